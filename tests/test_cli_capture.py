"""`isomerge capture`: texts and images through the real classes of transformers, and one clear line for mistakes."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from command_line import Run, read_terminal
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from isomerge.capture.pretrained import capture_pretrained
from isomerge.capture.samples import draw_order, image_steps
from isomerge.checkpoint import open_checkpoint
from isomerge.errors import InputError
from isomerge.families import classify, recognise
from isomerge.statistics import fingerprint, open_statistics

WORDS = [f"w{i}" for i in range(30)]
LENGTH = 8
SMALL = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": LENGTH,
}  # fmt: skip
VISION = {**SMALL, "image_size": 8, "patch_size": 4, "projection_dim": 12}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # the command sets them
        monkeypatch.setenv(name, "1")


def save_tokenizer(folder: Path, special: bool = True) -> None:
    """A tokenizer of whole words; with `special`, [CLS] before and [SEP] after each text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]" if special else None, unk_token="[UNK]"
    ).save_pretrained(folder)


TEXT_MODELS = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    ),
}


def save_text_model(
    folder: Path, kind: str = "bert", dtype: torch.dtype = torch.float32
) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = TEXT_MODELS[kind]().to(dtype).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder, special=kind == "bert")
    return model


@pytest.fixture
def expert(tmp_path: Path) -> Path:
    save_text_model(tmp_path / "expert")
    return tmp_path / "expert"


TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9 w10 w11 w12 w13 w14", "w15", "w16 nothing w17"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\ufeff" + "\n\n".join(TEXTS) + "\r\n  \n", encoding="utf-8")
    return path


def matrices(folder: Path) -> set[str]:
    with open_checkpoint(folder) as checkpoint:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        family = recognise(shapes)
        return {
            name
            for name, info in checkpoint.tensors.items()
            if classify(name, info.shape, info.dtype, family, "default").kind == "matrix"
        }


def test_texts_give_the_moments_of_the_model_on_each_text_alone(
    expert: Path, texts: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "s.safetensors"
    done = run("capture", "--model", expert, "--data", texts, "-o", out, "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    model = transformers.BertForSequenceClassification.from_pretrained(expert).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(expert)
    seen: list[Tensor] = []
    hook = model.bert.encoder.layer[1].attention.self.query.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        for text in TEXTS:
            model(**tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt"))
    hook.remove()
    X = torch.cat([x[0] for x in seen]).double()
    with open_statistics(out) as statistics, open_checkpoint(expert) as checkpoint:
        assert set(statistics.layers) == matrices(expert)
        assert statistics.samples == 5
        assert statistics.fingerprint == fingerprint(checkpoint, statistics.layers)
        name = "bert.encoder.layer.1.attention.self.query.weight"
        found = statistics.moment(name).double()
        assert statistics.layers[name].tokens == len(X) == 5 + 4 + LENGTH + 3 + 5
        assert float((found - X.mT @ X).norm() / (X.mT @ X).norm()) < 1e-5
    assert "warning: " + str(texts) + ": 5 samples, 32 were asked for: all are used" in done.stdout
    assert f"warning: 1 of 5 texts are longer than {LENGTH} tokens and were truncated" in done.stdout
    assert "saw fewer tokens" in done.stdout  # the pooler: one per text
    assert f"{out}: 13 layers, 25 tokens of 5 samples, " in done.stdout
    assert done.stderr.splitlines()[-1] == "100%  5 of 5 samples  25 tokens"


@pytest.mark.parametrize("kind", TEXT_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_matrix_of_a_text_model_is_captured(
    kind: str, dtype: torch.dtype, texts: Path, tmp_path: Path, run: Run
) -> None:
    save_text_model(tmp_path / "m", kind, dtype)
    out = tmp_path / "s.safetensors"
    done = run("capture", "--model", tmp_path / "m", "--data", texts, "-o", out, "--max-length", "6")
    assert done.returncode == 0, done.stderr
    with open_statistics(out) as statistics:
        assert set(statistics.layers) == matrices(tmp_path / "m")
        widest = max(layer.tokens for layer in statistics.layers.values())
    special = 2 if kind == "bert" else 0
    assert widest == sum(min(6, special + len(text.split())) for text in TEXTS)
    assert ("want of others" in done.stdout) == (kind == "t5")


@pytest.mark.skipif(torch.__version__ < "2.6", reason="transformers loads .bin files with torch 2.6 and later")
def test_bin_checkpoints_and_base(expert: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    old = tmp_path / "old"
    shutil.copytree(expert, old)
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    base = tmp_path / "base"
    shutil.copytree(expert, base)
    state = {name: value + 0.01 for name, value in load_file(base / "model.safetensors").items()}
    save_file(state, base / "model.safetensors", {"format": "pt"})
    for name, folder in (("new", expert), ("old", old)):
        out = tmp_path / f"{name}.safetensors"
        done = run("capture", "--model", folder, "--data", texts, "-o", out, "--base", base, "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "new.safetensors").read_bytes() == (tmp_path / "old.safetensors").read_bytes()
    with open_statistics(tmp_path / "new.safetensors") as statistics, open_checkpoint(base) as checkpoint:
        shifts = [name for name, layer in statistics.layers.items() if layer.space == "output"]
        assert statistics.base_fingerprint == fingerprint(checkpoint, shifts)
        layer = statistics.layers["bert.encoder.layer.0.output.dense.weight"]
        assert (layer.space, layer.size) == ("output", 16)


def test_the_draw_is_by_seed_without_replacement_and_stable(expert: Path, tmp_path: Path, run: Run) -> None:
    assert draw_order(6, 0) == [4, 3, 2, 0, 5, 1]
    assert all(sorted(draw_order(50, seed)) == list(range(50)) for seed in range(5))
    assert draw_order(50, 0) != draw_order(50, 1)
    data = tmp_path / "many.txt"
    data.write_text("\n".join(f"w{i}" for i in range(20)))
    files = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        out = tmp_path / name
        done = run("capture", "--model", expert, "--data", data, "-o", out, "--samples", "6", "--seed", seed)
        assert done.returncode == 0, done.stderr
        assert "were asked for" not in done.stdout
        assert "6 samples" in done.stdout
        files.append(out.read_bytes())
    assert files[0] == files[1] != files[2]


def test_jsonl(expert: Path, tmp_path: Path, run: Run) -> None:
    plain, fields = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    plain.write_text("\n".join(json.dumps(text) for text in TEXTS))
    fields.write_text("\n\n".join(json.dumps({"label": 1, "sentence": text}) for text in TEXTS))
    for path, extra in ((plain, ()), (fields, ("--text-field", "sentence"))):
        done = run("capture", "--model", expert, "--data", path, "-o", path.with_suffix(".st"), "-q", *extra)
        assert done.returncode == 0, done.stderr
    assert plain.with_suffix(".st").read_bytes() == fields.with_suffix(".st").read_bytes()


# Images ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "cats").mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    for i, size in enumerate([(20, 30), (30, 20), (9, 9), (8, 40)]):
        data = bytes(torch.randint(0, 256, (size[0] * size[1] * 3,), generator=random).tolist())
        Image.frombytes("RGB", size, data).save(folder / ("cats" if i % 2 else ".") / f"{i}.png")
    Image.new("L", (12, 12), 99).save(folder / "grey.jpg")
    (folder / "notes.md").write_text("not an image")
    return folder


IMAGE_MODELS = {
    "vit": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)),
        lambda: transformers.ViTImageProcessor(size={"height": 8, "width": 8}),
    ),
    "clip": (
        lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)),
        lambda: transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
    ),
    "clip-both": (
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(text_config=SMALL, vision_config=VISION, projection_dim=12)
        ),
        lambda: transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
    ),
}


def save_image_model(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    model, processor = (make() for make in IMAGE_MODELS[kind])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", IMAGE_MODELS)
def test_images(kind: str, pictures: Path, tmp_path: Path, run: Run) -> None:
    model, out = save_image_model(tmp_path / "m", kind), tmp_path / "s"
    done = run("capture", "--model", model, "--data", pictures, "-o", out, "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    with open_statistics(out) as statistics:
        tokens = {layer.tokens for layer in statistics.layers.values()}
        assert set(statistics.layers) == {name for name in matrices(model) if not name.startswith("text_model.")}
        assert statistics.samples == 5
    assert max(tokens) == 5 * 5  # 2 x 2 patches and the class token
    assert ("never ran" in done.stdout) == (kind == "clip-both")


PROCESSORS = ("CLIPImageProcessorPil", "ViTImageProcessorPil")


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_images_are_prepared_as_transformers_does(kind: str, pictures: Path, tmp_path: Path) -> None:
    name = {"clip": "CLIPImageProcessor", "vit": "ViTImageProcessor"}[kind]
    # Before transformers 5, the class without a suffix was the one that needs Pillow alone.
    maker = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    sizes = {"size": {"shortest_edge": 11}, "crop_size": {"height": 9, "width": 10}} if kind == "clip" else {
        "size": {"height": 8, "width": 11}
    }  # fmt: skip
    processor = maker(**sizes)
    processor.save_pretrained(tmp_path)
    steps = image_steps(tmp_path)
    for path in [*sorted(pictures.rglob("*.png")), pictures / "grey.jpg"]:
        with Image.open(path) as image:
            expected = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        assert steps(path).shape == expected.shape
        assert float((steps(path) - expected).abs().max()) < 1e-5, path


def test_a_picture_that_does_not_decode_is_named_or_skipped(pictures: Path, tmp_path: Path, run: Run) -> None:
    model = save_image_model(tmp_path / "m", "vit")
    whole = (pictures / "0.png").read_bytes()
    (pictures / "bad.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "empty.jpg").write_bytes(b"")
    before = sorted(tmp_path.iterdir())
    done = run("capture", "--model", model, "--data", pictures, "-o", tmp_path / "s", "--batch-size", "1")
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert "bad.png: the image does not decode" in line or "empty.jpg: the image does not decode" in line
    assert "--skip-bad" in line
    assert sorted(tmp_path.iterdir()) == before
    done = run("capture", "--model", model, "--data", pictures, "-o", tmp_path / "s", "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert "warning: 2 images do not decode and were skipped: " in done.stdout
    assert "of 5 samples" in done.stdout
    for path in pictures.rglob("*.*"):
        if path.is_file() and path.name not in ("bad.png", "empty.jpg"):
            path.unlink()
    done = run("capture", "--model", model, "--data", pictures, "-o", tmp_path / "t", "--skip-bad", "-q")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "none of the 2 images decodes" in done.stderr


# Mistakes -------------------------------------------------------------------------------------------------------


def edit_config(expert: Path, **values: object) -> None:
    path = expert / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def without_tokenizer(expert: Path) -> None:
    for path in expert.glob("tokenizer*"):
        path.unlink()


def spoil_weights(expert: Path) -> None:
    state = {f"other.{name}": value for name, value in load_file(expert / "model.safetensors").items()}
    save_file(state, expert / "model.safetensors", {"format": "pt"})


# What to spoil of the expert and its texts; the data if not those texts, and further arguments; the message.
MISTAKES: dict[str, tuple[Callable[[Path, Path], object], list[str], str]] = {
    "no data": (lambda m, d: d.unlink(), [], "texts.txt: no such file or folder"),
    "empty": (lambda m, d: d.write_text(""), [], "texts.txt: the file has no text, expected one sample per line"),
    "blank": (lambda m, d: d.write_text("\n \n\t\n"), [], "the file has no text"),
    "latin-1": (
        lambda m, d: d.write_bytes(b"fine\nna\xefve\n"), [], "texts.txt: line 2 is not UTF-8 text, byte 0xef; convert"
    ),
    "suffix": (lambda m, d: d.rename(d.with_suffix(".csv")), ["texts.csv"], "expected texts in a .txt or .jsonl file"),
    "field": (
        lambda m, d: d.with_suffix(".jsonl").write_text('{"text": "w1"}\n\n{"label": 3}\n'), ["texts.jsonl"],
        "texts.jsonl: line 3: no field 'text', it has label; name one by --text-field",
    ),
    "number": (
        lambda m, d: d.with_suffix(".jsonl").write_text('{"text": 5}\n'), ["texts.jsonl"], "line 1: the text is 5"
    ),
    "json": (lambda m, d: d.with_suffix(".jsonl").write_text("{\n"), ["texts.jsonl"], "line 1: not valid JSON"),
    "no images": (lambda m, d: (m.parent / "void").mkdir(), ["void"], "void: no images in this folder"),
    "image for text": (
        lambda m, d: (Image.new("RGB", (8, 8)).save(d.with_suffix(".png")),
                      transformers.ViTImageProcessor().save_pretrained(m)),
        ["texts.png"], "BertForSequenceClassification takes input_ids, the samples are images",
    ),
    "no processor": (
        lambda m, d: Image.new("RGB", (8, 8)).save(d.with_suffix(".png")), ["texts.png"], "no preprocessor_config.json"
    ),
    "no model": (lambda m, d: shutil.rmtree(m), [], "expected the folder of a Hugging Face model, there is none"),
    "no config": (lambda m, d: (m / "config.json").unlink(), [], "expert: no config.json"),
    "broken config": (lambda m, d: (m / "config.json").write_text("{"), [], "expert: config.json: "),
    "model type": (lambda m, d: edit_config(m, model_type="zork"), [], "model_type 'zork' is unknown to transformers"),
    "architecture": (
        lambda m, d: edit_config(m, architectures=["ZorkModel"]), [], "architecture 'ZorkModel' is unknown"
    ),
    "no tokenizer": (lambda m, d: without_tokenizer(m), [], "expert: no tokenizer in this folder"),
    "broken tokenizer": (lambda m, d: (m / "tokenizer.json").write_text("{}"), [], "the tokenizer does not load"),
    "no weights": (lambda m, d: (m / "model.safetensors").unlink(), [], "no weights in this folder"),
    "weights": (lambda m, d: spoil_weights(m), [], "the weights are not those of BertForSequenceClassification"),
    "other tokenizer": (
        lambda m, d: edit_tokenizer(m), [], "the tokenizer has ids beyond the model's 40 embeddings"
    ),
    "device": (lambda m, d: None, ["texts.txt", "--device", "zork"], "--device zork: cannot be used here"),
    "samples": (lambda m, d: None, ["texts.txt", "--samples", "0"], "--samples"),
    "base": (lambda m, d: None, ["texts.txt", "--base", "nowhere"], "nowhere: no such file or folder"),
}  # fmt: skip


def edit_tokenizer(expert: Path) -> None:
    path = expert / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["w1"] = 40
    path.write_text(json.dumps(content))


def tree(folder: Path) -> Iterator[tuple[str, int]]:
    return ((str(path), path.lstat().st_mtime_ns) for path in sorted(folder.rglob("*")))


@pytest.mark.parametrize("case", MISTAKES)
def test_wrong_input_exits_2_with_one_line_and_writes_nothing(expert: Path, texts: Path, case: str, run: Run) -> None:
    spoil, extra, expected = MISTAKES[case]
    spoil(expert, texts)
    data, *extra = extra or ["texts.txt"]
    before = list(tree(texts.parent))
    done = run(
        "capture", "--model", expert, "--data", texts.parent / data, "-o", texts.parent / "out", "--quiet", *extra
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("isomerge: ")
    assert expected in line
    assert done.stdout == ""
    assert list(tree(texts.parent)) == before


def test_an_existing_output_needs_force(expert: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    arguments = ("capture", "--model", expert, "--data", texts, "-o", out, "--quiet")
    done = run(*arguments)
    assert done.returncode == 2
    assert "out: the output exists already; choose another name, or overwrite it (--force)" in done.stderr
    assert out.read_text() == "mine"
    assert run(*arguments, "--force").returncode == 0
    open_statistics(out).close()
    done = run("capture", "--model", expert, "--data", texts, "-o", tmp_path, "--force")
    assert (done.returncode, "the output is a folder" in done.stderr) == (2, True)
    done = run("capture", "--model", expert, "--data", texts, "-o", texts / "s")
    assert (done.returncode, "cannot be written here" in done.stderr) == (2, True)


@pytest.mark.parametrize(("package", "expected"), [("transformers", "transformers"), ("PIL", "Pillow")])
def test_a_missing_package_names_the_extra(
    package: str, expected: str, pictures: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_image_model(tmp_path / "m", "vit")
    monkeypatch.setitem(sys.modules, package, None)
    done = run("capture", "--model", model, "--data", pictures, "-o", tmp_path / "s", "--quiet")
    assert done.returncode == 2
    assert f"{expected} is not installed" in done.stderr
    assert "pip install 'isomerge[capture]'" in done.stderr


def test_weights_that_are_missing_are_said(expert: Path, texts: Path, tmp_path: Path, run: Run) -> None:
    state = load_file(expert / "model.safetensors")
    del state["bert.pooler.dense.weight"]
    save_file(state, expert / "model.safetensors", {"format": "pt"})
    done = run("capture", "--model", expert, "--data", texts, "-o", tmp_path / "s")
    assert done.returncode == 0, done.stderr
    assert "warning: 1 weights of BertForSequenceClassification are not in the folder and are random: " in done.stdout
    with open_statistics(tmp_path / "s") as statistics:
        assert set(statistics.layers) == matrices(expert)


def test_settings_of_transformers_are_as_before(expert: Path, texts: Path) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capture_pretrained(expert, texts)
    with pytest.raises(InputError):
        capture_pretrained(expert, texts, base=expert / "nothing")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_process_on_a_terminal_shows_a_bar_and_leaves_no_network_traces(expert: Path, texts: Path) -> None:
    master, slave = pty.openpty()
    out = texts.parent / "s"
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('network')\n"
        "socket.socket.connect = refuse\n"
        "from isomerge.cli import main\n"
        "main()\n"
    )
    arguments = ["capture", "--model", str(expert), "--data", str(texts), "-o", str(out)]
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=slave, text=True,
        env={**environment, "TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    shown = read_terminal(master)
    printed, _ = child.communicate(timeout=120)
    assert child.returncode == 0, shown
    assert b"capturing" in shown
    assert b"5 of 5 samples" in shown
    assert "13 layers" in printed

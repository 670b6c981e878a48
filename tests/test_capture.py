"""Capture held to XᵀX in float64 of inputs that are recorded by other means: families, padding, sharing, mistakes."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import isomerge
from isomerge.capture import Captured, Progress, capture
from isomerge.capture import moments as moments_module
from isomerge.capture.moments import TOKENS, Moments
from isomerge.capture.sites import match_names
from isomerge.checkpoint import from_state_dict, open_checkpoint
from isomerge.errors import InputError
from isomerge.families import classify, recognise
from isomerge.statistics import fingerprint, open_statistics

TOLERANCE = 2e-6  # relative, Frobenius: float32 products of the very same inputs; 4e-7 at most was seen


class Recorder(TorchFunctionMode):
    """Every input X of F.linear and addmm under the memory of the weight: no hooks, no names."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[int, list[Tensor]] = {}

    def __torch_function__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func in (F.linear, torch.addmm):
            X, weight = (args[0], args[1]) if func is F.linear else (args[1], args[2])
            self.inputs.setdefault(weight.data_ptr(), []).append(X.detach().double().clone())
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def second_moment(inputs: list[Tensor], masks: list[Tensor | None]) -> tuple[Tensor, int]:
    """Σ XᵀX in float64 and the number of tokens; rows that a mask of the same shape sets to 0 are left out."""
    total, tokens = torch.zeros(inputs[0].shape[-1], inputs[0].shape[-1], dtype=torch.float64), 0
    for X, mask in zip(inputs, masks, strict=True):
        if mask is not None and X.dim() == 3 and X.shape[:2] == mask.shape:
            X = X[mask.bool()]
        elif mask is not None and X.dim() == 2 and len(X) == mask.numel():
            X = X[mask.bool().flatten()]
        X = X.reshape(-1, X.shape[-1])
        total += X.mT @ X
        tokens += len(X)
    return total, tokens


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.detach()).norm() / expected.norm().detach())


def moment(captured: Captured, name: str) -> Tensor:
    return captured.moments[captured.layers[name].stored]


BERT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
DECODER = {**BERT, "num_key_value_heads": 1}
TOWER = {**BERT, "image_size": 8, "patch_size": 4, "projection_dim": 12}


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    )


def _t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**BERT)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**BERT)),
    "clip-vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER)),
    "clip-vision-projection": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**TOWER)
    ),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**TOWER)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**DECODER, head_dim=8)),
    "gpt2": _gpt2,
    "t5": _t5,
}


def batches_for(model: nn.Module, count: int = 3) -> list[dict[str, Tensor]]:
    """Padded texts of several lengths, or images."""
    random = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return [{"pixel_values": torch.randn(4, 3, 8, 8, generator=random)} for _ in range(count)]
    found = []
    for i in range(count):
        length = 9 + i
        batch = {
            "input_ids": torch.randint(3, 40, (4, length), generator=random),
            "attention_mask": (torch.arange(length) < torch.tensor([[length], [3], [5], [1]])).long(),
        }
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = torch.randint(3, 40, (4, 6 + i), generator=random)
            batch["decoder_attention_mask"] = (torch.arange(6 + i) < torch.tensor([[2], [6], [4], [3]])).long()
        found.append(batch)
    return found


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]()


def recorded(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, tuple[Tensor, int]]:
    """For each 2-D parameter that F.linear or addmm was called with: its moment and its tokens."""
    training = model.training
    model.eval()
    calls: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
    for batch in batches:
        with Recorder() as recorder, torch.no_grad():
            model(**batch)
        for name, value in model.named_parameters():
            for X in recorder.inputs.get(value.data_ptr(), []):
                mask = batch.get("attention_mask")
                if mask is not None and "decoder" in name and "EncDecAttention.k" not in name:
                    cross = "EncDecAttention.v" in name
                    mask = mask if cross else batch.get("decoder_attention_mask", mask)
                calls.setdefault(name, []).append((X, mask))
    model.train(training)
    return {name: second_moment([x for x, _ in seen], [m for _, m in seen]) for name, seen in calls.items()}


def test_every_matrix_of_a_family_has_its_moment_under_the_name_in_its_folder(model: nn.Module, tmp_path: Path) -> None:
    batches = batches_for(model)
    model.save_pretrained(tmp_path)
    expected = recorded(model, batches)
    captured = capture(model, iter(batches), checkpoint=tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        family = recognise(shapes)
        matrices = {
            name
            for name, info in checkpoint.tensors.items()
            if classify(name, info.shape, info.dtype, family, "default").kind == "matrix"
        }
        assert captured.fingerprint == fingerprint(checkpoint, captured.layers)
    assert family.name != "generic"
    assert set(captured.layers) == matrices
    assert captured.samples == 12
    assert not [warning for warning in captured.warnings if "left out" in warning]
    parameters = dict(model.named_parameters())
    weights = load_file(tmp_path / "model.safetensors")
    for name, layer in captured.layers.items():
        (own,) = (key for key in expected if torch.equal(parameters[key], weights[name]))  # transformers renames some
        wanted, tokens = expected[own]
        assert layer.tokens == tokens, name
        assert (layer.size, layer.space) == (len(wanted), "input")
        assert error(moment(captured, name), wanted) < TOLERANCE, name


def test_layers_that_read_one_tensor_share_its_moment() -> None:
    model = MODELS["llama"]()
    captured = capture(model, batches_for(model))
    block = "model.layers.1."
    stored = {name: captured.layers[f"{block}{name}.weight"].stored for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"
    )}  # fmt: skip
    assert len({stored[f"self_attn.{x}_proj"] for x in "qkv"}) == 1
    assert stored["mlp.gate_proj"] == stored["mlp.up_proj"]
    assert len(set(stored.values())) == 3
    assert len(captured.moments) == 8  # two blocks of: attention in, attention out, MLP in, MLP out


def test_a_base_may_be_the_model_itself() -> None:
    torch.manual_seed(0)
    model, base = MODELS["bert"](), MODELS["bert"]()
    of_model, of_state = (capture(model, batches_for(model), base=given) for given in (base, base.state_dict()))
    assert of_model.base_fingerprint == of_state.base_fingerprint
    assert all(values.equal(of_state.stored[name]) for name, values in of_model.stored.items())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_with_a_base_wide_layers_keep_the_moment_of_their_shift(family: str) -> None:
    torch.manual_seed(0)
    model, base = MODELS[family](), MODELS[family]()
    batches = batches_for(model)
    expected = recorded(model, batches)
    before = dict(base.named_parameters())
    weights = dict(model.named_parameters())
    captured = capture(model, batches, base=base.state_dict())
    spaces = {layer.space for layer in captured.layers.values()}
    assert spaces == {"input", "output"}
    shifts = [name for name, layer in captured.layers.items() if layer.space == "output"]
    assert captured.base_fingerprint == fingerprint(from_state_dict(base.state_dict(), "b"), shifts)
    for name, layer in captured.layers.items():
        delta = (weights[name] - before[name]).detach().double()
        delta = delta.mT if family == "gpt2" else delta
        m, n = delta.shape
        assert layer.space == ("output" if m < n else "input"), name
        wanted = expected[name][0]
        wanted = delta @ wanted @ delta.mT if m < n else wanted
        assert layer.size == len(wanted)
        assert error(moment(captured, name), wanted) < 2 * TOLERANCE, name


def test_a_base_that_lacks_a_layer_or_has_another_shape_is_an_input_error() -> None:
    model = MODELS["bert"]()
    state = dict(model.state_dict())
    del state["encoder.layer.1.output.dense.weight"]
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.output\.dense\.weight \[16, 24\] is missing"):
        capture(model, batches_for(model), base=state)
    with pytest.raises(InputError, match=r"attention\.output\.dense\.weight \[16, 16\] is missing"):
        capture(model, batches_for(model), base={"other.weight": torch.ones(2, 2)})


# Modules written out --------------------------------------------------------------------------------------------


class OpenClipBlock(nn.Module):
    """A residual block as open_clip and OpenAI's CLIP have it."""

    def __init__(self, width: int, heads: int, batch_first: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=batch_first)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenClip(nn.Module):
    """The visual tower of open_clip, with `visual.proj` applied by a product and not by a layer."""

    def __init__(self, batch_first: bool = True, width: int = 16) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, width, 4, 4, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(width))
        self.visual.resblocks = nn.ModuleList(OpenClipBlock(width, 2, batch_first) for _ in range(2))
        self.visual.proj = nn.Parameter(torch.randn(width, 8))

    def encode_image(self, images: Tensor) -> Tensor:
        x = self.visual.conv1(images).flatten(2).mT
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x], 1)
        x = x if self.batch_first else x.transpose(0, 1)
        for block in self.visual.resblocks:
            x = block(x)
        x = x if self.batch_first else x.transpose(0, 1)
        return x[:, 0] @ self.visual.proj

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        raise AssertionError("capture must call encode_image")


def attention_by_hand(attn: nn.MultiheadAttention, X: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √d) V of all heads, [batch, sequence, width]: what out_proj reads."""
    batch, sequence, width = X.shape
    heads, d = attn.num_heads, width // attn.num_heads
    packed = X @ attn.in_proj_weight.double().mT + attn.in_proj_bias.double()
    Q, K, V = packed.view(batch, sequence, 3, heads, d).permute(2, 0, 3, 1, 4)
    return (((Q @ K.mT) / math.sqrt(d)).softmax(-1) @ V).transpose(1, 2).reshape(batch, sequence, width)


@pytest.mark.parametrize("batch_first", [True, False])
def test_open_clip_attention_both_projections(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = OpenClip(batch_first)
    images = torch.randn(3, 3, 8, 8)
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        plain = model.eval().encode_image(images)
    model.train()
    captured = capture(model, [images], forward=model.encode_image)
    blocks = [f"visual.resblocks.{i}." for i in range(2)]
    names = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    assert set(captured.layers) == {block + name for block in blocks for name in names}
    assert any("visual.proj" in warning and "applied by no" in warning for warning in captured.warnings)
    twin = OpenClip(True).double()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        x = twin.visual.conv1(images.double()).flatten(2).mT
        x = torch.cat([twin.visual.class_embedding.expand(3, 1, -1), x], 1)
        for prefix, block in zip(blocks, twin.visual.resblocks, strict=True):
            seen[prefix + names[0]] = block.ln_1(x)
            seen[prefix + names[1]] = attention_by_hand(block.attn, block.ln_1(x))
            x = x + block.attn.out_proj(seen[prefix + names[1]])
            seen[prefix + names[2]] = block.ln_2(x)
            seen[prefix + names[3]] = F.gelu(block.mlp["c_fc"](block.ln_2(x)))
            x = x + block.mlp["c_proj"](seen[prefix + names[3]])
        assert error(plain, x[:, 0] @ twin.visual.proj) < 1e-6
    for name, X in seen.items():
        assert captured.layers[name].tokens == 15
        assert error(moment(captured, name), second_moment([X], [None])[0]) < TOLERANCE, name
    with torch.no_grad():
        assert torch.equal(model.eval().encode_image(images), plain)


class TimmAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, S, C = x.shape
        q, k, v = self.qkv(x).reshape(B, S, 3, 2, C // 2).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, C))


class TimmViT(nn.Module):
    main_input_name = "pixel_values"

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 4, 4)})
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.LayerNorm(width), "attn": TimmAttention(width), "norm2": nn.LayerNorm(width),
                "mlp": nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)),
            })
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(width, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixel_values).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = x + block["attn"](block["norm1"](x))
            x = x + block["mlp"](block["norm2"](x))
        return self.head(x[:, 0])


def test_timm_vit_fused_qkv() -> None:
    torch.manual_seed(0)
    model = TimmViT()
    batches = batches_for(model)
    expected = recorded(model, batches)
    captured = capture(model, (batch["pixel_values"] for batch in batches))
    assert set(captured.layers) == set(expected) - {"head.weight"}
    assert "blocks.0.attn.qkv.weight" in captured.layers
    for name, layer in captured.layers.items():
        assert layer.tokens == expected[name][1] == 60
        assert error(moment(captured, name), expected[name][0]) < TOLERANCE, name


def encoder(batch_first: bool = True) -> nn.TransformerEncoder:
    """Torch's own layers in eval mode take a fused path that calls no submodule."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first, dropout=0.3)
    return nn.TransformerEncoder(layer, 2)


def test_torch_encoder_does_not_bypass_the_layers() -> None:
    torch.manual_seed(0)
    model, X = encoder(), torch.randn(3, 5, 16)
    captured = capture(model, [X])
    assert len(captured.layers) == 8
    assert {layer.tokens for layer in captured.layers.values()} == {15}
    assert error(moment(captured, "layers.0.self_attn.in_proj_weight"), second_moment([X.double()], [None])[0]) < 1e-6
    attn = model.layers[0].self_attn
    out = attention_by_hand(attn, X.double())
    assert error(moment(captured, "layers.0.self_attn.out_proj.weight"), second_moment([out], [None])[0]) < 2e-6
    assert any("no known family" in warning for warning in captured.warnings)
    assert torch.backends.mha.get_fastpath_enabled()


class Masked(nn.Module):
    """A model whose layers see [batch, sequence, n], [sequence, batch, n] or [batch * sequence, n]."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout, self.fc, self.pool = layout, nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.layout == "flat":
            y = self.fc(x.reshape(-1, 6)).view(*x.shape[:2], 4)
        elif self.layout == "sequence first":
            y = self.fc(x.transpose(0, 1)).transpose(0, 1)
        elif self.layout == "heads":
            y = self.fc(x[:, :, None].expand(-1, -1, 3, -1)).mean(2)
        else:
            y = self.fc(x)
        return self.pool(y[:, 0])


@pytest.mark.parametrize("layout", ["batch first", "sequence first", "flat", "heads"])
@pytest.mark.parametrize("as_tuple", [True, False])
def test_padding_is_left_out_in_every_layout(layout: str, as_tuple: bool) -> None:
    torch.manual_seed(0)
    model, X = Masked(layout), torch.randn(3, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    X[mask == 0] = torch.nan  # no padding may count, not even in a sum with weight zero
    batch: object = (X, mask) if as_tuple else {"x": X, "attention_mask": mask.bool()}
    if layout != "flat":  # the pooled rows hold the NaN of the second sample
        X[1, 0] = 0
    else:
        X[:, 0] = X[:, 0].nan_to_num()
    captured = capture(model, [batch])
    times = 3 if layout == "heads" else 1
    wanted, tokens = second_moment([X[mask.bool()].double()], [None])
    assert captured.layers["fc.weight"].tokens == tokens * times == 8 * times
    assert error(moment(captured, "fc.weight"), wanted * times) < TOLERANCE
    assert captured.layers["pool.weight"].tokens == 3


def test_a_square_mask_of_a_sequence_first_attention() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)})
    X, mask = torch.randn(3, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])

    def forward(x: Tensor, attention_mask: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return model["attn"](x, x, x)[0]

    captured = capture(model, [{"x": X, "attention_mask": mask}], forward=forward)
    wanted = second_moment([X[mask.bool()].double()], [None])[0]
    assert error(moment(captured, "attn.in_proj_weight"), wanted) < TOLERANCE


class Shared(nn.Module):
    """One layer called twice, one never, one weight under two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never = nn.Linear(5, 5), nn.Linear(5, 5)
        self.left, self.right = nn.Linear(5, 5), nn.Linear(5, 5)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(x)
        return self.twice(y) + self.left(x) + self.right(y)


def test_calls_of_a_shared_module_and_of_tied_weights_add_up() -> None:
    torch.manual_seed(0)
    model, X = Shared(), torch.randn(7, 5)
    expected = recorded_plain(model, X)
    captured = capture(model, [X, X])
    assert set(captured.layers) == {"twice.weight", "left.weight"}
    for name in captured.layers:
        assert captured.layers[name].tokens == 28
        assert error(moment(captured, name), 2 * expected[name]) < TOLERANCE
    assert any("never ran: never.weight" in warning for warning in captured.warnings)


def recorded_plain(model: nn.Module, *X: Tensor) -> dict[str, Tensor]:
    with Recorder() as recorder, torch.no_grad():
        model(*X)
    return {
        name: second_moment(seen, [None] * len(seen))[0]
        for name, value in model.named_parameters()
        if (seen := recorder.inputs.get(value.data_ptr()))
    }


class Fickle(nn.Module):
    """a and b read one tensor in the first batch, and different ones, or one alone, in later batches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, how: str) -> Tensor:
        if how == "same":
            return self.a(x) + self.b(x) + self.c(x)
        if how == "other":
            return self.a(x) + self.b(x * 2) + self.c(x)
        if how == "changed":
            y = self.a(x)
            x = x.clone()
            z = self.c(x)
            x.add_(1)
            return y + z + self.b(x)
        return self.a(x) + self.c(x)


def told(model: Fickle, batches: list[tuple[Tensor, str]]) -> dict[str, Tensor]:
    """The moment of every layer over batches."""
    expected: dict[str, Tensor] = {}
    for x, how in batches:
        for name, value in recorded_plain(model, x, how).items():  # type: ignore[arg-type]
            expected[name] = expected.get(name, torch.zeros(4, 4)) + value
    return expected


@pytest.mark.parametrize(
    "story", ["same same", "same other same", "same alone same", "other same", "same changed same"]
)
@pytest.mark.parametrize("kept", [1, 200, 1 << 20])  # bytes of rows: none are kept, a few are, all are
@pytest.mark.parametrize("tokens", [1, 2, 6])  # of a batch: below the width in the end, from some batch on above, above
def test_layers_stop_sharing_as_soon_as_they_read_different_tensors(
    story: str, tokens: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments_module, "_BYTES", kept)
    torch.manual_seed(0)
    model = Fickle()
    batches = [(torch.randn(tokens, 4), how) for how in story.split()]
    captured = capture(model, batches)
    few = [len(value) < 4 for value in captured.stored.values()]
    assert all(few) if tokens == 1 else not all(few)
    for name, wanted in told(model, batches).items():
        assert error(moment(captured, name), wanted) < TOLERANCE, name
    together = captured.layers["a.weight"].stored == captured.layers["b.weight"].stored
    assert together == (story == "same same")
    if story not in ("same other same", "same changed same"):  # there c parts from a as well, and may
        assert captured.layers["a.weight"].stored == captured.layers["c.weight"].stored


class InPlace(nn.Module):
    """Changes the input of a layer in place after the layer has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.a(x)
        x += y
        return self.b(x)


@pytest.mark.parametrize("tokens", [3, 6])  # below the width and above
@pytest.mark.parametrize("kept", [1, 1 << 20])  # bytes of rows: none are kept, all are
@pytest.mark.parametrize("inference", [False, True])
def test_an_input_changed_in_place_counts_as_it_was_read(
    inference: bool, kept: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments_module, "_BYTES", kept)
    torch.manual_seed(0)
    model, X = InPlace(), torch.randn(tokens, 4)
    expected = recorded_plain(model, X)
    with torch.inference_mode(inference):
        captured = capture(model, [X])
    for name, wanted in expected.items():
        assert error(moment(captured, name), wanted) < TOLERANCE, name


def test_cross_attention_and_separate_projections_are_left_out_and_said() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(16, 2, 24, batch_first=True)
    captured = capture(model, [(torch.randn(2, 3, 16), torch.randn(2, 4, 16))])
    assert "self_attn.in_proj_weight" in captured.layers
    assert "multihead_attn.in_proj_weight" not in captured.layers
    assert captured.layers["multihead_attn.out_proj.weight"].tokens == 6
    assert any("not one tensor: multihead_attn.in_proj_weight" in warning for warning in captured.warnings)
    narrow = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
    captured = capture(narrow, [(torch.randn(2, 3, 8), torch.randn(2, 3, 6), torch.randn(2, 3, 6))])
    assert set(captured.layers) == {"out_proj.weight"}
    assert any("different widths: k_proj_weight, q_proj_weight, v_proj_weight" in w for w in captured.warnings)


def test_more_tokens_than_one_chunk() -> None:
    torch.manual_seed(0)
    model, X = nn.Sequential(nn.Linear(3, 2)), torch.randn(2 * TOKENS + 77, 3)
    captured = capture(model, [X[None]])
    assert captured.layers["0.weight"].tokens == len(X)
    assert error(moment(captured, "0.weight"), X.double().mT @ X.double()) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_float64_sums(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, X = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype), torch.randn(50, 8).to(dtype)
    expected = recorded_plain(model, X)
    captured = capture(model, [X], dtype=torch.float64)
    for name, wanted in expected.items():
        assert moment(captured, name).dtype == torch.float64
        assert error(moment(captured, name), wanted) < (1e-14 if dtype == torch.float64 else TOLERANCE)
    assert next(model.parameters()).dtype == dtype


@pytest.mark.parametrize("kept", [1, 200, 1 << 20])  # bytes of rows before they are settled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_fewer_tokens_than_the_width_are_kept_as_they_are(
    dtype: torch.dtype, kept: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(moments_module, "_BYTES", kept)
    torch.manual_seed(0)
    model, X = nn.Sequential(nn.Linear(20, 3)).to(dtype), torch.randn(24, 20).to(dtype)
    few = capture(model, [X[:7], X[7:8], X[8:19]], path=tmp_path / "s")
    assert torch.equal(few.stored["0.weight"], X[:19])
    assert error(few.moments["0.weight"], X[:19].double().mT @ X[:19].double()) < TOLERANCE
    with open_statistics(tmp_path / "s") as statistics:
        assert torch.equal(statistics.stored("0.weight"), X[:19])
    for batches in ([X[:7], X[7:19], X[19:20]], [X[:19], X[19:]], [X]):  # from the width on, a moment
        many = torch.cat(batches).double()
        captured = capture(model, batches)
        assert captured.stored["0.weight"].shape == (20, 20)
        assert error(captured.moments["0.weight"], many.mT @ many) < TOLERANCE
    wide = capture(model, [X[:19]], dtype=torch.float64).stored["0.weight"]
    assert wide.shape == ((19, 20) if dtype == torch.float64 else (20, 20))
    assert wide.dtype == torch.float64


# What it leaves behind ------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> list[object]:
    """All that a capture might leave behind on a module."""
    found: list[object] = [torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()]
    for name, module in model.named_modules():
        found.append((name, id(module), module.training, sorted(module.__dict__), len(module._forward_pre_hooks)))
        found.append((len(module._forward_hooks), sorted(module._forward_pre_hooks_with_kwargs)))
    return found + [
        (name, p.requires_grad, p.grad is None, p.detach().clone().tolist()) for name, p in model.named_parameters()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_afterwards_as_it_was(fails: bool) -> None:
    model = encoder()
    model.train()
    model.layers[1].eval()
    next(model.parameters()).requires_grad_(False)
    torch.manual_seed(3)
    before, random = state_of(model), torch.get_rng_state()
    X = torch.randn(3, 5, 16)
    torch.set_rng_state(random)
    if fails:
        with pytest.raises((RuntimeError, AssertionError)):
            capture(model, [X, X[..., :-1]])
    else:
        capture(model, [X])
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_an_exception_in_forward_restores_the_swapped_projection() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2, batch_first=True)})
    before = state_of(model)
    bad = torch.ones(2, 3, 4), torch.ones(7, 7)

    def forward(x: Tensor, attn_mask: Tensor) -> object:
        return model["attn"](x, x, x, attn_mask=attn_mask)

    with pytest.raises(RuntimeError):
        capture(model, [bad], forward=forward)
    assert state_of(model) == before


def test_dropout_is_off_while_capturing_and_the_batches_are_read_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6)).train()
    X, reads = torch.randn(20, 6), []

    def batches() -> Iterator[Tensor]:
        for i in range(2):
            reads.append(i)
            yield X

    captured = capture(model, batches())
    assert error(moment(captured, "1.weight"), 2 * X.double().mT @ X.double()) < TOLERANCE
    assert reads == [0, 1]
    assert captured.samples == 40
    assert (model.training, model[0].training) == (True, True)


def test_no_batch_is_kept() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    alive: list[int] = []

    def batches() -> Iterator[Tensor]:
        for _ in range(4):
            gc.collect()
            alive.append(sum(type(x) is Tensor and x.shape == (3, 11, 6) for x in gc.get_objects()))
            yield torch.randn(3, 11, 6)

    capture(model, batches())
    assert max(alive) <= 1  # the batch before, that the loop variable holds


# Mistakes -------------------------------------------------------------------------------------------------------


def test_non_finite_inputs_name_the_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    with pytest.raises(InputError, match=r"^1\.weight: 6 of 6 values of its input are not finite"):
        capture(model, [torch.full((2, 3), 10.0)])
    with pytest.raises(InputError, match=r"^0\.weight: the sum of squares of its input overflows float32"):
        capture(nn.Sequential(nn.Linear(3, 3)), [torch.full((2, 3), 1e30)])
    wide = nn.Sequential(nn.Linear(9, 3))  # its inputs are kept as they are
    with pytest.raises(InputError, match=r"^0\.weight: 9 of 18 values of its input are not finite"):
        capture(wide, [torch.tensor([[0.0], [torch.nan]]).expand(2, 9)])
    with pytest.raises(InputError, match=r"^0\.weight: the sum of squares of its input overflows float32"):
        capture(wide, [torch.full((2, 9), 1e30)])
    wide, base = nn.Sequential(nn.Linear(4, 3)), {"0.weight": torch.full((3, 4), torch.nan)}
    with pytest.raises(InputError, match=r"^0\.weight: 12 values of the difference between the model and the base are"):
        capture(wide, [torch.ones(2, 4)], base=base)


def test_mistakes_are_one_line() -> None:
    model, X = Masked("batch first"), torch.randn(2, 3, 6)
    with pytest.raises(InputError, match=r"keeps none of its tokens: fc\.weight"):
        capture(model, [(X, torch.zeros(2, 3))], names=["fc.*"])
    with pytest.raises(InputError, match="there are no batches"):
        capture(model, iter(()))
    with pytest.raises(InputError, match="a batch is a list, expected a tensor, a tuple"):
        capture(model, [[X]])
    with pytest.raises(InputError, match="dtype: expected"):
        capture(model, [X], dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"names: 'foo\.\*' is the name of no layer"):
        capture(model, [X], names=["foo.*"])
    with pytest.raises(InputError, match="has no torch"):
        capture(nn.Sequential(nn.ReLU()), [X])


def test_an_all_masked_batch_counts_nothing_beside_others() -> None:
    model, X = Masked("batch first"), torch.randn(2, 3, 6)
    captured = capture(model, [(X, torch.zeros(2, 3)), (X, torch.ones(2, 3))])
    assert captured.layers["fc.weight"].tokens == 6
    assert captured.samples == 4


def test_saving_names_progress_and_the_file(tmp_path: Path) -> None:
    model, X = Masked("batch first"), torch.randn(2, 3, 6)
    states: list[Progress] = []
    path = tmp_path / "expert.safetensors"
    captured = isomerge.capture(model, [(X,), (X,)], path=path, names="fc.*", samples=7, progress=states.append)
    assert [(s.batches_done, s.samples_done, s.samples_total, s.tokens) for s in states] == [
        (1, 2, 7, 6),
        (2, 4, 7, 12),
    ]
    with open_statistics(path) as statistics:
        assert dict(statistics.layers) == captured.layers
        assert set(statistics.layers) == {"fc.weight"}
        assert (statistics.samples, statistics.fingerprint) == (7, captured.fingerprint)
        assert torch.equal(statistics.moment("fc.weight"), moment(captured, "fc.weight"))
    with pytest.raises(InputError, match="exists already"):
        capture(model, [], path=path)
    before = path.read_bytes()
    capture(model, [(X,), (X,)], path=path, names="fc.*", samples=7, overwrite=True)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_fewer_tokens_than_the_size_is_said() -> None:
    captured = capture(nn.Sequential(nn.Linear(9, 9)), [torch.randn(4, 9)])
    assert any("0.weight: 4 for 9" in warning for warning in captured.warnings)


def test_names_of_a_checkpoint_with_another_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**BERT))
    whole.save_pretrained(tmp_path)
    captured = capture(whole.roberta, batches_for(whole), checkpoint=tmp_path)
    assert captured.layers
    assert all(name.startswith("roberta.encoder.layer.") for name in captured.layers)


def test_match_names() -> None:
    shape = (2, 2)
    names = {f"layers.{i}.fc.weight": shape for i in range(3)}
    both = {f"{side}.layers.{i}.fc.weight": shape for i in range(3) for side in ("encoder", "decoder")}
    assert match_names(names, both) == {}  # two ways: neither is guessed
    one = {name: size for name, size in both.items() if name.startswith("encoder")}
    assert match_names(names, one) == {name: f"encoder.{name}" for name in names}
    assert match_names({f"a.b.{n}": s for n, s in names.items()}, {f"x.{n}": s for n, s in names.items()}) == {
        f"a.b.{n}": f"x.{n}" for n in names
    }
    assert match_names(names, {**names, "layers.1.fc.weight": (3, 2)}) == {
        n: n for n in names if n != "layers.1.fc.weight"
    }


def test_renamed_and_foreign_checkpoints() -> None:
    torch.manual_seed(0)
    model, X = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), torch.randn(9, 4)
    run = {"forward": lambda x: model[2](model[1](model[0](x)))}
    state = model.state_dict()
    renamed = {f"block.{i}.mixer.weight": state[f"{i}.weight"].clone() for i in range(3)}
    captured = capture(model, [X], checkpoint=renamed, **run)
    assert list(captured.layers) == sorted(renamed)
    assert error(moment(captured, "block.0.mixer.weight"), X.double().mT @ X.double()) < TOLERANCE
    swapped = {
        "0.weight": state["1.weight"].clone(),
        "1.weight": state["0.weight"].clone(),
        "2.weight": state["2.weight"],
    }
    captured = capture(model, [X], checkpoint=swapped, **run)
    assert error(moment(captured, "1.weight"), X.double().mT @ X.double()) < TOLERANCE  # values decide
    with pytest.raises(InputError, match="no matrix of the model is in it"):
        capture(model, [X], checkpoint={name: value + 1 for name, value in state.items()}, **run)
    halves = {name: value.bfloat16() for name, value in state.items()}
    half = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]).bfloat16()
    half.load_state_dict(halves)
    captured = capture(half, [X.bfloat16()], checkpoint=state, forward=lambda x: half[2](half[1](half[0](x))))
    assert captured.fingerprint == fingerprint(from_state_dict(state, "m"), captured.layers)


def test_moments_hold_at_most_a_few_inputs() -> None:
    moments = Moments()
    X = torch.randn(5, 4)
    for i in range(100):
        moments.add(f"l{i}", X, None)
    assert len(moments.sums()) == 1
    moments.end_of_batch()
    moments.flush()
    (only,) = moments.sums()
    assert only.members == {f"l{i}" for i in range(100)}
    assert error(only.moment, X.double().mT @ X.double()) < TOLERANCE  # type: ignore[arg-type]


def test_the_function_is_not_hidden_by_its_package() -> None:
    code = (
        "import isomerge, isomerge.capture, isomerge.capture.run, isomerge.capture.pretrained\n"
        "assert callable(isomerge.capture) and callable(isomerge.merge)\n"
        "from isomerge.capture import Captured, capture\n"
        "import sys; assert not {'transformers', 'tokenizers', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

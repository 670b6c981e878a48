"""`isomerge verify`: whatever has happened to an output since it was written is found, and said in one line."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
from command_line import Run
from safetensors.torch import load_file, save_file

from isomerge.errors import InputError
from isomerge.merge import merge
from isomerge.verify import verify


@pytest.fixture
def out(tmp_path: Path) -> Path:
    tiny.bert_models(tmp_path)
    merge(tiny.write_recipe(tmp_path, tiny.recipe_for("iso_c")), tmp_path / "out", shard_bytes=8000)
    return tmp_path / "out"


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 16
    file.write_bytes(content)


def resum(folder: Path, name: str) -> None:
    """Makes SHA256SUMS agree with a file that was changed."""
    sums = folder / "SHA256SUMS"
    lines = [line for line in sums.read_text().splitlines(keepends=True) if not line.endswith(f"  {name}\n")]
    lines.append(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n")
    sums.write_text("".join(lines))


def test_an_output_as_written(out: Path, run: Run) -> None:
    found = verify(out)
    assert (found.problems, found.notes) == ([], [])
    files = [file for file in out.iterdir() if file.name != "SHA256SUMS"]
    assert found.files == len(files) >= 7
    assert found.tensors == 28
    done = run("verify", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: {len(files)} files, 28 tensors, ")
    assert run("verify", out, "--quiet").stdout == ""
    # the list is that of coreutils
    assert (
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=out, capture_output=True).returncode == 0
    )


def test_a_flipped_bit_in_any_file_is_found(out: Path, run: Run) -> None:
    for file in sorted(out.iterdir()):
        size = file.stat().st_size
        for place in {0, size // 3, size // 2, size - 1}:
            flip(file, place)
            problems = verify(out).problems
            assert problems, (file.name, place)
            # damage to the list itself shows as that of a file which it lists
            assert file.name == "SHA256SUMS" or any(file.name in problem for problem in problems)
            assert all("\n" not in problem for problem in problems)
            flip(file, place)
    assert verify(out).problems == []
    flip(next(out.glob("model-00002*")), -1)
    done = run("verify", out)
    assert done.returncode == 1
    assert "model-00002-of-" in done.stdout
    assert "its SHA-256 is not the one recorded" in done.stdout


def test_files_that_are_missing_cut_short_or_foreign(out: Path) -> None:
    shard = next(out.glob("model-00002*"))
    whole = shard.read_bytes()
    for content in (None, whole[:-1], b""):
        shard.unlink(missing_ok=True)
        if content is not None:
            shard.write_bytes(content)
        assert any(shard.name in problem for problem in verify(out).problems)
    shard.write_bytes(whole)
    (out / "extra.safetensors").write_bytes(whole)
    assert verify(out).problems == [f"{out / 'extra.safetensors'}: is not a file of this merge"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop("pooler.dense.weight"), "pooler.dense.weight is missing"),
        (
            lambda state: state.update({"pooler.dense.weight": torch.zeros(16, 8)}),
            "pooler.dense.weight: float32 [16, 8], expected float32 [16, 16]",
        ),
        (
            lambda state: state.update({"pooler.dense.weight": torch.zeros(16, 16, dtype=torch.bfloat16)}),
            "pooler.dense.weight: bfloat16 [16, 16], expected float32 [16, 16]",
        ),
        (
            lambda state: state.update({"pooler.dense.weight": torch.full((16, 16), torch.inf)}),
            "pooler.dense.weight: 256 non-finite values",
        ),
    ],
    ids=["missing", "shape", "dtype", "non-finite"],
)
def test_weights_that_are_not_those_of_the_report(tmp_path: Path, change: object, problem: str) -> None:
    tiny.bert_models(tmp_path)
    out = tmp_path / "out"
    merge(tiny.write_recipe(tmp_path, tiny.recipe_for("iso_c")), out)
    state = load_file(out / "model.safetensors")
    change(state)  # type: ignore[operator]
    save_file(state, out / "model.safetensors", {"format": "pt"})
    resum(out, "model.safetensors")
    (found,) = verify(out).problems
    assert problem in found
    assert str(out) in found


def test_what_the_base_has_is_a_note(tmp_path: Path) -> None:
    states = tiny.bert_models(tmp_path)
    states[0]["embeddings.LayerNorm.bias"][0] = -torch.inf
    tiny.save_model(tmp_path / "base", states[0])
    rules = [{"filter": "embeddings.LayerNorm.bias", "keep_base": True}]
    merge(tiny.write_recipe(tmp_path, tiny.recipe_for("iso_c", rules=rules)), tmp_path / "out")
    found = verify(tmp_path / "out")
    assert found.problems == []
    (note,) = found.notes
    assert "embeddings.LayerNorm.bias: 1 non-finite values" in note


def test_every_folder_of_several_outputs(tmp_path: Path) -> None:
    tiny.bert_models(tmp_path)
    out = tmp_path / "out"
    merge(tiny.write_recipe(tmp_path, tiny.recipe_for("iso_c", parameters={"alpha": [0.5, 1]})), out)
    assert verify(out).tensors == 2 * 28
    flip(out / "alpha-1.0" / "model.safetensors", -1)
    (problem,) = verify(out).problems
    assert str(out / "alpha-1.0" / "model.safetensors") in problem


def test_what_is_no_output(tmp_path: Path, run: Run) -> None:
    tiny.bert_models(tmp_path)
    with pytest.raises(InputError, match=r"is not the output of a merge, there is no isomerge_report\.json in it"):
        verify(tmp_path / "base")
    done = run("verify", tmp_path / "absent")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_a_report_that_says_nothing(out: Path) -> None:
    for text in ("", "[]", "{}", json.dumps({"tensors": [1]}), "\xff"):
        (out / "isomerge_report.json").write_text(text)
        resum(out, "isomerge_report.json")
        (problem,) = verify(out).problems
        assert "cannot be read as the report of a merge" in problem

"""Whole merges of tiny checkpoints: what is written, that it is the same whatever the path, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
import torch
from tiny import assert_same
from torch import Tensor

from isomerge.deltas import unit_seed
from isomerge.errors import InputError
from isomerge.merge import Progress, merge, merge_state_dicts
from isomerge.methods import METHODS, check_parameters

SEED = 3


def in_folder(folder: Path, recipe: Mapping[str, object]) -> dict[str, object]:
    """The recipe with paths below `folder`, as a mapping for `merge`."""
    models = [{**entry, "model": str(folder / entry["model"])} for entry in recipe["models"]]  # type: ignore[attr-defined]
    return {**recipe, "base_model": str(folder / str(recipe["base_model"])), "models": models}


def plainly(method: str, states: list[dict[str, Tensor]], alpha: float) -> dict[str, Tensor]:
    """base + alpha * method(deltas), tensor by tensor, as the definition says."""
    base, result = states[0], {}
    row, parameters = METHODS[method], check_parameters(method, {})
    for name, value in base.items():
        if not value.is_floating_point():
            result[name] = value
            continue
        deltas = torch.stack([state[name].float() - value.float() for state in states[1:]])
        if row.elementwise or name not in tiny.matrices(base):
            called = row if row.elementwise else METHODS["average"]
            seed = {"seed": unit_seed(SEED, name)} if called.seeded else {}
            given = parameters if row.elementwise else {}
            update = called.function(deltas.reshape(len(deltas), 1, -1), **given, **seed).reshape(value.shape)
        else:
            update = row.function(deltas, **parameters)
        result[name] = (value.float() + alpha * update).to(value.dtype)
    return result


def weights_digest(folder: Path) -> str:
    total = hashlib.sha256()
    for name, value in sorted(tiny.load_output(folder).items()):
        total.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", tiny.WITHOUT_STATISTICS)
def test_every_method_from_disk_and_in_memory(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    states = tiny.bert_models(tmp_path, dtype=dtype)
    recipe = tiny.recipe_for(method, parameters={"alpha": 0.7}, seed=SEED)
    report = merge(tiny.write_recipe(tmp_path, recipe), tmp_path / "out")
    found = tiny.load_output(tmp_path / "out")
    assert_same(found, plainly(method, states, 0.7))
    assert_same(merge_state_dicts(states[0], states[1:], method=method, alpha=0.7, seed=SEED), found)
    moved = [record for record in report.tensors if record.update_norm]
    assert len(moved) == sum(value.is_floating_point() for value in states[0].values())
    assert report.totals.matrices == (0 if METHODS[method].elementwise else 13)


def test_records_tell_the_norms(tmp_path: Path) -> None:
    states = tiny.bert_models(tmp_path)
    report = merge(in_folder(tmp_path, tiny.recipe_for("task_arithmetic", parameters={"alpha": 2})), tmp_path / "out")
    record = next(r for r in report.tensors if r.name == "encoder.layer.0.intermediate.dense.weight")
    total = sum(state[record.name] - states[0][record.name] for state in states[1:])
    assert record.delta_sum_norm == pytest.approx(float(torch.linalg.norm(total)), rel=1e-5)
    assert record.update_norm == pytest.approx(float(torch.linalg.norm(total)), rel=1e-5)
    assert record.alpha == 2
    kept = next(r for r in report.tensors if r.name == "embeddings.position_ids")
    assert (kept.kind, kept.method, kept.update_norm) == ("keep", None, None)
    assert report.totals.bytes_written == sum(value.nbytes for value in states[0].values())
    # position_ids is read from the base alone.
    assert report.totals.bytes_read == 4 * report.totals.bytes_written - 3 * states[0]["embeddings.position_ids"].nbytes


@pytest.mark.parametrize("method", tiny.WITHOUT_STATISTICS)
def test_bytes_do_not_depend_on_groups_shards_or_workers(tmp_path: Path, method: str) -> None:
    tiny.bert_models(tmp_path)
    path = tiny.write_recipe(tmp_path, tiny.recipe_for(method, parameters={"alpha": 1.3}))
    digests = set()
    cases = [(1, 10**9, 1), (2**30, 10**9, None), (10_000, 3_000, 3)]
    for number, (group_bytes, shard_bytes, workers) in enumerate(cases):
        torch.manual_seed(number)  # a method that drew from the global generator would show
        merge(path, tmp_path / f"out{number}", group_bytes=group_bytes, shard_bytes=shard_bytes, workers=workers)
        digests.add(weights_digest(tmp_path / f"out{number}"))
    assert (tmp_path / "out2/model.safetensors.index.json").exists()
    assert len(digests) == 1
    assert (tmp_path / "out0/model.safetensors").read_bytes() == (tmp_path / "out1/model.safetensors").read_bytes()


def test_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    tiny.bert_models(tmp_path)
    path = tiny.write_recipe(tmp_path, tiny.recipe_for("iso_cts"))
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "isomerge.cli", "merge", str(path), str(tmp_path / f"out{seed}"), "--quiet"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    assert (tmp_path / "out1/model.safetensors").read_bytes() == (tmp_path / "out2/model.safetensors").read_bytes()


def test_long_tensors_are_merged_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = tiny.bert_models(tmp_path)
    monkeypatch.setattr("isomerge.deltas.PIECE_ELEMENTS", 96)
    monkeypatch.setattr("isomerge.run.PIECE_ELEMENTS", 5)
    merge(in_folder(tmp_path, tiny.recipe_for("iso_c")), tmp_path / "out")
    assert_same(tiny.load_output(tmp_path / "out"), plainly("iso_c", states, 1.0))


def test_output_folder(tmp_path: Path) -> None:
    tiny.bert_models(tmp_path)
    recipe = tiny.recipe_for("iso_cts", parameters={"lambda": 1.2}, out_dtype="bfloat16")
    path = tiny.write_recipe(tmp_path, recipe)
    seen: list[Progress] = []
    report = merge(path, tmp_path / "out", progress=seen.append)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "config.json",
        "isomerge_recipe.yaml",
        "isomerge_report.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {v.dtype for v in tiny.load_output(out).values()} == {torch.bfloat16, torch.int64}
    written = json.loads((out / "isomerge_report.json").read_text())
    assert written["totals"]["seconds"] == report.totals.seconds > 0
    assert written["totals"]["bytes_written"] == report.totals.bytes_written
    assert [r["name"] for r in written["tensors"]] == [r.name for r in report.tensors]
    assert len({written["base"]["digest"], *(e["digest"] for e in written["experts"])}) == 1  # equal headers
    card = (out / "README.md").read_text()
    assert card.startswith('---\nbase_model:\n- "base"\n- "e0"\n')
    assert "Iso-CTS" in card
    assert "2502.04959" in card
    assert (seen[-1].bytes_done, seen[-1].matrices_done) == (seen[-1].bytes_total, seen[-1].matrices_total)
    assert [p.bytes_done for p in seen] == sorted(p.bytes_done for p in seen)
    # The recipe in the output runs again, beside the original, to the same bytes.
    again = tmp_path / "again.yaml"
    again.write_text((out / "isomerge_recipe.yaml").read_text())
    merge(again, tmp_path / "out2")
    assert (tmp_path / "out2/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    states = [tiny.bert_state(0)]
    states += [tiny.tuned(states[0], seed) for seed in (1, 2)]
    for name, state in zip(("base", "e0", "e1"), states, strict=True):
        state["lm_head.weight"] = state["embeddings.word_embeddings.weight"]
        torch.save(state, tmp_path / f"{name}.pt")
    recipe = {"merge_method": "iso_c", "base_model": "base.pt", "models": [{"model": "e0.pt"}, {"model": "e1.pt"}]}
    merge(tiny.write_recipe(tmp_path, recipe), tmp_path / "out")
    found = tiny.load_output(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], found["embeddings.word_embeddings.weight"])
    memory = merge_state_dicts(states[0], states[1:], method="iso_c")
    assert_same(memory, found)
    assert memory["lm_head.weight"].data_ptr() == memory["embeddings.word_embeddings.weight"].data_ptr()


def test_non_finite_values_are_refused_or_left_out(tmp_path: Path) -> None:
    states = tiny.bert_models(tmp_path)
    name = "encoder.layer.1.output.dense.weight"
    bad = {n: v.clone() for n, v in states[2].items()}
    bad[name][0, 1], bad[name][2, 3] = float("nan"), float("inf")
    tiny.save_model(tmp_path / "e1", bad)
    recipe = in_folder(tmp_path, tiny.recipe_for("task_arithmetic"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=rf"e1: {name}: 2 non-finite values"):
        merge(recipe, tmp_path / "out")
    # what was merged before the bad tensor was read is kept for --allow-nonfinite
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / ".out.partial"])
    report = merge(recipe, tmp_path / "out", allow_nonfinite=True)
    record = next(r for r in report.tensors if r.name == name)
    assert record.nonfinite == {str(tmp_path / "e1"): 2}
    assert any("2 non-finite values were left out" in warning for warning in report.warnings)
    good = {n: v.clone() for n, v in states[2].items()}
    good[name][0, 1], good[name][2, 3] = states[0][name][0, 1], states[0][name][2, 3]
    assert_same(
        tiny.load_output(tmp_path / "out"), plainly("task_arithmetic", [states[0], states[1], good, states[3]], 1.0)
    )
    tiny.save_model(tmp_path / "base", bad)
    with pytest.raises(InputError, match=f"base: {name}: 2 non-finite values in the base"):
        merge(recipe, tmp_path / "out2", allow_nonfinite=True)


MEMORY_PROBE = """
import json, sys
from isomerge.merge import merge
report = merge(sys.argv[1], sys.argv[2])
print(json.dumps([report.totals.peak_bytes, report.totals.planned_peak_bytes]))
"""


def test_peak_memory_stays_under_the_promise(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    state = {f"layers.{i}.fc.weight": torch.randn(1024, 1024, generator=random) for i in range(28)}
    state["embed_tokens.weight"] = torch.randn(8192, 512, generator=random)
    size = sum(value.nbytes for value in state.values())
    tiny.save_model(tmp_path / "base", state)
    tiny.save_model(tmp_path / "expert", {name: value + 0.01 for name, value in state.items()})
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "expert"}] * 8,
        "rules": [{"filter": "layers.0.*", "merge_method": "iso_c"}],
    }
    path = tiny.write_recipe(tmp_path, recipe)
    command = [sys.executable, "-c", MEMORY_PROBE, str(path), str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, planned = json.loads(done.stdout)
    largest_group = 8 * state["embed_tokens.weight"].nbytes
    assert peak < size + 3 * largest_group + 500e6
    assert peak < 9 * size, "the bound says nothing if all models fit into it"
    assert peak < 1.15 * planned

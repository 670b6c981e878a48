"""Merges whose tensors decide something as a whole, in pieces: the bytes are those of merging them whole."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isomerge import InputError, deltas, merge, merge_state_dicts, methods, surveys
from isomerge.backends import native
from isomerge.deltas import unit_seed

PIECE = 1000
SHAPES = {"large.weight": (83, 71), "even.weight": (40, 50), "small.weight": (7, 9), "norm.weight": (1001,)}
METHODS = {"ties": {"density": 0.3}, "dare_ties": {"density": 0.5}}


def models(dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Tensor]]:
    """A base and three experts. Half of the changes are whole numbers, so that sums cancel."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    experts = []
    for _ in range(3):
        expert = {}
        for name, values in base.items():
            change = torch.randint(-3, 4, values.shape, generator=generator).float()
            change[::2] *= torch.rand(change[::2].shape, generator=generator)
            expert[name] = (values.float() + change / 16).to(dtype)
        experts.append(expert)
    return [base, *experts]


def stored(folder: Path, given: list[dict[str, Tensor]], method: str) -> dict[str, Any]:
    """A recipe of the method."""
    folder.mkdir(exist_ok=True)
    for number, tensors in enumerate(given):
        save_file(tensors, folder / f"{number}.safetensors")
    base, *experts = (str(folder / f"{number}.safetensors") for number in range(len(given)))
    return {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": path} for path in experts],
        "parameters": METHODS[method],
    }


def merged(recipe: dict[str, Any], out: Path, **options: Any) -> dict[str, Tensor]:
    merge(recipe, out, **options)
    return load_file(out / "model.safetensors")


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "PIECE_ELEMENTS", PIECE)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors are surveyed together, pass by pass."""
    found = []
    real = surveys.Surveys._see

    def see(self: surveys.Surveys, step: Any, units: Any, surveyed: Any) -> None:
        found.append(len(units))
        real(self, step, units, surveyed)

    monkeypatch.setattr(surveys.Surveys, "_see", see)
    return found


@pytest.mark.parametrize("extension", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_pieces_give_the_bits_of_the_method_on_whole_tensors(
    method: str, dtype: torch.dtype, extension: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    if not extension:
        monkeypatch.setattr(native, "availability", lambda: "not built")
    base, *experts = given = models(dtype)
    found = merged(stored(tmp_path / "in", given, method), tmp_path / "out")
    assert len(passes) >= (1 if method == "dare_ties" else 3)
    exact = torch.promote_types(dtype, torch.float32)
    for name, origin in base.items():
        stack = torch.stack([expert[name].to(exact) - origin.to(exact) for expert in experts]).view(3, 1, -1)
        drawn = {"seed": unit_seed(0, name)} if methods.METHODS[method].seeded else {}
        update = methods.METHODS[method].function(stack, **METHODS[method], **drawn).view(origin.shape)
        assert torch.equal(found[name], (origin.to(exact) + update).to(dtype)), name


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_do_not_depend_on_budgets_and_workers(method: str, tmp_path: Path, passes: list[int]) -> None:
    recipe = stored(tmp_path / "in", models(), method)
    usual = merged(recipe, tmp_path / "usual")
    for number, (workers, group_bytes) in enumerate(itertools.product((1, 3), (1, 40_000))):
        options = {"workers": workers, "group_bytes": group_bytes}
        other = merged(recipe, tmp_path / f"other{number}", **options)
        assert all(torch.equal(other[name], values) for name, values in usual.items())
    base, *experts = models()
    in_memory = merge_state_dicts(base, experts, method=method, **METHODS[method])
    assert all(torch.equal(in_memory[name], values) for name, values in usual.items())
    assert {1} < set(passes), "some alone, some together"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite(method: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = models()
    spoilt = [{name: values.clone() for name, values in model.items()} for model in given]
    spoilt[2]["large.weight"][82, 70] = value
    given[2]["large.weight"][82, 70] = given[0]["large.weight"][82, 70]  # as if it had not been changed
    expected = merged(stored(tmp_path / "in", given, method), tmp_path / "expected")
    recipe = stored(tmp_path / "spoilt", spoilt, method)
    with pytest.raises(InputError, match=r"1\.safetensors|2\.safetensors: .*large.weight"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = merge(recipe, tmp_path / "out", allow_nonfinite=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert [sum(record.nonfinite.values()) for record in report.tensors if record.name == "large.weight"] == [1]


def test_what_is_merged_again_after_a_crash_is_elected_by_the_whole_tensor(tmp_path: Path) -> None:
    recipe = stored(tmp_path / "in", models(), "ties")
    usual = merged(recipe, tmp_path / "usual", group_bytes=1)
    calls = []

    class Killed(Exception):
        pass

    def progress(done: Any) -> None:
        calls.append(done.name)
        if calls.count("large.weight") == 3:
            raise Killed

    with pytest.raises(Killed):
        merge(recipe, tmp_path / "out", group_bytes=1, progress=progress)
    report = merge(recipe, tmp_path / "out", group_bytes=1)
    assert report.totals.restored > 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], values) for name, values in usual.items())


def test_a_survey_reads_no_more_at_a_time_than_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, real = [], surveys.DeltaReader.map

    def map_(self: Any, group: Any, function: Any) -> Any:
        lengths.append(len(group.units))
        return real(self, group, function)

    monkeypatch.setattr(surveys.DeltaReader, "map", map_)
    recipe = stored(tmp_path / "in", models(), "ties")
    merge(recipe, tmp_path / "out", group_bytes=3 * 4 * 2 * PIECE)  # two pieces of three tasks
    assert max(lengths) == 2
    assert lengths.count(2) > 6

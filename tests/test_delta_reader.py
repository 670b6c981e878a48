"""Reading deltas: the definition, whatever the runs and the threads; and values that are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from isomerge import delta_reader, merge_state_dicts, methods
from isomerge.checkpoint import open_checkpoint
from isomerge.delta_reader import DeltaReader, Passage
from isomerge.deltas import Group, Unit
from isomerge.errors import InputError

T, M, N = 3, 12, 10
WEIGHTS = [1.0, 0.5, -2.0]
UNITS = (Unit("a", ("a",) * T, 0, M * N, True), Unit("b", ("b",) * T, M * N, M * N, False, 1))


@pytest.fixture
def models(tmp_path: Path) -> list[dict[str, Tensor]]:
    """A base in float32 and three experts in bfloat16: a matrix, and a stack of two."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (M, N), "b": (2, M, N)}
    return [
        {
            name: torch.randn(shape, generator=generator).to(torch.bfloat16 if t else None)
            for name, shape in shapes.items()
        }
        for t in range(1 + T)
    ]


@contextmanager
def opened(
    models: list[dict[str, Tensor]], folder: Path, suffix: str = ".safetensors", **options: object
) -> Iterator[DeltaReader]:
    checkpoints = []
    for t, tensors in enumerate(models):
        path = folder / f"{t}{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
        checkpoints.append(open_checkpoint(path))
    base, *experts = checkpoints
    with DeltaReader(base, experts, WEIGHTS, **options) as reader:  # type: ignore[arg-type]
        yield reader


def expected(models: list[dict[str, Tensor]], unit: Unit, transposed: bool) -> Tensor:
    """[1 + T, m, n]: base and deltas of a unit, by definition."""
    base, *tuned = (tensors[unit.name].reshape(-1, M, N)[unit.slice_index or 0].float() for tensors in models)
    values = torch.stack([base, *(weight * (t - base) for t, weight in zip(tuned, WEIGHTS, strict=True))])
    return values.mT if transposed else values


def values(passage: Passage) -> Tensor:
    """[1 + T, m, n] or [2, m, n]: base and deltas, copied."""
    base, deltas = passage.load()
    return torch.cat([base[None], deltas])


def group_of(transposed: bool) -> Group:
    return Group(N if transposed else M, M if transposed else N, transposed, torch.float32, UNITS)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("run", [1, 7, 50, 2**19])
def test_deltas_are_those_of_the_definition(
    models: list[dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    transposed: bool,
    workers: int,
    run: int,
) -> None:
    monkeypatch.setattr(delta_reader, "RUN_ELEMENTS", run)
    if suffix == ".pt":  # its elements do not stand in order in the file, so it is read at once
        models[2]["a"] = models[2]["a"].mT.contiguous().mT
    group = group_of(transposed)
    with opened(models, tmp_path, suffix, workers=workers) as reader:
        assert open_checkpoint(tmp_path / f"2{suffix}").in_order("a") is (suffix != ".pt")
        stack = reader.read(group)
        mapped = reader.map(group, values)
        summed, mean = (reader.read(replace(group, reduction=name)) for name in ("sum", "mean"))
        means = reader.map(replace(group, reduction="mean"), values)
        bases = [reader.read_base(unit, group) for unit in UNITS]
    for unit, deltas, base, result, alone in zip(UNITS, stack.deltas, stack.base, mapped.results, bases, strict=True):
        exact = expected(models, unit, transposed)
        assert torch.equal(torch.cat([base[None], deltas]), exact)
        assert torch.equal(result, exact)
        assert torch.equal(alone, exact[0])
    for unit, total, base, part, pair in zip(
        UNITS, summed.deltas, summed.base, mean.deltas, means.results, strict=True
    ):
        exact = expected(models, unit, transposed)
        assert torch.equal(total, (exact[1] + exact[2] + exact[3])[None])
        assert torch.equal(base, exact[0])
        assert torch.equal(part, total / T)
        assert torch.equal(pair, torch.cat([base[None], part]))
    sums = [expected(models, unit, transposed)[1:].double().sum(0).square().sum().item() for unit in UNITS]
    # float32 sums of at most 120 squares of sums of three terms
    for found in (stack, mapped, summed, mean, means):
        assert found.sum_squares == pytest.approx(sums, rel=240 * torch.finfo(torch.float32).eps)
        assert found.bytes_read == len(UNITS) * M * N * (4 + T * 2)


def test_what_is_mapped_runs_in_a_thread_with_one_thread_of_torch(
    models: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    with opened(models, tmp_path, workers=2) as reader:
        mapped = reader.map(group_of(False), lambda passage: torch.get_num_threads())
    assert mapped.results == [1, 1]
    with ThreadPoolExecutor(1) as pool:  # a thread's first call takes over the number that was set last anywhere
        assert pool.submit(lambda: torch.ones(1).add_(1) and torch.get_num_threads()).result() == threads


@pytest.mark.parametrize("how", ["read", "map", "sum", "mean", "mapped mean"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found_in_every_run(
    models: list[dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, value: float
) -> None:
    monkeypatch.setattr(delta_reader, "RUN_ELEMENTS", 50)
    models[2]["b"][1, 11, 3] = models[2]["b"][1, 0, 0] = value
    exact = expected(models, UNITS[1], False)
    exact[2, 11, 3] = exact[2, 0, 0] = 0
    reduction = how.split()[-1] if how not in ("read", "map") else "none"
    group = replace(group_of(False), reduction=reduction)
    with opened(models, tmp_path) as reader, pytest.raises(InputError, match=r"2\.safetensors: b: 2 non-finite values"):
        reader.map(group, values) if "map" in how else reader.read(group)
    with opened(models, tmp_path, allow_nonfinite=True) as reader:
        if "map" in how:
            found = reader.map(group, lambda passage: values(passage)[1:])
            deltas = found.results[1]
        else:
            found = reader.read(group)
            deltas = found.deltas[1]
    total = (exact[1] + exact[2] + exact[3])[None]
    assert torch.equal(deltas, {"none": exact[1:], "sum": total, "mean": total / T}[reduction])
    assert found.nonfinite == {(1, "b"): 2}
    assert found.sum_squares[1] == pytest.approx(exact[1:].double().sum(0).square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_base_that_is_not_finite_and_a_difference_that_overflows(
    models: list[dict[str, Tensor]], tmp_path: Path, mapped: bool
) -> None:
    group = group_of(False)

    def fails(message: str) -> None:
        with opened(models, tmp_path, allow_nonfinite=True) as reader, pytest.raises(InputError, match=message):
            reader.map(group, values) if mapped else reader.read(group)

    models[0]["a"][0, 0], models[1]["a"][0, 0] = 3e38, -3e38
    fails(r"1\.safetensors: a: 1 differences from the base overflow float32")
    models[0]["a"][0, :2] = float("inf")
    fails(r"0\.safetensors: a: 2 non-finite values in the base model")


def test_a_sum_that_overflows_is_no_fault(models: list[dict[str, Tensor]], tmp_path: Path) -> None:
    for tensors in models[1:]:
        tensors["a"][0, 0] = 1e38
    models[3]["a"][0, 0] = -1e38
    with opened(models, tmp_path) as reader:
        stack = reader.read(group_of(False))
    assert bool(torch.isfinite(stack.deltas).all())
    assert stack.nonfinite == {}


def test_pieces_without_an_update_keep_their_own_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isomerge.deltas.PIECE_ELEMENTS", 10)
    base = {"v": torch.arange(35.0)}
    assert torch.equal(merge_state_dicts(base, [base], method="average")["v"], base["v"])


@pytest.mark.parametrize("name", [name for name, method in methods.METHODS.items() if method.reduction != "none"])
def test_methods_of_a_reduction_give_the_same_for_it(name: str) -> None:
    deltas = torch.randn(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    total = deltas[:, 0] + deltas[:, 1] + deltas[:, 2]
    reduced = total / 3 if methods.METHODS[name].reduction == "mean" else total
    function = methods.METHODS[name].function
    assert torch.equal(function(deltas), function(reduced.unsqueeze(1)))

"""TIES on tensors larger than a block, and the selection of its thresholds: bit for bit as by definition."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from isomerge.backends import election
from isomerge.backends.election import kth_largest
from isomerge.methods import dare_linear, dare_ties, ties
from isomerge.methods.survey import Survey
from isomerge.methods.ties import dare_ties_survey, ties_survey

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def by_definition(deltas: Tensor, density: float) -> Tensor:
    """[T, m, n] -> [m, n], element by element in Python."""
    T, m, n = deltas.shape
    kept = int(density * m * n)
    rows = deltas.reshape(T, -1)
    limits = [row.abs().sort(descending=True).values[kept - 1] for row in rows]
    trimmed = [[float(v) if abs(v) >= limit else 0.0 for v in row] for row, limit in zip(rows, limits, strict=True)]
    columns = list(zip(*trimmed, strict=True))
    sums = [sum(v for v in column if v > 0) - sum(-v for v in column if v < 0) for column in columns]
    majority = sum((s > 0) - (s < 0) for s in sums)
    merged = []
    for column, total in zip(columns, sums, strict=True):
        sign = total or majority
        agreeing = [v for v in column if v * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=deltas.dtype).view(m, n)


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Small whole numbers: sums are exact, and many are zero, so that the majority decides."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("block", [1, 7, 60, 10**6])
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int, density: float, seed: int) -> None:
    monkeypatch.setattr(election, "BLOCK", block)
    deltas = whole_numbers(2, 3, 12, 10, seed=seed)
    merged = ties(deltas, density=density)
    exact = torch.stack([by_definition(unit, density) for unit in deltas])
    assert torch.equal(merged.view(torch.int32), exact.view(torch.int32)), "to the sign of zero"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [5, 2**18])
@pytest.mark.parametrize("few", [0, 2**16])
def test_kth_largest(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int, few: int) -> None:
    monkeypatch.setattr("isomerge.backends.election.COUNTED", block)
    monkeypatch.setattr("isomerge.backends.election.FEW", few)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, generator=generator, dtype=torch.float64)
    hostile = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 6e4, -6e4, float("inf"), 1.0, 1.0, -1.0])
    for values in (noise, noise.exp(), whole_numbers(200, seed=1), torch.zeros(9), hostile, noise[:1]):
        magnitudes = values.to(dtype).abs().sort(descending=True).values
        for k in {1, 2, 5, 9, len(values) // 2, len(values) - 1, len(values)} & set(range(1, len(values) + 1)):
            assert kth_largest(values.to(dtype), k) == magnitudes[k - 1]


@pytest.mark.parametrize("shape", [(2, 3, 0, 5), (0, 3, 4, 5), (3, 0, 0), (3, 1, 1)])
@pytest.mark.parametrize("method", [ties, dare_ties])
def test_matrices_without_elements(method: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    merged = method(torch.zeros(shape), density=0.5)
    assert merged.shape == (*shape[:-3], *shape[-2:])
    assert not merged.any()


def test_dare_of_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = torch.randn(3, 1, 1000, generator=torch.Generator().manual_seed(0))
    whole = dare_linear(deltas, density=0.4, seed=7)
    ends = (0, 1, 400, 401, 1000)
    parts = [
        dare_linear(deltas[..., begin:end], density=0.4, seed=7, first=begin) for begin, end in itertools.pairwise(ends)
    ]
    assert torch.equal(torch.cat(parts, -1), whole)
    monkeypatch.setattr(sys.modules["isomerge.methods.ties"], "BLOCK", 64)
    assert torch.equal(dare_linear(deltas, density=0.4, seed=7), whole)
    assert torch.equal(dare_linear(deltas.view(3, 20, 50), density=0.4, seed=7).view(1, -1), whole)


# ---- in pieces


def surveyed(survey: Survey, deltas: Tensor, ends: Sequence[int]) -> Survey:
    """After passes over pieces of deltas [T, 1, n], side by side and in no order."""
    passes = 0
    with ThreadPoolExecutor(4) as pool:
        while not survey.finished:
            runs = list(itertools.pairwise(ends))[:: -1 if passes % 2 else 1]
            list(pool.map(lambda run: survey.see(deltas[..., run[0] : run[1]], run[0]), runs))
            survey.turn()
            passes += 1
    assert passes <= 1 + deltas.element_size() // 2
    return survey


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 1e-9, 0.05, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["whole numbers", "noise", "zeros"])
def test_ties_of_pieces_is_that_of_the_whole(dtype: torch.dtype, density: float, kind: str) -> None:
    T, n = 3, 7000
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(T, 1, n, generator=generator, dtype=dtype)
    deltas = {"whole numbers": whole_numbers(T, 1, n, seed=1).to(dtype), "noise": noise, "zeros": 0 * noise}[kind]
    whole = ties(deltas, density=density)
    for ends in ((0, n), (0, 1, 400, 401, n), tuple(range(0, n + 1, 1000))):
        elected = surveyed(ties_survey(T, n, dtype, torch.device("cpu"), density=density), deltas, ends).elected
        parts = [ties(deltas[..., a:b], density=density, elected=elected) for a, b in itertools.pairwise(ends)]
        assert torch.equal(torch.cat(parts, -1), whole)


def test_dare_ties_of_pieces_is_that_of_the_whole() -> None:
    T, n, ends = 2, 6000, (0, 1, 400, 401, 6000)
    deltas = whole_numbers(T, 1, n, seed=3)
    drawn = {"density": 0.4, "seed": 7}
    whole = dare_ties(deltas, **drawn)  # type: ignore[arg-type]
    elected = surveyed(dare_ties_survey(T, n, torch.float32, torch.device("cpu"), **drawn), deltas, ends).elected  # type: ignore[arg-type]
    assert elected.majority != 0
    parts = [dare_ties(deltas[..., a:b], **drawn, first=a, elected=elected) for a, b in itertools.pairwise(ends)]  # type: ignore[arg-type]
    assert torch.equal(torch.cat(parts, -1), whole)
    against = dare_ties(deltas, **drawn, elected=elected._replace(majority=-elected.majority))  # type: ignore[arg-type]
    assert not torch.equal(against, whole)

"""Gram products by BLAS's syrk, which scipy has, against blocks of products and float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from isomerge.backends import eigen
from isomerge.backends.eigen import BLOCK, add_gram, gram, mirror
from isomerge.backends.lapack import availability

needs_scipy = pytest.mark.skipif(availability() is not None, reason=str(availability()))

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "by rows": lambda B: B.contiguous(),
    "by columns": lambda B: B.mT.contiguous().mT,
    "rows apart": lambda B: torch.cat([B, B], dim=1)[:, : B.shape[1]],
    "columns apart": lambda B: torch.cat([B.mT, B.mT], dim=1)[:, : B.shape[0]].mT,
    "every second": lambda B: torch.stack([B, B], dim=-1).flatten(-2)[:, ::2],
}


def random(p: int, r: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(p, r, generator=torch.Generator().manual_seed(p + r), dtype=torch.float64).to(dtype)


@needs_scipy
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 300), (512, 257), (700, 384), (100, 500)], ids=str)
def test_the_product_is_added_to_what_is_there(shape: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    B = LAYOUTS[layout](random(*shape, dtype))
    out = random(shape[1], shape[1], dtype)
    exact = out.double() + B.double().mT @ B.double()
    scale = B.double().abs().mT @ B.double().abs() + out.abs()
    add_gram(B, out)
    bound = 2 * shape[0] ** 0.5 * torch.finfo(dtype).eps * scale  # of sums of p products, rounded at random
    assert bool(((out - exact).abs() <= bound).tril().logical_or(torch.ones_like(out).triu(1) > 0).all())


@needs_scipy
def test_strided_memory_below_the_result_is_left_alone() -> None:
    memory = torch.full((300, 310), 7.0)
    B = random(600, 300, torch.float32)
    memory[:, :300] = 0
    add_gram(B, memory[:, :300])
    mirror(memory[:, :300])
    assert bool((memory[:, 300:] == 7).all())
    torch.testing.assert_close(memory[:, :300], (B.double().mT @ B.double()).float(), rtol=1e-4, atol=1e-3)


@needs_scipy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_with_and_without_scipy(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    B = random(900, 3 * BLOCK, dtype)
    by_syrk, added = gram(B), torch.zeros(3 * BLOCK, 3 * BLOCK, dtype=dtype)
    add_gram(B, added)
    monkeypatch.setattr(eigen, "availability", lambda: "not here")
    by_blocks, blocks = gram(B), torch.zeros_like(added)
    add_gram(B, blocks)
    assert torch.equal(by_syrk, by_syrk.mT)
    bound = 60 * torch.finfo(dtype).eps * float(B.square().sum(0).max())
    assert float((by_syrk - by_blocks).abs().max()) <= bound
    assert float((added - blocks).tril().abs().max()) <= bound
    assert torch.equal(by_syrk, by_blocks) is (dtype == torch.float32)  # `gram` keeps its rounding in float32


@needs_scipy
def test_values_that_are_not_finite_stay_so() -> None:
    B = random(400, 300, torch.float32)
    B[3, 5] = torch.nan
    out = torch.zeros(300, 300)
    add_gram(B, out)
    mirror(out)
    assert bool(out[5].isnan().all())
    assert int(out.isnan().sum()) == 2 * 300 - 1

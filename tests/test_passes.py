"""The two memory-bound passes at either end of a merge, by their definition and in the driver's arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch
from spectra import ON_CPU, relative
from torch import Tensor

from isomerge import ops
from isomerge.backends import eager
from isomerge.methods.linear import total

every_backend = pytest.mark.parametrize("backend", ON_CPU)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
dtype_pairs = pytest.mark.parametrize(("mine", "theirs"), list(itertools.product(DTYPES, DTYPES)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def models(*batch: int, T: int = 3, m: int = 7, n: int = 10) -> tuple[Tensor, Tensor]:
    """(tuned [..., T, m, n], base [..., m, n]), the deltas a hundredth of the base."""
    base = normal(*batch, m, n)
    return base.unsqueeze(-3) + 0.01 * normal(*batch, T, m, n, seed=1), base


# ---- delta_sum
@every_backend
@dtype_pairs
def test_delta_sum_by_its_definition(backend: str, mine: torch.dtype, theirs: torch.dtype) -> None:
    tuned, base = models(2)
    tuned, base = tuned.to(mine), base.to(theirs)
    before = tuned.clone(), base.clone()
    deltas = tuned.double() - base.double().unsqueeze(-3)
    summed, norms, norm = ops.delta_sum(tuned, base, backend=backend)
    assert summed.dtype == (torch.float64 if torch.float64 in (mine, theirs) else torch.float32)
    eps = torch.finfo(summed.dtype).eps
    # each of 3 deltas and 2 sums is rounded by half an eps of at most the sum of |deltas|
    assert bool(((summed.double() - deltas.sum(-3)).abs() <= 2 * eps * deltas.abs().sum(-3)).all())
    assert norms.dtype == norm.dtype == torch.float64
    torch.testing.assert_close(norms, torch.linalg.matrix_norm(deltas), rtol=eps, atol=0)
    torch.testing.assert_close(norm, torch.linalg.matrix_norm(deltas.sum(-3)), rtol=4 * eps, atol=0)
    assert torch.equal(tuned, before[0])
    assert torch.equal(base, before[1])


@every_backend
@pytest.mark.parametrize(("T", "m", "n"), [(1, 1, 1), (20, 3, 5), (2, 700, 413), (2, 1, 300_000)])
def test_delta_sum_of_one_task_of_many_and_of_several_pieces(backend: str, T: int, m: int, n: int) -> None:
    tuned, base = models(T=T, m=m, n=n)
    result = ops.delta_sum(tuned, base, backend=backend)
    deltas = tuned - base
    assert relative(result.sum, deltas.sum(0)) <= 1e-15 * T
    torch.testing.assert_close(result.norms, torch.linalg.matrix_norm(deltas), rtol=1e-13, atol=0)
    torch.testing.assert_close(result.norm, torch.linalg.matrix_norm(deltas.sum(0)), rtol=1e-13, atol=0)


def test_deltas_of_half_precision_are_not_rounded_to_it() -> None:
    tuned, base = models(m=40, n=50)
    tuned, base = tuned.bfloat16(), base.float().bfloat16() + 3e-3
    exact = (tuned.double() - base.double()).sum(0)
    assert relative(ops.delta_sum(tuned, base).sum, exact) <= 1e-7
    assert relative((tuned - base).float().sum(0), exact) > 1e-4  # what rounding them would give


def test_delta_sum_has_the_bits_of_the_methods_sum_whatever_is_batched() -> None:
    tuned, base = models(3, T=4, m=300, n=500)
    tuned, base = tuned.bfloat16(), base.bfloat16()
    together = ops.delta_sum(tuned, base)
    assert torch.equal(together.sum, total(tuned.float() - base.float().unsqueeze(-3)))
    for i in range(3):
        for mine, all_of_it in zip(ops.delta_sum(tuned[i], base[i]), together, strict=True):
            assert torch.equal(mine, all_of_it[i])


@every_backend
def test_delta_sum_of_strided_and_transposed_tensors(backend: str) -> None:
    tuned, base = models(2, T=4, m=14, n=30)
    plain = ops.delta_sum(tuned[:, ::2, ::3, 4:].contiguous(), base[:, ::3, 4:].contiguous(), backend=backend)
    strided = ops.delta_sum(tuned[:, ::2, ::3, 4:], base[:, ::3, 4:], backend=backend)
    turned = ops.delta_sum(tuned[:, ::2, ::3, 4:].mT, base[:, ::3, 4:].mT, backend=backend)
    expanded = ops.delta_sum(tuned[:1, :1].expand(2, 3, 14, 30), base[:1].expand(2, 14, 30), backend=backend)
    assert torch.equal(strided.sum, plain.sum)
    assert torch.equal(turned.sum, plain.sum.mT)
    torch.testing.assert_close(strided.norms, plain.norms, rtol=1e-14, atol=0)
    torch.testing.assert_close(turned.norms, plain.norms, rtol=1e-14, atol=0)
    assert relative(expanded.sum, 3 * (tuned[:1, 0] - base[:1]).expand(2, 14, 30)) <= 1e-15


@every_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_the_norms(backend: str, bad: float) -> None:
    tuned, base = models(2, m=90, n=11)
    tuned, base = tuned.bfloat16(), base.bfloat16()
    tuned[1, 2, 80, 3] = bad
    _, norms, norm = ops.delta_sum(tuned, base, backend=backend)
    finite = torch.ones(2, 3, dtype=torch.bool)
    finite[1, 2] = False
    assert torch.equal(norms.isfinite(), finite)
    assert norm.isfinite().tolist() == [True, False]
    base[0, 0, 0] = bad
    tuned[0, 1, 0, 0] = bad  # Inf - Inf
    assert not ops.delta_sum(tuned, base, backend=backend).norms[0].isfinite().any()


@every_backend
def test_large_finite_deltas_have_finite_norms_and_overflow_shows(backend: str) -> None:
    tuned, base = torch.full((2, 4, 5), 1e30), torch.zeros(4, 5)  # their squares overflow float32
    torch.testing.assert_close(
        ops.delta_sum(tuned, base, backend=backend).norms, torch.full((2,), 1e30 * 20**0.5).double()
    )
    if backend != "reference":
        assert ops.delta_sum(torch.full((1, 2, 2), 3e38), torch.full((2, 2), -3e38), backend=backend).norms.isinf()


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 3, 4, 5)])
def test_delta_sum_without_elements(shape: tuple[int, ...]) -> None:
    summed, norms, norm = ops.delta_sum(torch.empty(shape), torch.ones(*shape[:-3], *shape[-2:]))
    assert torch.equal(summed, torch.zeros(*shape[:-3], *shape[-2:]))
    assert torch.equal(norms, torch.zeros(shape[:-2], dtype=torch.float64))
    assert torch.equal(norm, torch.zeros(shape[:-3], dtype=torch.float64))


# ---- finalize
@every_backend
@dtype_pairs
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_finalize_by_its_definition(
    backend: str, mine: torch.dtype, theirs: torch.dtype, out_dtype: torch.dtype
) -> None:
    base, update = normal(3, 5, 7).to(mine), normal(3, 5, 7, seed=1).to(theirs)
    scale = torch.tensor([0.3, -1.5, 0.0], dtype=torch.float64)
    before = base.clone(), update.clone(), scale.clone()
    merged = ops.finalize(base, update, scale, out_dtype=out_dtype, backend=backend)
    product = scale[:, None, None] * update.double()
    arithmetic = torch.finfo(torch.float64 if torch.float64 in (mine, theirs) else torch.float32).eps
    # the factor, the product and the sum are rounded in the arithmetic, the result once more
    exact = base.double() + product
    allowed = arithmetic * (product.abs() + exact.abs()) + torch.finfo(out_dtype).eps * exact.abs() / 2 * (1 + 2**-8)
    assert merged.dtype == out_dtype
    assert bool(((merged.double() - exact).abs() <= allowed + torch.finfo(out_dtype).tiny).all())
    for given, kept in zip((base, update, scale), before, strict=True):
        assert torch.equal(given, kept)


@every_backend
def test_a_number_scales_every_matrix(backend: str) -> None:
    base, update = normal(2, 5, 7).bfloat16(), normal(2, 5, 7, seed=1).float()
    scale = torch.full((2,), 0.7, dtype=torch.float64)
    assert torch.equal(
        ops.finalize(base, update, 0.7, out_dtype=torch.bfloat16, backend=backend),
        ops.finalize(base, update, scale, out_dtype=torch.bfloat16, backend=backend),
    )
    assert torch.equal(
        ops.finalize(base[0].mT, update[0].mT, 0.7, out_dtype=torch.float32, backend=backend),
        ops.finalize(base[0], update[0], 0.7, out_dtype=torch.float32, backend=backend).mT,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_finalize_has_the_bits_of_the_driver(stored: torch.dtype, out_dtype: torch.dtype, dtype: torch.dtype) -> None:
    base, update = normal(64, 65).to(stored), normal(64, 65, seed=1).to(dtype)
    for alpha, factor in ((1.0, 1.0), (0.3, 1.0), (1.52, 0.123456789)):
        if torch.promote_types(stored, dtype) != dtype:
            continue
        merged = update * (alpha * factor)  # as isomerge.run adds an update to its base, in the arithmetic dtype
        merged.add_(base.to(dtype))
        assert torch.equal(ops.finalize(base, update, alpha * factor, out_dtype=out_dtype), merged.to(out_dtype))


def test_the_product_is_rounded_before_it_is_added() -> None:
    scale, value = 1 + 2.0**-12 + 2.0**-23, 1 + 2.0**-12  # both float32, their product is not
    product = torch.tensor(scale * value, dtype=torch.float32).item()
    assert product != scale * value
    base, update = torch.full((1, 1), -1.0), torch.full((1, 1), value)
    assert ops.finalize(base, update, scale, out_dtype=torch.float64).item() == product - 1


def test_finalize_without_elements_and_of_what_is_not_finite() -> None:
    assert ops.finalize(torch.empty(2, 0, 5), torch.empty(2, 0, 5), 1.0, out_dtype=torch.bfloat16).shape == (2, 0, 5)
    base, update = torch.zeros(1, 3), torch.tensor([[torch.nan, torch.inf, 1e38]])
    merged = ops.finalize(base, update, 2.0, out_dtype=torch.float16)
    assert merged.isnan().tolist() == [[True, False, False]]
    assert merged.isinf().tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.delta_sum(torch.ones(4, 5), torch.ones(4, 5)), r"delta_sum: expected tuned .* got \(4, 5\)"),
        (lambda: ops.delta_sum(torch.ones(2, 4, 5), torch.ones(5, 4)), r"delta_sum: expected .* \(5, 4\)"),
        (lambda: ops.delta_sum(torch.ones(2, 4, 5).int(), torch.ones(4, 5)), "delta_sum: .* got torch.int32"),
        (lambda: ops.delta_sum(torch.ones(2, 4, 5), torch.ones(4, 5, device="meta")), "on one device"),
        (lambda: ops.finalize(torch.ones(4, 5), torch.ones(5, 4), 1.0, out_dtype=torch.float32), r"finalize: .*\(5, 4"),
        (
            lambda: ops.finalize(torch.ones(2, 4, 5), torch.ones(2, 4, 5), torch.ones(3), out_dtype=torch.float32),
            r"scale \[...\]",
        ),
        (lambda: ops.finalize(torch.ones(4, 5), torch.ones(4, 5), 1.0, out_dtype=torch.int8), "out_dtype must be"),
        (lambda: ops.finalize(torch.ones(5), torch.ones(5), 1.0, out_dtype=torch.float32), "finalize: expected A"),
    ],
)
def test_wrong_calls_say_what_was_expected(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_the_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, base = models(2, m=90, n=50)
    whole = ops.delta_sum(tuned.float(), base.float())
    monkeypatch.setattr(eager, "PIECE", 7 * 50)
    pieces = ops.delta_sum(tuned.float(), base.float())
    assert torch.equal(pieces.sum, whole.sum)
    torch.testing.assert_close(pieces.norms, whole.norms, rtol=1e-13, atol=0)
    torch.testing.assert_close(pieces.norm, whole.norm, rtol=1e-13, atol=0)

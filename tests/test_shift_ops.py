"""The ops behind essential subspaces: second moments, their principal directions, projections, products of factors."""

from __future__ import annotations

import pytest
import torch
from spectra import ON_CPU, SHAPES, matrix, orthonormal, projector, relative
from torch import Tensor

from isomerge import ops

every_backend = pytest.mark.parametrize("backend", ON_CPU)
fast = pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "reference"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- shift_cov
@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize(("tokens", "n", "m"), [(1, 5, 3), (50, 300, 7), (2049, 6, 20), (4100, 3, 1)])
def test_shift_cov_is_the_second_moment(
    backend: str, dtype: torch.dtype, with_delta: bool, tokens: int, n: int, m: int
) -> None:
    X = normal(tokens, n).to(dtype)
    delta = normal(m, n, seed=1).to(dtype) if with_delta else None
    Y = X.double() if delta is None else X.double() @ delta.double().mT
    result = ops.shift_cov(X, delta, backend=backend)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(result, Y.mT @ Y) <= (1e-13 if dtype == torch.float64 else 1e-6)
    assert torch.equal(result, result.mT)
    assert relative(ops.shift_cov(X, delta, precision="exact"), Y.mT @ Y) <= 1e-13


def test_a_split_gives_the_whole_and_a_million_tokens_lose_nothing() -> None:
    X, delta = (normal(1_000_000, 8) + 0.5).float(), normal(6, 8, seed=1).float()
    for given in (None, delta):
        exact = ops.shift_cov(X.double(), None if given is None else given.double(), backend="reference")
        whole = ops.shift_cov(X, given)
        parts = torch.zeros_like(whole)
        for chunk in X.split(3001):
            assert ops.shift_cov(chunk, given, out=parts) is parts
        assert relative(whole, exact) <= 1e-6
        assert relative(parts, exact) <= 1e-6
        plain = X if given is None else X @ given.mT
        one_chain = torch.zeros_like(whole)
        for row in plain[:200_000].split(1):
            one_chain += row.mT @ row
        assert relative(one_chain, (plain[:200_000].double().mT @ plain[:200_000].double())) > 1e-6  # what it avoids


@every_backend
def test_shift_cov_of_stacks_and_strided_tensors(backend: str) -> None:
    X = normal(2, 3, 40, 12).transpose(-1, -2)[..., ::2, :20]  # [2, 3, 6, 20], strided
    delta = normal(2, 3, 20, 9, seed=1).mT
    before = X.clone()
    result = ops.shift_cov(X, delta, backend=backend)
    for i in range(2):
        for j in range(3):
            Y = X[i, j] @ delta[i, j].mT
            assert relative(result[i, j], Y.mT @ Y) <= 1e-13
    assert torch.equal(X, before)


@every_backend
def test_shift_cov_adds_to_out_of_either_dtype(backend: str) -> None:
    X = normal(30, 5).float()
    for dtype in (torch.float32, torch.float64):
        out = torch.ones(5, 5, dtype=dtype)
        ops.shift_cov(X, out=out, backend=backend)
        assert relative(out, 1 + X.double().mT @ X.double()) <= 1e-6
    misaligned = torch.zeros(26)[1:].view(5, 5)
    ops.shift_cov(X, out=misaligned, backend=backend)
    assert relative(misaligned, X.double().mT @ X.double()) <= 1e-6


def test_shift_cov_without_tokens_leaves_out_as_it_is() -> None:
    assert torch.equal(ops.shift_cov(torch.empty(0, 4)), torch.zeros(4, 4))
    out = torch.eye(3)
    assert torch.equal(ops.shift_cov(torch.empty(0, 4), torch.ones(3, 4), out=out), torch.eye(3))


# ---- principal
def shifts(m: int, n: int, tokens: int, decay: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    X = (
        normal(tokens, n, seed=seed)
        * torch.logspace(0, -decay, n, dtype=torch.float64)
        @ orthonormal(n, n, seed + 1).mT
    )
    return X, normal(m, n, seed=seed + 2)


@every_backend
@pytest.mark.parametrize(("m", "n"), [(40, 40), (72, 24), (24, 72), (1, 9), (9, 1)])
@pytest.mark.parametrize("tokens", [200, 12])
@pytest.mark.parametrize("share", [0.125, 0.5, 1.0])
def test_principal_directions_are_those_of_the_shifts(backend: str, m: int, n: int, tokens: int, share: float) -> None:
    X, delta = shifts(m, n, tokens, 1.5)
    k = max(1, int(m * share))
    _, S, Vh = torch.linalg.svd(X @ delta.mT, full_matrices=False)
    rank = min(k, m, n, tokens)
    for moment, given in ((X.mT @ X, delta), ((X @ delta.mT).mT @ (X @ delta.mT), None)):
        vectors, values = ops.principal(moment, k, delta=given, backend=backend)
        assert vectors.shape == (m, k)
        torch.testing.assert_close(values[:rank], S[:rank].square(), rtol=1e-7, atol=0)
        assert not values[rank:].any()
        assert not vectors[:, rank:].any()
        assert relative(projector(vectors[:, :rank]), projector(Vh[:rank].mT)) <= 1e-6
        assert relative((vectors[:, :rank].mT @ Vh[:rank].mT).abs(), torch.eye(rank)) <= 1e-5  # eigenvectors, in order


def test_principal_of_float32_moments_drops_what_is_their_rounding() -> None:
    X, delta = shifts(60, 40, 10, 1.0)  # rank 10
    vectors, values = ops.principal((X.mT @ X).float(), 30, delta=delta.float())
    assert vectors.dtype == torch.float32
    assert int((values > 0).sum()) == 10
    expected = torch.linalg.svd(X @ delta.mT, full_matrices=False)[2][:10].mT
    assert relative(projector(vectors), projector(expected)) <= 1e-4


@every_backend
def test_principal_of_zero_and_of_stacks(backend: str) -> None:
    X, delta = shifts(20, 30, 50, 1.0)
    moments = torch.stack([X.mT @ X, torch.zeros(30, 30, dtype=torch.float64)])
    vectors, values = ops.principal(moments, 5, delta=torch.stack([delta, delta]), backend=backend)
    alone = ops.principal(X.mT @ X, 5, delta=delta, backend=backend)
    assert torch.equal(vectors[0], alone.vectors)
    assert torch.equal(values[0], alone.values)
    assert not vectors[1].any()
    assert not values[1].any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_principal_does_not_depend_on_the_scale(scale: float) -> None:
    X, delta = shifts(20, 30, 50, 1.0)
    plain, scaled = ops.principal(X.mT @ X, 5, delta=delta), ops.principal(X.mT @ X * scale, 5, delta=delta)
    assert relative(projector(scaled.vectors), projector(plain.vectors)) <= 1e-10
    torch.testing.assert_close(scaled.values / scale, plain.values)


# ---- project_scale
@every_backend
@pytest.mark.parametrize(("T", "m", "n", "s"), [(1, 5, 7, 5), (3, 40, 9, 13), (8, 7, 33, 1)])
def test_project_scale_is_the_scaled_concatenation(backend: str, T: int, m: int, n: int, s: int) -> None:
    Q, W, scale = normal(2, T, m, s).float(), normal(2, T, m, n, seed=1).bfloat16(), normal(2, T, s, seed=2).float()
    rows, squares = ops.project_scale(Q, W, scale, backend=backend)
    expected = torch.cat([scale[:, t, :, None] * (Q[:, t].double().mT @ W[:, t].double()) for t in range(T)], dim=-2)
    assert rows.dtype == torch.float32
    assert relative(rows, expected) <= 1e-6
    torch.testing.assert_close(squares, expected.square().sum(-2), rtol=1e-5, atol=1e-12)


def test_project_scale_without_elements() -> None:
    rows, squares = ops.project_scale(torch.empty(2, 5, 0), torch.empty(2, 5, 7), torch.empty(2, 0))
    assert rows.shape == (0, 7)
    assert torch.equal(squares, torch.zeros(7, dtype=torch.float64))


# ---- polar_product
@fast
@pytest.mark.parametrize("precision", ["default", "exact"])
@pytest.mark.parametrize("kind", ["flat", "decay", "rank_one", "zero", "cliff", "spiked"])
@pytest.mark.parametrize("right", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("left", SHAPES.values(), ids=SHAPES)
def test_polar_product_is_the_product_of_the_factors(
    left: tuple[int, int], right: tuple[int, int], kind: str, precision: str, backend: str
) -> None:
    A, B = matrix(kind, *left).float(), matrix("decay", left[1], right[1], seed=1).float()
    scale = normal(left[1], seed=4).abs().float()
    expected = ops.polar_product(A, B, scale=scale, backend="reference")
    result = ops.polar_product(A, B, scale=scale, backend=backend, precision=precision)
    size = max(torch.linalg.vector_norm(expected.product).item(), 1e-30)
    assert torch.linalg.vector_norm(result.product - expected.product).item() <= 2e-4 * size
    torch.testing.assert_close(result.nuclear_norms, expected.nuclear_norms, rtol=1e-5, atol=1e-30)
    assert torch.equal(result.ranks, expected.ranks)


@pytest.mark.parametrize("kind", ["decay", "ill", "flat"])
@pytest.mark.parametrize(("m", "q", "n"), [(1200, 600, 600), (600, 600, 200), (600, 600, 1300), (300, 600, 700)])
def test_polar_product_of_larger_matrices_is_as_good_as_the_float32_svd(m: int, q: int, n: int, kind: str) -> None:
    A, B = matrix(kind, m, q).float(), matrix("decay", q, n, seed=1).float()
    expected = ops.polar_product(A, B, backend="reference").product

    def svd32(A: Tensor) -> Tensor:
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
        return (U * (S > ops.RANK_RTOL * S[:1])) @ Vh

    allowed = max(2 * relative(svd32(A) @ svd32(B), expected), 1e-4)
    assert relative(ops.polar_product(A, B).product, expected) <= allowed


def test_polar_product_of_stacks_equals_one_by_one_bit_for_bit() -> None:
    A, B, scale = normal(3, 40, 24).float(), normal(3, 24, 31, seed=1).float(), normal(3, 24, seed=2).float()
    together = ops.polar_product(A, B, scale=scale)
    for i in range(3):
        alone = ops.polar_product(A[i], B[i], scale=scale[i])
        for mine, all_of_it in zip(alone, together, strict=True):
            assert torch.equal(mine, all_of_it[i])


# ---- calls that say what was expected
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.shift_cov(torch.ones(3, 4), torch.ones(5, 3)), r"delta must be \[..., m, 4\]"),
        (lambda: ops.shift_cov(torch.ones(3, 4), out=torch.ones(3, 3)), r"out must be \(4, 4\)"),
        (lambda: ops.shift_cov(torch.ones(3, 4), out=torch.ones(4, 4).bfloat16()), "float32 or float64"),
        (lambda: ops.shift_cov(torch.full((3, 4), torch.nan)), "X holds 12 non-finite values"),
        (lambda: ops.shift_cov(torch.ones(3, 4), torch.full((2, 4), torch.inf)), "delta holds 8 non-finite values"),
        (lambda: ops.shift_cov(torch.full((3, 4), 1e30)), "the moment overflows torch.float32"),
        (lambda: ops.shift_cov(torch.ones(3, 4).int()), "got torch.int32"),
        (lambda: ops.principal(torch.ones(3, 4), 1), r"must be \[..., n, n\]"),
        (lambda: ops.principal(torch.ones(4, 4), 1, delta=torch.ones(2, 5)), "as wide as the moment"),
        (lambda: ops.principal(torch.ones(4, 4), 3, delta=torch.ones(2, 4)), "within 0..m = 2"),
        (lambda: ops.principal(torch.full((4, 4), torch.nan), 1), "principal: A holds 16 non-finite"),
        (lambda: ops.project_scale(torch.ones(2, 4, 3), torch.ones(2, 5, 3), torch.ones(2, 3)), "got"),
        (lambda: ops.polar_product(torch.ones(3, 4), torch.ones(3, 4)), r"\(3, 4\), \(3, 4\)"),
        (lambda: ops.polar_product(torch.ones(3, 4), torch.ones(4, 4), scale=torch.ones(3)), r"and scale \(3,\)"),
    ],
)
def test_wrong_calls_say_what_was_expected(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]

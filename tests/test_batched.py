"""The ops on whole stacks and the `triton` backend's door to them, on CPU tensors with torch's primitives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from spectra import SHAPES, SPECTRA, matrix, orthonormal, projector, relative
from torch import Tensor
from triton_aot import DEVICE  # before triton: it sets TRITON_INTERPRET

pytest.importorskip("triton")

from isomerge import methods, ops
from isomerge.backends import BACKENDS, batched, batched_eigen, cuda, iterations
from isomerge.backends import triton as backend
from isomerge.backends.primitives import TorchPrimitives

EPS = torch.finfo(torch.float64).eps
MIXED = ("decay", "cliff", "zero", "flat", "rank_one", "ill")
LARGE = {"square": (200, 200), "tall": (260, 200), "wide": (200, 260)}

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="stacks": the ops of the triton backend with torch's primitives, on any device."""
    row = BACKENDS["eager"]._replace(module="isomerge.backends.triton")
    monkeypatch.setattr("isomerge.backends.BACKENDS", {"stacks": row, **BACKENDS})
    monkeypatch.setattr(backend, "TritonPrimitives", TorchPrimitives)


@pytest.fixture
def krylov(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Block Krylov answers for matrices of tests; a list of the stacks for which it did."""
    monkeypatch.setattr(batched_eigen, "KRYLOV_MIN_SIDE", 150)
    asked, iterate = [], batched_eigen.block_krylov

    def counted(X: Tensor, k: int, *, tol: float, seed: int) -> tuple[Tensor, list[bool]]:
        asked.append(len(X))
        return iterate(X, k, tol=tol, seed=seed)

    monkeypatch.setattr(batched_eigen, "block_krylov", counted)
    return asked


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(m: int, n: int) -> Tensor:
    """[2, 3, m, n] float64 of six spectra and five ranks, stored by columns."""
    stack = torch.stack([matrix(name, m, n, seed=i) for i, name in enumerate(MIXED)])
    return stack.reshape(2, 3, m, n).mT.contiguous().mT


def each(*stacks: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The matrices of stacks of the same two leading dimensions, side by side."""
    return zip(*(stack.flatten(0, 1) for stack in stacks), strict=True)


def rounding(dtype: torch.dtype, size: int) -> float:
    """Of float64 sums and eigensolves of this size, and of their result to `dtype`."""
    return 2 * torch.finfo(dtype).eps + 2 * size * EPS


def svd32_polar(A: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(A.float(), full_matrices=False)
    return (U * (S > ops.RANK_RTOL * S[:1])) @ Vh


# --------------------------------------------------------------------------------------- polar, polar_product


@pytest.mark.parametrize("precision", ["fast", "default", "exact"])
@shapes
def test_polar_of_a_mixed_stack(shape: tuple[int, int], precision: str) -> None:
    A = mixed(*shape).float()
    result, expected = ops.polar(A, precision=precision, backend="stacks"), ops.polar(A, backend="reference")
    assert torch.equal(result.rank, expected.rank)
    for one, factor, exact in each(A, result.factor, expected.factor):
        bound = {"fast": 2e-2, "default": max(1e-4, 2 * relative(svd32_polar(one), exact)), "exact": 1e-6}[precision]
        assert relative(factor, exact) <= bound


@pytest.mark.parametrize("right", [(24, 80), (80, 24), (48, 48)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("m", [1, 24, 48, 80])
@pytest.mark.parametrize("deficient", [True, False])
def test_polar_product_of_stacks(m: int, right: tuple[int, int], deficient: bool) -> None:
    q = right[0]
    A, B = mixed(m, q).float(), (mixed(*right).flip(0) if deficient else normal(2, 3, *right)).float()
    scale = normal(2, 3, q, seed=4).abs().float()
    expected = ops.polar_product(A, B, scale=scale, backend="reference")
    result = ops.polar_product(A, B, scale=scale, backend="stacks")
    assert torch.equal(result.ranks, expected.ranks)
    torch.testing.assert_close(result.nuclear_norms, expected.nuclear_norms, rtol=1e-5, atol=0)
    for one, two, s, product, exact in each(A, B, scale, result.product, expected.product):
        allowed = max(1e-4, 2 * relative((svd32_polar(one) * s) @ svd32_polar(two), exact))
        assert relative(product, exact) <= allowed
    half = ops.polar_product(A.bfloat16(), B.double(), backend="stacks")
    exact = ops.polar_product(A.bfloat16(), B.double(), backend="reference").product
    assert half.product.dtype == torch.float64
    assert relative(half.product, exact) <= 1e-6


# ------------------------------------------------------------------------------------------------------- rsvd


def assert_is_the_svd(result: ops.SVD, A: Tensor, expected: ops.SVD) -> None:
    """One matrix: values, distance to it, orthonormal where they should be, zero where null."""
    (U, S, Vh), k = (part.double() for part in result), len(result.S)
    eps = rounding(result.U.dtype, max(A.shape))
    top = torch.linalg.matrix_norm(A.double(), ord=2).item() or 1.0
    assert (S - expected.S.double()).abs().max() <= eps * top
    assert torch.equal(S > 0, expected.S > 0)
    assert torch.equal(S, S.sort(descending=True).values)
    best = torch.linalg.vector_norm(A.double() - ((expected.U * expected.S) @ expected.Vh).double())
    assert torch.linalg.vector_norm(A.double() - (U * S) @ Vh) <= best + eps * top * k**0.5
    small, large = (U, Vh.mT) if A.shape[0] <= A.shape[1] else (Vh.mT, U)
    assert relative(small.mT @ small, torch.eye(k)) <= eps
    # the Gram's rounding turns Y = R V by eps sigma_1² / (sigma_i sigma_j)
    kept = S > 0
    inner = (large.mT @ large - torch.diag(kept.double())) * S[:, None] * S / top**2
    assert inner.abs().max() <= eps
    assert not large[:, ~kept].any()


@shapes
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rsvd_of_a_mixed_stack(shape: tuple[int, int], share: float, dtype: torch.dtype) -> None:
    A, k = mixed(*shape).to(dtype), max(1, int(share * min(shape)))
    result, expected = ops.rsvd(A, k, backend="stacks"), ops.rsvd(A, k, backend="reference")
    assert [part.dtype for part in result] == [dtype] * 3
    for one, *parts in each(A, *result, *expected):
        assert_is_the_svd(ops.SVD(*parts[:3]), one, ops.SVD(*parts[3:]))


def test_singular_values_below_the_rounding_of_the_gram_are_sorted_with_their_vectors() -> None:
    values = torch.cat([torch.ones(4), torch.logspace(-7.5, -8.5, 36)]).double()
    A = (orthonormal(60, 40, 1) * values) @ orthonormal(40, 40, 2).mT
    U, S, _ = ops.rsvd(A, 40, rtol=0.0, backend="stacks")
    by_eigenvalue = torch.linalg.vector_norm(A @ torch.linalg.eigh(A.mT @ A).eigenvectors.flip(-1), dim=0)
    assert (by_eigenvalue.diff() > 1e-12).any()
    assert torch.equal(S, S.sort(descending=True).values)
    assert (torch.linalg.vector_norm(U, dim=0) - 1).abs().max() <= rounding(torch.float64, 60)


def test_rsvd_keeps_nothing() -> None:
    U, S, Vh = ops.rsvd(mixed(20, 30), 0, backend="stacks")
    assert (U.shape, S.shape, Vh.shape) == ((2, 3, 20, 0), (2, 3, 0), (2, 3, 0, 30))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("shared", [True, False])
def test_rsvd_deflated_is_that_of_the_residual(shape: tuple[int, int], shared: bool) -> None:
    A = torch.stack([matrix("decay", *shape, seed=i) for i in range(6)]).reshape(2, 3, *shape).float()
    Q = torch.stack([orthonormal(shape[0], 7, i) for i in range(6)]).reshape(2, 3, -1, 7).float()
    Q = Q[:, :1] if shared else Q
    expected = ops.rsvd(A.double() - Q.double() @ (Q.double().mT @ A.double()), 5, backend="reference")
    result = ops.rsvd(A, 5, deflate=Q, backend="stacks")
    truncated, exact = ((svd.U * svd.S.unsqueeze(-2)) @ svd.Vh for svd in (result, expected))
    assert relative(truncated, exact) < 1e-6
    assert (Q.mT @ result.U).abs().max() < 1e-6
    plain = ops.rsvd(A, 5, backend="stacks")
    assert (Q.mT @ plain.U).abs().max() > 0.1  # what deflation takes away


def test_rsvd_absolute_threshold_is_per_matrix() -> None:
    A = torch.stack([matrix("decay", 20, 30), 10 * matrix("decay", 20, 30)])
    for atol in (torch.tensor([0.1, 0.1]), torch.tensor([0.1, 1.0])):
        S, exact = (ops.rsvd(A, 20, atol=atol, backend=name).S for name in ("stacks", "reference"))
        assert torch.equal(S > 0, exact > 0)
        assert 0 < (S[0] > 0).sum() <= (S[1] > 0).sum() < 20


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_block_krylov_answers_for_few_of_many(shape: tuple[int, int], krylov: list[int]) -> None:
    A = torch.stack([matrix(name, *shape, seed=i) for i, name in enumerate(SPECTRA)] + [normal(*shape) / 30]).float()
    result, expected = ops.rsvd(A, 6, backend="stacks"), ops.rsvd(A, 6, backend="reference")
    assert krylov == [len(A)]
    for one, *parts in zip(A, *result, *expected, strict=True):
        (U, S, Vh), exact = parts[:3], ops.SVD(*parts[3:])
        top = exact.S[0].item()
        assert (S - exact.S).abs().max() <= 1e-6 * top
        assert torch.equal(S > 0, exact.S > 0)
        small = U if shape[0] <= shape[1] else Vh.mT
        assert relative(small.mT @ small, torch.eye(6)) <= 1e-6
        best = torch.linalg.vector_norm(one - (exact.U * exact.S) @ exact.Vh)
        assert torch.linalg.vector_norm(one - (U * S) @ Vh) <= best + 1e-5 * top
    ops.rsvd(A, 7, backend="stacks")  # 7 > 200 / 32
    assert len(krylov) == 1


def test_block_krylov_keeps_its_word_on_flat_spectra() -> None:
    A = normal(2, 200, 220)
    for tol in (1e-4, 1e-10):
        V, converged = batched_eigen.block_krylov(A, 5, tol=tol, seed=0)
        assert all(converged)
        GV = A @ (A.mT @ V)
        values = (V * GV).sum(-2)
        assert (torch.linalg.vector_norm(GV - V * values.unsqueeze(-2), dim=-2) <= 1.01 * tol * values[:, :1]).all()
        torch.testing.assert_close(values, torch.linalg.svdvals(A)[:, :5].square(), rtol=tol, atol=0)
        other, _ = batched_eigen.block_krylov(A, 5, tol=tol, seed=1)
        assert not torch.equal(other, V)


def test_what_block_krylov_leaves_gets_an_eigensolve(krylov: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_eigen, "CYCLES", 1)
    solved, solve = [], batched_eigen.eigh

    def counted(G: Tensor) -> tuple[Tensor, Tensor]:
        solved.append(tuple(G.shape))
        return solve(G)

    monkeypatch.setattr(batched_eigen, "eigh", counted)
    easy = matrix("rank_one", 200, 220)
    A = torch.stack([easy, normal(200, 220), easy])
    result, expected = ops.rsvd(A, 5, backend="stacks"), ops.rsvd(A, 5, backend="reference")
    assert solved == [(3, 156, 156), (1, 200, 200)]
    for i in range(3):
        assert_is_the_svd(ops.SVD(*(part[i] for part in result)), A[i], ops.SVD(*(part[i] for part in expected)))


@pytest.mark.parametrize(("constant", "name"), [("NOISE", "rank_one"), ("ROUNDING", "flat")])
def test_rank_deficient_blocks_and_invariant_spaces_need_care(
    constant: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    A = matrix(name, 200, 240)[None]

    def defect() -> float:
        V, _ = batched_eigen.block_krylov(A, 6, tol=1e-9, seed=0)
        return relative(V.mT @ V, torch.eye(6))

    assert defect() <= 1e-12
    monkeypatch.setattr(batched_eigen, constant, 0.0)
    assert not defect() <= 1e-12


# --------------------------------------------------------------------------------------------------- subspace


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subspaces_of_a_mixed_stack_are_completed(shape: tuple[int, int], dtype: torch.dtype) -> None:
    A, (m, n) = mixed(*shape).to(dtype), shape
    error, exact = rounding(dtype, max(shape)), torch.linalg.svd(A.double())
    for k in {0, 1, min(3, m), min(m, n), m}:
        for full in (False, True):
            Q = ops.subspace(A, k, full=full, backend="stacks")
            assert Q.shape == (2, 3, m, m if full else k)
            assert Q.dtype == dtype
            for one, U, S in each(Q, *exact[:2]):
                assert relative(one.double().mT @ one.double(), torch.eye(one.shape[-1])) <= error
                j = min(k, int((S > 1e-6 * S[:1]).sum()))
                squares = torch.cat([S, S.new_zeros(1)]).square()
                gap = ((squares[j - 1] - squares[j]) / squares[0]).item() if j else 0.0
                if gap > 1e-12:  # elsewhere the subspace is not unique
                    allowed = error + 4 * max(shape) * EPS / gap  # the Gram's rounding over its gap
                    assert relative(projector(one[:, :j]), projector(U[:, :j])) <= allowed


def test_subspaces_of_the_right_side_and_by_block_krylov(krylov: list[int]) -> None:
    A = torch.stack([matrix("decay", 200, 260, seed=i) for i in range(3)])
    U, _, Vh = torch.linalg.svd(A, full_matrices=False)
    for side, exact in (("left", U[..., :4]), ("right", Vh.mT[..., :4])):
        Q = ops.subspace(A, 4, side=side, backend="stacks")
        for one, expected in zip(Q, exact, strict=True):
            assert relative(projector(one), projector(expected)) <= 1e-8
    assert krylov == [3, 3]
    ops.subspace(A, 4, full=True, backend="stacks")
    assert krylov == [3, 3]


# -------------------------------------------------------------------------------------------------- principal


@pytest.mark.parametrize(("m", "n"), [(40, 40), (72, 24), (24, 72), (1, 9), (9, 1)])
@pytest.mark.parametrize("share", [0.125, 1.0])
def test_principal_of_a_stack_of_several_ranks(m: int, n: int, share: float) -> None:
    tokens = (200, 12, 200, 5)  # the second and the fourth moment are singular
    X = [normal(count, n, seed=i) * torch.logspace(0, -1.5, n, dtype=torch.float64) for i, count in enumerate(tokens)]
    moments = torch.stack([*(x.mT @ x for x in X), torch.zeros(n, n)]).double()
    delta, k = normal(5, m, n, seed=9), max(1, int(m * share))
    before = moments.clone(), delta.clone()
    shifted = delta @ moments @ delta.mT
    for given in ((moments, delta), ((shifted + shifted.mT) / 2, None)):
        vectors, values = ops.principal(given[0], k, delta=given[1], backend="stacks")
        expected = ops.principal(given[0], k, delta=given[1], backend="reference")
        assert vectors.shape == (5, m, k)
        for i in range(5):
            rank = int((expected.values[i] > 0).sum())
            assert rank == (min(k, m, n, tokens[i]) if i < 4 else 0)
            torch.testing.assert_close(values[i], expected.values[i], rtol=1e-7, atol=0)
            assert not vectors[i, :, rank:].any()
            assert relative(projector(vectors[i]), projector(expected.vectors[i])) <= 1e-6
            assert relative((vectors[i].mT @ expected.vectors[i]).abs()[:rank, :rank], torch.eye(rank)) <= 1e-5
    assert torch.equal(moments, before[0])
    assert torch.equal(delta, before[1])


# ------------------------------------------------------------------------- the ops that are kernels in float32


@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, "default"), (torch.float32, "exact")])
def test_shift_cov_in_float64(
    dtype: torch.dtype, precision: str, with_delta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched, "TOKENS", 32)
    monkeypatch.setattr(backend.moments, "shift_cov", None)  # must not be asked
    X = normal(2, 3, 40, 70).mT.to(dtype)[..., ::2]  # [2, 3, 70, 20]
    delta = normal(2, 3, 9, 20, seed=1).to(dtype) if with_delta else None
    out = torch.ones(2, 3, 9, 9) if with_delta else None
    result = ops.shift_cov(X, delta, out=out, precision=precision, backend="stacks")
    Y = X.double() if delta is None else X.double() @ delta.double().mT
    exact = Y.mT @ Y + (0 if out is None else 1)
    assert out is None or result is out
    assert torch.equal(result, result.mT)
    # one rounding a chunk to the dtype of `out`, and 70 products of float64
    assert relative(result, exact) <= 70 * EPS + (0 if out is None else 3 * torch.finfo(torch.float32).eps)


def test_project_scale_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.projection, "project_scale", None)  # must not be asked
    Q, W, scale = normal(2, 3, 40, 7), normal(2, 3, 40, 9, seed=1), normal(2, 3, 7, seed=2)
    for left in (Q, Q.float()):
        rows, squares = ops.project_scale(left, W, scale, backend="stacks")
        expected = ops.project_scale(left, W, scale, backend="reference")
        assert relative(rows, expected.rows) <= 40 * EPS
        torch.testing.assert_close(squares, expected.column_squares, rtol=40 * EPS, atol=0)


def test_kernels_answer_for_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the backend as it is, in Triton's interpreter where there is no device
    X, delta = normal(33, 20).float().to(DEVICE), normal(5, 20, seed=1).float().to(DEVICE)
    out = torch.zeros(5, 5, device=DEVICE)
    backend.shift_cov(X, delta, out=out, precision="default")
    Y = X.double() @ delta.double().mT
    assert relative(out, Y.mT @ Y) <= 1e-6
    Q, scale = normal(1, 5, 3).float().to(DEVICE), torch.ones(1, 3, device=DEVICE)
    rows, _ = backend.project_scale(Q, delta[None], row_scale=scale)
    assert relative(rows, Q[0].double().mT @ delta.double()) <= 1e-6
    total, _, _ = backend.delta_sum(delta[None], torch.zeros_like(delta))
    assert torch.equal(total, delta)
    merged = backend.finalize(total, total, scale=torch.ones((), device=DEVICE), out_dtype=torch.float32)
    assert torch.equal(merged, 2 * delta)
    factor, _, rank = backend.polar(X.mT, rtol=ops.RANK_RTOL, precision="default")
    assert rank == 20
    assert relative(factor, ops.polar(X.mT, backend="reference").factor) <= 1e-4


def test_matmul_broadcasts_in_the_dtype_of_its_operands() -> None:
    A, B = normal(2, 1, 20, 30), normal(3, 30, 7, seed=1)
    for dtype in (torch.float32, torch.float64):
        product = ops.matmul(A.to(dtype), B.to(dtype), backend="stacks")
        assert product.dtype == dtype
        exact = A.to(dtype).double() @ B.to(dtype).double()
        size = torch.linalg.vector_norm(A) * torch.linalg.vector_norm(B)
        assert torch.linalg.vector_norm(product - exact) <= 30 * torch.finfo(dtype).eps * size


# -------------------------------------------------------------------------------------------- stacks as such


CALLS: dict[str, Callable[[Tensor], object]] = {
    "rsvd": lambda A: ops.rsvd(A, 4, backend="stacks"),
    "rsvd deflated": lambda A: ops.rsvd(A, 4, deflate=A[..., :2].expand(*A.shape[:-1], 2), backend="stacks"),
    "subspace": lambda A: ops.subspace(A, 5, full=True, backend="stacks"),
    "principal": lambda A: ops.principal(A.mT @ A, 5, delta=A, backend="stacks"),
    "polar": lambda A: ops.polar(A, backend="stacks"),
    "polar_product": lambda A: ops.polar_product(A, A.mT, backend="stacks"),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def tensors(result: object) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in CALLS if "polar" not in name])  # one schedule for a stack
@pytest.mark.parametrize("shape", [(37, 37), (71, 23), (23, 71), (200, 210)])
def test_the_company_of_a_matrix_does_not_matter(name: str, shape: tuple[int, int], krylov: list[int]) -> None:
    stack = mixed(*shape).float()
    company = normal(2, 3, *shape).float().mT.contiguous().mT  # slower to converge
    company[1, 0] = stack[1, 0]
    before = stack.clone()
    for one, other in zip(tensors(CALLS[name](stack)), tensors(CALLS[name](company)), strict=True):
        assert torch.equal(one[1, 0], other[1, 0])
        assert not torch.equal(one[0, 0], other[0, 0])
    assert torch.equal(stack, before)


@calls
def test_a_matrix_alone_is_a_stack_of_one(call: Callable[[Tensor], object]) -> None:
    A = normal(30, 20).float()
    for alone, stacked in zip(tensors(call(A)), tensors(call(A[None])), strict=True):
        assert torch.equal(alone, stacked[0])


WAITS = ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call by which the host reads a tensor, in order."""
    seen: list[str] = []

    def counting(name: str) -> Callable[..., object]:
        method = getattr(Tensor, name)

        def counted(self: Tensor, *args: object, **kwargs: object) -> object:
            seen.append(name)
            return method(self, *args, **kwargs)

        return counted

    for name in WAITS:
        monkeypatch.setattr(Tensor, name, counting(name))
    return seen


@calls
@pytest.mark.parametrize("shape", [(60, 20), (20, 60), (200, 210)])
def test_the_host_waits_as_often_for_a_stack_as_for_one(
    call: Callable[[Tensor], object], shape: tuple[int, int], waits: list[str], krylov: list[int]
) -> None:
    counts = []
    for batch in (1, 5):
        waits.clear()
        call(normal(1, *shape).expand(batch, *shape) / 30)
        counts.append(len(waits))
    assert counts[0] == counts[1] <= 12
    waits.clear()
    ops.rsvd(normal(5, *shape), 4, backend="eager")
    assert len(waits) > 5  # what it avoids


# ------------------------------------------------------------------------------------------- small factorizations


def test_cholesky_inverse_of_the_extension_answers_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    G = normal(3, 40, 20).mT @ normal(3, 40, 20)
    asked = []

    def inverse(G: Tensor) -> cuda.Cholesky:
        asked.append(tuple(G.shape))
        L = torch.linalg.cholesky(G)
        return cuda.Cholesky(L, torch.linalg.inv(L), torch.zeros(len(G), dtype=torch.int32))

    expected = batched_eigen.cholesky_inverse(G)
    torch.testing.assert_close(expected @ G @ expected.mT, torch.eye(20, dtype=G.dtype).expand(3, 20, 20))
    monkeypatch.setattr(cuda, "cholesky_inverse", inverse)
    assert torch.equal(batched_eigen.cholesky_inverse(G), expected)
    assert not asked
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "availability", lambda: "not built")
    assert torch.equal(batched_eigen.cholesky_inverse(G), expected)
    assert not asked
    monkeypatch.setattr(cuda, "availability", lambda: None)
    torch.testing.assert_close(batched_eigen.cholesky_inverse(G), expected)
    batched_eigen.cholesky_inverse(torch.eye(cuda.MAX_SIDE + 1, dtype=G.dtype)[None])
    assert asked == [(3, 20, 20)]


def test_a_failed_cholesky_ends_in_an_eigensolve(krylov: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    G = torch.stack([torch.eye(3), -torch.eye(3)]).double()
    assert batched_eigen.cholesky_inverse(G).isnan().flatten(1).all(-1).tolist() == [False, True]
    factor = batched_eigen.cholesky_inverse

    def failing(G: Tensor) -> Tensor:
        return factor(G) * torch.tensor([1.0, torch.nan]).double()[:, None, None]

    monkeypatch.setattr(batched_eigen, "cholesky_inverse", failing)
    A = torch.stack([matrix("decay", 200, 210, seed=i) for i in range(2)])
    assert relative(ops.rsvd(A, 5, backend="stacks").S, ops.rsvd(A, 5, backend="reference").S) <= 1e-12


@pytest.mark.parametrize("failure", ["raises", "returns NaN"])
def test_eigh_solves_again_what_is_left_unsolved(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    G = normal(3, 20, 10).mT @ normal(3, 20, 10)
    expected, solve = torch.linalg.eigh(G), torch.linalg.eigh

    def broken(G: Tensor) -> tuple[Tensor, Tensor]:
        if G.ndim == 3 and failure == "raises":
            raise torch.linalg.LinAlgError("no convergence")
        values, V = solve(G)
        return values, V * torch.tensor([1, torch.nan, 1])[:, None, None] if G.ndim == 3 else V

    again, one = [], iterations.eigh

    def counted(G: Tensor) -> tuple[Tensor, Tensor]:
        again.append(G)
        return one(G)

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    monkeypatch.setattr(iterations, "eigh", counted)
    values, V = batched_eigen.eigh(G)
    assert len(again) == (3 if failure == "raises" else 1)
    torch.testing.assert_close(values, expected.eigenvalues)
    torch.testing.assert_close((V * values.unsqueeze(-2)) @ V.mT, G)


# ------------------------------------------------------------------------------------------------- whole methods


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=["wide", "tall"])
@pytest.mark.parametrize("kind", ["full", "low"])
def test_methods_on_stacks_agree_with_the_reference(shape: tuple[int, int], kind: str) -> None:
    m, n = shape
    deltas = normal(2, 3, m, n).float() / 100
    if kind == "low":
        deltas = (normal(2, 3, m, 2) @ normal(2, 3, 2, n, seed=1)).float() / 100
    inputs = normal(2, 3, 50, n, seed=2).float()
    moments = inputs.mT @ inputs
    for merge in (
        methods.iso_c,
        methods.iso_cts,
        methods.tsvm,
        lambda deltas, backend: methods.esm(deltas, moments, backend=backend),
    ):
        result, expected = merge(deltas.double(), backend="stacks"), merge(deltas.double(), backend="reference")
        assert relative(result, expected) <= 1e-6


# -------------------------------------------------------------------------------------------------- availability


def found(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, version: str | None = "13.0") -> None:
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_availability_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, (9, 0))
    assert backend.availability() is None
    found(monkeypatch, (7, 5))
    assert backend.availability() == "expected a device of compute capability 8.0 or higher, got 7.5"
    found(monkeypatch, None)
    assert backend.availability() == "torch finds no CUDA device"
    found(monkeypatch, (9, 4), version=None)  # as torch for ROCm says
    assert backend.availability() == "torch is built without CUDA"
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    assert backend.availability() is None


WITHOUT_TRITON = """
import importlib.util, sys
from importlib.util import find_spec

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find_spec(name, package)
sys.meta_path.insert(0, Blocker())
from isomerge.backends import triton
assert triton.availability() == "the package triton is not installed; pip install 'isomerge[gpu]'"
"""


def test_without_triton_the_backend_imports_and_says_so() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

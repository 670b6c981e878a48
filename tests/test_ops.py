"""Every op against float64, on hostile input. Tolerances: twice torch's own float32 SVD on the same input, or 1e-4."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from spectra import ON_CPU, SHAPES, SPECTRA, matrix, orthonormal, projector, relative
from torch import Tensor

from isomerge import backends as backends_module
from isomerge import ops
from isomerge.backends import BACKENDS, OPS, eager, eigen, table
from isomerge.backends.iterations import chebyshev_subspace

FAST = [name for name in ON_CPU if name != "reference"]
BOUND = {"fast": 2e-2, "default": 1e-4, "exact": 1e-6}

cases = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
spectra = pytest.mark.parametrize("name", SPECTRA)
backends = pytest.mark.parametrize("backend", FAST)


def svd32_error(A: Tensor, expected: Tensor) -> float:
    """What the float32 SVD makes of the polar factor over the same numerical rank."""
    U, S, Vh = torch.linalg.svd(A.float(), full_matrices=False)
    return relative((U * (S > ops.RANK_RTOL * S[:1])) @ Vh, expected)


@cases
@spectra
@backends
@pytest.mark.parametrize("precision", BOUND)
def test_polar_against_float64(shape: tuple[int, int], name: str, backend: str, precision: str) -> None:
    A = matrix(name, *shape).float()
    expected = ops.polar(A, backend="reference")
    result = ops.polar(A, backend=backend, precision=precision)
    allowed = max(2 * svd32_error(A, expected.factor), BOUND[precision]) if precision == "default" else BOUND[precision]
    assert relative(result.factor, expected.factor) <= allowed
    torch.testing.assert_close(
        result.nuclear_norm, expected.nuclear_norm, rtol=max(1e-5, BOUND[precision] ** 2), atol=0
    )
    assert torch.equal(result.rank, expected.rank)


@pytest.mark.parametrize("shape", [(200, 200), (600, 200), (200, 600)], ids=["square", "tall", "wide"])
@pytest.mark.parametrize("name", ["decay", "ill", "spiked", "cliff"])
def test_polar_of_larger_matrices_is_as_good_as_the_float32_svd(shape: tuple[int, int], name: str) -> None:
    A = matrix(name, *shape).float()
    expected = ops.polar(A, backend="reference").factor
    assert relative(ops.polar(A).factor, expected) <= max(2 * svd32_error(A, expected), 1e-4)


@pytest.mark.parametrize("name", ["decay", "flat", "ill"])
def test_polar_is_the_polar_factor(name: str) -> None:
    A = matrix(name, 40, 64)
    X, nuclear_norm, rank = ops.polar(A)
    torch.testing.assert_close(X @ X.mT, torch.eye(40, dtype=X.dtype), rtol=0, atol=1e-4)
    torch.testing.assert_close((X * A).sum(), nuclear_norm)  # <X, A> = ||A||_*
    product = X.mT @ A
    assert relative(product, product.mT) < 1e-4  # Xᵀ A is symmetric, which orthogonality alone does not give
    assert rank == 40


def test_polar_of_float64_keeps_float64_accuracy() -> None:
    A = matrix("decay", 50, 50)
    assert relative(ops.polar(A).factor, ops.polar(A, backend="reference").factor) < 1e-9
    assert ops.polar(A).factor.dtype == torch.float64


@pytest.mark.parametrize("side", [64, 200])
def test_singular_values_at_the_null_threshold(side: int) -> None:
    below, above = ops.RANK_RTOL / 2, ops.RANK_RTOL * 4
    S = torch.cat([torch.ones(side - 2), torch.tensor([above, below])]).double()
    A = (orthonormal(side, side, 1) * S) @ orthonormal(side, side, 2).mT
    for backend in ON_CPU:
        assert ops.polar(A, backend=backend).rank == side - 1
        assert ops.polar(A, backend=backend, rtol=1e-8).rank == side


def test_float64_svds_wait_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes memory that a plan counts once."""
    S = torch.logspace(0, -7, 60, dtype=torch.float64)
    ill = torch.stack([(orthonormal(60, 60, seed) * S) @ orthonormal(60, 60, seed + 4).mT for seed in range(4)])
    inside, most, calls, svd = 0, 0, 0, torch.linalg.svd

    def counted(matrix: Tensor, **options: bool) -> object:
        nonlocal inside, most, calls
        inside, calls = inside + 1, calls + 1
        most = max(most, inside)
        time.sleep(0.02)
        result = svd(matrix, **options)
        inside -= 1
        return result

    monkeypatch.setattr(torch.linalg, "svd", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        ops.polar(ill, rtol=0.0, backend="eager")
    finally:
        torch.set_num_threads(before)
    assert (calls, most) == (4, 1)


def test_float64_svd_answers_only_for_ill_conditioned_input(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    svd = torch.linalg.svd

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    for name in SPECTRA:
        ops.polar(matrix(name, 60, 60).float())
        ops.rsvd(matrix(name, 60, 60).float(), 20)
    assert not calls
    S = torch.logspace(0, -7, 60, dtype=torch.float64)
    ill = (orthonormal(60, 60, 1) * S) @ orthonormal(60, 60, 2).mT
    expected = ops.polar(ill, backend="reference", rtol=0.0).factor
    calls.clear()
    assert relative(ops.polar(ill, rtol=0.0).factor, expected) < 1e-7
    assert calls, "condition number 1e7 is beyond a Gram matrix in float64"


@cases
@spectra
@backends
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_rsvd_against_float64(shape: tuple[int, int], name: str, backend: str, share: float) -> None:
    A = matrix(name, *shape).float()
    k = int(share * min(shape))
    U, S, Vh = ops.rsvd(A, k, backend=backend)
    expected = ops.rsvd(A, k, backend="reference")
    assert U.shape == expected.U.shape
    assert Vh.shape == expected.Vh.shape
    largest = torch.linalg.matrix_norm(A.double(), ord=2)
    torch.testing.assert_close(S.double(), expected.S.double(), rtol=0, atol=1e-6 * largest.item())
    # where singular values repeat, the triplets are not unique, but the distance to A is
    best = torch.linalg.vector_norm(A.double() - (expected.U * expected.S) @ expected.Vh)
    distance = torch.linalg.vector_norm(A.double() - ((U * S) @ Vh).double())
    assert distance <= best + 1e-5 * largest
    small = U if shape[0] <= shape[1] else Vh.mT
    torch.testing.assert_close(small.mT @ small, torch.eye(k), rtol=0, atol=1e-4)
    large = Vh.mT if shape[0] <= shape[1] else U
    torch.testing.assert_close(large.mT @ large, torch.diag((S > 0).float()), rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", [(200, 200), (400, 200), (200, 400)], ids=["square", "tall", "wide"])
@pytest.mark.parametrize("share", [0.02, 0.125, 0.8])
@pytest.mark.parametrize("precision", ["default", "exact"])
def test_leading_subspaces_are_as_good_as_the_float32_svd(shape: tuple[int, int], share: float, precision: str) -> None:
    generator = torch.Generator().manual_seed(3)
    A = (matrix("decay", *shape) + 1e-3 * torch.randn(shape, generator=generator)).float()
    k = int(share * min(shape))
    U, _, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    u, _, vh = torch.linalg.svd(A, full_matrices=False)
    left, right = projector(U[:, :k]), projector(Vh[:k].mT)
    result = ops.rsvd(A, k, precision=precision)
    for mine, theirs, exact in ((result.U, u[:, :k], left), (result.Vh.mT, vh[:k].mT, right)):
        bound = 1e-5 if precision == "exact" else max(2 * relative(projector(theirs), exact), 3e-5)
        assert relative(projector(mine), exact) <= bound
    for side, exact in (("left", left), ("right", right)):
        Q = ops.subspace(A, k, side=side, precision=precision)
        assert relative(projector(Q), exact) <= 1e-4


@backends
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)], ids=["wide", "tall", "square"])
def test_rsvd_deflated_equals_rsvd_of_the_residual(shape: tuple[int, int], backend: str) -> None:
    A, Q = matrix("decay", *shape), orthonormal(shape[0], 7, 9)
    expected = ops.rsvd(A - Q @ (Q.mT @ A), 5, backend="reference")
    result = ops.rsvd(A, 5, deflate=Q, backend=backend)
    assert relative((result.U * result.S) @ result.Vh, (expected.U * expected.S) @ expected.Vh) < 1e-6
    assert (Q.mT @ result.U).abs().max() < 1e-6


@backends
def test_rsvd_absolute_threshold_is_per_matrix(backend: str) -> None:
    A = torch.stack([matrix("decay", 20, 30), 10 * matrix("decay", 20, 30)])
    S = ops.rsvd(A, 20, atol=torch.tensor([0.1, 0.1]), backend=backend).S
    assert (S[0] > 0).sum() < (S[1] > 0).sum() < 20
    assert S[S > 0].min() > 0.1


def test_block_krylov_answers_for_few_directions_of_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(3, 300, 320, generator=generator)  # plain power iteration fails here
    monkeypatch.setattr(eager, "KRYLOV_MIN_SIDE", 200)
    monkeypatch.setattr(eager, "leading", None)  # must not be asked
    for A in (flat, flat.mT, flat + 3 * matrix("rank_one", 300, 320)):
        expected = ops.rsvd(A, 5, backend="reference")
        result = ops.rsvd(A, 5)
        assert relative(result.S, expected.S) < 1e-6
        truncated, exact = ((svd.U * svd.S.unsqueeze(-2)) @ svd.Vh for svd in (result, expected))
        assert relative(truncated, exact) < 2e-4
        assert torch.equal(result.U, ops.rsvd(A, 5).U)
        assert relative(ops.rsvd(A, 5, seed=1).S, expected.S) < 1e-6


@pytest.mark.parametrize("shape", [(200, 200), (400, 200), (200, 400)], ids=["square", "tall", "wide"])
def test_filtered_iteration_answers_for_few_directions(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    A, Q = torch.randn(2, *shape, generator=generator), orthonormal(shape[0], 50, 1).float()
    expected = ops.rsvd(A, 8, deflate=Q, backend="reference")
    monkeypatch.setattr(eigen, "FILTER_MIN_SIDE", 100)
    asked = []

    def counted(*args: object, **kwargs: object) -> object:
        asked.append(chebyshev_subspace(*args, **kwargs))
        return asked[-1]

    monkeypatch.setattr(eigen, "chebyshev_subspace", counted)
    result = ops.rsvd(A, 8, deflate=Q)
    assert len(asked) == 2
    assert all(X is not None for X in asked)
    truncated, exact = ((svd.U * svd.S.unsqueeze(-2)) @ svd.Vh for svd in (result, expected))
    assert relative(truncated, exact) < 2e-5


@backends
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("name", ["decay", "rank_one", "zero"])
def test_subspace_is_orthonormal_and_completed(shape: tuple[int, int], name: str, backend: str) -> None:
    A = matrix(name, *shape).float()
    for k in (0, 3, shape[0]):
        for full in (False, True):
            Q = ops.subspace(A, k, full=full, backend=backend)
            assert Q.shape == (shape[0], shape[0] if full else k)
            torch.testing.assert_close(Q.mT @ Q, torch.eye(Q.shape[1]), rtol=0, atol=1e-5)
    U = torch.linalg.svd(matrix("decay", *shape)).U[:, :3]
    if name == "decay":
        assert relative(projector(ops.subspace(A, 3, full=True, backend=backend)[:, :3]), projector(U)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@backends
def test_dtypes_are_computed_from_the_exact_input_values(dtype: torch.dtype, backend: str) -> None:
    A = matrix("repeated", 30, 20).to(dtype)
    result = ops.polar(A, backend=backend)
    assert result.factor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(result.factor, ops.polar(A.double(), backend="reference").factor) < 1e-5


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e20, 1e30])
def test_results_do_not_depend_on_the_scale(scale: float) -> None:
    A = torch.stack([matrix("decay", 30, 60), matrix("flat", 30, 60)]).float()
    B = A * torch.tensor([1.0, scale])[:, None, None]
    polar = ops.polar(B)
    assert relative(polar.factor, ops.polar(A).factor) < 1e-4
    torch.testing.assert_close(
        polar.nuclear_norm, ops.polar(A).nuclear_norm * torch.tensor([1.0, scale]), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(ops.rsvd(B, 4).S[1], ops.rsvd(A, 4).S[1] * scale, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(37, 37), (71, 23), (23, 71)], ids=["square", "tall", "wide"])
def test_batched_equals_one_by_one_bit_for_bit(shape: tuple[int, int]) -> None:
    stack = torch.stack([matrix("decay", *shape, seed=i) for i in range(6)]).reshape(2, 3, *shape).float()
    polar, svd, Q = ops.polar(stack), ops.rsvd(stack, 4), ops.subspace(stack, 5)
    product = ops.matmul(stack, stack.mT)
    for i in range(2):
        for j in range(3):
            assert torch.equal(ops.polar(stack[i, j]).factor, polar.factor[i, j])
            assert torch.equal(ops.rsvd(stack[i, j], 4).U, svd.U[i, j])
            assert torch.equal(ops.subspace(stack[i, j], 5), Q[i, j])
            assert torch.equal(ops.matmul(stack[i, j], stack[i, j].mT), product[i, j])


def test_strided_inputs_and_inputs_left_alone() -> None:
    storage = torch.stack([matrix("decay", 40, 60, seed=i) for i in range(2)]).float()
    strided = storage.expand(3, 2, 40, 60)[::2, :, ::2, 1::3]
    before = strided.clone()
    for op in (ops.polar, lambda A: ops.rsvd(A, 3), lambda A: ops.subspace(A, 3), lambda A: ops.matmul(A, A.mT)):
        result, expected = op(strided), op(before.contiguous())
        for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (result, expected)), strict=True):
            torch.testing.assert_close(a, b)
    assert torch.equal(strided, before)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty_stacks(shape: tuple[int, ...]) -> None:
    A = torch.empty(shape)
    assert ops.polar(A).factor.shape == shape
    assert ops.polar(A).nuclear_norm.shape == shape[:1]
    assert ops.rsvd(A, 0).U.shape == (*shape[:2], 0)
    assert ops.subspace(A, shape[1]).shape == (*shape[:2], shape[1])
    assert ops.matmul(A, A.mT).shape == (*shape[:2], shape[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A: ops.polar(A[0]), r"polar: expected A of shape \[..., m, n\], got \(5,\)"),
        (lambda A: ops.polar(A.long()), "polar: expected float16, bfloat16, float32 or float64, got torch.int64"),
        (lambda A: ops.polar(A / 0 - A / 0), "polar: A holds 20 non-finite values"),
        (lambda A: ops.rsvd(A * float("inf"), 2), "rsvd: A holds 20 non-finite values"),
        (lambda A: ops.polar(A, precision="best"), "precision must be one of fast, default, exact, got 'best'"),
        (
            lambda A: ops.polar(A, backend="cuda13"),
            "polar: unknown backend 'cuda13'; expected one of: auto, triton, cuda, native, eager",
        ),
        (lambda A: ops.rsvd(A, 5), r"rsvd: k must be within 0..min\(m, n\) = 4"),
        (lambda A: ops.rsvd(A, -1), "rsvd: k must be within 0"),
        (lambda A: ops.rsvd(A, 2, deflate=A.mT), r"rsvd: deflate must be \[..., 4, q\], got \(5, 4\)"),
        (lambda A: ops.subspace(A, 5), r"subspace: k must be within 0..4"),
        (lambda A: ops.subspace(A, 2, side="up"), 'subspace: side must be "left" or "right", got \'up\''),
        (lambda A: ops.matmul(A, A), r"matmul: expected \[..., m, l\] and \[..., l, n\], got \(4, 5\) and \(4, 5\)"),
    ],
)
def test_wrong_calls_say_what_was_expected(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4, 5))


def test_an_explicit_backend_runs_or_explains(monkeypatch: pytest.MonkeyPatch) -> None:
    row = BACKENDS["eager"]._replace(devices=("cuda",), ops=("polar",))
    monkeypatch.setattr("isomerge.backends.BACKENDS", {"gpu": row, **BACKENDS})
    monkeypatch.setattr("isomerge.backends.eager.availability", lambda: None, raising=False)
    with pytest.raises(ops.BackendUnavailable, match=r"polar\[gpu\] cannot run: expected a tensor on cuda, got cpu"):
        ops.polar(torch.ones(2, 2), backend="gpu")
    with pytest.raises(
        ops.BackendUnavailable, match="gpu does not provide matmul; it is provided by: triton, eager, reference"
    ):
        ops.matmul(torch.ones(2, 2), torch.ones(2, 2), backend="gpu")
    assert ops.polar(torch.ones(2, 2)).rank == 1  # auto goes on to one that can


def test_the_table_lists_every_cell() -> None:
    assert [(op, backend) for op, backend, _ in table()] == [(op, backend) for op in OPS for backend in BACKENDS]
    for _, backend, reason in table():
        if backend != "native":  # where it is built
            assert (reason is None) == (BACKENDS[backend].devices is None)


def test_a_backend_for_another_device_says_what_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    backends_module._unavailable.cache_clear()
    monkeypatch.setattr("isomerge.backends.triton.availability", lambda: "no device was found")
    with pytest.raises(ops.BackendUnavailable, match=r"polar\[triton\] cannot run: no device was found\. Use"):
        ops.polar(torch.ones(2, 2), backend="triton")
    backends_module._unavailable.cache_clear()


def test_auto_does_not_load_backends_of_other_devices() -> None:
    code = "import sys, torch; from isomerge import ops; ops.polar(torch.ones(2, 2)); "
    code += "assert not {'triton', 'isomerge.backends.triton', 'isomerge.backends.cuda'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_triangular_gram_equals_the_plain_product() -> None:
    B = torch.randn(50, 2 * eigen.BLOCK + 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(eigen.gram(B), B.mT @ B, rtol=0, atol=1e-12)

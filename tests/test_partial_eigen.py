"""The leading eigenvectors in float64: hostile spectra, one thread a call, and what answers where there is no scipy."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time

import pytest
import test_ops
import torch
from spectra import SPECTRA, matrix, orthonormal, projector, relative, spectrum
from torch import Tensor

from isomerge import ops
from isomerge.backends import eigen, lapack, partial_eigen
from isomerge.backends.partial_eigen import FAITHFUL, INVERSE_SHARE, leading_eigenvectors
from isomerge.backends.side_by_side import side_by_side

SIDE = 200
EPS = torch.finfo(torch.float64).eps
SHARES = {"one": 1, "few": 20, "at the switch": int(SIDE * INVERSE_SHARE), "beyond it": SIDE // 2, "all": SIDE}

needs_scipy = pytest.mark.skipif(lapack.availability() is not None, reason=str(lapack.availability()))


def eigenvalues(name: str) -> Tensor:
    """[SIDE] of a Gram matrix, descending; beside the spectra of the ops what trouble eigensolvers have."""
    more = {
        "low rank": torch.cat([torch.logspace(0, -1, 16), torch.zeros(SIDE - 16)]),
        "cluster": torch.cat([torch.full((10,), 2.0), 1 + 1e-9 * torch.arange(60), torch.full((SIDE - 70,), 0.5)]),
        "groups": torch.logspace(0, -3, SIDE // 8).repeat_interleave(8),
        "tiny": torch.logspace(-40, -46, SIDE, dtype=torch.float64),
        "huge": torch.logspace(36, 30, SIDE, dtype=torch.float64),
    }
    values = more[name] if name in more else spectrum(name, SIDE).square()
    return values.double().sort(descending=True).values


@needs_scipy
@pytest.mark.parametrize("name", [*SPECTRA, "low rank", "cluster", "groups", "tiny", "huge"])
@pytest.mark.parametrize("k", SHARES.values(), ids=SHARES)
def test_vectors_are_orthonormal_and_residuals_are_those_of_float64(
    name: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name != "zero":  # which inverse iteration leaves to torch
        monkeypatch.setattr(partial_eigen, "eigh", None)
    expected, V = eigenvalues(name), orthonormal(SIDE, SIDE, 3)
    G = (V * expected) @ V.mT
    before = G.clone()
    values, X = leading_eigenvectors(G, k)
    assert torch.equal(G, before)
    assert X.shape == (SIDE, k)
    rounding = SIDE * EPS * expected[0]  # LAPACK's backward error, and that of forming G
    assert (values.flip(0) - expected).abs().max() <= rounding
    assert (X.mT @ X - torch.eye(k)).abs().max() <= FAITHFUL + SIDE * EPS
    assert (G @ X - X * values[SIDE - k :]).abs().max() <= FAITHFUL * expected[0] + rounding


@needs_scipy
@pytest.mark.parametrize(
    "G", [torch.eye(SIDE), torch.ones(SIDE, SIDE), torch.block_diag(*[torch.ones(20, 20)] * 10)], ids="IJB"
)
def test_tridiagonal_forms_that_fall_apart(G: Tensor) -> None:
    for k in SHARES.values():
        values, X = leading_eigenvectors(G, k)
        assert (X.mT @ X - torch.eye(k)).abs().max() <= FAITHFUL + SIDE * EPS
        assert (G.double() @ X - X * values[SIDE - k :]).abs().max() <= (FAITHFUL + SIDE * EPS) * values[-1]


@pytest.mark.parametrize("k", SHARES.values(), ids=SHARES)
def test_nan_is_not_answered(k: int) -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        leading_eigenvectors(torch.full((SIDE, SIDE), torch.nan), k)


@needs_scipy
def test_bits_do_not_depend_on_the_workers_and_the_threads_of_blas_are_put_back() -> None:
    library = lapack._library()
    stack = torch.stack([matrix("decay", SIDE, SIDE, seed=i) for i in range(5)]).float()
    before, blas = torch.get_num_threads(), library._get()
    library._set(2)
    try:
        results = []
        for workers in (1, 2, 3):
            torch.set_num_threads(workers)
            results += [ops.rsvd(stack, k) for k in (25, 25)]
            assert library._get() == 2
        single = torch.stack([ops.rsvd(A, 25).U for A in stack])
        assert all(torch.equal(result.U, single) for result in results)
        with library:
            leading_eigenvectors(stack[0] @ stack[0].mT, 25)
            assert library._get() == 1, "not before the last one is out"
        assert library._get() == 2
    finally:
        library._set(blas)
        torch.set_num_threads(before)


@needs_scipy
def test_other_threads_go_on_during_a_call() -> None:
    r = 1000
    A, spare = torch.eye(r, dtype=torch.float64) + 1, torch.empty(67, r, dtype=torch.float64)
    times, ended = [], threading.Event()

    def reduce() -> None:
        started = time.perf_counter()
        lapack.call("dsytrd", "U", r, A, r, spare[0], spare[1], spare[2], spare[3:], 64 * r)
        times.append(time.perf_counter() - started)
        ended.set()

    thread = threading.Thread(target=reduce)
    thread.start()
    longest, last = 0.0, time.perf_counter()
    while True:
        over, now = ended.is_set(), time.perf_counter()
        longest, last = max(longest, now - last), now
        if over:
            break
    thread.join()
    assert longest < times[0] / 2


def solved_by_a_child(queue: multiprocessing.Queue, G: Tensor) -> None:
    values = side_by_side(lambda G: leading_eigenvectors(G, 3)[0], [G])[0]  # on a worker, as every op does
    queue.put(float(values[-1]))


@needs_scipy
def test_a_forked_child_has_locks_of_its_own() -> None:
    G = torch.diag(torch.arange(SIDE, dtype=torch.float64))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    library = lapack._library()
    with lapack._loading, library._lock:  # as a worker may hold them
        child = context.Process(target=solved_by_a_child, args=(queue, G))
        child.start()
    assert queue.get(timeout=60) == pytest.approx(SIDE - 1)
    child.join(60)


@pytest.mark.parametrize("shape", [(200, 200), (400, 200), (200, 400)], ids=["square", "tall", "wide"])
@pytest.mark.parametrize("share", [0.125, 0.8])
def test_without_partial_solves_a_corrected_float32_eigensolve_is_as_good(
    shape: tuple[int, int], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eigen, "partial", lambda *_: False)
    monkeypatch.setattr(partial_eigen, "partial", lambda *_: False)
    test_ops.test_leading_subspaces_are_as_good_as_the_float32_svd(shape, share, "default")


@needs_scipy
@pytest.mark.parametrize("k", [25, 150])
def test_a_float32_gram_that_is_too_coarse_is_formed_again_in_float64(k: int) -> None:
    S = torch.cat([torch.logspace(0, -2, k), torch.full((SIDE - k,), 0.00995)]).double()
    U, V = orthonormal(SIDE, SIDE, 1), orthonormal(SIDE, SIDE, 2)
    A = ((U * S) @ V.mT).float()
    exact = torch.linalg.svd(A.double()).U[:, :k]
    assert relative(projector(ops.rsvd(A, k).U), projector(exact)) <= 3e-5


CODE = """
import sys, torch
sys.modules["scipy"] = None
from isomerge import ops
from isomerge.backends import lapack
A = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
U, S, Vh = ops.rsvd(A, 25)
u, s, vh = torch.linalg.svd(A.double())
exact = (u[:, :25] * s[:25]) @ vh[:25]
assert torch.linalg.vector_norm((U * S) @ Vh - exact) < 1e-4 * torch.linalg.vector_norm(exact)
assert "scipy" in lapack.availability(), lapack.availability()
"""


def test_without_scipy_torch_answers() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

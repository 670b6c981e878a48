"""Every op on a GPU, on every backend that answers there, against the float64 reference on the CPU.

Tolerances: twice what torch's float32 does with the same input, or 1e-4 for what comes from singular vectors, 1e-6 for
sums over many tokens and float32's eps for the other products.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import papers
import pytest
import torch
from spectra import matrix, relative
from torch import Tensor

from isomerge import methods, ops
from isomerge.backends import BACKENDS, refusal

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
KERNELS = [backend for backend, row in BACKENDS.items() if row.devices == (DEVICE,)]
CELLS = [(op, backend) for backend in (*KERNELS, "eager") for op in BACKENDS[backend].ops]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EPS = torch.finfo(torch.float32).eps
FLOOR = {"shift_cov": 1e-6, "project_scale": EPS, "delta_sum": EPS, "finalize": EPS, "matmul": EPS}  # others 1e-4
LARGE = tuple(FLOOR)  # the ops that are also called on more than 2^31 elements
FLOOR |= {
    "subtract": 1e-6,
    "frobenius": 1e-6,
    "count_digits": 0,
    "kth_largest": 0,
    "votes": 0,
    "elect": EPS,
    "drop": EPS,
}

LAYOUTS = {  # odd sizes, sizes that are and are not multiples of tiles
    "square": lambda kind: matrix(kind, 128, 128),
    "tall": lambda kind: matrix(kind, 201, 65),
    "wide": lambda kind: matrix(kind, 65, 201),
    "row": lambda kind: matrix(kind, 1, 40),
    "stack": lambda kind: torch.stack([matrix(kind, 70, 33, seed=i) for i in range(6)]).reshape(2, 3, 70, 33),
    "strided": lambda kind: torch.stack([matrix(kind, 131, 130, seed=i) for i in range(2)])[..., ::2, 1::3],
    "transposed": lambda kind: matrix(kind, 65, 129).mT,
}

INPUTS = [(dtype, layout, "decay") for dtype in DTYPES for layout in LAYOUTS]
INPUTS += [(torch.float32, layout, kind) for layout in LAYOUTS for kind in ("rank_one", "zero")]

cells = pytest.mark.parametrize(("op", "backend"), CELLS, ids=[f"{op}-{backend}" for op, backend in CELLS])


def answers(op: str, A: Tensor, backend: str) -> tuple[Tensor, ...]:
    """What `op` makes of A [..., m, n], in terms that are unique whatever the signs and rotations of vectors."""
    m, n = A.shape[-2:]
    k = (min(m, n) + 3) // 4
    wide = A.to(torch.promote_types(A.dtype, torch.float32))
    scale = torch.linspace(0.5, 2, n, device=A.device, dtype=wide.dtype).expand(*A.shape[:-2], n)
    if op == "polar":
        return ops.polar(A, backend=backend)[:2]
    if op == "polar_product":
        return ops.polar_product(A, A.mT, scale=scale, backend=backend)[:2]
    if op == "rsvd":
        U, S, Vh = ops.rsvd(A, k, backend=backend)
        return (U * S.unsqueeze(-2)) @ Vh, S
    if op == "subspace":
        Q = ops.subspace(A, k, backend=backend)
        return Q @ (Q.mT @ wide), Q.mT @ Q
    if op == "principal":
        vectors, values = ops.principal(wide.mT @ wide, k, delta=A, backend=backend)
        return (vectors * values.unsqueeze(-2)) @ vectors.mT.double(), values
    if op == "shift_cov":
        delta = wide[..., : max(1, m // 2), :].flip(-1).to(A.dtype)
        return ops.shift_cov(A, backend=backend), ops.shift_cov(A, delta, backend=backend)
    if op == "project_scale":
        W = torch.stack([A, A.flip(-1), A.flip(-2)], -3)
        return ops.project_scale(W[..., :k], W, scale[..., None, :k].expand(*W.shape[:-2], k), backend=backend)
    if op == "delta_sum":
        return ops.delta_sum(torch.stack([A.flip(-1), A.flip(-2), A], -3), A * 0.5, backend=backend)
    if op == "finalize":
        each = torch.full(A.shape[:-2], 1.3, device=A.device)
        return (
            ops.finalize(A, wide.flip(-1), each, out_dtype=torch.bfloat16, backend=backend),
            ops.finalize(A, wide.flip(-1), 0.7, out_dtype=torch.float32, backend=backend),
        )
    if op == "subtract":
        deltas, base = wide.new_empty(2, *A.shape), torch.empty_like(wide)
        square = ops.subtract(A, (A.flip(-1), A.flip(-2)), [0.7, 1.0], base_out=base, out=deltas, backend=backend)
        return deltas, base, wide.new_tensor(square)
    if op == "frobenius":
        return (wide.new_tensor(ops.frobenius(A, backend=backend)),)
    if op == "kth_largest":
        return tuple(ops.kth_largest(wide.flatten(), k, backend=backend) for k in (1, wide.numel() // 3 + 1))
    if op == "count_digits":
        exact = A.flatten().float()  # digits are of a dtype
        counts = ops.count_digits(exact, backend=backend)
        return counts, ops.count_digits(exact, (int(counts.argmax()),), backend=backend)
    if op in ("votes", "elect"):
        deltas = torch.stack([A.flip(-1).flatten(), A.flip(-2).flatten(), A.flatten()])
        limits = deltas.abs().float().mean(1)
        votes = ops.votes(deltas, limits, backend=backend)
        return (votes if op == "votes" else ops.elect(deltas, limits, 1, backend=backend),)
    if op == "drop":
        return (ops.drop(A.flatten(), 0.3, seed=2**63 + 5, first=2**40, backend=backend),)
    assert op == "matmul"
    return (ops.matmul(A, A.mT, backend=backend),)


def torch32(op: str, A: Tensor) -> tuple[Tensor, ...]:
    """The same by torch in float32 on the CPU: its SVD for polar factors, else the eager backend."""
    if op not in ("polar", "polar_product"):
        return answers(op, A.float() if A.dtype == torch.float64 else A, "eager")
    U, S, Vh = torch.linalg.svd(A.float(), full_matrices=False)
    kept = S * (S > ops.RANK_RTOL * S[..., :1])
    factor, norm = (U * (kept > 0).unsqueeze(-2)) @ Vh, kept.sum(-1)
    scale = torch.linspace(0.5, 2, A.shape[-1])
    return (factor, norm) if op == "polar" else ((factor * scale) @ factor.mT, torch.stack([norm, norm], -1))


def check(op: str, A: Tensor, actual: tuple[Tensor, ...]) -> None:
    """Holds the answers for A [..., m, n], on any device, to the tolerance."""
    A = A.cpu()
    for i, (mine, exact, theirs) in enumerate(
        zip(actual, answers(op, A.double(), "reference"), torch32(op, A), strict=True)
    ):
        assert mine.shape == exact.shape
        allowed = max(2 * relative(theirs, exact), FLOOR.get(op, 1e-4))
        assert relative(mine.cpu(), exact) <= allowed, f"{op}, answer {i}"


def run(op: str, A: Tensor, backend: str) -> tuple[Tensor, ...]:
    """The answers; skips where the backend says why it has none, which it may do for float64 alone."""
    reason = refusal(op, backend, torch.device(DEVICE))
    if reason is not None:
        pytest.skip(reason)
    try:
        return answers(op, A, backend)
    except (ops.BackendUnavailable, ValueError) as error:
        if A.dtype == torch.float64 and f"[{backend}]" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills what `torch.empty` returns with NaN, so that what a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def test_empty_tensors_are_poisoned(poisoned: None) -> None:
    assert bool(torch.empty(1000, device=DEVICE).isnan().all())


@pytest.mark.filterwarnings("ignore")  # of operations that are not deterministic
@cells
@pytest.mark.parametrize(("dtype", "layout", "kind"), INPUTS)
def test_against_float64(op: str, backend: str, dtype: torch.dtype, layout: str, kind: str, poisoned: None) -> None:
    A = LAYOUTS[layout](kind).to(DEVICE, dtype)
    before = A.clone()
    check(op, A, run(op, A, backend))
    assert torch.equal(A, before)


@cells
def test_runs_give_the_same_bits(op: str, backend: str) -> None:
    A = torch.stack([matrix("decay", 300, 200, seed=i) for i in range(3)]).to(DEVICE, torch.float32)
    for first, second in zip(run(op, A, backend), run(op, A, backend), strict=True):
        assert torch.equal(first, second)


@cells
def test_a_side_stream_needs_nothing_of_the_default_stream(op: str, backend: str) -> None:
    A, side = matrix("decay", 130, 70).to(DEVICE, torch.float32), torch.cuda.Stream()
    expected = run(op, A, backend)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        run(op, A, backend)  # handles and memory of this stream
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.default_stream()):
            torch.cuda._sleep(10**9)  # half a second
        actual = run(op, A, backend)
        side.synchronize()
        busy = not torch.cuda.default_stream().query()
        same = [torch.equal(mine, theirs) for mine, theirs in zip(actual, expected, strict=True)]
    torch.cuda.synchronize()
    assert all(same)
    assert busy, "the default stream was waited for"


@pytest.mark.parametrize("backend", KERNELS)
def test_tensors_on_the_cpu_are_refused_with_the_reason(backend: str) -> None:
    for op in BACKENDS[backend].ops:
        reason = refusal(op, backend, torch.device(DEVICE))
        expected = "expected a tensor on cuda, got cpu" if reason is None else re.escape(reason)
        with pytest.raises(ops.BackendUnavailable, match=rf"{op}\[{backend}\] cannot run: {expected}"):
            answers(op, matrix("decay", 20, 12).float(), backend)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsvm", "esm"])
@pytest.mark.parametrize("shape", [(96, 96), (200, 64), (64, 200)], ids=["square", "tall", "wide"])
def test_methods_on_the_gpu_are_as_good_as_the_papers_code(method: str, shape: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(0)
    deltas = torch.randn(2, 4, *shape, generator=random)
    X = torch.randn(2, 4, 150, shape[1], generator=random) * torch.logspace(0, -1, shape[1])
    given = (deltas, X.mT @ X) if method == "esm" else (deltas,)
    actual = getattr(methods, method)(*(part.to(DEVICE) for part in given)).cpu()

    def published(i: int, dtype: torch.dtype) -> Tensor:
        if method == "esm":
            return papers.esm(deltas[i].to(dtype), X[i].to(dtype))
        return papers.METHODS[method](deltas[i].to(dtype))

    for i in range(2):
        exact = published(i, torch.float64)
        assert relative(actual[i], exact) <= max(2 * relative(published(i, torch.float32), exact), 1e-4)


# ---- offsets of more than 31 bits
ROWS, COLUMNS = 2**16 + 1, 2**15 + 8
"""A matrix of more than 2³¹ elements, in neither side a multiple of a tile."""


def large_problem(op: str, backend: str) -> tuple[Tensor, Tensor]:
    """(what the op computes at the far end of its tensors, the same in float64)."""
    if op in ("delta_sum", "finalize"):
        base = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device=DEVICE).normal_()
        if op == "finalize":
            update = torch.empty(ROWS, COLUMNS, device=DEVICE).normal_()
            merged = ops.finalize(base, update, 0.3, out_dtype=torch.float32, backend=backend)
            return merged[-9:], base[-9:].double() + 0.3 * update[-9:].double()
        tuned = torch.empty(2, ROWS, COLUMNS, dtype=torch.bfloat16, device=DEVICE).normal_()
        total = ops.delta_sum(tuned, base, backend=backend).sum
        return total[-9:], (tuned[:, -9:].double() - base[-9:].double()).sum(0)
    if op == "shift_cov":
        X = torch.empty(2**31 // 250, 251, dtype=torch.bfloat16, device=DEVICE).normal_()
        exact = sum((part.double().mT @ part.double() for part in X.split(2**20)), torch.zeros(()).to(DEVICE))
        return ops.shift_cov(X, backend=backend), torch.as_tensor(exact)
    if op == "project_scale":
        Q, W = (torch.empty(2, ROWS, width, device=DEVICE).normal_() for width in (17, COLUMNS))
        rows, _ = ops.project_scale(Q, W, torch.ones(2, 17, device=DEVICE), backend=backend)
        return rows[..., -9:], (Q.double().mT @ W[..., -9:].double()).flatten(0, 1)
    A, B = torch.randn(ROWS, 64, device=DEVICE), torch.randn(64, COLUMNS, device=DEVICE)
    return ops.matmul(A, B, backend=backend)[-9:], A[-9:].double() @ B.double()


LARGE_CELLS = [cell for cell in CELLS if cell[0] in LARGE]


@pytest.mark.parametrize(("op", "backend"), LARGE_CELLS, ids=[f"{op}-{backend}" for op, backend in LARGE_CELLS])
def test_offsets_beyond_31_bits(op: str, backend: str) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 80e9:
        pytest.skip("needs 80 GB of free memory")
    reason = refusal(op, backend, torch.device(DEVICE))
    if reason is not None:
        pytest.skip(reason)
    actual, exact = large_problem(op, backend)
    # Random signs: errors of a sum of K products grow as sqrt(K) eps, as the sum itself does; 1e-5 is far from a wrong
    # element, of error 1.
    assert relative(actual, exact) <= 1e-5


# ---- compute-sanitizer
OUTSIDE = """
import torch, triton, triton.language as tl
@triton.jit
def outside(x):
    tl.store(x + tl.arange(0, 64), 1.0)
outside[(1,)](torch.zeros(8, device="cuda"))
torch.cuda.synchronize()
"""
FOUND = 86


def small_calls(backend: str) -> None:
    """Every op of a backend once on small matrices, for the tools that slow a program down a hundred times."""
    A = matrix("decay", 67, 35).to(DEVICE, torch.float32)
    for op in BACKENDS[backend].ops:
        answers(op, A, backend)
    if backend == "cuda":
        from isomerge.backends import cuda

        G = (A.mT @ A).double()
        cuda.cholesky_inverse(G)
        cuda.small_eigh(G)
    torch.cuda.synchronize()


def sanitized(tool: str, script: Path) -> subprocess.CompletedProcess[str]:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, str(script)]
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent, here.parent / "benchmarks")))
    # without torch's caching each tensor is an allocation, whose ends the tool knows
    environment = {**os.environ, "PYTHONPATH": paths, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    if "not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device or its driver")
    return done


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("backend", KERNELS)
def test_sanitizer_finds_nothing(tool: str, backend: str, tmp_path: Path) -> None:
    reason = refusal("shift_cov", backend, torch.device(DEVICE))
    if reason is not None:
        pytest.skip(reason)
    script = tmp_path / "calls.py"
    script.write_text(f"import test_gpu\ntest_gpu.small_calls({backend!r})\n")
    done = sanitized(tool, script)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_sanitizer_finds_a_store_outside(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "outside.py"
    script.write_text(OUTSIDE)
    assert sanitized("memcheck", script).returncode == FOUND


# ---- what tensor cores do
def test_rounding_of_tensor_cores_is_recorded(
    record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """2²⁴ and then 3 in another step of 16: 2²⁴ + 4 if rounded to the nearest, 2²⁴ + 2 if truncated."""
    A, B = (torch.zeros(128, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    A[:, 0], B[0] = 2.0**12, 2.0**12
    A[:, 16:19], B[16:19] = 1.0, 1.0
    value = torch.mm(A, B, out_dtype=torch.float32)[0, 0].item() - 2.0**24
    kind = {2.0: "truncates", 4.0: "rounds to the nearest"}.get(value, f"gives 2^24 + {value:g}")
    record_property("tensor core accumulation", kind)
    with capsys.disabled():
        print(f"\na bfloat16 tensor core {kind} what it adds to its float32 sum")

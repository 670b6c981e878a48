"""The whole merge on a GPU that the CPU plays: devices, streams and memory as CUDA has them, kernels interpreted.

What only a GPU can show is in `test_gpu.py` and, of merges, in `test_place.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import emulate
import played_gpu
import pytest
import tiny
import torch
from played_gpu import Event, Gpu, Played, Stream
from spectra import relative
from test_place import recipe

from isomerge import methods, ops
from isomerge.backends import batched
from isomerge.backends.triton import gemm as gemm_module
from isomerge.merge import merge
from isomerge.methods import METHODS, costs

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(emulate.COMPILER is None, reason="needs g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one"),
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    with played_gpu.played(monkeypatch) as gpu:
        yield gpu


def check(gpu: Gpu) -> None:
    gc.collect()
    assert gpu.complaints == []
    assert gpu.bytes == 0


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_elements_are_merged_to_the_bytes_of_the_cpu(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, method)
    merge(path, tmp_path / "cpu")
    with played_gpu.played(monkeypatch) as gpu:
        report = merge(path, tmp_path / "gpu", device="cuda")
        assert len(gpu.streams) == 3  # default, up, down
        assert report.totals.gpu_peak_bytes == gpu.peak <= report.totals.planned_gpu_bytes
    tiny.assert_same(*(tiny.load_output(tmp_path / out) for out in ("gpu", "cpu")))
    check(gpu)


@pytest.mark.parametrize("method", ["tsvm", "iso_cts", "esm"])
def test_matrices_are_merged_as_on_the_cpu(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path, method)
    merge(path, tmp_path / "cpu")
    with played_gpu.played(monkeypatch) as gpu:
        report = merge(path, tmp_path / "gpu", device="cuda")
    assert report.totals.gpu_peak_bytes == gpu.peak <= report.totals.planned_gpu_bytes
    tiny.assert_near(*(tiny.load_output(tmp_path / out) for out in ("gpu", "cpu", "base")))
    check(gpu)


# ---- memory


@pytest.mark.filterwarnings("ignore:invalid value")  # of what is arbitrary where a matrix is singular
@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 128)], ids=["square", "tall", "wide"])
@pytest.mark.parametrize("method", ["tsvm", "iso_c", "iso_cts", "esm"])
def test_a_method_takes_what_its_plan_says(
    method: str, shape: tuple[int, int], gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of low rank, for which every algorithm is the one that takes most; the tasks of a matrix one after the other."""
    monkeypatch.setattr(batched, "PART_BYTES", 1)
    monkeypatch.setattr(costs, "PART_FLOATS", 0)
    L, T, (m, n) = 2, 3, shape
    random = torch.Generator().manual_seed(0)
    deltas = (torch.randn(L, T, m, 4, generator=random) @ torch.randn(L, T, 4, n, generator=random)).to("cuda")
    X = torch.randn(L, T, 64, n, generator=random)
    given = (deltas, (X.mT @ X).to("cuda")) if method == "esm" else (deltas,)
    gpu.peak = before = gpu.bytes
    update = getattr(methods, method)(*given)
    planned = METHODS[method].gpu_floats
    assert planned is not None
    side = m if method == "esm" else min(m, n)
    # Planes of 32 columns have 64.
    assert 0.4 <= (gpu.peak - before) / 4 / (planned(m, n, T, L) - 4 * L * side**2) <= (1.0 if min(m, n) > 32 else 1.3)
    assert update.shape == (L, m, n)


def test_parts_of_a_stack_are_the_stack(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    A = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(0)).to("cuda")
    Q = ops.subspace(A[:, 0], 2).unsqueeze(1)  # one for three matrices
    whole = ops.rsvd(A, 3, deflate=Q)
    gpu.peak = gpu.bytes
    ops.rsvd(A, 3, deflate=Q)
    together = gpu.peak
    monkeypatch.setattr(batched, "PART_BYTES", 2 * 8 * 12 * 8)
    parts = ops.rsvd(A, 3, deflate=Q)
    gpu.peak = gpu.bytes
    ops.rsvd(A, 3, deflate=Q)
    assert gpu.peak < together
    for part, all_of_it in zip(parts, whole, strict=True):
        assert relative(part.cpu(), all_of_it.cpu()) < 1e-12


def test_what_a_part_is_has_one_meaning() -> None:
    assert 4 * costs.PART_FLOATS == batched.PART_BYTES


# ---- what the played device finds


def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What it says of an average, in an error or in the end."""
    path = recipe(tmp_path, "average")
    with played_gpu.played(monkeypatch) as gpu:
        try:
            merge(path, tmp_path / "out", device="cuda")
        except RuntimeError as error:
            return str(error)
    gc.collect()
    return "; ".join(gpu.complaints)


def test_a_copy_that_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    assert "did not wait for stream 1" in refused(tmp_path, monkeypatch)


def test_a_result_that_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "wait_stream", lambda self, stream: None)
    assert "on stream 2 did not wait for stream 0" in refused(tmp_path, monkeypatch)


def test_memory_that_another_stream_still_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Played, "record_stream", lambda self, stream: None)
    assert "bytes of stream 0 freed before step" in refused(tmp_path, monkeypatch)


def test_a_download_that_the_host_does_not_wait_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "synchronize", lambda self: None)
    assert refused(tmp_path, monkeypatch) == ""
    values = tiny.load_output(tmp_path / "out").values()
    assert all(bool(value.isnan().all()) for value in values if value.is_floating_point())


def test_tensors_of_two_devices(gpu: Gpu) -> None:
    A, B = torch.ones(3, 3, device="cuda:0"), torch.ones(3, 3)
    for calculate in (lambda: A + B, lambda: A @ B, lambda: torch.cat([A, B]), lambda: A.add_(B)):
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            calculate()
    assert (A + torch.tensor(1.0)).device == A.device  # a number
    assert A[[0, 2]].device == A.device
    assert A.cpu().equal(B)
    with pytest.raises(TypeError, match="numpy"):
        A.numpy()
    with pytest.raises(ValueError, match="Pointer argument cannot be accessed"):
        gemm_module._gemm_kernel[(1,)](A, B)

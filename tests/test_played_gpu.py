"""The whole merge on a GPU that the CPU plays: devices, streams and memory as CUDA has them, kernels interpreted.

What only a GPU can show is in `test_gpu.py` and, of merges, in `test_place.py`.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import emulate
import gpu as gpu_benchmark
import gpu_measure
import played_gpu
import pytest
import tiny
import torch
from gpu_setting import Setting
from played_gpu import Event, Gpu, Stream
from spectra import relative
from test_place import recipe
from torch import Tensor

from isomerge import capture, deltas, methods, ops
from isomerge.backends import batched
from isomerge.backends.triton import gemm as gemm_module
from isomerge.merge import merge
from isomerge.methods import METHODS, costs
from isomerge.place import open_place

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


@pytest.mark.parametrize("piece", [deltas.PIECE_ELEMENTS, 1000])
@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_elements_are_merged_to_the_bytes_of_the_cpu(
    method: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas, "PIECE_ELEMENTS", piece)
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


def test_statistics_are_captured_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, base = (torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 16)).eval() for _ in range(2))
    batches = [torch.randn(3, 7, 24) for _ in range(3)]
    expected = capture(model, batches, base=base)
    with played_gpu.played(monkeypatch) as gpu:
        for layer in (*model, *base):
            for name, value in list(layer.named_parameters()):
                layer._parameters[name] = value.detach().to("cuda:0")  # type: ignore[assignment]
        actual = capture(model, batches, base=base)
    del model, base, layer, value
    assert actual.moments.keys() == expected.moments.keys()
    for name, moment in actual.moments.items():
        assert moment.device.type == "cpu"
        assert relative(moment, expected.moments[name].double()) <= 1e-6
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


# ---- what has yet to be measured


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("section", ["ceilings", "primitives", "ops"])
def test_the_benchmark_has_rows_for_every_case(section: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_measure, "FLUSH", 1024)
    clock, setting = gpu_measure.Clock(played_gpu.DEVICE), Setting(played_gpu.DEVICE, quick=True)
    rates = dict.fromkeys(("copy", "bf16", "tf32", "fp32", "fp64"), 1e12)
    cases = [case for case in gpu_benchmark.CASES[section](setting) if section != "ops" or "24x24" in case.shape]
    assert len(cases) >= 5
    for case in cases:
        for row in gpu_measure.rows_of(case, clock, 0.0, rates):
            assert "failure" not in row, row
            assert not row.get("wrong"), row


# ---- what the played device finds


def test_an_upload_that_is_not_waited_for(gpu: Gpu) -> None:
    place = open_place("cuda", "device")
    with place.reading():
        A = place.up(torch.ones(4))
        take = place.mark()
    with pytest.raises(RuntimeError, match=r"aten.add.Tensor on stream 0 did not wait for stream 1"):
        A + 1
    take([A])
    assert (A + 1).cpu().eq(2).all()


def test_a_download_that_does_not_wait(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    place, A = open_place("cuda", "device"), torch.ones(4, device="cuda:0")
    assert place.down(A)().eq(1).all()
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "wait_stream", lambda self, stream: None)
        with pytest.raises(RuntimeError, match="on stream 2 did not wait for stream 0"):
            place.down(A + 1)
    with monkeypatch.context() as patch:
        patch.setattr(Event, "synchronize", lambda self: None)
        assert place.down(A)().isnan().all()


def test_memory_that_another_stream_still_reads(gpu: Gpu) -> None:
    side = torch.cuda.Stream()

    def used(finish: Callable[[Tensor], object]) -> list[str]:
        A = torch.ones(100, device="cuda:0")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            A + 1
        finish(A)
        del A
        found, gpu.complaints = gpu.complaints, []
        return found

    assert used(lambda A: A.record_stream(side)) == []
    assert used(lambda A: torch.cuda.current_stream().wait_stream(side)) == []
    found = used(lambda A: None)
    assert len(found) == 1
    assert re.fullmatch(r"400 bytes of stream 0 freed before step \d+ of 1", found[0])


def test_memory_that_is_written_while_another_stream_reads(gpu: Gpu) -> None:
    side, A = torch.cuda.Stream(), torch.ones(4, device="cuda:0")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        A + 1
    with pytest.raises(RuntimeError, match="on stream 0 writes what stream 1 reads"):
        A.add_(1)


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

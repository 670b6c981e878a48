"""The emulator of tests/cuda_on_cpu finds each fault that it is there to find, and lets the sound kernels pass."""

from __future__ import annotations

import emulate
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(emulate.COMPILER is None, reason="needs g++")

THREADS = 64


@pytest.fixture(scope="module")
def faults() -> emulate.Library:
    return emulate.library("faults.cu")


def run(faults: emulate.Library, entry: str, fault: int) -> Tensor:
    inputs = [emulate.guarded(torch.arange(THREADS).double() + 1)] if entry == "fault_asynchronous" else []

    def compute(order: str) -> list[Tensor]:
        out = emulate.guarded(torch.full((THREADS,), torch.nan, dtype=torch.float64))
        faults.run(entry, out, *inputs, THREADS, fault, None, order=order)
        return [out.clone()]

    return faults.in_every_order(compute)[0]


def test_sound_kernels_compute_what_they_should(faults: emulate.Library) -> None:
    i = torch.arange(THREADS).double()
    assert run(faults, "fault_tree_sum", 0).equal(torch.full_like(i, THREADS * (THREADS + 1) / 2))
    assert faults.launches == [emulate.Launch((1, 1, 1), (THREADS, 1, 1), 8 * THREADS, 7)]
    assert run(faults, "fault_rotate", 0).equal(i.roll(3))
    for entry in ("fault_divergent", "fault_beyond"):
        assert run(faults, entry, 0).equal(i)
    assert run(faults, "fault_asynchronous", 0).equal(i + 1)


def test_warp_wide_instructions(faults: emulate.Library) -> None:
    i = torch.arange(THREADS, dtype=torch.float64)
    sums = i.view(-1, 16).sum(1).repeat_interleave(16)  # of each half warp, by a butterfly
    up = torch.where(i % 32 == 0, sums, sums.roll(1))
    down = torch.where(i % 8 < 4, i + 4, i)  # sections of eight lanes
    votes = 1e8 + 2e8 + 4e8 * (i >= 32)  # the odd lanes, all, and whether lane 33 is in the warp
    assert run(faults, "fault_lanes", 0).equal(sums + 1000 * up + 1e6 * down + votes)


@pytest.mark.parametrize("entry", ["fault_tree_sum", "fault_rotate"])
def test_a_missing_barrier_makes_results_depend_on_the_order(faults: emulate.Library, entry: str) -> None:
    with pytest.raises(AssertionError, match="depends on the order of the threads"):
        run(faults, entry, 1)


@pytest.mark.parametrize(
    ("entry", "fault", "message"),
    [
        ("fault_divergent", 1, "threads that never arrive; 1 of 64 have ended"),
        ("fault_divergent", 2, r"wait at different barriers, faults.cu:\d+ and faults.cu:\d+"),
        ("fault_divergent", 3, "threads that never arrive; 0 of 64 have ended"),
        ("fault_beyond", 1, "access outside of its buffers"),  # shared memory, one past the end
        ("fault_beyond", 2, "access outside of its buffers"),  # global memory, one past the end
        ("fault_beyond", 3, "access outside of its buffers"),  # global memory, before the start
        ("fault_asynchronous", 1, "ends with asynchronous copies in flight"),
        ("fault_asynchronous", 2, "ends with asynchronous copies in flight"),
        ("fault_lanes", 1, "leaves out its caller"),
    ],
)
def test_faults_are_errors_that_say_where(faults: emulate.Library, entry: str, fault: int, message: str) -> None:
    with pytest.raises(emulate.EmulationError, match=r"thread \(\d+, 0, 0\) of block \(0, 0, 0\).*" + message):
        run(faults, entry, fault)
    assert run(faults, entry, 0).isfinite().all()  # and the next launch is not the worse for it


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "code"),
    [(1, 1025, 0, 9), (0, 32, 0, 9), (1, 0, 0, 9), (1, 32, 227 * 1024 + 1, 1)],
)
def test_launches_beyond_the_limits_of_the_hardware_fail(
    faults: emulate.Library, grid: int, block: int, shared_bytes: int, code: int
) -> None:
    with pytest.raises(emulate.EmulationError, match=f"cudaError {code}$"):
        faults.run("fault_limits", grid, block, shared_bytes, None)


def test_guarded_copies_are_copies() -> None:
    for source in (torch.arange(30.0).view(5, 6).mT, torch.ones(3, 0), torch.ones(7, dtype=torch.bfloat16)):
        copy = emulate.guarded(source)
        assert copy.equal(source)
        assert copy.is_contiguous()
        assert copy.data_ptr() != source.data_ptr() or source.numel() == 0

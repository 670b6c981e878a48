"""Launching kernels, host side: tile shapes, devices, batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

PROCESSORS = 132
"""Multiprocessors of an H100 or H200. A constant, so that what a kernel computes depends on shapes alone."""


@dataclass(frozen=True)
class Launch:
    """The tile [rows, columns] that one program computes in steps of `depth`, and how the compiler schedules it.

    `fused`: a product and a sum may be one instruction, of one rounding. Said to every kernel: Triton's own choice
    differs by version.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    fused: bool = True

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": self.fused}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when triton was imported."""
    return bool(triton.knobs.runtime.interpret)


def capability(device: torch.device) -> int:
    """The compute capability of a device, 90 for 9.0; of the interpreter, which has no limits, that."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextmanager
def launching(*tensors: Tensor) -> Iterator[None]:
    """Makes the device of the tensors current: Triton launches there, not where its arguments are.

    Raises ValueError when they are on several devices, or on one for which kernels are not compiled.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise ValueError(f"expected tensors on one device, got {', '.join(sorted(map(str, devices)))}")
    if tensors[0].device.type != "cuda" and not interpreted():
        raise ValueError(f"expected tensors on a CUDA device, got {tensors[0].device}")
    with torch.cuda.device_of(tensors[0]):
        yield


def batched(A: Tensor) -> Tensor:
    """A [..., m, n] with one batch dimension: [B, m, n]; a view where the strides of A allow it."""
    return A[None] if A.ndim == 2 else A.flatten(0, -3)

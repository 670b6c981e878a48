"""The `triton` backend, for CUDA devices of compute capability 8.0 and up: kernels, and iterations over them.

Its ops have the calling convention of `isomerge.backends.reference`. What is float64, by dtype or by the precision
"exact", is left to torch, whose library uses the float64 tensor cores at full rate. Without the package triton this
module imports all the same, and `availability` says what is missing.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from isomerge.backends import batched, polar_iteration
from isomerge.backends.batched import matmul

if find_spec("triton") is not None:
    from isomerge.backends.triton import moments, projection
    from isomerge.backends.triton.launch import interpreted
    from isomerge.backends.triton.passes import delta_sum, finalize
    from isomerge.backends.triton.primitives import TritonPrimitives

__all__ = [
    "availability",
    "delta_sum",
    "finalize",
    "matmul",
    "polar",
    "polar_product",
    "principal",
    "project_scale",
    "rsvd",
    "shift_cov",
    "subspace",
]

MIN_CAPABILITY = (8, 0)
"""bfloat16 and TF32 tensor cores, and asynchronous copies to shared memory."""


def availability() -> str | None:
    """Why no op can run here, or None when they can: on CUDA tensors, or in Triton's interpreter on CPU tensors."""
    if find_spec("triton") is None:
        return "the package triton is not installed; pip install 'isomerge[gpu]'"
    if interpreted():
        return None
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        expected, got = (".".join(map(str, version)) for version in (MIN_CAPABILITY, capability))
        return f"expected a device of compute capability {expected} or higher, got {got}"
    return None


def polar(A: Tensor, *, rtol: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Newton-Schulz in the formats that the precision allows."""
    return polar_iteration.polar(A, TritonPrimitives(A.device), rtol=rtol, precision=precision)


def polar_product(A: Tensor, B: Tensor, *, scale: Tensor, rtol: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Two of them, and their product."""
    return batched.polar_product(A, B, TritonPrimitives(A.device), scale=scale, rtol=rtol, precision=precision)


def rsvd(
    A: Tensor, k: int, *, deflate: Tensor, rtol: float, atol: Tensor, tol: float, seed: int, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """One precision, the last."""
    primitives = TritonPrimitives(A.device)
    return batched.rsvd(A, k, primitives, deflate=deflate, rtol=rtol, atol=atol, tol=tol, seed=seed)


def subspace(A: Tensor, k: int, *, full: bool, precision: str) -> Tensor:
    """One precision, the last."""
    return batched.subspace(A, k, TritonPrimitives(A.device), full=full)


def principal(moment: Tensor, k: int, *, delta: Tensor | None, rtol: float) -> tuple[Tensor, Tensor]:
    """In float64, like every eigenproblem."""
    return batched.principal(moment, k, TritonPrimitives(moment.device), delta=delta, rtol=rtol)


def shift_cov(X: Tensor, delta: Tensor | None, *, out: Tensor, precision: str) -> Tensor:
    """`moments.shift_cov`, or in float64 `batched.shift_cov`."""
    if precision == "exact" or X.dtype == torch.float64 or (delta is not None and delta.dtype == torch.float64):
        return batched.shift_cov(X, delta, TritonPrimitives(X.device), out=out)
    return moments.shift_cov(X, delta, out=out, precision=precision)


def project_scale(Q: Tensor, W: Tensor, *, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """`projection.project_scale`, or in float64 `batched.project_scale`."""
    if torch.float64 in (Q.dtype, W.dtype, row_scale.dtype):
        return batched.project_scale(Q, W, row_scale=row_scale)
    return projection.project_scale(Q, W, row_scale=row_scale)

"""The ops as CUDA kernels: the only door to `isomerge._C`, which knows addresses and sizes, but no tensors.

Everything that can be wrong with a tensor is found here, before an address leaves Python. Kernels run on the device of
their inputs, on torch's current stream; what they use and what they return belongs to that stream, so torch's
allocator keeps it until they are done. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from isomerge.backends import BackendUnavailable
from isomerge.backends.extension import load

DEVICE = "cuda"
"""The type of the devices that the kernels run on."""

MAX_SIDE = 128
"""Largest matrix of `cholesky_inverse` and `small_eigh`: one thread block holds it."""


class Cholesky(NamedTuple):
    """`factor` L and `inverse` L⁻¹ [..., s, s]; `status` [...] int32: 0, or 1 + the pivot that failed (both NaN)."""

    factor: Tensor
    inverse: Tensor
    status: Tensor


class Eigen(NamedTuple):
    """`values` [..., s] ascending, `vectors` [..., s, s] in columns; `status` [...] int32: the number of sweeps.

    A negative status is a failure: -1 for input that is not finite (both NaN), -2 if Jacobi's method did not converge.
    """

    values: Tensor
    vectors: Tensor
    status: Tensor


def availability() -> str | None:
    """Why no kernel can run here, or None when they can."""
    try:
        status: str = _extension().status()
    except BackendUnavailable as error:
        return str(error)
    return status if status.startswith("no device") else None


def shift_cov(X: Tensor, delta: Tensor | None, *, out: Tensor, precision: str) -> Tensor:
    """out + YᵀY with Y = X or X Δᵀ in tensor-core products of float32's accuracy; X Δᵀ is never stored whole.

    X [..., N, n] float32 or bfloat16, delta [..., m, n], out [..., d, d] float32 or float64. float16 X and any other
    delta than float32 are converted first, which is exact for half precisions. Deterministic, and symmetric to the bit.
    """
    given = [X, out] if delta is None else [X, out, delta]
    _check_devices("shift_cov", *given)
    _check("shift_cov", "X", X, torch.float32, torch.bfloat16, torch.float16)
    _check("shift_cov", "out", out, torch.float32, torch.float64)
    if precision == "exact":
        raise BackendUnavailable('shift_cov[cuda]: precision "exact" is float64, its kernel float32; use "eager"')
    leading, (N, n) = X.shape[:-2], X.shape[-2:]
    batch, d = leading.numel(), n if delta is None else delta.shape[-2]
    _check_shapes("shift_cov", out=(out, (*leading, d, d)), delta=(delta, (*leading, d, n)))
    X = _stack(X.float() if X.dtype == torch.float16 else X)
    delta = None if delta is None else _stack(delta.float())
    total = out.contiguous()
    m = 0 if delta is None else d
    if batch * N * n * d:
        with _launching(X) as (extension, stream):
            workspace = _bytes(X, extension.shift_cov_workspace_bytes(batch, N, n, m))
            extension.shift_cov(
                *(X.data_ptr(), X.element_size(), batch, N, n, X.stride(0), X.stride(1)),
                *((0, 0, 0, 0) if delta is None else (delta.data_ptr(), m, delta.stride(0), delta.stride(1))),
                *(total.data_ptr(), total.element_size(), workspace.data_ptr(), stream),
            )
    return out if total.data_ptr() == out.data_ptr() else out.copy_(total)


def project_scale(Q: Tensor, W: Tensor, *, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """C [..., T s, n] float32 of rows row_scale[t, i] (Q_tᵀ W_t)[i], and the column sums of C² [..., n] float64.

    Q [..., T, m, s], W [..., T, m, n] float32 or bfloat16 (float16 is converted first, Q and row_scale to float32).
    Tensor-core products of float32's accuracy, deterministic.
    """
    _check_devices("project_scale", Q, W, row_scale)
    _check("project_scale", "Q", Q, torch.float32, torch.bfloat16, torch.float16)
    _check("project_scale", "W", W, torch.float32, torch.bfloat16, torch.float16)
    leading, (T, m, s), n = Q.shape[:-3], Q.shape[-3:], W.shape[-1]
    _check_shapes("project_scale", W=(W, (*leading, T, m, n)), row_scale=(row_scale, (*leading, T, s)))
    batch = leading.numel()
    C = Q.new_empty(*leading, T * s, n, dtype=torch.float32)
    squares = Q.new_zeros(*leading, n, dtype=torch.float64)
    Q, W = _stack(Q.float()), _stack(W.float() if W.dtype == torch.float16 else W)
    scale = row_scale.float().contiguous()
    if C.numel():
        with _launching(Q) as (extension, stream):
            workspace = _bytes(Q, extension.project_scale_workspace_bytes(batch, T, n, s))
            extension.project_scale(
                *(Q.data_ptr(), Q.stride(0), Q.stride(1)),
                *(W.data_ptr(), W.element_size(), W.stride(0), W.stride(1)),
                *(scale.data_ptr(), batch, T, m, n, s),
                *(C.data_ptr(), squares.data_ptr(), workspace.data_ptr(), stream),
            )
    return C, squares


def cholesky_inverse(G: Tensor, *, shift: float = 1e-15) -> Cholesky:
    """Lower L and L⁻¹ of L Lᵀ = G + shift tr(G) I, for G [..., s, s] float64, s <= 128, from its lower triangle.

    What CholeskyQR needs: Q = X L⁻ᵀ for G = XᵀX. The shift keeps the factor defined where X is singular to rounding.
    """
    matrices = _small("cholesky_inverse", G)
    factor, inverse = torch.empty_like(matrices), torch.empty_like(matrices)
    status = matrices.new_zeros(matrices.shape[0], dtype=torch.int32)
    with _launching(matrices) as (extension, stream):
        pointers = [tensor.data_ptr() for tensor in (matrices, factor, inverse, status)]
        extension.cholesky_inverse(*pointers, *matrices.shape[:2], shift, stream)
    return Cholesky(factor.view(G.shape), inverse.view(G.shape), status.view(G.shape[:-2]))


def small_eigh(G: Tensor) -> Eigen:
    """Eigenvalues and eigenvectors of symmetric G [..., s, s] float64, s <= 128, from its lower triangle."""
    matrices = _small("small_eigh", G)
    values, vectors = torch.empty_like(matrices[..., 0]), torch.empty_like(matrices)
    status = matrices.new_zeros(matrices.shape[0], dtype=torch.int32)
    with _launching(matrices) as (extension, stream):
        pointers = [tensor.data_ptr() for tensor in (matrices, values, vectors, status)]
        extension.small_eigh(*pointers, *matrices.shape[:2], stream)
    return Eigen(values.view(G.shape[:-1]), vectors.view(G.shape), status.view(G.shape[:-2]))


# ---------------------------------------------------------------------------------------------- what crosses the door


def _extension() -> ModuleType:
    return load("isomerge._C", "ISOMERGE_CUDA")


@contextmanager
def _launching(tensor: Tensor) -> Iterator[tuple[ModuleType, int]]:
    """The extension and the current stream of the tensor's device, which is the current device meanwhile."""
    extension = _extension()
    with torch.cuda.device(tensor.device):
        yield extension, torch.cuda.current_stream().cuda_stream


def _check_devices(op: str, *tensors: Tensor) -> None:
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1 or tensors[0].device.type != DEVICE:
        raise BackendUnavailable(
            f'{op}[cuda]: expected tensors on one {DEVICE} device, got {", ".join(devices)}. Use backend="auto" or '
            "move the tensors."
        )


def _check(op: str, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(tensor.dtype).removeprefix("torch.")
        raise BackendUnavailable(f'{op}[cuda]: expected {name} in {expected}, got {got}. Convert it or use "eager".')


def _check_shapes(op: str, **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """A size that is off would be an access out of bounds, far from here."""
    for name, (tensor, expected) in tensors.items():
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"{op}[cuda]: expected {name} of shape {expected}, got {tuple(tensor.shape)}")


def _small(op: str, G: Tensor) -> Tensor:
    """G as contiguous matrices [B, s, s]."""
    _check_devices(op, G)
    _check(op, "G", G, torch.float64)
    if G.dim() < 2 or G.shape[-1] != G.shape[-2] or G.shape[-1] > MAX_SIDE:
        raise ValueError(f"{op}[cuda]: expected G [..., s, s] with s <= {MAX_SIDE}, got {tuple(G.shape)}")
    return G.reshape(G.shape[:-2].numel(), *G.shape[-2:]).contiguous()


def _stack(A: Tensor) -> Tensor:
    """A [..., m, n] as [B, m, n] with adjacent elements in rows: a view where strides allow it, else a copy."""
    matrices = A.reshape(A.shape[:-2].numel(), *A.shape[-2:])
    return matrices if matrices.stride(-1) == 1 or matrices.shape[-1] < 2 else matrices.contiguous()


def _bytes(like: Tensor, count: int) -> Tensor:
    """Scratch memory; torch's allocator aligns it to 512 bytes."""
    return torch.empty(count, dtype=torch.uint8, device=like.device)

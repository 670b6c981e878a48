"""The papers' computation: one float32 `torch.linalg.svd` per matrix and task, one matrix after the other.

Written from the algorithms as published (Iso: Marczak et al. 2025, algorithms 1 and 2; TSV-M: Gargiulo et al. 2025,
algorithm 1; ESM: arXiv 2606.19164, without the constant 2 and the padding of its released code) with their shapes,
zero-filled slots and rounding of the ranks. In float64 the same functions are the yardstick that errors are measured
against. deltas [T, m, n] -> update [m, n].
"""

from __future__ import annotations

import torch
from torch import Tensor


def svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    return U, S, Vh


def whitened(A: Tensor) -> Tensor:
    U, _, Vh = svd(A)
    return U @ Vh


def iso_c(deltas: Tensor) -> Tensor:
    U, S, Vh = svd(deltas.sum(0))
    return U @ torch.diag(S.mean().expand(S.shape[0])) @ Vh


def iso_cts(deltas: Tensor, common_space_fraction: float = 0.8) -> Tensor:
    T, m, n = deltas.shape
    r = min(m, n)
    specific = round((r - int(r * common_space_fraction)) / T) * T
    common, s = r - specific, specific // T
    U, S, Vh = svd(deltas.sum(0))
    U_c = U[:, :common]
    left, values, right = torch.zeros_like(U), torch.zeros_like(S), torch.zeros_like(Vh)
    for t, delta in enumerate(deltas):
        U_t, S_t, Vh_t = svd(delta - U_c @ (U_c.T @ delta))
        slots = slice(t * s, (t + 1) * s)
        left[:, slots], values[slots], right[slots] = U_t[:, :s], S_t[:s], Vh_t[:s]
    left[:, T * s :], values[T * s :], right[T * s :] = U_c, S[:common], Vh[:common]
    return whitened(left) @ torch.diag(values.mean().expand(r)) @ whitened(right)


def tsvm(deltas: Tensor) -> Tensor:
    T, m, n = deltas.shape
    r = min(m, n)
    s = int(r * (1 / T))
    left, values, right = deltas.new_zeros(m, r), deltas.new_zeros(r), deltas.new_zeros(r, n)
    for t, delta in enumerate(deltas):
        U, S, Vh = svd(delta)
        slots = slice(t * s, (t + 1) * s)
        left[:, slots], values[slots], right[slots] = U[:, :s], S[:s], Vh[:s]
    return whitened(left) @ torch.diag(values) @ whitened(right)


def esm(deltas: Tensor, inputs: Tensor, eigenvalue_power: float = 0.15, exponent: float = 2.0) -> Tensor:
    """inputs [T, N, n]: the SVD of every N x m shift matrix, then of both concatenations."""
    T, m, n = deltas.shape
    s = m // T
    norms = torch.linalg.vector_norm(deltas, dim=(1, 2))
    left, right = deltas.new_zeros(m, T * s), deltas.new_zeros(T * s, n)
    for t, (delta, X) in enumerate(zip(deltas, inputs, strict=True)):
        _, values, Vh = svd(X @ delta.T)
        E, weights = Vh[:s].T, values[:s].square().pow(eigenvalue_power)
        weights = weights / weights.mean()
        left[:, t * s : (t + 1) * s] = E * weights
        right[t * s : (t + 1) * s] = weights[:, None] * (E.T @ delta) * (norms[t] / norms.mean()) ** exponent
    columns = torch.linalg.vector_norm(right, dim=0)
    right = right * (columns / columns.mean()) ** exponent
    U, S, Vh = svd(left)
    P, values, Qh = svd(right)
    return S.mean() * values.mean() * ((U @ Vh) @ (P @ Qh))


METHODS = {"iso_c": iso_c, "tsvm": tsvm, "iso_cts": iso_cts}

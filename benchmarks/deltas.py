"""Deltas with the conditioning of real ones: a low-rank signal with decaying spectrum over a noise floor.

Sums of T = 8 have condition numbers of 1e4 to 1e5 when square and about 20 when 3:1 or 4:1, as sums of real updates do.
"""

from __future__ import annotations

import torch
from torch import Tensor

VIT_B32 = {"attn.out_proj": (768, 768), "attn.in_proj": (2304, 768), "mlp.c_fc": (3072, 768), "mlp.c_proj": (768, 3072)}
"""The four matrices of one ViT-B/32 block, name -> (out, in); the model has 12 such blocks."""


def synthetic(T: int, m: int, n: int, *, seed: int = 0) -> Tensor:
    """[T, m, n] float32 deltas of entries of order 1e-3."""
    generator = torch.Generator().manual_seed(seed)
    decay = torch.logspace(0, -1.3, 64)
    result = torch.empty(T, m, n)
    for t in range(T):
        signal = (torch.randn(m, 64, generator=generator) * decay) @ torch.randn(64, n, generator=generator) / n**0.5
        result[t] = (signal + 0.05 * torch.randn(m, n, generator=generator)) * 1e-3
    return result


def activations(T: int, tokens: int, n: int, *, seed: int = 0) -> Tensor:
    """[T, tokens, n] float32 inputs of a layer: a mean, and a spectrum that falls by 1e2 in a basis common to tasks."""
    generator = torch.Generator().manual_seed(1000 + seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    mean = torch.randn(n, generator=generator)
    result = torch.empty(T, tokens, n)
    for t in range(T):
        spectrum = torch.logspace(0, -2, n) * torch.empty(n).uniform_(0.5, 2.0, generator=generator)
        result[t] = (torch.randn(tokens, n, generator=generator) * spectrum) @ basis.T + 0.1 * mean
    return result

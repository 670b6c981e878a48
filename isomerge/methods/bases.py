"""Bases of several tasks, put side by side."""

from __future__ import annotations

import torch
from torch import Tensor


def without_null(vectors: Tensor, S: Tensor) -> Tensor:
    """The columns of vectors [..., m, k], zero where S [..., k] is."""
    return vectors * (S > 0).unsqueeze(-2)


def beside(blocks: Tensor, dim: int) -> Tensor:
    """The T blocks of [..., T, m, n], concatenated along one of the last two dimensions."""
    return torch.cat(blocks.unbind(-3), dim=dim)

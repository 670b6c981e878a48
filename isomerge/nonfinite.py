"""NaN and Inf in the inputs: found where they stand, told with their count, or taken out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isomerge.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from isomerge.checkpoint import Checkpoint


def check_base(values: Tensor, base: Checkpoint, name: str) -> None:
    """InputError unless the base's values of a unit are finite."""
    if count := _count(values):
        raise InputError(
            f"{base.label}: {name}: {count} non-finite values in the base model; repair them, "
            f'or copy the tensor unchanged with a rule {{filter: "{name}", keep_base: true}}'
        )


def zero(delta: Tensor, raw: Callable[[], Tensor], expert: Checkpoint, name: str, *, allowed: bool) -> int:
    """Sets the non-finite entries of a delta to zero and returns their number; `raw` reads the expert's values again.

    InputError unless they are `allowed`, and where they come of finite values, whose difference overflows.
    """
    bad = ~torch.isfinite(delta)
    count = int(bad.sum())
    if count == 0:  # finite values whose sum overflowed
        return 0
    in_expert = _count(raw())
    if in_expert == 0:
        raise InputError(
            f"{expert.label}: {name}: {count} differences from the base overflow {str(delta.dtype)[6:]}; "
            "set `dtype: float64`"
        )
    if not allowed:
        raise NonFiniteError(
            f"{expert.label}: {name}: {in_expert} non-finite values (NaN or Inf); nothing was written. Repair the "
            "checkpoint, or leave such entries out of the merge with --allow-nonfinite"
        )
    delta.masked_fill_(bad, 0.0)
    return count


def _count(values: Tensor) -> int:
    return int((~torch.isfinite(values)).sum())

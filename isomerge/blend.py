"""Elements merged on their way from files to the output, in blocks that a core's cache holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from isomerge.backends import native
from isomerge.checkpoint import Checkpoint
from isomerge.deltas import Group, Unit


class Blend(NamedTuple):
    """A unit of the merged model."""

    values: tuple[Tensor, ...]  # [count] of each scale
    sum_square: float  # ||sum of the deltas||²
    update_square: float  # ||update||²


def blend(
    models: Iterable[tuple[Checkpoint, str]],
    weights: Sequence[float],
    unit: Unit,
    group: Group,
    scales: Sequence[float],
    dtype: torch.dtype,
) -> Blend | None:
    """base + scale * update for each scale, in `dtype`, where the update is the group's reduction of the deltas.

    `models` are the base and the experts, each with the unit's name in it. The bits are those of reading all of the
    unit, `ops.subtract` and `ops.finalize`; these are for the caller wherever the answer is None: where not all
    elements lie in files in their order, nothing fit for it is built, or a value asks for a closer look, for it is not
    finite, could overflow, or a block's update is zero. InputError if a file is no longer the one that was opened.
    """
    if group.reduction == "none" or group.transposed or group.dtype != torch.float32 or native.availability():
        return None
    with ExitStack() as opened:
        stretches = []
        for model, name in models:
            place = opened.enter_context(model.stretch(name, unit.start))
            if place is None:
                return None
            stretches.append(native.Stretch(*place, model.tensors[name].dtype))
        found = native.blend(
            stretches, unit.count, weights=weights, reduction=group.reduction, scales=scales, out_dtype=dtype
        )
    if found is None or max(map(abs, scales)) * math.sqrt(found[2]) > torch.finfo(group.dtype).max:
        return None
    return Blend(*found)

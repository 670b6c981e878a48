"""Elements merged on their way from files to the output, in blocks that a core's cache holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor

from isomerge.backends.native import FileModels, Finalized, Stretch, reads
from isomerge.checkpoint import Checkpoint
from isomerge.deltas import Group, Unit

Answer = TypeVar("Answer")


class Direct:
    """A unit's elements, straight from the files of the models.

    The bits are those of reading all of the unit, `ops.subtract` and the ops named below; these are for the caller
    wherever the answer is None: where not all elements lie in files in their order, nothing fit for it is built, or a
    value asks for a closer look, for it is not finite, could overflow, or what is added is zero. InputError if a file
    is no longer the one that was opened.
    """

    def __init__(
        self, models: Iterable[tuple[Checkpoint, str]], weights: Sequence[float], unit: Unit, group: Group
    ) -> None:
        """`models` are the base and the experts, each with the unit's name in it."""
        self._models, self._weights, self._unit, self._group = list(models), weights, unit, group

    def blend(self, scales: Sequence[float], dtype: torch.dtype) -> Finalized | None:
        """base + scale * update in `dtype`, by `ops.finalize`, where the update is the group's reduction of deltas."""
        if self._group.reduction == "none":
            return None
        return self._finalized(lambda files: files.blend(self._group.reduction, scales, dtype), scales, dtype)

    def elect(self, thresholds: Tensor, majority: int, scales: Sequence[float], dtype: torch.dtype) -> Finalized | None:
        """The same where the update is that of `ops.elect`."""
        return self._finalized(lambda files: files.elect(thresholds, majority, scales, dtype), scales, dtype)

    def votes(self, thresholds: Tensor) -> int | None:
        """`ops.votes`."""
        return self._asked(lambda files: files.votes(thresholds))

    def count_digits(self, higher: Sequence[Sequence[int]]) -> Tensor | None:
        """`ops.count_digits` of each task's deltas, [T, 2^16]."""
        return self._asked(lambda files: files.count_digits(higher))

    def _finalized(
        self, ask: Callable[[FileModels], Finalized | None], scales: Sequence[float], dtype: torch.dtype
    ) -> Finalized | None:
        if not reads([dtype]):
            return None
        found = self._asked(ask)
        if found is None:
            return None
        largest = max(map(abs, scales)) * math.sqrt(found.update_square)
        return found if largest <= torch.finfo(self._group.dtype).max else None

    def _asked(self, ask: Callable[[FileModels], Answer | None]) -> Answer | None:
        dtypes = [model.tensors[name].dtype for model, name in self._models]
        if self._group.transposed or self._group.dtype != torch.float32 or not reads(dtypes):
            return None
        with ExitStack() as opened:
            stretches = []
            for (model, name), dtype in zip(self._models, dtypes, strict=True):
                place = opened.enter_context(model.stretch(name, self._unit.start))
                if place is None:
                    return None
                stretches.append(Stretch(*place, dtype))
            return ask(FileModels(stretches, self._unit.count, weights=self._weights))

"""Elements merged on their way from files to the output, in blocks that a core's cache holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from isomerge.backends.native import Drop, FileModels, Finalized, Stretch, reads
from isomerge.checkpoint import Checkpoint
from isomerge.deltas import Group, Unit

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Direct:
    """A unit's elements, straight from the files of the models: the `Source` of methods.

    The bits are those of reading all of the unit, `ops.subtract`, the ops that are asked for and `ops.finalize`; these
    are for the caller wherever the answer is None: where not all elements lie in files in their order, nothing fit for
    it is built, or a value asks for a closer look, for it is not finite, could overflow, or what is added is zero.
    InputError if a file is no longer the one that was opened.
    """

    models: tuple[tuple[Checkpoint, str], ...]  # the base and the experts, each with the unit's name in it
    weights: Sequence[float]
    unit: Unit
    group: Group
    scales: Sequence[float] = ()  # of the update in each output
    dtype: torch.dtype = torch.float32  # of the outputs
    drop: Drop | None = None

    def to(self, scales: Sequence[float], dtype: torch.dtype) -> Direct:
        """The same for outputs base + scale * update."""
        return replace(self, scales=scales, dtype=dtype)

    def dropped(self, density: float, seed: int, first: int, apart: int) -> Direct:
        return replace(self, drop=Drop(density, seed % 2**64, first, apart))

    def blend(self, reduction: str) -> Finalized | None:
        if reduction == "none" or (self.drop is not None and reduction != "sum"):
            return None
        return self._finalized(lambda files: files.blend(reduction, self.scales, self.dtype))

    def elect(self, thresholds: Tensor, majority: int) -> Finalized | None:
        return self._finalized(lambda files: files.elect(thresholds, majority, self.scales, self.dtype))

    def votes(self, thresholds: Tensor) -> int | None:
        return self._asked(lambda files: files.votes(thresholds))

    def count_digits(self, higher: Sequence[Sequence[int]]) -> Tensor | None:
        return self._asked(lambda files: files.count_digits(higher))

    def _finalized(self, ask: Callable[[FileModels], Finalized | None]) -> Finalized | None:
        found = self._asked(ask) if reads([self.dtype]) else None
        if found is None:
            return None
        largest = max(map(abs, self.scales)) * math.sqrt(found.update_square)
        return found if largest <= torch.finfo(self.group.dtype).max else None

    def _asked(self, ask: Callable[[FileModels], Answer | None]) -> Answer | None:
        dtypes = [model.tensors[name].dtype for model, name in self.models]
        if self.group.transposed or self.group.dtype != torch.float32 or not reads(dtypes):
            return None
        with ExitStack() as opened:
            stretches = []
            for (model, name), dtype in zip(self.models, dtypes, strict=True):
                place = opened.enter_context(model.stretch(name, self.unit.start))
                if place is None:
                    return None
                stretches.append(Stretch(*place, dtype))
            return ask(FileModels(stretches, self.unit.count, weights=self.weights, drop=self.drop))

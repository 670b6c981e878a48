"""Elements that need not be in memory, for methods that can say what they want of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor

Merged = TypeVar("Merged", covariant=True)


class Source(Protocol[Merged]):
    """A piece of the deltas of T tasks, and of the base. Every answer may be None: then they are to be read."""

    def dropped(self, density: float, seed: int, first: int, apart: int) -> Source[Merged]:
        """The same with what `ops.drop` leaves of the deltas of task t: numbers from `first` + t * `apart` on."""
        ...

    def blend(self, reduction: str) -> Merged | None:
        """What the "sum" or "mean" of the deltas over t makes of the base; of what is left of them, the sum alone."""
        ...

    def elect(self, thresholds: Tensor, majority: int) -> Merged | None:
        """What `ops.elect` of the deltas makes of the base."""
        ...

    def votes(self, thresholds: Tensor) -> int | None:
        """`ops.votes` of the deltas."""
        ...

    def count_digits(self, higher: Sequence[Sequence[int]]) -> Tensor | None:
        """`ops.count_digits` of each task's deltas behind its digits, [T, 2^16]."""
        ...

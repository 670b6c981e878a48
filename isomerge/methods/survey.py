"""What a tensor decides as a whole about each of its entries, found in passes over pieces of it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from isomerge import ops
from isomerge.methods.source import Source

TABLE_BYTES = 8 * ops.DIGITS
"""Of the counts that a survey keeps of each task."""


class Election(NamedTuple):
    """What `ops.elect` asks for beside the deltas."""

    thresholds: Tensor  # [T]: entries of smaller magnitude do not count
    majority: int  # -1, 0, 1: the sign of columns whose sum is zero


def threshold(delta: Tensor, kept: int) -> Tensor:
    """The smallest of the `kept` largest magnitudes of delta [n], a scalar, or what keeps none or all."""
    known = _evident(kept, delta.numel())
    return ops.kth_largest(delta, kept) if known is None else delta.new_tensor(known)


def election(deltas: Tensor, kept: int) -> Election:
    """That of deltas [T, n] of which each task's `kept` largest count."""
    thresholds = torch.stack([threshold(delta, kept) for delta in deltas])
    return Election(thresholds, _sign(int(ops.votes(deltas, thresholds))))


class Survey:
    """The `election` of deltas [T, n] that are seen in pieces, as often as needed:

        while not survey.finished:
            for first, piece in pieces:
                survey.see(piece, first)
            survey.turn()
        survey.elected

    Pieces may come in any order and from any threads, and be of other sizes in every pass. There is a pass for each 16
    bits of the dtype, none where all or no entries are kept, and one for the majority.
    """

    def __init__(
        self,
        T: int,
        n: int,
        kept: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        seen_as: Callable[[Tensor, int], Tensor] = lambda deltas, first: deltas,
        asked_of: Callable[[Source[object], int], Source[object]] = lambda source, first: source,
    ) -> None:
        """`seen_as(deltas, first)` are the deltas that count, and `asked_of(source, first)` those of a source, where
        they are not those that are given.
        """
        self._seen_as, self._asked_of = seen_as, asked_of
        known = _evident(kept, n)
        self._searches = [ops.Selection(kept, dtype) for _ in range(T)] if known is None else []
        # Here, for threads that see pieces would take it from stores of memory of their own, each as much.
        self._counts = torch.zeros(len(self._searches), ops.DIGITS, dtype=torch.int64, device=device)
        self._thresholds = torch.full((T,), known or 0.0, dtype=dtype)
        self._votes = 0
        self._lock = threading.Lock()
        self.finished = kept == 0

    def see(self, deltas: Tensor, first: int) -> None:
        """Deltas [T, ..] of the entries from `first` on."""
        deltas = self._seen_as(deltas.flatten(1), first)
        if not self._searches:
            self._add_votes(int(ops.votes(deltas, self._thresholds.to(deltas.device))))
            return
        for t, (delta, search) in enumerate(zip(deltas, self._searches, strict=True)):
            self._add_counts(t, ops.count_digits(delta, search.higher))

    def ask(self, source: Source[object], first: int) -> bool:
        """`see` for a piece that need not be in memory. Whether it had the answers."""
        source = self._asked_of(source, first)
        if not self._searches:
            votes = source.votes(self._thresholds)
            if votes is not None:
                self._add_votes(votes)
            return votes is not None
        counts = source.count_digits([search.higher for search in self._searches])
        for t, count in enumerate(() if counts is None else counts):
            self._add_counts(t, count)
        return counts is not None

    def turn(self) -> None:
        """All entries have been seen once more."""
        if not self._searches:
            self.finished = True
            return
        for search, counts in zip(self._searches, self._counts, strict=True):
            search.narrow(counts)
        self._counts.zero_()
        if self._searches[0].found:
            self._thresholds = torch.stack([search.value() for search in self._searches])
            self._searches, self._counts = [], self._counts[:0].clone()

    def _add_votes(self, votes: int) -> None:
        with self._lock:
            self._votes += votes

    def _add_counts(self, t: int, counts: Tensor) -> None:
        with self._lock:
            self._counts[t] += counts

    @property
    def elected(self) -> Election:
        """Once it is finished."""
        return Election(self._thresholds, _sign(self._votes))


def _evident(kept: int, n: int) -> float | None:
    """The threshold that keeps none or all of n entries; None where it has to be looked for."""
    if kept == 0:
        return math.inf
    return 0.0 if kept >= n else None


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)

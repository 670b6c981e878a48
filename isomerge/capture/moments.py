"""Sums YᵀY over the calls of many layers, in which layers that read the same tensors share one sum.

Sharing is found while running, never assumed: a layer joins a sum when its whole history is that sum's, and leaves it
with a copy before the first tensor that the others did not read. Inputs of fewer tokens than they are wide are kept as
they are: they take less memory than their moment, and no arithmetic. Beyond that and the moments themselves, at most
256 MB of rows are held, or those of one call if that is more, and the tensors that some of their readers have yet to
read.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from isomerge import ops
from isomerge.backends.side_by_side import concurrently
from isomerge.errors import InputError

TOKENS = 8192  # rows that are gathered and multiplied at a time
_BYTES = 256 << 20  # of rows that are kept before they are multiplied: a product of few rows costs as one of many


@dataclass(slots=True)
class _Read:
    """A tensor that some members of a sum have read, and that waits for the others.

    While it waits, its rows that count are kept as they were, in `copy`.
    """

    tensor: Tensor
    version: int | None
    rows: Tensor | None
    readers: set[str]
    copy: Tensor | None = None


@dataclass(eq=False, slots=True)
class Sum:
    """`moment` [d, d] over `tokens` rows, or `inputs` [.., d], the rows themselves, while they are fewer than d.

    `members` are the layers that read exactly the tensors in it.
    """

    space: str
    rule: str  # which tokens count; layers with different rules share nothing
    members: set[str]
    moment: Tensor | None = None
    inputs: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    calls: int = 0
    waiting: _Read | None = None
    rows: list[Tensor] = field(default_factory=list)  # that are in neither yet

    def stored(self) -> Tensor | None:
        """YᵀY [d, d], or Y [tokens, d] if that is less; None for no tokens. Complete after `flush`."""
        if self.inputs:
            self.inputs = [_joined(self.inputs)]
        return self.inputs[0] if self.inputs else self.moment


def _no_delta(name: str) -> Tensor:
    raise KeyError(name)


@dataclass(slots=True)
class Moments:
    """The sums of all layers, in `dtype`. For layers in output space, `delta` gives Δ [m, n] and `rows_of` m."""

    dtype: torch.dtype = torch.float32
    delta: Callable[[str], Tensor] = _no_delta
    rows_of: Callable[[str], int] = len
    _of: dict[str, Sum] = field(default_factory=dict)
    _fresh: dict[int, tuple[weakref.ref[Tensor], int, Sum]] = field(default_factory=dict)
    _kept: int = 0  # bytes of rows

    def add(self, name: str, X: Tensor, rows: Tensor | None, *, space: str = "input", rule: str = "") -> None:
        """One call of a layer with inputs X [..., n]; of its N tokens those of `rows` count, or all."""
        version = None if X.is_inference() else X._version
        found = self._of.get(name)
        if found is None:
            found = self._shared(X, version, space, rule)
            if found is not None:
                found.members.add(name)
                self._of[name] = found
                return
            found = self._of[name] = Sum(space, rule, {name})
            if space == "input" and version is not None:
                self._fresh[id(X)] = (weakref.ref(X), version, found)
        waiting = found.waiting
        if waiting is not None:
            if waiting.tensor is X and waiting.version == version and name not in waiting.readers:
                waiting.readers.add(name)
            else:
                self._split(found)
                found, waiting = self._of[name], None
        if waiting is None:
            waiting = found.waiting = _Read(X, version, rows, {name})
        if waiting.readers == found.members:
            self._take(found)
        elif waiting.copy is None:
            flat = X.detach().reshape(-1, X.shape[-1])
            waiting.copy = flat.clone() if rows is None else flat.index_select(0, rows)

    def end_of_batch(self) -> None:
        """Settles what waits: layers that did not read what others read go their own way."""
        for found in self.sums():
            if found.waiting is not None:
                self._split(found)
        self._fresh.clear()

    def flush(self) -> None:
        """Multiplies all rows that are kept. On a CPU by as many threads as torch has, each on one sum."""
        # The longest first, so that the threads end together.
        work = sorted((found for found in self.sums() if found.rows), key=self._cost, reverse=True)
        self._kept = 0
        if {found.rows[0].device.type for found in work} <= {"cpu"}:
            concurrently([partial(self._multiply, found) for found in work])
        else:
            for found in work:
                self._multiply(found)

    def sums(self) -> list[Sum]:
        """All sums, in the order in which their layers ran first."""
        return list(dict.fromkeys(self._of.values()))

    def __iter__(self) -> Iterator[tuple[str, Sum]]:
        """(layer, its sum), in the order in which the layers ran first."""
        return iter(self._of.items())

    def _shared(self, X: Tensor, version: int | None, space: str, rule: str) -> Sum | None:
        """The sum that holds X and nothing else, if any."""
        reference, seen, found = self._fresh.get(id(X), (None, None, None))
        if space != "input" or version is None or reference is None or found is None:
            return None
        same = reference() is X and seen == version and found.rule == rule
        return found if same and found.calls == 1 and found.waiting is None else None

    def _split(self, found: Sum) -> None:
        """Gives the members that have not read the waiting tensor a sum of their own, then adds it to the rest."""
        assert found.waiting is not None
        others = found.members - found.waiting.readers
        if others:
            apart = replace(found, members=others, waiting=None, rows=list(found.rows), inputs=list(found.inputs))
            apart.moment = None if found.moment is None else found.moment.clone()
            found.members = found.members - others
            self._of.update(dict.fromkeys(others, apart))
        self._take(found)

    def _take(self, found: Sum) -> None:
        """Adds the waiting tensor to a sum."""
        read, found.waiting = found.waiting, None
        assert read is not None
        found.calls += 1
        X, rows = read.copy, None
        if X is None:
            X, rows = read.tensor.detach().reshape(-1, read.tensor.shape[-1]), read.rows
        count = len(X) if rows is None else len(rows)
        for start in range(0, count, TOKENS):
            part = X[start : start + TOKENS] if rows is None else X.index_select(0, rows[start : start + TOKENS])
            if rows is None and read.copy is None and (part.nbytes < _BYTES or found.moment is None):
                part = part.clone()  # what the model does to its tensor later must not count
            found.rows.append(part)
            self._kept += part.nbytes
            if self._kept >= _BYTES:
                self.flush()
        found.tokens += count

    def _size(self, found: Sum) -> int:
        return found.rows[0].shape[1] if found.space == "input" else self.rows_of(min(found.members))

    def _cost(self, found: Sum) -> int:
        """Multiplications that the rows of a sum need, half a Gram product counted as a whole."""
        d, n = self._size(found), found.rows[0].shape[1]
        return sum(map(len, found.rows)) * d * (d if found.space == "input" else d + n)

    @torch.no_grad()
    def _multiply(self, found: Sum) -> None:
        """Adds the rows that are kept to the moment, or to the inputs while they are less than it."""
        name, d = min(found.members), self._size(found)
        if self._keeps_inputs(found, d):
            for X in found.rows:
                if not math.isfinite(torch.linalg.vector_norm(X, dtype=torch.promote_types(X.dtype, self.dtype))):
                    raise _refused(name, X, None)
            found.inputs += found.rows
            found.rows.clear()
            return
        found.rows[:0] = found.inputs
        found.inputs.clear()
        if found.moment is None:
            found.moment = torch.zeros(d, d, dtype=self.dtype, device=found.rows[0].device)
        X = _joined(found.rows)
        found.rows.clear()
        delta = self.delta(name) if found.space == "output" else None
        try:
            ops.shift_cov(X, delta, out=found.moment)
        except ValueError:
            raise _refused(name, X, delta) from None

    def _keeps_inputs(self, found: Sum, d: int) -> bool:
        """Whether all rows so far are kept as they are: fewer than d inputs, whose moment can still be had as it was
        asked for.
        """
        lossless = self.dtype in (torch.float32, found.rows[0].dtype)  # products are in float32 or wider
        fresh = found.space == "input" and found.moment is None
        return fresh and lossless and sum(map(len, found.inputs + found.rows)) < d


def _joined(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _refused(name: str, X: Tensor, delta: Tensor | None) -> InputError:
    """Why rows have no finite moment."""
    if delta is not None and not bool(delta.isfinite().all()):
        return InputError(
            f"{name}: {int((~delta.isfinite()).sum())} values of the difference between the model and the base are not"
            " finite; check both"
        )
    if bool(X.isfinite().all()):
        return InputError(
            f"{name}: the sum of squares of its input overflows float32; check the samples, or use float64"
        )
    return InputError(
        f"{name}: {int((~X.isfinite()).sum())} of {X.numel()} values of its input are not finite; check the samples, or"
        " run the model in float32"
    )

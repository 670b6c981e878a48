"""From checkpoints to deltas, in runs that stay in a core's cache from the file to the last subtraction."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from isomerge import nonfinite, ops
from isomerge.backends.side_by_side import single_threaded
from isomerge.deltas import RUNS_BYTES, Group, Mapped, Read, Result, Stack, Unit, empty_stack, moment_bytes
from isomerge.direct import Direct
from isomerge.errors import InputError
from isomerge.memory import on_huge_pages
from isomerge.place import Place

if TYPE_CHECKING:
    from isomerge.checkpoint import Checkpoint

RUN_ELEMENTS = 2**19
"""Of a tensor that are read and subtracted at a time: 2 MiB in float32, for the cache."""

LEAST_ELEMENTS = 2**16
"""Of a tensor that are read at a time, however many models there are: less, and the calls take longer than the rest."""


class MomentSource(Protocol):
    """The second moments of one expert's layers."""

    label: str

    def stored(self, name: str) -> Tensor:
        """YᵀY [d, d] of the layer with the weight `name`, or its inputs Y [tokens, n], tokens < n; InputError unless
        they are finite."""
        ...


class Passage(NamedTuple):
    """A unit of elements on its way through one thread, which reads it in one of two ways.

    load()         its base [m, n] and its deltas [T or 1, m, n], not to be kept: the next unit overwrites them
    direct         what can be asked of it without; `took(||sum of the deltas||²)` then counts it as read
    """

    unit: Unit
    load: Callable[[], tuple[Tensor, Tensor]]
    direct: Direct
    took: Callable[[float], None]


class DeltaReader:
    """Reads groups: delta_t = weight_t * (expert_t - base), the difference taken in the group's dtype, never below,
    and where the group asks for them the second moments: YᵀY for inputs, weight_t² YᵀY for shifts Y = X delta_tᵀ.

    On the CPU `workers` threads, by default as many as torch's, read and subtract runs of `RUN_ELEMENTS` side by side;
    no byte depends on their number. For another `place` everything is uploaded and computed there as `Place.reading`
    says. A context manager, to be made where no other thread calls torch.

    InputError names the file, the tensor and the count when a value is not finite. With `allow_nonfinite` such an
    entry of an expert counts as a delta of zero; in the base it is an error always.
    """

    def __init__(
        self,
        base: Checkpoint,
        experts: Sequence[Checkpoint],
        weights: Sequence[float],
        *,
        moments: Sequence[MomentSource] = (),
        allow_nonfinite: bool = False,
        place: Place | None = None,
        workers: int | None = None,
    ) -> None:
        self._place = place or Place()
        self._base, self._experts, self._weights, self._moments = base, experts, weights, moments
        self._allow_nonfinite = allow_nonfinite
        self._free: list[Tensor] = []  # flat memory of units that are done: fresh pages cost as much as the arithmetic
        self._buffers = _Buffers()
        self._pool: ThreadPoolExecutor | None = None
        if self._place.memory() is None:
            self._pool = single_threaded(workers or torch.get_num_threads(), "isomerge-delta")

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> DeltaReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, group: Group) -> Stack:
        """A group's deltas, or where it says so their sum or mean over the experts, its base and its moments."""
        m, n, T = group.m, group.n, len(self._experts)
        self._free.clear()  # no memory beside what the group takes
        deltas = empty_stack(len(group.units), self._stacked(group), m, n, group.dtype, self._place.device)
        stack = Stack(deltas=deltas, base=[self._empty(group) for _ in group.units])
        targets = list(zip(group.units, stack.base, deltas, strict=True))
        runs = [self._runs(unit, group) for unit in group.units]
        calls = [
            partial(self._subtract, group, *t, *run) for t, mine in zip(targets, runs, strict=True) for run in mine
        ]
        squares = iter(self._each(calls))
        for (unit, base, delta), mine in zip(targets, runs, strict=True):
            self._prove(stack, group, unit, base, delta, sum(next(squares) for _ in mine))
        if group.moment_size:
            stack.moments = self._read_moments(group, deltas)
            stack.bytes_read += len(group.units) * T * moment_bytes(group.moment_size, group.tokens, n)
        return stack

    def map(self, group: Group, function: Callable[[Passage], Result]) -> Mapped[Result]:
        """What `function` makes of each unit of a group of elements, on the CPU: called in the thread that reads it."""
        mapped = Mapped[Result]()
        size = (1 + self._stacked(group)) * group.m * group.n
        if any(buffer.numel() < size or buffer.dtype != group.dtype for buffer in self._free):
            self._free.clear()

        def one(unit: Unit) -> tuple[Result, Read]:
            found, memory = Read(), list[Tensor]()
            load, took = partial(self._load, group, unit, found, memory), partial(self._count, found, unit)
            direct = Direct(tuple(self._sources(unit)), self._weights, unit, group)
            result = function(Passage(unit, load, direct, took))
            self._free += memory
            return result, found

        for result, found in self._each([partial(one, unit) for unit in group.units]):
            mapped.results.append(result)
            mapped.add(found)
        return mapped

    def base_bytes(self, unit: Unit) -> int:
        """Bytes that reading the base's values of a unit takes."""
        return _nbytes(self._base, unit.name, unit)

    def read_base(self, unit: Unit, group: Group) -> Tensor:
        """The base's values of a unit, [m, n] in the group's dtype; InputError unless they are finite."""
        values = self._empty(group)
        _rows(values, group).copy_(self._read(self._base, unit.name, unit, group))
        nonfinite.check_base(values, self._base, unit.name)
        return values

    def _stacked(self, group: Group) -> int:
        return len(self._experts) if group.reduction == "none" else 1

    def _runs(self, unit: Unit, group: Group) -> list[tuple[int, int]]:
        """(first, count) of the rows of a unit, as it is stored, that are read at a time."""
        rows, columns = group.m * group.n // _columns(group), _columns(group)
        parts = self._pool is not None and all(model.in_order(name) for model, name in self._sources(unit))
        step = max(1, self._longest(unit) // columns) if parts else max(1, rows)
        return [(first, min(step, rows - first)) for first in range(0, rows, step)]

    def _longest(self, unit: Unit) -> int:
        """Elements of the longest run: of all models together no more than `RUNS_BYTES`, unless that is very few."""
        together = sum(model.tensors[name].dtype.itemsize for model, name in self._sources(unit))
        return min(RUN_ELEMENTS, max(RUNS_BYTES // together, LEAST_ELEMENTS))

    def _load(self, group: Group, unit: Unit, found: Read, memory: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The base [m, n] and the deltas [T or 1, m, n] of a unit, in memory that is added to `memory`."""
        shape = 1 + self._stacked(group), group.m, group.n
        size = math.prod(shape)
        memory.append(self._free.pop() if self._free else on_huge_pages(torch.empty(size, dtype=group.dtype)))
        stack = memory[-1][:size].view(shape)
        base, deltas = stack[0], stack[1:]
        square = sum(self._subtract(group, unit, base, deltas, *run) for run in self._runs(unit, group))
        self._prove(found, group, unit, base, deltas, square)
        return base, deltas

    def _subtract(self, group: Group, unit: Unit, base: Tensor, deltas: Tensor, first: int, count: int) -> float:
        """Fills rows of the base [m, n] and of the deltas [T, m, n], or of their reduction; returns ||sum||²."""
        rows = slice(first, first + count)
        # Runs of all models may be in memory at once, so whole tensors are taken one by one.
        short = self._pool is not None and count * _columns(group) <= self._longest(unit)
        models = (
            self._read(model, name, unit, group, first, count, buffer=index if short else None)
            for index, (model, name) in enumerate(self._sources(unit))
        )
        return ops.subtract(
            next(models),
            models,
            self._weights,
            base_out=_rows(base, group)[rows],
            out=_rows(deltas, group)[:, rows],
            reduction=group.reduction,
            backend="auto" if short else "eager",
        )

    def _prove(self, found: Read, group: Group, unit: Unit, base: Tensor, deltas: Tensor, square: float) -> None:
        """Notes what a unit took; `square` is ||sum of the deltas||² as it was computed. If that is finite so are all
        values, for one NaN or Inf in any model makes it NaN or Inf; else each is looked at.
        """
        sources, reduced = list(zip(self._experts, unit.sources, strict=True)), group.reduction != "none"
        if not math.isfinite(square):
            nonfinite.check_base(base, self._base, unit.name)
            for t, (expert, name) in enumerate(sources):
                delta = self._delta(t, group, unit, base) if reduced else deltas[t]
                raw = partial(self._read, expert, name, unit, group)
                if count := nonfinite.zero(delta, raw, expert, name, allowed=self._allow_nonfinite):
                    found.nonfinite[t, unit.name] = count
                if reduced:
                    deltas[0] = delta if t == 0 else deltas[0].add_(delta)
            square = ops.frobenius(deltas.sum(0)) ** 2
            if group.reduction == "mean":
                deltas /= len(self._experts)
        self._count(found, unit, square)

    def _count(self, found: Read, unit: Unit, square: float) -> None:
        """Notes that all of a unit was read; `square` is ||sum of the deltas||²."""
        found.bytes_read += sum(_nbytes(model, name, unit) for model, name in self._sources(unit))
        found.sum_squares.append(square)

    def _delta(self, t: int, group: Group, unit: Unit, base: Tensor) -> Tensor:
        """weight_t * (expert_t - base) [m, n] of one expert and a base that is in memory."""
        delta = self._empty(group)
        values = self._read(self._experts[t], unit.sources[t], unit, group)
        _rows(delta, group).copy_(values).sub_(_rows(base, group))
        return delta.mul_(self._weights[t])

    def _each(self, calls: Sequence[Callable[[], Result]]) -> list[Result]:
        """The results of the calls in order, side by side on the CPU; the first exception is raised here."""
        if self._pool is None:
            return [call() for call in calls]
        return list(self._pool.map(lambda call: call(), calls))

    def _read_moments(self, group: Group, deltas: Tensor) -> Tensor:
        d = group.moment_size
        moments = empty_stack(len(group.units), len(self._moments), d, d, group.dtype, self._place.device)
        for unit, mine, theirs in zip(group.units, moments, deltas, strict=True):
            for t, (target, delta) in enumerate(zip(mine, theirs, strict=True)):
                self._moment(group, t, unit, target, delta)
        return moments

    def _moment(self, group: Group, t: int, unit: Unit, target: Tensor, delta: Tensor) -> None:
        """The second moment of an expert's layer into `target` [d, d]; of inputs the shifts' with `delta`, if d = m."""
        source, name, shifts = self._moments[t], unit.sources[t], len(target) != group.n
        stored = self._place.up(source.stored(name))
        if stored.shape[0] == stored.shape[1]:
            target.copy_(stored)
            if shifts and self._weights[t] != 1.0:  # of the shifts X deltaᵀ: they scale as the delta does
                target.mul_(self._weights[t] ** 2)
        else:
            with suppress(ValueError):  # what overflows is said below
                ops.shift_cov(stored.to(group.dtype), delta if shifts else None, out=target.zero_())
        if not bool(torch.isfinite(target.sum())) and not bool(torch.isfinite(target).all()):
            raise InputError(
                f"{source.label}: {name}: second moments overflow {str(target.dtype)[6:]}; set `dtype: float64`"
            )

    def _read(
        self,
        checkpoint: Checkpoint,
        name: str,
        unit: Unit,
        group: Group,
        first: int = 0,
        count: int | None = None,
        buffer: int | None = None,
    ) -> Tensor:
        """Rows of a unit as they are stored, [rows, columns], in the checkpoint's dtype; all by default.

        In memory of their own, or in this thread's `buffer` of that number, until the next are read to it.
        """
        columns = _columns(group)
        length = unit.count if count is None else count * columns
        out = None if buffer is None else self._buffer(buffer, length, checkpoint.tensors[name].dtype)
        values = checkpoint.read(name, unit.start + first * columns, length, out=out)
        return self._place.up(values).view(-1, columns)

    def _buffer(self, index: int, length: int, dtype: torch.dtype) -> Tensor:
        """Memory that this thread uses again and again: fresh pages would cost more than the copy to them."""
        buffers, nbytes = self._buffers.runs, length * dtype.itemsize
        if index not in buffers or len(buffers[index]) < nbytes:
            buffers[index] = torch.empty(nbytes, dtype=torch.uint8)
        return buffers[index][:nbytes].view(dtype)

    def _sources(self, unit: Unit) -> Iterator[tuple[Checkpoint, str]]:
        """Each model and the unit's name in it, the base first."""
        yield self._base, unit.name
        yield from zip(self._experts, unit.sources, strict=True)

    def _empty(self, group: Group) -> Tensor:
        return torch.empty(group.m, group.n, dtype=group.dtype, device=self._place.device)


class _Buffers(threading.local):
    """Memory of each thread, by number."""

    def __init__(self) -> None:
        self.runs: dict[int, Tensor] = {}


def _columns(group: Group) -> int:
    """Elements of a row of a unit as a checkpoint stores it: m, or 1 where any run of elements is rows."""
    return group.m if group.transposed else 1


def _rows(values: Tensor, group: Group) -> Tensor:
    """[..., m, n] -> the same memory in the order in which a checkpoint stores it: [..., rows, columns]."""
    return values.mT if group.transposed else values.view(*values.shape[:-2], -1, 1)


def _nbytes(checkpoint: Checkpoint, name: str, unit: Unit) -> int:
    return unit.count * checkpoint.tensors[name].dtype.itemsize

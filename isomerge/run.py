"""The loop over a plan: for each group read -> method -> write, reading and writing in threads of their own.

The same inputs and settings on one machine give the same bytes, whatever the groups, the shards and the threads do:
methods compute each matrix of a stack as if it were alone, and random numbers depend on the tensor's name and the place
in it.

Where an update is scaled by its norm among all layers of its type, the updates of the type wait in a file until the
last of them is computed; then each is read back, scaled, added to the base and written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor

from isomerge import ops
from isomerge.assignments import Assignment
from isomerge.checkpoint import Checkpoint, Receipt
from isomerge.delta_reader import DeltaReader, Passage
from isomerge.deltas import PIECE_ELEMENTS, Mapped, Stack, Unit
from isomerge.errors import InputError
from isomerge.memory import give_back, peak_rss, resident
from isomerge.methods import METHODS
from isomerge.moments import Moments
from isomerge.overlap import Behind, ahead
from isomerge.place import Place
from isomerge.plan import Plan
from isomerge.report import Report
from isomerge.schedule import Step, process_bytes, streams
from isomerge.spool import Spool
from isomerge.surveys import Surveys
from isomerge.tally import Batch, Outcome, Tally

FULL = 0.9  # of the planned memory: beyond it, what malloc keeps back is given back between groups
WRITES = 1  # tensors that wait for the writing thread, or are being written, while the next is computed


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a merge is; bytes are those read and written together."""

    bytes_done: int
    bytes_total: int
    matrices_done: int
    matrices_total: int
    name: str  # the tensor just merged; "" when an earlier process has merged what is done


@dataclass(frozen=True, slots=True)
class Job:
    """Open checkpoints, the statistics of the experts where a method needs them, the plan of their merge, and where it
    is computed.
    """

    plan: Plan
    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    statistics: tuple[Moments, ...] = ()
    place: Place = field(default_factory=Place)


class _Sink(Protocol):
    @property
    def records(self) -> Sequence[Mapping[str, Any]]:
        """Of what is written already, by an earlier process."""

    def write(self, name: str, tensor: Tensor, start: int = 0, output: int = 0) -> Receipt: ...

    def note(self, record: Mapping[str, Any], receipts: Sequence[Receipt]) -> None: ...


def run(
    job: Job,
    sink: _Sink,
    spool: Spool,
    report: Report,
    allow_nonfinite: bool,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Writes every tensor of the plan to the sink, less what stands there, and completes the report."""
    started = time.perf_counter()
    weights = [model.weight for model in job.plan.settings.models]
    place = job.place
    others = max(0, resident() - process_bytes(job.plan.workers))  # what the caller's own program holds

    def read(step: Step) -> tuple[Stack | Mapped[Written], Callable[[Iterable[Tensor]], None], float]:
        before = time.perf_counter()
        with place.reading():
            found = state.read(step)
            return found, place.mark(), time.perf_counter() - before

    reader = DeltaReader(
        job.base,
        job.experts,
        weights,
        moments=job.statistics,
        allow_nonfinite=allow_nonfinite,
        place=place,
        workers=job.plan.workers,
    )
    with reader, Behind(WRITES) as writes:
        state = _Run(job, reader, sink, spool, report, progress, writes)
        state.restore()
        for assignment in job.plan.assignments:
            if assignment.call is None:
                state.copy(assignment)
        steps = state.left()
        if spool.layer_type is not None and not (steps and steps[0].layer_type == spool.layer_type):
            state.release()  # an earlier process had computed all of the type, and not written all
        with closing(ahead(read, steps)) as stacks:
            for step, following in zip_longest(steps, steps[1:]):
                found, take, seconds = next(stacks)
                take(found.tensors())
                report.totals.read_seconds += seconds
                state.step(step, found)
                del found  # before the next is taken: two stacks in memory, never three
                give_back(above=others + FULL * job.plan.peak_bytes)
                if step.layer_type is not None and (following is None or following.layer_type != step.layer_type):
                    state.release()
        writes.close()
    state.finish()
    report.totals.seconds = time.perf_counter() - started
    report.totals.peak_bytes, report.totals.gpu_peak_bytes = peak_rss(), place.peak()


@dataclass(frozen=True, slots=True)
class Merged:
    """A unit of the merged model."""

    values: tuple[Tensor, ...]  # of each output, in its dtype
    update_square: float  # ||update||², times the square of the layer factor
    seconds: float


@dataclass(frozen=True, slots=True)
class Written:
    """A unit of the merged model that the thread which has read and merged it has written, out of its cache."""

    merged: Merged  # without the values
    receipts: tuple[Receipt, ...]
    nbytes: int
    seconds: float


class _Run:
    """One pass over a plan: merges units, writes them, keeps the records."""

    def __init__(
        self,
        job: Job,
        reader: DeltaReader,
        sink: _Sink,
        spool: Spool,
        report: Report,
        progress: Callable[[Progress], None] | None,
        writes: Behind,
    ) -> None:
        self._job, self._reader, self._sink, self._spool = job, reader, sink, spool
        self._report, self._progress, self._writes = report, progress, writes
        self._write_seconds = 0.0  # of the writing thread
        self._assignments = {a.name: a for a in job.plan.assignments}
        self._outputs = range(len(job.plan.settings.outputs))
        self._surveys = Surveys(job.plan, reader, job.place)
        self._tally = Tally(report)
        self._bytes_done = self._matrices_done = 0

    def restore(self) -> None:
        """Counts what an earlier process has written, and takes over the updates it has left in the spool."""
        units = {(unit.name, unit.start): (step, unit) for step in self._job.plan.steps for unit in step.group.units}
        batches = [Batch.from_plain(record) for record in self._sink.records]
        written = {key for batch in batches if not batch.waits for key in batch.keys}
        under_way = next((step.layer_type for key, (step, _) in units.items() if key not in written), None)
        for batch in batches:
            if batch.waits and batch.keys <= self._tally.done:
                continue  # done again since, for the spool had not held it
            waiting = [] if batch.keys <= written else [(*units[o.key], o.slot) for o in batch.outcomes if o.slot]
            if all(step.layer_type == under_way and self._spool.holds(step, slot) for step, _, slot in waiting):
                for step, unit, slot in waiting:
                    self._spool.take_over(step, unit, slot)
                self._tally.add(batch)
        self._report.totals.restored = len(self._tally.done)
        if self._tally.done:
            self._matrices_done = self._tally.matrices
            self._tell("", self._report.totals.bytes_read + self._report.totals.bytes_written)

    def left(self) -> list[Step]:
        """The steps less the units that are done."""
        steps = []
        for step in self._job.plan.steps:
            units = tuple(unit for unit in step.group.units if (unit.name, unit.start) not in self._tally.done)
            if units:
                steps.append(replace(step, group=replace(step.group, units=units)))
        return steps

    def copy(self, assignment: Assignment) -> None:
        """The base's values, piece by piece."""
        outcome = Outcome(assignment.name, 0)
        if outcome.key in self._tally.done:
            return
        batch, receipts = Batch([outcome]), list[Receipt]()
        for start in range(0, assignment.numel, PIECE_ELEMENTS):
            values = self._job.base.read(assignment.name, start, min(PIECE_ELEMENTS, assignment.numel - start))
            batch.read += values.nbytes
            cast = values.to(assignment.out_dtype)
            self._check_range(assignment, cast, values)
            for output in self._outputs:
                self._write(outcome, cast, start, output, receipts)
        self._tell(assignment.name, batch.read + outcome.written)
        self._close(batch, receipts)

    def read(self, step: Step) -> Stack | Mapped[Written]:
        """A group in memory; or each unit merged and written in the thread that has read it."""
        self._surveys.prepare(step)
        if not streams(step) or self._job.place.memory() is not None:
            return self._reader.read(step.group)

        def written(passage: Passage) -> Written:
            unit, merged = passage.unit, self._direct(step, passage)
            if merged is None:
                base, deltas = passage.load()
                started = time.perf_counter()
                merged = self._merged(step, unit, self._update(step, unit, deltas), base, started)
            before, assignment, receipts = time.perf_counter(), self._assignments[unit.name], list[Receipt]()
            for output, values in enumerate(merged.values):
                receipts += self._store(assignment, self._as_stored(step, values), unit.start, output)
            nbytes = len(receipts) * merged.values[0].nbytes
            seconds = time.perf_counter() - before
            return Written(replace(merged, values=()), tuple(receipts), nbytes, seconds)

        return self._reader.map(step.group, written)

    def step(self, step: Step, found: Stack | Mapped[Written]) -> None:
        """One group: every unit computed, added to the base and written; or kept until its layer factor is known."""
        batch, receipts = Batch(read=found.bytes_read), list[Receipt]()
        self._bytes_done += found.bytes_read
        for (expert, name), count in found.nonfinite.items():
            batch.nonfinite.setdefault(name, {})[self._job.experts[expert].label] = count
        for index, (unit, result) in enumerate(zip(step.group.units, self._results(step, found), strict=True)):
            outcome = Outcome(
                unit.name, unit.start, matrix=step.kind == "matrix", delta_square=found.sum_squares[index]
            )
            if isinstance(result, Written):
                outcome.update_square, outcome.seconds = result.merged.update_square, result.merged.seconds
                outcome.written = result.nbytes
                receipts += result.receipts
                self._report.totals.write_seconds += result.seconds
            elif isinstance(result, Merged):
                self._put(step, unit, outcome, result, receipts)
            else:
                self._keep(step, unit, outcome, *result)
            batch.outcomes.append(outcome)
            self._matrices_done += outcome.matrix
            self._tell(unit.name, outcome.written)
        self._close(batch, receipts)

    def release(self) -> None:
        """Updates of one type of layers, now that the norms of all are known: scaled, added to the base, written."""
        batch, receipts = Batch(), list[Receipt]()
        for waiting, factor in self._spool.factors():
            step, unit = waiting.step, waiting.unit
            outcome = Outcome(unit.name, unit.start, layer_factor=factor)
            before = time.perf_counter()
            with self._job.place.reading():
                update = self._job.place.up(self._spool.read(waiting))
                base = self._reader.read_base(unit, step.group)
                take = self._job.place.mark()
            take((update, base))
            self._report.totals.read_seconds += time.perf_counter() - before
            batch.read += self._reader.base_bytes(unit)
            merged = self._merged(step, unit, update, base, time.perf_counter(), factor)
            self._put(step, unit, outcome, merged, receipts)
            batch.outcomes.append(outcome)
            self._tell(unit.name, self._reader.base_bytes(unit) + outcome.written)
            del update, base  # before the next are read
        self._close(batch, receipts)
        self._writes.close()  # from here on the spool is not needed
        self._spool.clear()

    def finish(self) -> None:
        """Completes the report, after the last write."""
        self._report.totals.write_seconds += self._write_seconds
        self._tally.close()

    def _results(self, step: Step, found: Stack | Mapped[Written]) -> Iterable[Written | Merged | tuple[Tensor, float]]:
        """Each unit merged, perhaps written; or its update [m, n] and its share of the time, where that has to wait."""
        if isinstance(found, Mapped):
            return found.results
        updates = zip(step.group.units, found.base, self._updates(step, found), strict=True)
        if step.layer_type is not None:
            return (update for _, _, update in updates)
        return (
            self._merged(step, unit, update, base, time.perf_counter() - seconds)
            for unit, base, (update, seconds) in updates
        )

    def _updates(self, step: Step, stack: Stack) -> Iterator[tuple[Tensor, float]]:
        """(update [m, n], share of the time) of a stack [L, T, m, n]: one call for all, or one for each unit."""
        method, units, deltas = METHODS[step.call.method], step.group.units, stack.deltas
        before = time.perf_counter()
        if not method.apart:
            inputs = (deltas,) if stack.moments is None else (deltas, stack.moments)
            updates = method.function(*inputs, **step.call.arguments)
            share = (time.perf_counter() - before) / len(units)
            yield from ((update, share) for update in updates)
            return
        for unit, mine in zip(units, deltas, strict=True):
            before = time.perf_counter()
            yield self._update(step, unit, mine), time.perf_counter() - before

    def _update(self, step: Step, unit: Unit, deltas: Tensor) -> Tensor:
        """The update [m, n] of one unit, by its deltas [T, m, n]."""
        method = METHODS[step.call.method]
        if _reduced(step):
            return deltas[0]  # the method would copy it
        return method.function(deltas, **step.call.arguments, **self._surveys.arguments(step, unit))

    def _keep(self, step: Step, unit: Unit, outcome: Outcome, update: Tensor, seconds: float) -> None:
        """The update and its norm to the spool; the norm is summed in float64, for its powers are to come."""
        before = time.perf_counter()
        update = update.to(step.group.dtype).contiguous()
        norm = float(torch.linalg.vector_norm(update, dtype=torch.float64))
        outcome.seconds = seconds + time.perf_counter() - before
        if not math.isfinite(norm):
            raise ArithmeticError(f"{unit.label}: {step.call.method} gave non-finite values")
        before = time.perf_counter()
        outcome.slot = self._spool.put(step, unit, self._job.place.down(update)(), norm)
        self._report.totals.write_seconds += time.perf_counter() - before

    def _merged(
        self, step: Step, unit: Unit, update: Tensor, base: Tensor, started: float, factor: float = 1.0
    ) -> Merged:
        """base + alpha * factor * update for each output, rounded once from the arithmetic dtype; in any thread."""
        assignment, values = self._assignments[unit.name], []
        norm = abs(factor) * ops.frobenius(update)
        for alpha in step.call.alphas:
            scale = alpha * factor
            bounded = abs(alpha) * norm <= torch.finfo(update.dtype).max
            if not bounded and not bool(torch.isfinite(update * scale).all()):
                raise ArithmeticError(f"{unit.label}: {step.call.method} with alpha {alpha:g} gave non-finite values")
            # Adding nothing would turn a zero of the base from -0 to 0. A copy, for `base` may not be kept.
            dtype = assignment.out_dtype
            values.append(ops.finalize(base, update, scale, out_dtype=dtype) if norm else base.to(dtype, copy=True))
            self._check_range(assignment, values[-1])
        return Merged(tuple(values), norm**2, time.perf_counter() - started)

    def _direct(self, step: Step, passage: Passage) -> Merged | None:
        """A unit merged on its way from the files, if it can be; in any thread."""
        method, started = METHODS[step.call.method], time.perf_counter()
        if method.merged_from is None:
            return None
        assignment = self._assignments[passage.unit.name]
        source = passage.direct.to(step.call.alphas, assignment.out_dtype)
        found = method.merged_from(source, **step.call.arguments, **self._surveys.arguments(step, passage.unit))
        if found is None:
            return None
        passage.took(found.sum_square)
        for values in found.values:
            self._check_range(assignment, values)
        return Merged(found.values, found.update_square, time.perf_counter() - started)

    def _put(self, step: Step, unit: Unit, outcome: Outcome, merged: Merged, receipts: list[Receipt]) -> None:
        """A merged unit to each output."""
        outcome.update_square, outcome.seconds = merged.update_square, merged.seconds
        for output, values in enumerate(merged.values):
            self._write(outcome, self._as_stored(step, values), unit.start, output, receipts)

    def _check_range(self, assignment: Assignment, cast: Tensor, values: Tensor | None = None) -> None:
        """InputError where float16 cannot hold what was finite: `values`, or without them everything."""
        if cast.dtype is not torch.float16:
            return
        overflow = int((torch.isinf(cast) if values is None else torch.isinf(cast) & torch.isfinite(values)).sum())
        if overflow:
            raise InputError(
                f"{self._job.plan.settings.source}: out_dtype: {overflow} values of {assignment.name} overflow "
                "float16; use bfloat16 or float32"
            )

    def _as_stored(self, step: Step, values: Tensor) -> Tensor:
        return (values.mT if step.group.transposed else values).contiguous()

    def _write(self, outcome: Outcome, values: Tensor, start: int, output: int, receipts: list[Receipt]) -> None:
        """Hands values on the device, contiguous, in the dtype of the output, to the writing thread."""
        assignment = self._assignments[outcome.name]
        arrive = self._job.place.down(values)
        outcome.written += (1 + len(assignment.aliases)) * values.nbytes

        def write() -> None:
            before = time.perf_counter()
            receipts.extend(self._store(assignment, arrive(), start, output))
            self._write_seconds += time.perf_counter() - before

        self._writes.put(write)

    def _store(self, assignment: Assignment, values: Tensor, start: int, output: int) -> list[Receipt]:
        """Writes values on the CPU under every name of a tensor; in any thread."""
        return [self._sink.write(name, values, start, output) for name in (assignment.name, *assignment.aliases)]

    def _close(self, batch: Batch, receipts: Sequence[Receipt]) -> None:
        """Counts a batch as done, here now and for a later process when its last write is."""
        record = batch.plain()
        self._writes.follow(lambda: self._sink.note(record, receipts))
        self._tally.add(batch)

    def _tell(self, name: str, nbytes: int) -> None:
        """Progress by a unit for which `nbytes` were read and written."""
        self._bytes_done += nbytes
        if self._progress is not None:
            plan = self._job.plan
            total = plan.bytes_read + plan.bytes_written
            self._progress(Progress(self._bytes_done, total, self._matrices_done, plan.matrices, name))


def _reduced(step: Step) -> bool:
    """Whether the reduction of the deltas, formed as they are read, is the update."""
    return METHODS[step.call.method].elementwise and step.group.reduction != "none"

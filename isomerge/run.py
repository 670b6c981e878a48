"""The loop over a plan: for each group read -> method -> write, reading and writing in threads of their own.

The same inputs and settings on one machine give the same bytes, whatever the groups, the shards and the threads do:
methods compute each matrix of a stack as if it were alone, pieces have a size of their own, and random numbers are
seeded by the tensor's name.

Where an update is scaled by its norm among all layers of its type, the updates of the type wait in a file until the
last of them is computed; then each is read back, scaled, added to the base and written.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from isomerge import ops
from isomerge.checkpoint import Checkpoint
from isomerge.deltas import PIECE_ELEMENTS, DeltaReader, Group, Stack, Unit
from isomerge.errors import InputError
from isomerge.methods import METHODS
from isomerge.moments import Moments
from isomerge.overlap import Behind, ahead
from isomerge.place import Place
from isomerge.plan import Assignment, Plan
from isomerge.report import Report, peak_rss
from isomerge.schedule import Step
from isomerge.spool import Spool

WRITES = 1  # tensors that wait for the writing thread, or are being written, while the next is computed


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a merge is; bytes are those read and written together."""

    bytes_done: int
    bytes_total: int
    matrices_done: int
    matrices_total: int
    name: str  # the tensor just computed or written


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
    def write(self, name: str, tensor: Tensor, start: int = 0) -> None: ...


def run(
    job: Job,
    sink: _Sink,
    spool: Spool,
    report: Report,
    allow_nonfinite: bool,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Writes every tensor of the plan to the sink and completes the report."""
    started = time.perf_counter()
    weights = [model.weight for model in job.plan.settings.models]
    place = job.place
    reader = DeltaReader(
        job.base, job.experts, weights, moments=job.statistics, allow_nonfinite=allow_nonfinite, place=place
    )

    def read(group: Group) -> tuple[Stack, Callable[[Iterable[Tensor]], None], float]:
        before = time.perf_counter()
        with place.reading():
            stack = reader.read(group)
            return stack, place.mark(), time.perf_counter() - before

    with Behind(WRITES) as writes:
        state = _Run(job, reader, sink, spool, report, progress, writes)
        for assignment in job.plan.assignments:
            if assignment.call is None:
                state.copy(assignment)
        steps = job.plan.steps
        with closing(ahead(read, [step.group for step in steps])) as stacks:
            for step, following in zip(steps, (*steps[1:], None), strict=True):
                stack, take, seconds = next(stacks)
                take(stack.tensors())
                report.totals.read_seconds += seconds
                state.step(step, stack)
                del stack  # before the next is taken: two stacks in memory, never three
                if step.layer_type is not None and (following is None or following.layer_type != step.layer_type):
                    state.release()
        writes.close()
    state.finish()
    report.totals.seconds = time.perf_counter() - started
    report.totals.peak_bytes = peak_rss()


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
        self._records = {record.name: record for record in report.tensors}
        self._squares: dict[str, list[float]] = {}  # tensor -> sums over its units of ||sum of deltas||², ||update||²
        self._matrices = 0

    def copy(self, assignment: Assignment) -> None:
        """The base's values, piece by piece."""
        for start in range(0, assignment.numel, PIECE_ELEMENTS):
            values = self._job.base.read(assignment.name, start, min(PIECE_ELEMENTS, assignment.numel - start))
            self._report.totals.bytes_read += values.nbytes
            cast = values.to(assignment.out_dtype)
            self._check_range(assignment, cast, values)
            self._write(assignment, cast, start)
        self._tell(assignment.name)

    def step(self, step: Step, stack: Stack) -> None:
        """One group: every unit computed, added to the base and written; or kept until its layer factor is known."""
        self._report.totals.bytes_read += stack.bytes_read
        for (expert, name), count in stack.nonfinite.items():
            nonfinite = self._records[name].nonfinite
            label = self._job.experts[expert].label
            nonfinite[label] = nonfinite.get(label, 0) + count
        for index, (unit, update, seconds) in enumerate(self._updates(step, stack)):
            before = time.perf_counter()
            self._squares.setdefault(unit.name, [0.0, 0.0])[0] += _norm(stack.deltas[index].sum(0)) ** 2
            self._spend(unit, seconds + time.perf_counter() - before)
            self._matrices += step.kind == "matrix"
            if step.layer_type is None:
                self._add(step, unit, update, stack.base[index])
            else:
                self._keep(step, unit, update)
            self._tell(unit.name)

    def release(self) -> None:
        """Updates of one type of layers, now that the norms of all are known: scaled, added to the base, written."""
        for waiting, factor in self._spool.factors():
            step, unit = waiting.step, waiting.unit
            self._records[unit.name].layer_factor = factor
            before = time.perf_counter()
            with self._job.place.reading():
                update = self._job.place.up(self._spool.read(waiting))
                base = self._reader.read_base(unit, step.group)
                take = self._job.place.mark()
            take((update, base))
            self._report.totals.read_seconds += time.perf_counter() - before
            self._report.totals.bytes_read += self._reader.base_bytes(unit)
            self._add(step, unit, update, base, factor)
            self._tell(unit.name)
            del update, base  # before the next are read
        self._spool.clear()

    def finish(self) -> None:
        """Norms of whole tensors, and the warnings that only the data could give; after the last write."""
        self._report.totals.write_seconds += self._write_seconds
        for name, (deltas, update) in self._squares.items():
            self._records[name].delta_sum_norm, self._records[name].update_norm = deltas**0.5, update**0.5
        totals: dict[str, int] = {}
        for record in self._report.tensors:
            for label, count in record.nonfinite.items():
                totals[label] = totals.get(label, 0) + count
        for label, count in totals.items():
            self._report.warnings.append(f"{label}: {count} non-finite values were left out of the merge")

    def _updates(self, step: Step, stack: Stack) -> Iterator[tuple[Unit, Tensor, float]]:
        """(unit, update [m, n], share of the time) of a stack [L, T, m, n]: one call for all, or one each if seeded."""
        method, units, deltas = METHODS[step.call.method], step.group.units, stack.deltas
        before = time.perf_counter()
        if not method.seeded:
            inputs = (deltas,) if stack.moments is None else (deltas, stack.moments)
            updates = method.function(*inputs, **step.call.arguments)
            share = (time.perf_counter() - before) / len(units)
            yield from ((unit, update, share) for unit, update in zip(units, updates, strict=True))
            return
        for unit, mine in zip(units, deltas, strict=True):
            before = time.perf_counter()
            seed = unit_seed(self._job.plan.settings.seed, unit.label)
            update = method.function(mine, **step.call.arguments, seed=seed)
            yield unit, update, time.perf_counter() - before

    def _keep(self, step: Step, unit: Unit, update: Tensor) -> None:
        """The update and its norm to the spool; the norm is summed in float64, for its powers are to come."""
        before = time.perf_counter()
        update = update.to(step.group.dtype).contiguous()
        norm = float(torch.linalg.vector_norm(update, dtype=torch.float64))
        self._spend(unit, time.perf_counter() - before)
        if not math.isfinite(norm):
            raise ArithmeticError(f"{unit.label}: {step.call.method} gave non-finite values")
        before = time.perf_counter()
        self._spool.put(step, unit, self._job.place.down(update)(), norm)
        self._report.totals.write_seconds += time.perf_counter() - before

    def _add(self, step: Step, unit: Unit, update: Tensor, base: Tensor, factor: float = 1.0) -> None:
        """Writes base + alpha * factor * update, rounded once from the arithmetic dtype to that of the output."""
        assignment, scale = self._assignments[unit.name], step.call.alpha * factor
        before = time.perf_counter()
        norm = abs(scale) * _norm(update)
        if not norm <= torch.finfo(update.dtype).max and not bool(torch.isfinite(update * scale).all()):
            raise ArithmeticError(
                f"{unit.label}: {step.call.method} with alpha {step.call.alpha:g} gave non-finite values"
            )
        self._squares[unit.name][1] += norm**2
        merged = ops.finalize(base, update, scale, out_dtype=assignment.out_dtype)
        self._check_range(assignment, merged)
        self._spend(unit, time.perf_counter() - before)
        self._write(assignment, merged.mT if step.group.transposed else merged, unit.start)

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

    def _spend(self, unit: Unit, seconds: float) -> None:
        self._records[unit.name].seconds += seconds
        self._report.totals.compute_seconds += seconds

    def _write(self, assignment: Assignment, values: Tensor, start: int) -> None:
        """Hands values on the device, in the dtype of the output, to the writing thread."""
        arrive = self._job.place.down(values.contiguous())
        names = (assignment.name, *assignment.aliases)
        self._report.totals.bytes_written += len(names) * values.nbytes

        def write() -> None:
            before = time.perf_counter()
            arrived = arrive()
            for name in names:
                self._sink.write(name, arrived, start)
            self._write_seconds += time.perf_counter() - before

        self._writes.put(write)

    def _tell(self, name: str) -> None:
        if self._progress is not None:
            totals, plan = self._report.totals, self._job.plan
            total = plan.bytes_read + plan.bytes_written
            done = totals.bytes_read + totals.bytes_written
            self._progress(Progress(done, total, self._matrices, plan.matrices, name))


def unit_seed(seed: int, label: str) -> int:
    """A seed for one unit that depends on the recipe's seed and on its name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{label}".encode()).digest()[:8], "big") >> 1


def _norm(values: Tensor) -> float:
    """Frobenius norm; summed in float64 where the squares overflow the values' own dtype."""
    norm = float(torch.linalg.vector_norm(values))
    return norm if math.isfinite(norm) else float(torch.linalg.vector_norm(values, dtype=torch.float64))

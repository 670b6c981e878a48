"""The driver: for each group read -> method -> write. One engine for checkpoints on disk and models in memory.

The same inputs and settings on one machine give the same bytes, whatever the groups, the shards and the reading
thread do: methods compute each matrix of a stack as if it were alone, pieces have a size of their own, and random
numbers are seeded by the tensor's name.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from isomerge import output
from isomerge.checkpoint import Checkpoint, MemoryWriter, TensorSpec, Writer, from_state_dict, open_checkpoint
from isomerge.deltas import PIECE_ELEMENTS, DeltaReader, Group, Stack, Unit
from isomerge.errors import InputError
from isomerge.methods import METHODS
from isomerge.plan import Assignment, Plan, build_plan, check_settings
from isomerge.report import Report, new_report, peak_rss
from isomerge.schedule import Step
from isomerge.settings import SCOPES, Model, Rule, Settings, finite_number, rule_from, split_alpha

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a merge is; bytes are those read and written together."""

    bytes_done: int
    bytes_total: int
    matrices_done: int
    matrices_total: int
    name: str  # the tensor just finished


@dataclass(frozen=True, slots=True)
class Job:
    """Open checkpoints and the plan of their merge."""

    plan: Plan
    base: Checkpoint
    experts: tuple[Checkpoint, ...]


class _Sink(Protocol):
    def write(self, name: str, tensor: Tensor, start: int = 0) -> None: ...


def merge(
    recipe: str | Path | Mapping[str, object],
    out: str | Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    group_bytes: int | None = None,
    allow_nonfinite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Merges the checkpoints of a recipe into the folder `out` and returns what happened.

    `recipe` is a YAML file, or its content as a mapping (relative paths then start at the working directory).
    `group_bytes` bounds the deltas that are computed at a time, one unit at least; by default the plan chooses.
    With `allow_nonfinite`, NaN and Inf entries of experts count as a delta of zero. InputError, with nothing written,
    for any mistake in the inputs; the folder appears whole at the end, or not at all.
    """
    out = Path(out)
    with open_job(recipe, group_bytes=group_bytes) as job:
        settings = job.plan.settings
        inputs = [model.path for model in (settings.base, *settings.models) if model.path is not None]
        output.check_output(out, job.plan.bytes_written, inputs, overwrite=overwrite)
        from isomerge import __version__
        from isomerge.recipe import dump_recipe

        report = new_report(job.plan, job.base, job.experts, __version__)
        metadata = {**job.base.metadata, "isomerge_version": __version__}
        with Writer(out, _specs(job.plan), shard_bytes=shard_bytes, metadata=metadata, overwrite=overwrite) as writer:
            _run(job, writer, report, allow_nonfinite, progress)
            output.add_side_files(writer, job.base, job.plan, report, dump_recipe(settings))
            writer.commit()
    return report


def merge_state_dicts(
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    *,
    method: str,
    weights: Sequence[float] | None = None,
    scope: str = "default",
    rules: Sequence[Rule | Mapping[str, object]] = (),
    out_dtype: torch.dtype | None = None,
    seed: int = 0,
    **parameters: object,
) -> dict[str, Tensor]:
    """The merge of models in memory, on the CPU, with the keys of `base` in their order: what `merge` would write.

    `parameters` are `alpha` and the method's own; `rules` are mappings with a recipe's keys. The inputs are not
    modified. Tensors that share memory in `base` share it in the result. InputError for mistakes in the inputs.
    """
    where = "merge_state_dicts"
    if not experts:
        raise InputError(f"{where}: experts: none are given; give at least one state dict")
    if scope not in SCOPES:
        raise InputError(f"{where}: scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise InputError(f"{where}: out_dtype: expected a floating-point dtype, got {out_dtype}")
    given = [1.0] * len(experts) if weights is None else list(weights)
    if len(given) != len(experts):
        raise InputError(f"{where}: weights: {len(given)} for {len(experts)} experts; give one per expert")
    alpha, own = split_alpha(parameters, f"{where}: parameters")
    settings = Settings(
        method=method,
        base=Model("base"),
        models=tuple(
            Model(f"experts[{i}]", None, finite_number(w, f"{where}: weights[{i}]")) for i, w in enumerate(given)
        ),
        parameters=own,
        alpha=1.0 if alpha is None else alpha,
        scope=scope,
        rules=tuple(rule_from(rule, f"{where}: rules[{i}]") for i, rule in enumerate(rules)),
        out_dtype=out_dtype,
        seed=seed,
        source=where,
    )
    check_settings(settings)
    from isomerge import __version__

    opened = from_state_dict(base, "base")
    tuned = tuple(from_state_dict(expert, f"experts[{i}]") for i, expert in enumerate(experts))
    plan = build_plan(settings, opened, tuned)
    # Names on one tensor are joined again below, so that they share memory.
    plan = replace(plan, assignments=tuple(replace(a, aliases=()) for a in plan.assignments))
    job = Job(plan, opened, tuned)
    with MemoryWriter(_specs(plan)) as writer:
        _run(job, writer, new_report(plan, opened, tuned, __version__), False, None)
        writer.commit()
    return {name: writer.tensors[opened.aliases.get(name, name)] for name in base}


@contextmanager
def open_job(recipe: str | Path | Mapping[str, object], *, group_bytes: int | None = None) -> Iterator[Job]:
    """The plan of a recipe with its checkpoints open. InputError for every mistake that headers can show."""
    from isomerge.recipe import load_recipe, parse_recipe

    settings = parse_recipe(recipe, Path()) if isinstance(recipe, Mapping) else load_recipe(recipe)
    check_settings(settings)
    with ExitStack() as stack:
        base = stack.enter_context(_open(settings.base))
        experts = tuple(stack.enter_context(_open(model)) for model in settings.models)
        yield Job(build_plan(settings, base, experts, group_bytes=group_bytes), base, experts)


def _open(model: Model) -> Checkpoint:
    assert model.path is not None
    if not model.path.exists() and Path(model.name).exists():
        raise InputError(f"{model.path}: does not exist; relative paths in a recipe start at the recipe's folder")
    return open_checkpoint(model.path)


def _specs(plan: Plan) -> list[TensorSpec]:
    return [TensorSpec(name, a.out_dtype, a.shape) for a in plan.assignments for name in (a.name, *a.aliases)]


# The loop -------------------------------------------------------------------------------------------------------


def _run(
    job: Job,
    sink: _Sink,
    report: Report,
    allow_nonfinite: bool,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Writes every tensor of the plan to the sink and completes the report."""
    started = time.perf_counter()
    run = _Run(job, sink, report, progress)
    reader = DeltaReader(
        job.base, job.experts, [model.weight for model in job.plan.settings.models], allow_nonfinite=allow_nonfinite
    )
    for assignment in job.plan.assignments:
        if assignment.call is None:
            run.copy(assignment)

    def read(group: Group) -> tuple[Stack, float]:
        before = time.perf_counter()
        return reader.read(group), time.perf_counter() - before

    with closing(_ahead(read, [step.group for step in job.plan.steps])) as stacks:
        for step in job.plan.steps:
            stack, seconds = next(stacks)
            report.totals.read_seconds += seconds
            run.step(step, stack)
            del stack  # before the next is taken: two stacks in memory, never three
    run.finish()
    report.totals.seconds = time.perf_counter() - started
    report.totals.peak_bytes = peak_rss()


def _ahead(
    read: Callable[[Group], tuple[Stack, float]], groups: Sequence[Group]
) -> Generator[tuple[Stack, float], None, None]:
    """What `read` gives for each group in order; the next is read in a thread while the caller works on one."""
    if not groups:
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="isomerge-read") as pool:
        coming = pool.submit(read, groups[0])
        for group in groups[1:]:
            stack = coming.result()
            coming = pool.submit(read, group)
            yield stack
            del stack
        yield coming.result()


class _Run:
    """One pass over a plan: merges units, writes them, keeps the records."""

    def __init__(self, job: Job, sink: _Sink, report: Report, progress: Callable[[Progress], None] | None) -> None:
        self._job, self._sink, self._report, self._progress = job, sink, report, progress
        self._assignments = {a.name: a for a in job.plan.assignments}
        self._records = {record.name: record for record in report.tensors}
        self._squares: dict[str, list[float]] = {}  # tensor -> sums over its units of ||sum of deltas||², ||update||²
        self._matrices = 0

    def copy(self, assignment: Assignment) -> None:
        """The base's values, piece by piece."""
        for start in range(0, assignment.numel, PIECE_ELEMENTS):
            values = self._job.base.read(assignment.name, start, min(PIECE_ELEMENTS, assignment.numel - start))
            self._report.totals.bytes_read += values.nbytes
            self._write(assignment, values, start)
        self._tell(assignment.name)

    def step(self, step: Step, stack: Stack) -> None:
        """One group: every unit computed, added to the base and written."""
        self._report.totals.bytes_read += stack.bytes_read
        for (expert, name), count in stack.nonfinite.items():
            nonfinite = self._records[name].nonfinite
            label = self._job.experts[expert].label
            nonfinite[label] = nonfinite.get(label, 0) + count
        for index, (unit, update, seconds) in enumerate(self._updates(step, stack.deltas)):
            before = time.perf_counter()
            merged = self._add(step, unit, update, stack.deltas[index], stack.base[index])
            seconds += time.perf_counter() - before
            self._records[unit.name].seconds += seconds
            self._report.totals.compute_seconds += seconds
            self._write(self._assignments[unit.name], merged.mT if step.group.transposed else merged, unit.start)
            self._matrices += step.kind == "matrix"
            self._tell(unit.name)

    def finish(self) -> None:
        """Norms of whole tensors, and the warnings that only the data could give."""
        for name, (deltas, update) in self._squares.items():
            self._records[name].delta_sum_norm, self._records[name].update_norm = deltas**0.5, update**0.5
        totals: dict[str, int] = {}
        for record in self._report.tensors:
            for label, count in record.nonfinite.items():
                totals[label] = totals.get(label, 0) + count
        for label, count in totals.items():
            self._report.warnings.append(f"{label}: {count} non-finite values were left out of the merge")

    def _updates(self, step: Step, deltas: Tensor) -> Iterator[tuple[Unit, Tensor, float]]:
        """(unit, update [m, n], share of the time) of a stack [L, T, m, n]: one call for all, or one each if seeded."""
        method, units = METHODS[step.call.method], step.group.units
        before = time.perf_counter()
        if not method.seeded:
            updates = method.function(deltas, **step.call.parameters)
            share = (time.perf_counter() - before) / len(units)
            yield from ((unit, update, share) for unit, update in zip(units, updates, strict=True))
            return
        for unit, mine in zip(units, deltas, strict=True):
            before = time.perf_counter()
            seed = unit_seed(self._job.plan.settings.seed, unit.label)
            update = method.function(mine, **step.call.parameters, seed=seed)
            yield unit, update, time.perf_counter() - before

    def _add(self, step: Step, unit: Unit, update: Tensor, deltas: Tensor, base: Tensor) -> Tensor:
        """base + alpha * update, [m, n], in the arithmetic dtype; the product is rounded before it is added."""
        alpha = step.call.alpha
        scaled = update * alpha
        norm = _norm(scaled)
        if not math.isfinite(norm):
            raise ArithmeticError(f"{unit.label}: {step.call.method} with alpha {alpha:g} gave non-finite values")
        squares = self._squares.setdefault(unit.name, [0.0, 0.0])
        squares[0] += _norm(deltas.sum(0)) ** 2
        squares[1] += norm**2
        return scaled.add_(base)

    def _write(self, assignment: Assignment, values: Tensor, start: int) -> None:
        before = time.perf_counter()
        cast = values.to(assignment.out_dtype).contiguous()
        if cast.dtype is torch.float16 and values.dtype is not torch.float16:
            overflow = int((torch.isinf(cast) & torch.isfinite(values)).sum())
            if overflow:
                raise InputError(
                    f"{self._job.plan.settings.source}: out_dtype: {overflow} values of {assignment.name} overflow "
                    "float16; use bfloat16 or float32"
                )
        for name in (assignment.name, *assignment.aliases):
            self._sink.write(name, cast, start)
            self._report.totals.bytes_written += cast.nbytes
        self._report.totals.write_seconds += time.perf_counter() - before

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

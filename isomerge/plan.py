"""The plan: a recipe and the headers of the checkpoints -> what will be done to each tensor, and what it costs.

No tensor is read here, and every mistake that headers can show is an `InputError` here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import TYPE_CHECKING

import torch

from isomerge import families, headers
from isomerge.assignments import Assignment, Calls, assign, with_layer_types, with_moments
from isomerge.deltas import Group, Unit, cut, moment_bytes, pieces
from isomerge.families import Family
from isomerge.methods import METHODS
from isomerge.schedule import Bound, Step, gpu_step_bytes, physical_bytes, process_bytes, staging, step_bytes
from isomerge.settings import Settings

if TYPE_CHECKING:
    from isomerge.checkpoint import Checkpoint
    from isomerge.moments import Moments


@dataclass(frozen=True, slots=True)
class MethodTotals:
    """What one method has to do."""

    tensors: int
    matrices: int
    flops: float
    bytes_read: int
    bytes_written: int
    shapes: Mapping[tuple[int, int], int]  # m x n -> matrices


@dataclass(frozen=True)
class Plan:
    """Everything that a merge will do, in order, and its costs in bytes and floating-point operations."""

    settings: Settings
    family: Family
    assignments: tuple[Assignment, ...]  # in the order of the base file
    steps: tuple[Step, ...]
    bytes_read: int
    warnings: tuple[str, ...]
    workers: int  # threads that read side by side
    on_gpu: bool = False  # whether groups are read to a GPU and computed there
    _bytes_read: Mapping[str, int] = field(default_factory=dict, repr=False)  # of each tensor, from all models

    @cached_property
    def bytes_written(self) -> int:
        return len(self.settings.outputs) * sum(a.bytes_written for a in self.assignments)

    @cached_property
    def spool_bytes(self) -> int:
        """Bytes on disk of the updates that wait for the norms of all layers of their type: one type at a time."""
        waiting: dict[str, int] = {}
        for step in self.steps:
            if step.layer_type is not None:
                nbytes = step.group.m * step.group.n * step.group.dtype.itemsize * len(step.group.units)
                waiting[step.layer_type] = waiting.get(step.layer_type, 0) + nbytes
        return max(waiting.values(), default=0)

    @property
    def disk_bytes(self) -> int:
        """Disk that the merge needs while it runs."""
        return self.bytes_written + self.spool_bytes

    @cached_property
    def matrices(self) -> int:
        return sum(len(step.group.units) for step in self.steps if step.kind == "matrix")

    @cached_property
    def flops(self) -> float:
        return sum(total.flops for total in self.by_method.values())

    @cached_property
    def by_method(self) -> dict[str, MethodTotals]:
        """Totals per method, and under `keep` those of the tensors that are copied."""
        experts = len(self.settings.models)
        totals: dict[str, MethodTotals] = {}
        for name in dict.fromkeys("keep" if a.call is None else a.call.method for a in self.assignments):
            mine = [a for a in self.assignments if (a.call.method if a.call else "keep") == name]
            steps = [s for s in self.steps if s.call.method == name]
            shapes: dict[tuple[int, int], int] = {}
            for s in steps:
                if s.kind == "matrix":
                    shape = s.group.m, s.group.n
                    shapes[shape] = shapes.get(shape, 0) + len(s.group.units)
            totals[name] = MethodTotals(
                tensors=len(mine),
                matrices=sum(shapes.values()),
                flops=sum(METHODS[name].flops(s.group.m, s.group.n, experts) * len(s.group.units) for s in steps),
                bytes_read=sum(self._bytes_read[a.name] for a in mine),
                bytes_written=len(self.settings.outputs) * sum(a.bytes_written for a in mine),
                shapes=shapes,
            )
        return totals

    @cached_property
    def peak_bytes(self) -> int:
        """Estimated peak of resident memory: two groups in flight, the method's workspace, a tensor being read."""
        experts = len(self.settings.models)
        taken = (
            staging(step, experts) if self.on_gpu else step_bytes(step, experts, self.workers) for step in self.steps
        )
        return process_bytes(self.workers) + max(taken, default=0)

    @cached_property
    def gpu_bytes(self) -> int:
        """Estimated peak of a GPU's memory: what would else be in the process's, 0 without one."""
        if not self.on_gpu:
            return 0
        experts = len(self.settings.models)
        return max((gpu_step_bytes(step, experts) for step in self.steps), default=0)


def build_plan(
    settings: Settings,
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    *,
    statistics: Sequence[Moments] = (),
    group_bytes: int | None = None,
    max_memory: int | None = None,
    gpu_memory: int | None = None,
    workers: int | None = None,
) -> Plan:
    """The plan of a merge from the headers of its checkpoints and, where a method needs them, of their statistics.

    `group_bytes` bounds the deltas and moments of one group, one unit at least. Without it, a group has a unit for each
    thread as far as the merge stays below `max_memory`: by default the size of the base + 3 times the deltas and
    moments of the largest tensor + 500 MB, and half of the machine's memory at most. With `gpu_memory`, groups are on a
    GPU, and of a size that depends on their shape alone. Of elements, memory holds as many units as there are
    `workers`, by default torch's threads. No result depends on any of these. InputError for a bound given that one
    unit, on a GPU one group, passes.
    """
    calls = Calls(settings)
    family = families.recognise({name: info.shape for name, info in base.tensors.items()})
    assignments = [assign(info, base, family, settings, calls) for info in base.tensors.values()]
    merged = [a.name for a in assignments if a.call is not None]
    headers.check_base_dtypes(base, merged)
    buffers = [a.name for a in assignments if not a.dtype.is_floating_point]
    by_rule = {a.name for a in assignments if a.rule is not None and settings.rules[a.rule].keep_base}
    headers.check_buffers(base, experts, [name for name in buffers if name not in by_rule])
    sources = headers.match(base, experts, merged, family)
    assignments, said = with_moments(assignments, sources.names, family, statistics)
    assignments = with_layer_types(assignments)
    dtypes = _dtypes(settings, base, experts, sources.names)
    largest = max(
        ((a.numel + a.moment_size**2) * dtypes[a.name].itemsize for a in assignments if a.call is not None), default=0
    )
    size = sum(info.nbytes for info in base.tensors.values())
    workers = workers or torch.get_num_threads()
    peak = min(size + 3 * len(experts) * largest + 500_000_000, physical_bytes() // 2)
    bound = Bound(group_bytes, peak if max_memory is None else max_memory, gpu_memory, workers)
    steps = tuple(_steps(assignments, sources.names, dtypes, bound))
    if max_memory is not None or gpu_memory is not None:
        bound.check(steps, len(experts))
    read = {a.name: _read_bytes(a, base, experts, sources.names.get(a.name, ())) for a in assignments}
    return Plan(
        settings=settings,
        family=family,
        assignments=tuple(assignments),
        steps=steps,
        on_gpu=gpu_memory is not None,
        bytes_read=sum(read.values()),
        workers=workers,
        warnings=(*_warnings(settings, assignments), *sources.warnings, *said),
        _bytes_read=read,
    )


def _steps(
    assignments: Iterable[Assignment],
    sources: Mapping[str, tuple[str, ...]],
    dtypes: Mapping[str, torch.dtype],
    bound: Bound,
) -> list[Step]:
    """Equal-shaped units with the same call, gathered in the order of the base file and cut to the memory bound.

    Steps are in the order of their first units in the file, so that reading goes forward, and those of one layer type
    follow one another, so that only one type's updates wait at a time.
    """
    order: dict[str, int] = {}
    gathered: dict[str | None, dict[tuple[object, ...], tuple[Step, list[Unit]]]] = {}
    for a in assignments:
        if a.call is None:
            continue
        dtype, experts = dtypes[a.name], len(sources[a.name])
        order[a.name] = len(order)
        for m, n, unit in _units(a, sources[a.name], experts):
            parameters = tuple(sorted(a.call.parameters.items()))
            key = (m, n, dtype, a.kind, a.moment_size, a.tokens, a.call.method, a.call.alphas, parameters)
            reduction = METHODS[a.call.method].reduction
            group = Group(m, n, a.kind.transposed, dtype, (), a.moment_size, a.tokens, reduction)
            empty = Step(group, a.call, a.kind.kind, a.layer_type)
            gathered.setdefault(a.layer_type, {}).setdefault(key, (empty, []))[1].append(unit)
    steps = []
    for alike in gathered.values():
        runs = [
            replace(step, group=replace(step.group, units=run))
            for step, units in alike.values()
            for run in cut(units, bound.length(step, len(units[0].sources)))
        ]
        steps += sorted(runs, key=lambda step: (order[step.group.units[0].name], step.group.units[0].start))
    return steps


def _dtypes(
    settings: Settings, base: Checkpoint, experts: Sequence[Checkpoint], sources: Mapping[str, tuple[str, ...]]
) -> dict[str, torch.dtype]:
    """The arithmetic of each merged tensor: the recipe's, and float64 where an input is float64."""
    return {
        name: reduce(
            torch.promote_types,
            (e.tensors[source].dtype for e, source in zip(experts, found, strict=True)),
            torch.promote_types(settings.dtype, base.tensors[name].dtype),
        )
        for name, found in sources.items()
    }


def _units(a: Assignment, sources: tuple[str, ...], experts: int) -> Iterable[tuple[int, int, Unit]]:
    """(m, n, unit) of the units of one tensor."""
    assert a.call is not None
    if a.kind.kind == "matrix":
        m, n = a.matrix
        if not a.kind.stacked(a.shape):
            return [(m, n, Unit(a.name, sources, 0, m * n, True))]
        return [(m, n, Unit(a.name, sources, i * m * n, m * n, False, i)) for i in range(a.kind.slices)]
    return [(1, unit.count, unit) for unit in pieces(a.name, sources, a.numel)]


def _read_bytes(a: Assignment, base: Checkpoint, experts: Sequence[Checkpoint], sources: Sequence[str]) -> int:
    """Bytes read for a tensor from all models and statistics; from the base twice where its update has to wait."""
    itemsizes = [e.tensors[name].dtype.itemsize for e, name in zip(experts, sources, strict=bool(sources))]
    times = 1 if a.layer_type is None else 2
    values = a.numel * (times * base.tensors[a.name].dtype.itemsize + sum(itemsizes))
    moments = moment_bytes(a.moment_size, a.tokens, a.matrix[1]) if a.moment_size else 0
    return values + len(sources) * moments


def _warnings(settings: Settings, assignments: Sequence[Assignment]) -> Iterable[str]:
    used = {a.rule for a in assignments}
    statistics = any(a.call is not None and METHODS[a.call.method].moments for a in assignments)
    for index, rule in enumerate(settings.rules):
        if index not in used:
            hidden = any(rule.matches(a.name) for a in assignments)
            reason = "an earlier rule takes every tensor it matches" if hidden else "it matches no tensor"
            yield f'{settings.source}: rules[{index}] ("{rule.filter}") has no effect: {reason}'
    for index, model in enumerate(settings.models):
        if model.statistics is not None and not statistics:
            yield f"{settings.source}: models[{index}].statistics is not used by {settings.method}"
        if (
            model.path is not None
            and settings.base.path is not None
            and model.path.resolve() == settings.base.path.resolve()
        ):
            yield f"{settings.source}: models[{index}] is the base itself: an expert whose delta is zero"
    if all(a.call is None for a in assignments):
        yield "no tensor is merged: the output will equal the base"

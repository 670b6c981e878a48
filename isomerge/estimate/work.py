"""What a merge consists of, counted: units of one shape, dtypes and call, all of which take the same time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from isomerge.assignments import Assignment
from isomerge.methods import METHODS
from isomerge.run import Job
from isomerge.schedule import Step

KEPT = "keep"  # as a plan calls what is copied from the base


@dataclass(frozen=True, slots=True)
class Work:
    """Like units; or, without a step, all elements of one dtype that are copied from the base, as one 1 x n unit."""

    assignment: Assignment  # of the first unit
    step: Step | None  # the first group
    m: int
    n: int
    units: int
    length: int  # units in the largest group

    @property
    def method(self) -> str:
        return KEPT if self.step is None else self.step.call.method

    @property
    def transposed(self) -> bool:
        """Whether its matrices are stored [n, m]."""
        return self.step is not None and self.step.group.transposed

    @property
    def elementwise(self) -> bool:
        """Whether it is merged element by element, in pieces that come and go."""
        return self.step is not None and METHODS[self.method].elementwise

    @property
    def cubic(self) -> bool:
        """Whether the time grows with the third power of the sides, and not with the number of elements."""
        return self.step is not None and not self.elementwise

    def sides(self, share: float) -> tuple[int, int]:
        """m x n with the sides multiplied by `share`, the number of elements by its square."""
        if self.m == 1:
            return 1, max(1, round(self.n * share**2))
        return max(1, round(self.m * share)), max(1, round(self.n * share))


def gather(job: Job) -> list[Work]:
    """All work of a job; every element that is written is in one of them."""
    assignments = {a.name: a for a in job.plan.assignments}
    found: dict[object, Work] = {}
    for step in job.plan.steps:
        group, first = step.group, step.group.units[0]
        a = assignments[first.name]
        dtypes = a.dtype, *(e.tensors[s].dtype for e, s in zip(job.experts, first.sources, strict=True))
        parameters = tuple(step.call.parameters.items())
        shape = group.m, group.n, group.transposed, group.dtype, group.moment_size
        surveyed = METHODS[step.call.method].survey is not None and not first.whole
        key = (*shape, surveyed, dtypes, a.out_dtype, step.kind, step.call.method, parameters)
        known = found.get(key) or Work(a, step, group.m, group.n, 0, 0)
        count = len(group.units)
        found[key] = replace(known, units=known.units + count, length=max(known.length, count))
    for a in job.plan.assignments:
        if a.call is None and a.numel:
            kept = found.get((a.dtype, a.out_dtype)) or Work(a, None, 1, 0, 1, 1)
            found[a.dtype, a.out_dtype] = replace(kept, n=kept.n + a.numel)
    return list(found.values())

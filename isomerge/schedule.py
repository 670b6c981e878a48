"""Steps: what is computed together, what it costs in memory, and how large that makes a group."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from isomerge.deltas import GROUP_BYTES, Group
from isomerge.methods import METHODS

PROCESS_BYTES = 360 * 2**20  # Python with torch loaded and what malloc keeps back (measured: 250 to 350 MiB)


@dataclass(frozen=True, slots=True)
class Call:
    """A method with its parameters, and the multiplier of its update."""

    method: str
    parameters: Mapping[str, object]
    alpha: float


@dataclass(frozen=True, slots=True)
class Step:
    """One group and the call on each of its units."""

    group: Group
    call: Call
    kind: str  # "matrix" or "elementwise"


def costs(step: Step, experts: int) -> tuple[int, int]:
    """Bytes of working memory of a step: (whatever the number of units, per unit)."""
    group, method = step.group, METHODS[step.call.method]
    elements = group.m * group.n
    held = 2 * (experts + 1) * elements  # deltas and base, of this group and of the next that is being read
    updates = 2 * elements + method.peak_floats(group.m, group.n, experts)
    single = 2 * elements  # a raw tensor from a file, the sum of deltas that is measured
    if method.seeded:  # called on one unit after the other
        return int((single + updates) * group.dtype.itemsize), held * group.dtype.itemsize
    return single * group.dtype.itemsize, int((held + updates) * group.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class Bound:
    """How large groups may be: by what the caller said, else by the memory of the whole merge."""

    group_bytes: int | None
    peak_bytes: int

    def length(self, step: Step, experts: int) -> int:
        """The largest number of units in a group of the step."""
        unit_bytes = experts * step.group.m * step.group.n * step.group.dtype.itemsize
        if self.group_bytes is not None:
            return max(1, self.group_bytes // unit_bytes)
        fixed, per_unit = costs(step, experts)
        fitting = (self.peak_bytes - PROCESS_BYTES - fixed) // per_unit
        # Matrices are computed one per thread; for the rest 64 MiB of deltas keep the overhead of a call small.
        wanted = max(GROUP_BYTES // unit_bytes, torch.get_num_threads() if step.kind == "matrix" else 1)
        return max(1, min(wanted, fitting))


def physical_bytes() -> int:
    """The machine's memory; 8 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 8 * 2**30

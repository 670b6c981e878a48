"""Steps: what is computed together, what it costs in memory, how large that makes a group, and which layers of a
model are of one type.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from isomerge.deltas import GROUP_BYTES, RUNS_BYTES, STREAM_BYTES, SURVEY_BYTES, Group
from isomerge.errors import InputError
from isomerge.methods import METHODS
from isomerge.methods.survey import TABLE_BYTES

LAYER_EXPONENT = "layer_exponent"  # the parameter of a call that the driver applies, over all layers of a type
_BLOCKS = re.compile(r"(res)?blocks?")
_INDEX = re.compile(r"((?:\w*(?:layer|block)_)?)\d+")  # `3`, and torchvision's `encoder_layer_3`
PROCESS_BYTES = 380 * 2**20  # Python with torch loaded and what malloc keeps back (measured: 250 to 365 MiB)
THREAD_BYTES = 26 * 2**20  # that malloc keeps back for each thread beyond two (measured with eight: 17 to 24 MiB)

SHIFT_TOKENS = 512  # whose shifts are in memory at a time: TOKENS of backends/eager.py, which a plan does not load

GPU_GROUP_BYTES = 4 * 2**30
"""Of what the units of a group take on a GPU: 12 matrices of 768 x 768 by TSV-M at T = 8, of which one has 21 tiles for
132 multiprocessors. One number for every device and budget, for the bits of a batch may depend on its size."""


@dataclass(frozen=True, slots=True)
class Call:
    """A method with its parameters, and the multiplier of its update for each output of the merge."""

    method: str
    parameters: Mapping[str, object]
    alphas: tuple[float, ...]

    @property
    def arguments(self) -> dict[str, object]:
        """The parameters that the method's function takes."""
        return {name: value for name, value in self.parameters.items() if name != LAYER_EXPONENT}

    @property
    def layer_exponent(self) -> float:
        """The power of a layer's relative norm that its update is multiplied by; 0: updates are as computed."""
        return float(self.parameters.get(LAYER_EXPONENT, 0.0))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Step:
    """One group and the call on each of its units."""

    group: Group
    call: Call
    kind: str  # "matrix" or "elementwise"
    layer_type: str | None = None  # of its layers, when each one's factor depends on the norms of them all


def layer_type(name: str) -> str:
    """The tensor's name without its block's index: `encoder.layer.3.mlp.weight` -> `encoder.layer.*.mlp.weight`.

    The index is the first number, and where there are `blocks.N` that one: T5's `block.3.layer.0` and Swin's
    `layers.0.blocks.3` both give what stands at the same place in every block. A number right before the last part,
    as in `mlp.2.weight`, is a place in a sequence and no block.
    """
    parts = name.split(".")
    indices = [i for i, part in enumerate(parts[:-2]) if _INDEX.fullmatch(part)]
    if not indices:
        return name
    chosen = next((i for i in indices if i > 0 and _BLOCKS.fullmatch(parts[i - 1])), indices[0])
    parts[chosen] = _INDEX.sub(r"\1*", parts[chosen])
    return ".".join(parts)


def costs(step: Step, experts: int) -> tuple[int, int]:
    """Bytes of working memory of a step: (whatever the number of units, per unit in memory), one task at a time."""
    group, method = step.group, METHODS[step.call.method]
    workspace = method.peak_floats(group.m, group.n, experts)
    if streams(step):
        # Deltas, base, another delta and a raw tensor from a file; base + update; what is merged.
        stacked = experts if group.reduction == "none" else 1
        floats = (stacked + 4 + len(step.call.alphas)) * group.m * group.n + workspace
        counts = 2 * experts * TABLE_BYTES if method.survey else 0  # of one piece, and what they are made of
        return _surveyed(step, experts), int(floats * group.dtype.itemsize) + counts
    single, held = _single(step), _held(step, experts)
    updates = 2 * group.m * group.n + workspace
    return int(single * group.dtype.itemsize), int((held + updates) * group.dtype.itemsize)


def gpu_step_bytes(step: Step, experts: int, units: int | None = None) -> int:
    """Bytes of a GPU's memory that a step on `units` units takes, by default its own."""
    group, method = step.group, METHODS[step.call.method]
    units = len(group.units) if units is None else units
    together = 1 if method.apart else units
    if method.gpu_floats is None:
        workspace = together * (2 * group.m * group.n + method.peak_floats(group.m, group.n, experts))
    else:
        workspace = method.gpu_floats(group.m, group.n, experts, together)
    floats = _single(step) + units * _held(step, experts) + workspace
    return int(floats * group.dtype.itemsize) + _surveyed(step, experts)


def _held(step: Step, experts: int) -> int:
    """Floats per unit: deltas, moments and base, of this group and of the next that is being read."""
    group = step.group
    stacked = experts if group.reduction == "none" else 1
    return 2 * (stacked + 1) * group.m * group.n + 2 * experts * group.moment_size**2


def _surveyed(step: Step, experts: int) -> int:
    """Bytes of the counts of tensors that are surveyed together."""
    return max(SURVEY_BYTES, experts * TABLE_BYTES) if METHODS[step.call.method].survey else 0


def _single(step: Step) -> int:
    """Floats whatever the number of units: a raw tensor from a file, the merged ones, one that is being written, and
    what one matrix at a time takes.
    """
    group, method = step.group, METHODS[step.call.method]
    elements, outputs = group.m * group.n, len(step.call.alphas)
    return max(elements, stored_floats(group)) + (outputs + 1) * elements + int(method.alone_floats(group.m, group.n))


@dataclass(frozen=True, slots=True)
class Bound:
    """How large groups may be: by what the caller said, else by the memory of the whole merge.

    `gpu_bytes` is the memory of the GPU that holds and computes the groups, None where the process itself does.
    """

    group_bytes: int | None
    peak_bytes: int
    gpu_bytes: int | None = None
    workers: int = 1  # threads that read side by side

    def length(self, step: Step, experts: int) -> int:
        """The largest number of units in a group of the step."""
        group = step.group
        unit_bytes = experts * (group.m * group.n + group.moment_size**2) * group.dtype.itemsize
        if self.gpu_bytes is not None:
            one = gpu_step_bytes(step, experts, 1)
            return max(1, GPU_GROUP_BYTES // (gpu_step_bytes(step, experts, 2) - one or one))
        if self.group_bytes is not None:
            return max(1, self.group_bytes // unit_bytes)
        fixed, per_unit = costs(step, experts)
        room = self.peak_bytes - process_bytes(self.workers)
        fitting = (room - fixed) // per_unit
        # A unit is computed by one thread; 64 MiB of small ones keep the overhead of a group small.
        wanted = max(GROUP_BYTES // unit_bytes, torch.get_num_threads())
        if streams(step) and fitting >= self.workers:
            return max(wanted, STREAM_BYTES // unit_bytes)
        units = max(1, min(wanted, fitting))
        while units > 1 and step_bytes(step, experts, self.workers, units=units) > room:
            units -= 1
        return units

    def check(self, steps: Iterable[Step], experts: int) -> None:
        """InputError if a single unit of some step, on a GPU a group, takes more than there is, with the least that all
        of them need.
        """

        def needed(step: Step) -> int:
            if self.gpu_bytes is not None:
                return gpu_step_bytes(step, experts)
            return process_bytes(self.workers) + step_bytes(step, experts, self.workers, units=1)

        given, name = (self.peak_bytes, "memory") if self.gpu_bytes is None else (self.gpu_bytes, "GPU memory")
        least, step = max(((needed(step), step) for step in steps), key=lambda p: p[0], default=(0, None))
        if step is not None and least > given:
            raise InputError(
                f"{given / 1e6:.1f} MB of {name} is too little: {step.group.units[0].label} by {step.call.method} takes"
                f" {math.ceil(least / 1e5) / 10:.1f} MB, give at least that"
            )


def process_bytes(workers: int) -> int:
    """Bytes of a process beside the tensors of a step."""
    return PROCESS_BYTES + THREAD_BYTES * max(0, max(workers, torch.get_num_threads()) - 2) + RUNS_BYTES * workers


def streams(step: Step) -> bool:
    """Whether, on a CPU, each unit is read, merged and written by one thread, and memory holds one for each thread."""
    return step.kind == "elementwise"


def step_bytes(step: Step, experts: int, workers: int, *, units: int | None = None) -> int:
    """Bytes of working memory of a step on `units` units, by default its own."""
    group = step.group
    units = len(group.units) if units is None else units
    fixed, per_unit = costs(step, experts)
    if streams(step):
        return fixed + per_unit * min(units, workers)
    # Threads that have no unit of their own take a task of another's.
    beside = max(0, min(torch.get_num_threads(), units * experts) - units)
    floats = METHODS[step.call.method].task_floats(group.m, group.n)
    return fixed + per_unit * units + int(beside * floats * group.dtype.itemsize)


def stored_floats(group: Group) -> int:
    """Floats that reading one moment takes beside it: what is stored, and of inputs a copy in the group's dtype and
    some of their shifts.
    """
    return 2 * group.tokens * group.n + SHIFT_TOKENS * group.moment_size if group.tokens else group.moment_size**2


def staging(step: Step, experts: int) -> int:
    """Bytes in the process of a step that is computed on a GPU: a tensor from a file, a result, both pinned as well."""
    elements = max(step.group.m * step.group.n, stored_floats(step.group))
    return 4 * elements * step.group.dtype.itemsize


def physical_bytes() -> int:
    """The machine's memory; 8 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 8 * 2**30

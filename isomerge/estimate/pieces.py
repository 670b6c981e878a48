"""Small jobs: the first elements of units of a merge, reshaped to units of their own.

Reshaped rows of a matrix of low rank have low rank as well, so that methods take the branches that they will take.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from isomerge.checkpoint import Checkpoint, from_state_dict, open_checkpoint, write_safetensors
from isomerge.deltas import Unit
from isomerge.estimate.work import Work
from isomerge.moments import Moments
from isomerge.run import Job
from isomerge.schedule import Step

GROUPS = 3  # of elementwise work, so that reading, computing and writing overlap as they will
MOST_ELEMENTS, MOST_UNITS = 2**23, 16  # of a group whose units are not matrices side by side; one unit at least
MOST_STORED = 2**27  # elements in the files of all models: 256 MiB of bfloat16
WEIGHT, CHANGE = 0.02, 1e-3  # standard deviations of noise that stands in for models


def small_job(job: Job, work: Work, share: float, folder: Path) -> Job:
    """A job of units of `work` with sides smaller by `share` and values of the job's models.

    One group of matrices, or values that are copied, in memory; a few groups of anything else, in files in `folder`,
    from which it is read in ways of its own. InputError where the models cannot be read, OSError where files cannot be
    written.
    """
    m, n = work.sides(share)
    names = [f"unit {index}" for index in range(_units(job, work, m * n))]
    shape = (n, m) if work.transposed else (m, n)
    models = []
    for index, values in enumerate(_values(job, work, m * n)):
        tensors = _shifted(values, names, shape)
        stored = _stored(tensors, folder, index) if work.elementwise else from_state_dict(tensors, f"model {index}")
        models.append(stored)
    piece = replace(work.assignment, shape=shape, aliases=(), layer_type=None)
    pieces = tuple(replace(piece, name=name) for name in names)
    steps: tuple[Step, ...] = ()
    if work.step is not None:
        length = len(names) if work.cubic else -(-len(names) // GROUPS)
        runs = [names[first : first + length] for first in range(0, len(names), length)]
        steps = tuple(_small_step(work.step, run, m, n) for run in runs)
    size = steps[0].group.moment_size if steps else 0
    moments = tuple(_moments(names, size, t) for t in range(len(job.experts))) if size else ()
    plan = replace(job.plan, assignments=pieces, steps=steps, _bytes_read=dict.fromkeys(names, 0))
    return Job(plan, models[0], tuple(models[1:]), moments, job.place)


def _units(job: Job, work: Work, elements: int) -> int:
    """How many units a small job has. On a CPU matrices are computed side by side, one per thread."""
    if work.cubic and job.place.device.type == "cpu":
        return min(work.length, torch.get_num_threads())
    length = min(work.length, MOST_UNITS, max(1, MOST_ELEMENTS // elements))
    if not work.elementwise:
        return length
    return GROUPS * min(length, max(1, MOST_STORED // (GROUPS * (1 + len(job.experts)) * elements)))


def _small_step(step: Step, names: list[str], m: int, n: int) -> Step:
    """The step on tensors that are m x n, surveyed where its own are. Its alphas are 1: what overflows is for the merge
    to tell.
    """
    group = step.group
    of_outputs = group.moment_size == group.m != group.n
    d = 0 if not group.moment_size else m if of_outputs else n
    first = group.units[0]
    units = tuple(Unit(name, (name,) * len(first.sources), 0, m * n, first.whole) for name in names)
    call = replace(step.call, alphas=(1.0,) * len(step.call.alphas))
    group = replace(group, m=m, n=n, units=units, moment_size=d, tokens=0)
    return replace(step, group=group, call=call)


def _stored(tensors: dict[str, Tensor], folder: Path, index: int) -> Checkpoint:
    path = folder / f"model {index}.safetensors"
    write_safetensors(path, tensors, {}, durable=False)
    return open_checkpoint(path)


def _shifted(values: Tensor, names: list[str], shape: tuple[int, int]) -> dict[str, Tensor]:
    """Tensors that start one element apart: those at one place would count as tied."""
    count = values.numel()
    longer = values.new_empty(count + len(names))
    longer[:count] = values
    longer[count:] = values[0]
    return {name: longer[i : i + count].view(shape) for i, name in enumerate(names)}


def _values(job: Job, work: Work, count: int) -> list[Tensor]:
    """The first values of the first unit, in the base and in every expert; noise if an update is zero or not finite."""
    if work.step is None:
        return [torch.zeros(count, dtype=work.assignment.dtype)] * (1 + len(job.experts))
    unit = work.step.group.units[0]
    models: list[tuple[Checkpoint, str]] = [(job.base, unit.name), *zip(job.experts, unit.sources, strict=True)]
    values = [model.read(name, unit.start, count) for model, name in models]
    base = values[0].float()
    if all(0 < float((value.float() - base).norm()) < torch.inf for value in values[1:]):
        return values
    base = WEIGHT * _noise(count, 0)
    changed = [base + CHANGE * _noise(count, t + 1) for t in range(len(job.experts))]
    return [noise.to(value.dtype) for noise, value in zip([base, *changed], values, strict=True)]


def _moments(names: list[str], size: int, seed: int) -> Moments:
    """Second moments [size, size] of noise: to read those of the experts would take longer than the sample."""
    noise = _noise(size * size, seed).view(size, size)
    return Moments(dict.fromkeys(names, noise @ noise.mT), f"moments {seed}")


def _noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))

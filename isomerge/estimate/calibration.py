"""Which samples are taken: a small one of all work, then larger ones where they tell most, within a few seconds."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from isomerge.estimate import disks
from isomerge.estimate.probes import Sample, sample
from isomerge.estimate.totals import Estimate, Seconds, at_full_size, finish_seconds
from isomerge.estimate.work import Work, gather
from isomerge.run import Job

LEAST, MOST = 1.5, 6.0  # seconds of sampling
SHARE = 0.03  # of the merge, between them
SIDE = 256  # shorter side of a matrix in the first sample, at most
ELEMENTS = 2**18  # of any other unit in the first sample, at most


@dataclass(slots=True)
class _Known:
    work: Work
    samples: list[Sample]
    shared: bool  # the cores that compute also read

    @property
    def total(self) -> Seconds:
        return at_full_size(self.samples, self.work.cubic, self.shared) * self.work.units

    @property
    def share(self) -> float:
        return self.samples[-1].share

    @property
    def next_share(self) -> float:
        return min(1.0, 2 * self.share)

    @property
    def next_cost(self) -> float:
        """Seconds that the next sample takes, roughly."""
        return self.samples[-1].spent * (self.next_share / self.share) ** (3 if self.work.cubic else 2)


def estimate(job: Job, folder: Path, start: float = 0.0) -> Estimate:
    """How long the merge of an open job takes: a few seconds of measuring on the job's device and disks.

    In `folder`, where the output will be made, an unnamed file is written and gone again; in the system's temporary
    folder where that is not allowed. Pieces of the models, 256 MiB or so, are for a moment in the latter. `start` is
    what a merge takes before it reads, in seconds. Raises InputError where the models cannot be read, OSError where no
    file can be written.
    """
    files = {info.file: None for model in (job.base, *job.experts) for info in model.tensors.values()}
    writable = os.access(folder, os.W_OK | os.X_OK)
    with tempfile.TemporaryFile(buffering=0, dir=folder if writable else None) as scratch:
        rates = disks.measure(list(files), scratch)
        known = _sampled(job, scratch)
    methods = {name: Seconds() for name in job.plan.by_method}
    for entry in known:
        methods[entry.work.method] += entry.total
    engine = sum(seconds.engine for seconds in methods.values())
    cores = torch.get_num_threads() if job.place.device.type == "cpu" else 0
    longest = max(known, key=lambda entry: entry.total.engine, default=None)
    return Estimate(
        methods,
        start,
        job.plan.bytes_read / rates.read,
        finish_seconds(job.plan.bytes_written, engine, rates, cores),
        rates,
        1.0 if longest is None else longest.share,
    )


def _sampled(job: Job, scratch: IO[bytes]) -> list[_Known]:
    """All work of a job with its samples."""
    began = time.perf_counter()
    on_cpu = job.place.device.type == "cpu"
    known: list[_Known] = []
    ready: set[str] = set()
    for work in gather(job):
        share = _first_share(work)
        if not on_cpu or work.method not in ready:  # what only a first call does: threads, kernels for these sides
            sample(job, work, share, scratch)
            ready.add(work.method)
        known.append(_Known(work, [sample(job, work, share, scratch)], on_cpu))
    while (best := _next(known, time.perf_counter() - began)) is not None:
        best.samples.append(sample(job, best.work, best.next_share, scratch))
    return known


def _first_share(work: Work) -> float:
    if work.cubic:
        return min(1.0, SIDE / min(work.m, work.n))
    return min(1.0, (ELEMENTS / (work.m * work.n)) ** 0.5)


def _next(known: list[_Known], spent: float) -> _Known | None:
    """The work with the largest total of which a larger sample is to be had in the time that is left."""
    total = sum(entry.total.engine for entry in known)
    left = min(MOST, max(LEAST, SHARE * total)) - spent
    affordable = [entry for entry in known if entry.share < 1 and entry.next_cost <= left]
    return max(affordable, key=lambda entry: entry.total.engine, default=None)

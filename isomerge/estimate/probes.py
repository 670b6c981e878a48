"""How long units take: the engine of merges, run on pieces of the very models."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from isomerge.checkpoint import Receipt
from isomerge.checkpoint.files import crc32, write_from
from isomerge.estimate.pieces import small_job
from isomerge.estimate.work import Work
from isomerge.report import new_report
from isomerge.run import Job, run
from isomerge.spool import Spool


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds per unit whose sides are those of the work times `share`."""

    share: float
    engine: float  # of reading from memory, computing and writing together, beside each other
    read: float
    compute: float
    write: float
    spent: float  # on the whole sample


def sample(job: Job, work: Work, share: float, scratch: IO[bytes]) -> Sample:
    """Runs the engine on `small_job(job, work, share)`.

    What it writes goes to the unbuffered file `scratch`, which is empty afterwards. InputError where the models cannot
    be read, OSError where the file cannot be written.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.callback(scratch.truncate, 0)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="isomerge-"))
        small = small_job(job, work, share, Path(folder))
        for model in (small.base, *small.experts):
            stack.callback(model.close)
        report, spool = new_report(small.plan, small.base, small.experts, ""), stack.enter_context(Spool())
        before = time.perf_counter()
        run(small, _Sink(scratch), spool, report, False, None)
        seconds = time.perf_counter() - before
    count, totals = len(small.plan.assignments), report.totals
    # A GPU is still at work when a method returns; of a single group, computing is what is left.
    compute = seconds - totals.read_seconds if work.cubic else totals.compute_seconds
    return Sample(
        share=share,
        engine=seconds / count,
        read=totals.read_seconds / count,
        compute=compute / count,
        write=totals.write_seconds / count,
        spent=time.perf_counter() - started,
    )


class _Sink:
    """Does to a scratch file what a writer does to those of an output."""

    records: Sequence[Mapping[str, Any]] = ()

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._end = file, 0
        self._lock = threading.Lock()

    def write(self, name: str, tensor: Tensor, start: int = 0, output: int = 0) -> Receipt:
        values = tensor.contiguous()
        with self._lock:
            begin, self._end = self._end, self._end + values.nbytes
        write_from(self._file.fileno(), begin, values)
        return Receipt(output, name, start, values.numel(), crc32(values))

    def note(self, record: Mapping[str, Any], receipts: Sequence[Receipt]) -> None:
        """Nobody goes on from a sample."""

"""What `isomerge plan` says of time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from isomerge.cli.console import screen
from isomerge.cli.progress import duration

if TYPE_CHECKING:
    from isomerge.estimate import Estimate
    from isomerge.run import Job


def estimated(job: Job, out: Path | None) -> Estimate:
    """The estimate for an output at `out`, or else beside the base.

    What a merge does before it reads a tensor, this process has just done: it is asked how long that was.
    """
    from isomerge.estimate import estimate

    base = job.plan.settings.base.path
    assert base is not None  # as always in a recipe
    place = (base if out is None else out).resolve()
    folder = next(parent for parent in place.parents if parent.is_dir())
    try:
        return estimate(job, folder, time.process_time())
    except OSError as error:
        raise OSError(error.errno, f"cannot measure the time: {error.strerror}; --no-time leaves it out") from error


def print_time(estimate: Estimate) -> None:
    for line in _lines(estimate):
        screen.print(line, markup=False)


def _lines(estimate: Estimate) -> Iterator[str]:
    from isomerge.output import gigabytes

    units, disks = estimate.units, estimate.disks
    yield (
        f"time: about {duration(estimate.expected)}: {duration(estimate.start)} to start, {duration(units.engine)} to "
        f"merge (computing {duration(units.compute)}, reading {duration(units.read)}, writing {duration(units.write)}, "
        f"side by side), {duration(estimate.finish)} until the output is on the disk with its checksums"
    )
    methods = ", ".join(f"{name} {duration(seconds.engine)}" for name, seconds in estimate.methods.items())
    yield f"time by method: {methods or 'none'}"
    now = "" if disks.cached is None else f"; {disks.cached:.0%} are in memory now"
    yield (
        f"time by inputs: {duration(estimate.from_memory)} with all in memory, {duration(estimate.from_disk)} with all "
        f"from the disk, which gives {gigabytes(disks.read)}/s{now}"
    )
    if estimate.share < 1:
        yield f"time is extrapolated: what takes longest was measured at {estimate.share:.2g} of its sides"

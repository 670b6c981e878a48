"""The arithmetic of an estimate: seconds from samples of units and from rates of disks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from isomerge.checkpoint.shard_files import FLUSH_BYTES
from isomerge.estimate.disks import Disks
from isomerge.estimate.probes import Sample

SHORT = 3.0
"""3 - p, as `at_full_size` defines p, where there is one sample alone. Its sides are 256: from there to 2048 the time
of five calls grew by 2^0.9 to 2^2.1 less than n³; this takes off 2^1."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of like units, of a method or of all; `engine` is what the other three take together, beside each other."""

    engine: float = 0.0
    read: float = 0.0  # from memory
    compute: float = 0.0
    write: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.engine + other.engine,
            self.read + other.read,
            self.compute + other.compute,
            self.write + other.write,
        )

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(self.engine * factor, self.read * factor, self.compute * factor, self.write * factor)


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long a merge takes, in seconds. The inputs may be in memory already, or on the disk, or both."""

    methods: Mapping[str, Seconds]
    start: float  # until the first tensor is read
    fetch: float  # of all inputs from the disk, if none is in memory
    finish: float  # until the output is on the disk and has its checksums
    disks: Disks
    share: float  # of the sides, in the largest sample of what takes longest; below 1 the time is extrapolated

    @property
    def units(self) -> Seconds:
        return sum(self.methods.values(), Seconds())

    @property
    def from_memory(self) -> float:
        """If all inputs are in memory."""
        return self._total(0.0)

    @property
    def from_disk(self) -> float:
        """If none is."""
        return self._total(self.fetch)

    @property
    def expected(self) -> float:
        """With as much of the inputs in memory as there is now; none where the system does not tell."""
        return self._total(self.fetch * (1 - (self.disks.cached or 0.0)))

    def _total(self, fetch: float) -> float:
        units = self.units
        return self.start + max(units.engine, units.read + fetch) + self.finish

    def as_data(self) -> dict[str, object]:
        """Plain data, in seconds, bytes per second and shares."""
        return {
            "expected": self.expected,
            "from_memory": self.from_memory,
            "from_disk": self.from_disk,
            "start": self.start,
            "merge": asdict(self.units),
            "fetch": self.fetch,
            "finish": self.finish,
            "methods": {name: asdict(seconds) for name, seconds in self.methods.items()},
            "disks": asdict(self.disks),
            "sampled_share": self.share,
        }


def at_full_size(samples: Sequence[Sample], cubic: bool, shared: bool = True) -> Seconds:
    """Seconds per unit of a work from samples of it, the largest last.

    Elementwise work is proportional to the elements. The rest approaches n³ from below: small matrices pay for what
    grows slower, such as the memory passes of an eigensolve. Where the time has grown by the power p between two
    samples, every further doubling of the sides leaves a quarter of the distance of p from 3. Matrices are sampled one
    group at a time; reading the next takes time of its own if it is `shared` work of the cores that compute, and none
    beside a GPU.
    """
    last = samples[-1]
    doublings = -math.log2(last.share)
    area = last.share**-2
    if not cubic:
        return Seconds(last.engine, last.read, last.compute, last.write) * area
    short = SHORT
    if len(samples) > 1:
        before = samples[-2]
        power = math.log(last.compute / before.compute) / math.log(last.share / before.share)
        short = 3 - min(3.0, max(2.0, power))
    compute = last.compute * 2 ** (3 * doublings - short / 3 * (1 - 4**-doublings))
    read = last.read * area
    return Seconds(compute + read if shared else max(compute, read), read, compute, last.write * area)


def finish_seconds(written: int, engine: float, disks: Disks, cores: int) -> float:
    """Of making `written` bytes durable and their checksums, beyond the `engine` seconds in which they were written.

    All but the last FLUSH_BYTES are taken by the disk and summed meanwhile: by one of the `cores` of the engine, which
    loses what that takes; 0 where others do it.
    """
    last = min(written, FLUSH_BYTES)
    waiting = max(last, written - engine * disks.write)
    beside = (written - last) / cores if cores else 0.0
    return waiting / disks.write + (last + beside) / disks.checksum

"""Updates that wait on disk: a layer's factor depends on the norms of all layers of its type, and memory does not hold
the updates of them all.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from isomerge.checkpoint.files import crc32, crc32_at, read_into, write_from
from isomerge.deltas import Unit
from isomerge.methods import layer_factors
from isomerge.schedule import Step


@dataclass(frozen=True, slots=True)
class Slot:
    """Where an update is in the file, its Frobenius norm, and the CRC-32 of its bytes."""

    offset: int
    norm: float
    checksum: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """A unit whose update is in the spool."""

    step: Step
    unit: Unit
    slot: Slot


class Spool:
    """The updates of the layers of one type, in a file that is made when the first arrives: at `path`, where the next
    process finds it, or else without a name, gone whatever ends the process. A context manager.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._waiting: list[Waiting] = []
        self._end = 0

    def put(self, step: Step, unit: Unit, update: Tensor, norm: float) -> Slot:
        """Keep an update [m, n], contiguous, in the group's dtype, and its Frobenius norm."""
        try:
            write_from(self._open().fileno(), self._end, update)
        except OSError as error:
            folder = self._path or tempfile.tempdir or "TMPDIR"
            message = f"cannot keep the update of {unit.label} until its layer factor is known: {error.strerror}"
            raise OSError(error.errno, message, str(folder)) from error
        slot = Slot(self._end, norm, crc32(update))
        self.take_over(step, unit, slot)
        return slot

    def holds(self, step: Step, slot: Slot) -> bool:
        """Whether the update that a process before this one put there stands in the file."""
        return crc32_at(self._open().fileno(), slot.offset, _nbytes(step)) == slot.checksum

    def take_over(self, step: Step, unit: Unit, slot: Slot) -> None:
        """Count an update that stands in the file as put."""
        self._waiting.append(Waiting(step, unit, slot))
        self._end = max(self._end, slot.offset + _nbytes(step))

    def factors(self) -> list[tuple[Waiting, float]]:
        """Every unit in the order in which they came, and the factor of its layer by the norms of all.

        Each layer has its own exponent; the matrices of a stack are one layer.
        """
        parts: dict[str, list[float]] = {}
        exponents: dict[str, float] = {}
        for entry in self._waiting:
            parts.setdefault(entry.unit.name, []).append(entry.slot.norm)
            exponents[entry.unit.name] = entry.step.call.layer_exponent
        norms = torch.tensor([math.hypot(*norms) for norms in parts.values()], dtype=torch.float64)
        found = {exponent: layer_factors(norms, exponent).tolist() for exponent in set(exponents.values())}
        factors = {name: found[exponents[name]][index] for index, name in enumerate(parts)}
        return [(entry, factors[entry.unit.name]) for entry in self._waiting]

    def read(self, entry: Waiting) -> Tensor:
        """The update that was put in."""
        group = entry.step.group
        update = torch.empty(group.m, group.n, dtype=group.dtype)
        if not read_into(self._open().fileno(), entry.slot.offset, update):
            raise OSError(f"the update of {entry.unit.label} is no longer in its temporary file")
        return update

    @property
    def layer_type(self) -> str | None:
        """Of the updates that wait; None if none does."""
        return self._waiting[0].step.layer_type if self._waiting else None

    def clear(self) -> None:
        """Forget all units and give their place on the disk back."""
        self._waiting.clear()
        self._end = 0
        if self._file is not None:
            os.ftruncate(self._file.fileno(), 0)

    def close(self) -> None:
        """Let go of the file and of the disk it takes."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        if self._file is None:
            if self._path is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            else:
                self._file = open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)  # noqa: SIM115
        return self._file

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _nbytes(step: Step) -> int:
    return step.group.m * step.group.n * step.group.dtype.itemsize

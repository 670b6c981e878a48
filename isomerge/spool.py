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

from isomerge.checkpoint.files import read_into, write_from
from isomerge.deltas import Unit
from isomerge.methods import layer_factors
from isomerge.schedule import Step


@dataclass(frozen=True, slots=True)
class Waiting:
    """A unit whose update is in the spool."""

    step: Step
    unit: Unit
    offset: int  # in the file
    norm: float  # Frobenius


class Spool:
    """The updates of the layers of one type, in a file without a name: whatever ends the process, it is gone.

    The file is made when the first update arrives, in `folder` or the system's temporary folder. A context manager.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._waiting: list[Waiting] = []
        self._end = 0

    def put(self, step: Step, unit: Unit, update: Tensor, norm: float) -> None:
        """Keep an update [m, n], contiguous, in the group's dtype, and its Frobenius norm."""
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115
            write_from(self._file.fileno(), self._end, update)
        except OSError as error:
            folder = self._folder or tempfile.tempdir or "TMPDIR"
            message = f"cannot keep the update of {unit.label} until its layer factor is known: {error.strerror}"
            raise OSError(error.errno, message, str(folder)) from error
        self._waiting.append(Waiting(step, unit, self._end, norm))
        self._end += update.numel() * update.element_size()

    def factors(self) -> list[tuple[Waiting, float]]:
        """Every unit in the order in which they came, and the factor of its layer by the norms of all.

        Each layer has its own exponent; the matrices of a stack are one layer.
        """
        parts: dict[str, list[float]] = {}
        exponents: dict[str, float] = {}
        for entry in self._waiting:
            parts.setdefault(entry.unit.name, []).append(entry.norm)
            exponents[entry.unit.name] = entry.step.call.layer_exponent
        norms = torch.tensor([math.hypot(*norms) for norms in parts.values()], dtype=torch.float64)
        found = {exponent: layer_factors(norms, exponent).tolist() for exponent in set(exponents.values())}
        factors = {name: found[exponents[name]][index] for index, name in enumerate(parts)}
        return [(entry, factors[entry.unit.name]) for entry in self._waiting]

    def read(self, entry: Waiting) -> Tensor:
        """The update that was put in."""
        assert self._file is not None
        group = entry.step.group
        update = torch.empty(group.m, group.n, dtype=group.dtype)
        if not read_into(self._file.fileno(), entry.offset, update):
            raise OSError(f"the update of {entry.unit.label} is no longer in its temporary file")
        return update

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

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

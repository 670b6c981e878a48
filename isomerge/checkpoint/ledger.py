"""What a writer was promised and what has arrived: every element exactly once, from any thread, in any order."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from torch import Tensor

from isomerge.checkpoint.format import DTYPE_NAMES, TensorSpec
from isomerge.errors import InputError


@dataclass(slots=True)
class _Progress:
    spec: TensorSpec
    taken: list[tuple[int, int]] = field(default_factory=list)  # disjoint [begin, end), sorted, neighbours merged
    done: int = 0  # elements whose write has returned

    def take(self, begin: int, end: int) -> bool:
        """Claim [begin, end); False if part of it is taken."""
        at = bisect_right(self.taken, (begin, end))
        before = self.taken[at - 1] if at > 0 else (-1, -1)
        after = self.taken[at] if at < len(self.taken) else (self.spec.numel + 1, self.spec.numel + 1)
        if before[1] > begin or after[0] < end:
            return False
        first, last = at, at
        if before[1] == begin:
            begin, first = before[0], at - 1
        if after[0] == end:
            end, last = after[1], at + 1
        self.taken[first:last] = [(begin, end)]
        return True


class Receipt(NamedTuple):
    """What one write has put where: elements of the tensor `name` from flat index `start`."""

    output: int
    name: str
    start: int
    elements: int
    checksum: int  # CRC-32 of their bytes


class Ledger:
    """Checks writes against specs. Raises ValueError naming the tensor for whatever the caller got wrong."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._progress: dict[str, _Progress] = {}
        for spec in specs:
            if spec.name in self._progress:
                raise ValueError(f"tensor {spec.name!r} is in the specs twice")
            if spec.name == "__metadata__":
                raise ValueError("a tensor cannot be named '__metadata__', the format keeps that name for itself")
            if spec.dtype not in DTYPE_NAMES:
                raise ValueError(f"tensor {spec.name!r}: safetensors has no {spec.dtype}")
            if any(size < 0 for size in spec.shape):
                raise ValueError(f"tensor {spec.name!r}: shape {spec.shape} has a negative size")
            self._progress[spec.name] = _Progress(spec)
        self._changed = threading.Condition()
        self._writing = 0
        self._open = True

    @contextmanager
    def writing(self, name: str, tensor: Tensor, start: int) -> Iterator[Tensor]:
        """Claim the elements from flat index `start` for the block; yields them contiguous on the CPU.

        They count as written when the block ends without an exception.
        """
        progress = self._progress.get(name)
        if progress is None:
            raise ValueError(f"tensor {name!r} is not among the {len(self._progress)} specs of this writer")
        spec, count = progress.spec, tensor.numel()
        if tensor.dtype != spec.dtype:
            raise ValueError(f"tensor {name!r}: got {tensor.dtype}, expected {spec.dtype}")
        if start < 0 or start + count > spec.numel:
            raise ValueError(
                f"tensor {name!r}: elements [{start}, {start + count}) are outside shape {spec.shape} of {spec.numel}"
            )
        with self._changed:
            if not self._open:
                raise ValueError(f"tensor {name!r}: written after the writer was committed or closed")
            if count > 0 and not progress.take(start, start + count):
                raise ValueError(f"tensor {name!r}: elements [{start}, {start + count}) were written before, in part")
            self._writing += 1
        written = 0
        try:
            yield tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
            written = count
        finally:
            with self._changed:
                progress.done += written
                self._writing -= 1
                self._changed.notify_all()

    def is_free(self, name: str, start: int, count: int) -> bool:
        """Whether no element of the range has been claimed."""
        taken = self._progress[name].taken
        return not any(begin < start + count and start < end for begin, end in taken)

    def claim(self, name: str, start: int, count: int) -> None:
        """Count a free range of elements as written."""
        progress = self._progress[name]
        if count > 0:
            progress.take(start, start + count)
        progress.done += count

    def close(self) -> None:
        """Accept no more writes; ValueError, naming the first such tensor, unless every element has been written."""
        with self._changed:
            for progress in self._progress.values():
                if progress.done != progress.spec.numel:
                    raise ValueError(
                        f"tensor {progress.spec.name!r}: {progress.done} of {progress.spec.numel} elements were written"
                    )
            self._open = False

    def abandon(self) -> None:
        """Accept no more writes and wait for those that run."""
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: self._writing == 0)


def side_name(relative: str, present: Container[str], content: bytes | Path) -> str:
    """The normal form of a side file's name below the output folder.

    Raises ValueError if it is empty, reaches outside the folder, or is taken; InputError if `content` is missing.
    """
    path = PurePosixPath(relative)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in relative or "\0" in relative:
        raise ValueError(f"side file {relative!r}: expected a relative path inside the output folder")
    if str(path) in present:
        raise ValueError(f"side file {relative!r} is written twice, or has the name of a weights file")
    if isinstance(content, Path) and not content.is_file():
        raise InputError(f"{content}: no such file, it was to be copied to {relative!r}; check the path")
    return str(path)

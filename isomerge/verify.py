"""Is an output what the merge wrote? Every file against its recorded SHA-256, the weights against the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from isomerge.checkpoint import CHECKSUMS, Checkpoint, open_checkpoint, sha256_of
from isomerge.deltas import PIECE_ELEMENTS
from isomerge.errors import InputError
from isomerge.output import REPORT, reports
from isomerge.settings import dtype_name


@dataclass(slots=True)
class Verified:
    """What was found; `problems` is empty for an output that is as it was written."""

    files: int = 0
    tensors: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)  # one line each, with the file
    notes: list[str] = field(default_factory=list)


def verify(out: str | Path, *, progress: Callable[[int, int, str], None] | None = None) -> Verified:
    """Reads the output of a merge, all of it, and compares it with what the merge has recorded there.

    Each file: there, and of its SHA-256 in SHA256SUMS. The weights: headers and index in order, the names, shapes and
    dtypes of the report, values finite. Non-finite values that were copied from the base are a note.
    `progress(bytes done, bytes in all, file)` is called for every file and tensor. InputError if `out` is not the
    output of a merge. Reads everything twice, in pieces of 64 MiB.
    """
    out = Path(out)
    found = reports(out)
    if not found:
        raise InputError(f"{out}: is not the output of a merge, there is no {REPORT} in it; give the folder of one")
    verified = Verified()
    total = sum(2 * file.stat().st_size for report in found for file in report.parent.rglob("*") if file.is_file())

    def tell(nbytes: int, name: str) -> None:
        verified.nbytes += nbytes
        if progress is not None:
            progress(verified.nbytes, total, name)

    for report in found:
        _check_files(report.parent, verified, tell)
        _check_weights(report, verified, tell)
    return verified


_Tell = Callable[[int, str], None]


def _check_files(folder: Path, verified: Verified, tell: _Tell) -> None:
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        verified.problems.append(f"{folder / CHECKSUMS}: cannot be read: {' '.join(str(error).split())}")
        return
    listed = set()
    for number, line in enumerate(lines, start=1):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            verified.problems.append(f"{folder / CHECKSUMS}: line {number} is damaged")
            continue
        listed.add(name)
        file = folder / name
        try:
            same = sha256_of(file) == digest
            size = file.stat().st_size
        except OSError as error:
            verified.problems.append(f"{file}: cannot be read: {error.strerror}")
            continue
        verified.files += 1
        tell(size, name)
        if not same:
            verified.problems.append(f"{file}: its SHA-256 is not the one recorded; the file was changed or damaged")
    for file in sorted(folder.rglob("*.safetensors")):
        if file.relative_to(folder).as_posix() not in listed:
            verified.problems.append(f"{file}: is not a file of this merge")


def _check_weights(report: Path, verified: Verified, tell: _Tell) -> None:
    try:
        records = {record["name"]: record for record in json.loads(report.read_bytes())["tensors"]}
        expected = {name: (list(r["shape"]), str(r["dtype"]), r["method"]) for name, r in records.items()}
    except (OSError, ValueError, LookupError, TypeError) as error:
        verified.problems.append(f"{report}: cannot be read as the report of a merge: {type(error).__name__}: {error}")
        return
    try:
        with open_checkpoint(report.parent) as checkpoint:
            verified.tensors += len(checkpoint.tensors)
            verified.problems += _differences(checkpoint, expected)
            for name in checkpoint.tensors:
                count = _nonfinite(checkpoint, name)
                tell(checkpoint.tensors[name].nbytes, name)
                if count:
                    merged = name not in expected or expected[name][2] is not None
                    line = f"{checkpoint.tensors[name].file}: {name}: {count} non-finite values"
                    (verified.problems if merged else verified.notes).append(line)
    except InputError as error:
        verified.problems.append(str(error))


def _differences(checkpoint: Checkpoint, expected: dict[str, tuple[list[int], str, str | None]]) -> Iterator[str]:
    for name, (shape, dtype, _) in expected.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            yield f"{checkpoint.label}: {name} is missing"
        elif [list(info.shape), dtype_name(info.dtype)] != [shape, dtype]:
            yield f"{info.file}: {name}: {dtype_name(info.dtype)} {list(info.shape)}, expected {dtype} {shape}"


def _nonfinite(checkpoint: Checkpoint, name: str) -> int:
    info = checkpoint.tensors[name]
    if not info.dtype.is_floating_point:
        return 0
    count = 0
    for start in range(0, info.numel, PIECE_ELEMENTS):
        values = checkpoint.read(name, start, min(PIECE_ELEMENTS, info.numel - start))
        count += int((~torch.isfinite(values.float() if values.element_size() == 1 else values)).sum())
    return count

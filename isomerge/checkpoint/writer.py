"""Streaming writer of Hugging Face folders. What a process has written when it dies, its successor need not."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import cast

from torch import Tensor

from isomerge.checkpoint.files import crc32
from isomerge.checkpoint.folder import CHECKSUMS, SAFETENSORS_INDEX
from isomerge.checkpoint.format import TensorSpec
from isomerge.checkpoint.journal import Journal, Line, difference
from isomerge.checkpoint.ledger import Ledger, Receipt, side_name
from isomerge.checkpoint.shard_files import PART, ShardFiles
from isomerge.checkpoint.shards import build_index, layout
from isomerge.checkpoint.staging import Staging, disk_bytes, sync
from isomerge.checkpoint.sums import sha256_of
from isomerge.errors import InputError, NonFiniteError

_JOURNAL = "isomerge_journal.jsonl"


class Writer:
    """Writes tensors in any order, whole or in pieces, into a new folder, or into several folders within it.

    The folder appears at `commit`, complete and on the disk, with the SHA-256 of every file in SHA256SUMS; until then
    everything is in a hidden folder beside it, under names that nothing loads. Equal specs and values give equal
    bytes, whatever the order of the writes.

    With an `identity`, plain data, what is written is noted in a journal. Where a process ended without `commit`, the
    next writer of an equal identity takes over what has the right checksum on the disk: `records` are the records of
    that, in the order in which they were noted, and its tensors are not to be written again.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[TensorSpec],
        *,
        outputs: Sequence[str] = ("",),
        shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
        identity: Line | None = None,
        restart: bool = False,
    ) -> None:
        """`outputs` are names of folders within `folder`, or "" for itself; with `restart`, nothing is taken over.

        Raises InputError if the folder exists (unless `overwrite`), another process is writing to it, the disk is too
        full, or what stands there unfinished has another identity; ValueError for specs that no safetensors file can
        hold.
        """
        self.records: list[Line] = []
        self.resumable = False  # whether something is noted that a later writer could take over
        self._ledgers = [Ledger(specs) for _ in outputs]
        self._outputs = tuple(outputs)
        self._shards = layout(specs, shard_bytes, {"format": "pt", **(metadata or {})})
        self._side: list[dict[str, bytes | Path]] = [{} for _ in outputs]
        self._scratch: list[str] = []
        self._files: ShardFiles | None = None
        self._journal: Journal | None = None
        self._closing = threading.Lock()
        self._staging: Staging | None = Staging(Path(folder), overwrite=overwrite)
        try:
            lines = self._open_journal(self._staging, identity, restart)
            self._check_space(self._staging)
            summed = {cast(str, line["file"]): cast(str, line["sha256"]) for line in lines if "file" in line}
            self._files = ShardFiles(
                self._staging.folder, self._outputs, self._shards, summed=summed, finished=self._note_file
            )
            for line in lines:
                if "record" in line:
                    self._take_over(line)
        except BaseException:
            self._end(keep=self.resumable)
            raise

    def write(self, name: str, tensor: Tensor, start: int = 0, output: int = 0) -> Receipt:
        """Put the elements of `tensor`, in logical order, at flat index `start` of the tensor `name`.

        `tensor` may have any shape, strides and device; its dtype is the spec's. Safe to call from several threads. The
        receipt is for `note`.
        Raises ValueError, naming the tensor, if it is unknown, of another dtype, too long, or written before in part;
        OSError with the path if the disk fails.
        """
        try:
            with self._ledgers[output].writing(name, tensor, start) as values:
                assert self._files is not None
                self._files.write(output, name, start, values)
                checksum = 0 if self._journal is None else crc32(values)
                return Receipt(output, name, start, values.numel(), checksum)
        except OSError as error:
            assert self._files is not None
            file = str(self._files.file(output, name))
            raise OSError(error.errno, f"cannot write tensor {name!r}: {error.strerror}", file) from error

    def note(self, record: Line, receipts: Sequence[Receipt]) -> None:
        """What was written for these receipts is what `record`, plain data, speaks of, and is done.

        Files of which every element is noted are finished in a thread.
        """
        if self._journal is not None:
            self._journal.append({"record": record, "pieces": receipts})
            self.resumable = True
            self._count(receipts)

    def add_file(self, relative: str, content: bytes | Path, output: int = 0) -> None:
        """A file to go with the weights, at `relative` below the output's folder; a Path is copied at commit.

        Raises ValueError if `relative` reaches outside the folder or is taken, InputError if `content` is missing.
        """
        side = self._side[output]
        taken = {*side, SAFETENSORS_INDEX, CHECKSUMS, *(shard.name for shard in self._shards)}
        side[side_name(relative, taken, content)] = content

    def scratch(self, name: str) -> Path:
        """The path of a file that stays, as what is written does, until a writer commits."""
        assert self._staging is not None
        self._scratch.append(name)
        return self._staging.folder / name

    def commit(self) -> None:
        """Make everything durable and move the folder to its place.

        Raises ValueError, naming the tensor, unless every element has been written exactly once; OSError if the disk
        fails.
        """
        staging = self._staging
        if staging is None or self._files is None:
            raise ValueError("the writer was committed or closed before")
        try:
            for ledger in self._ledgers:
                ledger.close()
            sums = self._files.finish()
            for output, folder in enumerate(self._outputs):
                self._add_side_files(output, staging.folder / folder, sums[output])
            staging.commit(without=[_JOURNAL, *self._scratch])
            self._staging = None
        finally:
            self._end(keep=self.resumable)

    def close(self) -> None:
        """Wait for writes that run, then remove everything that was not committed."""
        self._end(keep=False)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keeps what is noted where running the same again may end better: not after a mistake in what was given."""
        mistake = kind is None or issubclass(kind, (InputError, ArithmeticError))
        final = mistake and not (kind is not None and issubclass(kind, NonFiniteError))
        self._end(keep=self.resumable and not final)

    def _open_journal(self, staging: Staging, identity: Line | None, restart: bool) -> list[Line]:
        """The lines of the writers before this one, if it may go on from them."""
        if identity is None:
            staging.clear()
            return []
        journal = self._journal = Journal(staging.folder / _JOURNAL)
        self.resumable = len(journal.lines) > 1
        if journal.lines and not restart:
            change = difference(journal.lines[0], identity)
            if change is not None:
                raise InputError(
                    f"{staging.shown}: an unfinished merge is there, in {staging.folder.name}, and not this one: "
                    f"{change}; repeat that one to finish it, or discard it with --restart"
                )
            return journal.lines[1:]
        self.resumable = False
        journal.close()
        staging.clear()
        self._journal = Journal(staging.folder / _JOURNAL)
        self._journal.append(identity)
        return []

    def _check_space(self, staging: Staging) -> None:
        needed = len(self._outputs) * sum(shard.nbytes for shard in self._shards)
        free = shutil.disk_usage(staging.folder).free + disk_bytes(staging.folder)
        if needed > free:
            raise InputError(
                f"{staging.shown}: the disk has {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} GB for the"
                " weights; make room or choose another disk"
            )

    def _take_over(self, line: Line) -> None:
        """Counts as written what a line speaks of, if it is on the disk."""
        assert self._files is not None
        pieces = cast("list[tuple[int, str, int, int, int]]", line["pieces"])
        receipts = [Receipt(*piece) for piece in pieces]
        if all(self._ledgers[r.output].is_free(r.name, r.start, r.elements) for r in receipts) and all(
            self._files.stands(*receipt) for receipt in receipts
        ):
            for r in receipts:
                self._ledgers[r.output].claim(r.name, r.start, r.elements)
            self.records.append(cast(Line, line["record"]))
            self._count(receipts)

    def _count(self, receipts: Sequence[Receipt]) -> None:
        assert self._files is not None
        for receipt in receipts:
            self._files.count(receipt.output, receipt.name, receipt.elements)

    def _note_file(self, path: str, digest: str) -> None:
        if self._journal is not None:
            self._journal.append({"file": path, "sha256": digest})

    def _add_side_files(self, output: int, folder: Path, sums: Mapping[str, str]) -> None:
        """Writes what goes with the weights; config.json is renamed last: only then does the folder load."""
        side, sums = self._side[output], dict(sums)
        if len(self._shards) > 1:
            side[SAFETENSORS_INDEX] = build_index(self._shards)
        for name, content in side.items():
            _write_side_file(folder / (name + PART), content)
            sums[name] = sha256_of(folder / (name + PART))
        lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
        _write_side_file(folder / (CHECKSUMS + PART), "".join(lines).encode())
        for name in (CHECKSUMS, *sorted(side, key=lambda name: name == "config.json")):
            os.rename(folder / (name + PART), folder / name)

    def _end(self, *, keep: bool) -> None:
        for ledger in self._ledgers:
            ledger.abandon()
        with self._closing:
            if self._files is not None:
                self._files.close()
            if self._journal is not None:
                self._journal.close()
            if self._staging is not None:
                if keep:
                    self._staging.keep()
                else:
                    self._staging.abandon()
                self._staging = None


def _write_side_file(path: Path, content: bytes | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content)
    sync(path)

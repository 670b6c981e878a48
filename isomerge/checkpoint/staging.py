"""A folder that appears whole or not at all: made under a hidden name beside its place, and renamed when complete.

The hidden folder is locked (flock) for as long as its process lives. A hidden folder that nobody locks is what a dead
process left: the next run to the same place continues in it, or clears it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from isomerge.errors import InputError

_LOOKS_LIKE_A_MODEL = re.compile(r"(model.*\.safetensors|pytorch_model.*\.bin|.*\.index\.json|isomerge_.*)")
_LOCK = ".lock"  # in the hidden folder: the file that is locked, with the number of the process in it


class Staging:
    """`folder` is the hidden one to write into; `commit` puts it in place, `abandon` removes it, `keep` leaves it."""

    def __init__(self, place: Path, *, overwrite: bool) -> None:
        """Takes over what a dead process left. Raises InputError if `place` exists (unless `overwrite`), or another
        live writer is at work on it.
        """
        self.shown = place  # as the user wrote it
        self.place = Path(os.path.realpath(place))
        self.overwrite = overwrite
        self.folder = hidden_folder(place)
        self._made: list[Path] = []
        try:
            _make_parents(self.place.parent, self._made)
            # The parent is locked while looking around, so that of two writers that start at once one is the second.
            parent = _lock(self.place.parent, wait=True)
            try:
                self._restore_old()
                self._check_place()
                self._lock = self._take()
            finally:
                _unlock(parent)
        except BaseException as error:
            self._remove_parents()
            if isinstance(error, OSError):
                raise InputError(f"{place}: the output folder cannot be made here: {error.strerror}") from None
            raise

    def clear(self) -> None:
        """Remove everything in the hidden folder."""
        for entry in self.folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()

    def commit(self, without: Iterable[str] = ()) -> None:
        """Move the folder to its place; one that is there already is replaced and removed.

        The files `without` are removed when that is done: until then they serve the next run, if this one dies.
        """
        for folder, _, _ in os.walk(self.folder):
            sync(Path(folder))
        parent = _lock(self.place.parent, wait=True)
        try:
            self._check_place()
            old = _hidden(self.place, "old") if self.place.exists() else None
            if old is not None:
                os.rename(self.place, old)
            try:
                os.rename(self.folder, self.place)
            except OSError:
                if old is not None:
                    os.rename(old, self.place)
                raise
            sync(self.place.parent)
            for name in (*without, _LOCK):
                (self.place / name).unlink(missing_ok=True)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)  # the next run to the same place removes what is left
        finally:
            _unlock(parent)
        _unlock(self._lock)

    def keep(self) -> None:
        """Leave the hidden folder for the next run to the same place."""
        _unlock(self._lock)

    def abandon(self) -> None:
        """Remove the hidden folder, and the parent folders made for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        _unlock(self._lock)
        self._remove_parents()

    def _take(self) -> int | None:
        """The lock of the hidden folder, which is made if it is not there; InputError if a live process has it."""
        if self.folder.is_symlink():
            raise InputError(f"{self.shown}: {self.folder} is a link, expected a folder or nothing; remove it")
        self.folder.mkdir(exist_ok=True)
        path = self.folder / _LOCK
        text = path.read_text() if path.exists() else ""
        holder = int(text) if text.isdigit() else 0
        busy = InputError(f"{self.shown}: process {holder} is writing to it; wait for it, or choose another folder")
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _flock(fd, wait=False) and _is_running(holder):  # no locks here: by the number of the process
                raise busy
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            os.close(fd)
            raise busy from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _restore_old(self) -> None:
        """Put back the output that a process had moved aside when it died, or remove it when its successor stands."""
        old = _hidden(self.place, "old")
        if old.is_symlink() or not old.is_dir():
            return
        if os.path.lexists(self.place):
            shutil.rmtree(old)
        else:
            os.rename(old, self.place)

    def _check_place(self) -> None:
        place = self.place
        if not os.path.lexists(place):
            return
        if not self.overwrite:
            raise InputError(f"{self.shown}: the output exists, expected a new folder; choose another or overwrite it")
        if not place.is_dir():
            raise InputError(f"{self.shown}: the output is a file, expected a folder; choose another name")
        names = [name for folder in (place, *place.glob("alpha-*/")) for name in os.listdir(folder)]
        if names and not any(_LOOKS_LIKE_A_MODEL.fullmatch(name) for name in names):
            raise InputError(
                f"{self.shown}: the output to overwrite does not look like a model, it has no weights; choose another"
                " folder, or remove this one yourself"
            )

    def _remove_parents(self) -> None:
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # somebody else uses it by now
                return


def hidden_folder(place: Path) -> Path:
    """Where the output `place` is written until it is whole."""
    return _hidden(Path(os.path.realpath(place)), "partial")


def disk_bytes(folder: Path) -> int:
    """Bytes that the files below a folder take of the disk."""
    return sum(file.lstat().st_blocks * 512 for file in folder.rglob("*"))


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _hidden(place: Path, kind: str) -> Path:
    return place.parent / f".{place.name}.{kind}"


def _make_parents(parent: Path, made: list[Path]) -> None:
    """Make the folder and those above it; the ones that were missing are added to `made`, outermost first."""
    if not parent.is_dir():
        _make_parents(parent.parent, made)
        parent.mkdir(exist_ok=True)
        made.append(parent)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A descriptor that holds the lock of a folder; None where the file system has no locks for folders."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        if _flock(fd, wait=wait):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _flock(fd: int, *, wait: bool) -> bool:
    """Lock an open file: False where the file system has no locks. BlockingIOError if another has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        # NFS answers EBADF for a folder: it wants a descriptor open for writing.
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.EBADF):
            return False
        raise
    return True


def _unlock(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _is_running(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""A folder that appears whole or not at all: made under a hidden name beside its place, and renamed when complete.

The hidden folder is locked (flock) for as long as its process lives. A folder that nobody locks is what a dead process
left behind, and is removed by the next run to the same place.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from pathlib import Path

from isomerge.errors import InputError

_LOOKS_LIKE_A_MODEL = re.compile(r"(model.*\.safetensors|pytorch_model.*\.bin|.*\.index\.json|isomerge_.*)")


class Staging:
    """`folder` is the hidden one to write into; `commit` puts it in place, `abandon` removes it."""

    def __init__(self, place: Path, *, overwrite: bool) -> None:
        """Raises InputError if `place` exists (unless `overwrite`), or another live writer is at work on it."""
        self.shown = place  # as the user wrote it
        self.place = Path(os.path.realpath(place))
        self.overwrite = overwrite
        self._made: list[Path] = []
        try:
            _make_parents(self.place.parent, self._made)
            # The parent is locked while looking around, so that of two writers that start at once one is the second.
            parent = _lock(self.place.parent, wait=True)
            try:
                _clear_leftovers(self.place, place)
                self._check_place()
                self.folder = _hidden(self.place, "partial")
                self.folder.mkdir()
                self._lock = _lock(self.folder, wait=False)
            finally:
                _unlock(parent)
        except BaseException as error:
            self._remove_parents()
            if isinstance(error, OSError):
                raise InputError(f"{place}: the output folder cannot be made here: {error.strerror}") from None
            raise

    def commit(self) -> None:
        """Move the folder to its place; one that is there already is replaced and removed."""
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
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)  # the next run to the same place removes what is left
        finally:
            _unlock(parent)
        _unlock(self._lock)

    def abandon(self) -> None:
        """Remove the hidden folder, and the parent folders made for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        _unlock(self._lock)
        self._remove_parents()

    def _check_place(self) -> None:
        place = self.place
        if not os.path.lexists(place):
            return
        if not self.overwrite:
            raise InputError(f"{self.shown}: the output exists, expected a new folder; choose another or overwrite it")
        if not place.is_dir():
            raise InputError(f"{self.shown}: the output is a file, expected a folder; choose another name")
        names = os.listdir(place)
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


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _hidden(place: Path, kind: str) -> Path:
    return place.parent / f".{place.name}.{kind}-{os.getpid()}"


def _make_parents(parent: Path, made: list[Path]) -> None:
    """Make the folder and those above it; the ones that were missing are added to `made`, outermost first."""
    if not parent.is_dir():
        _make_parents(parent.parent, made)
        parent.mkdir(exist_ok=True)
        made.append(parent)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A descriptor that holds the lock; None where the file system has no locks. BlockingIOError if another has it."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(fd)
        raise
    except OSError as error:
        os.close(fd)
        # NFS answers EBADF: it wants a descriptor open for writing, which a folder cannot have.
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.EBADF):
            return None
        raise
    return fd


def _unlock(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _is_alive(folder: Path, pid: int) -> bool:
    """Whether a process is at work in a hidden folder: by its lock, or by its number where there are no locks."""
    try:
        fd = _lock(folder, wait=False)
    except BlockingIOError:
        return True
    if fd is not None:
        _unlock(fd)
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _clear_leftovers(place: Path, shown: Path) -> None:
    """Remove what dead processes left for this place, and put back an old output that one had moved aside."""
    pattern = re.compile(re.escape(f".{place.name}.") + r"(partial|old)-(\d+)")
    matches = [match for entry in place.parent.iterdir() if (match := pattern.fullmatch(entry.name))]
    for match in sorted(matches, key=lambda match: match[1], reverse=True):  # partial before old
        entry = place.parent / match[0]
        if entry.is_symlink() or not entry.is_dir():
            continue
        if match[1] == "partial" and _is_alive(entry, int(match[2])):
            raise InputError(f"{shown}: process {match[2]} is writing to it; wait for it, or choose another folder")
        if match[1] == "old" and not os.path.lexists(place):
            os.rename(entry, place)
        else:
            shutil.rmtree(entry)

"""The journal of an output that is being written: what is done, line by line, so that another process can go on."""

from __future__ import annotations

import errno
import json
import os
import threading
import zlib
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

from isomerge.checkpoint.format import show

Line = Mapping[str, object]


class Journal:
    """An append-only file of JSON objects, one a line, each behind the CRC-32 of its text.

    `lines` are those found on opening. One that is damaged, or torn because its process died, ends them: it and all
    behind it are cut off. Lines are not forced to the disk: whoever writes one has to be able to tell, from a checksum
    in it, whether the data that it speaks of arrived there.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock = threading.Lock()
        self.lines: list[Line] = []
        end = 0
        for text in path.read_bytes().splitlines(keepends=True):
            line = _parse(text)
            if line is None:
                break
            self.lines.append(line)
            end += len(text)
        os.ftruncate(self._fd, end)

    def append(self, line: Line) -> None:
        """Add a line, in one write; safe to call from several threads."""
        text = json.dumps(line, ensure_ascii=True, separators=(",", ":")).encode()
        whole = b"%08x %s\n" % (zlib.crc32(text), text)
        with self._lock:
            written = os.write(self._fd, whole)
        if written != len(whole):
            raise OSError(errno.ENOSPC, "the journal of the output could be written in part only")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def difference(then: object, now: object, key: str = "") -> str | None:
    """The first difference of two pieces of plain data, as `models[0].weight: 1.0 then, 0.5 now`; None if equal."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        pairs = [(f"{key}.{name}".lstrip("."), then.get(name), now.get(name)) for name in {**then, **now}]
    elif isinstance(then, (list, tuple)) and isinstance(now, (list, tuple)):
        pairs = [(f"{key}[{i}]", a, b) for i, (a, b) in enumerate(zip_longest(then, now))]
    elif then == now:
        return None
    else:
        return f"{key}: {_shown(then)} then, {_shown(now)} now"
    return next((found for name, a, b in pairs if (found := difference(a, b, name)) is not None), None)


def _shown(value: object) -> str:
    return "none" if value is None else show(value)


def _parse(text: bytes) -> Line | None:
    """The object of a line; None if it is damaged."""
    head, _, body = text.partition(b" ")
    if not body.endswith(b"\n") or head != b"%08x" % zlib.crc32(body[:-1]):
        return None
    line = json.loads(body)
    return line if isinstance(line, dict) else None

"""Running the command line: in this process, in one of its own, on a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

COMMAND = [sys.executable, "-m", "isomerge.cli"]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def read_terminal(terminal: int) -> bytes:
    """All that comes from the other end of a pseudo-terminal, until that is closed; this end is closed then, too."""
    shown = b""
    while True:
        try:  # as it comes: a terminal that is full stops the process
            data = os.read(terminal, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(terminal)
    return shown

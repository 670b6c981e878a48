"""isomerge's command line as a user calls it: a process of its own, on one thread as everything in the demo."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time


class CommandFailed(RuntimeError):
    """An `isomerge` command did not exit with 0; the message is its last words."""


def run_isomerge(command: str, *arguments: object) -> float:
    """Runs `isomerge command arguments... --quiet`; the process's wall time in seconds.

    Raises:
        CommandFailed: it exited with anything but 0.
    """
    call = [sys.executable, "-m", "isomerge.cli", command, *map(str, arguments), "--quiet"]
    started = time.perf_counter()
    done = subprocess.run(call, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        shown = shlex.join(["isomerge", *call[3:-1]])
        raise CommandFailed(f"`{shown}` exited with {done.returncode}: {done.stderr.strip()[-800:]}")
    return seconds

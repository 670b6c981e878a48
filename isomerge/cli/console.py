"""Where commands print, and whether a failure prints its traceback."""

from __future__ import annotations

from rich.console import Console

screen = Console(highlight=False, soft_wrap=True)
debug = False  # set by --debug: tracebacks instead of one line


def set_debug(value: bool) -> None:
    """What --debug says, for the entry point, which no command returns to when it fails."""
    global debug
    debug = value

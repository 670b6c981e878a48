"""Where commands print, and what a failure prints besides its one line."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console

from isomerge.errors import printable

screen = Console(highlight=False, soft_wrap=True)
hint = ""  # what to say besides when a command fails: where what is done is kept
debug = False  # set by --debug: tracebacks instead of one line


def warn(warnings: Iterable[str]) -> None:
    """A line for each; names in them may come from hostile files."""
    for warning in warnings:
        screen.print(f"warning: {printable(warning)}", markup=False)


def set_hint(value: str) -> None:
    """What the user can go on with, for the entry point."""
    global hint
    hint = value


def set_debug(value: bool) -> None:
    """What --debug says, for the entry point, which no command returns to when it fails."""
    global debug
    debug = value

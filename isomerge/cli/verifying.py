"""`isomerge verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isomerge.cli.console import screen, set_debug
from isomerge.cli.progress import verify_progress


def verify_command(
    out: Annotated[Path, typer.Argument(help="Output folder of a merge.", show_default=False)],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print problems only.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback when something fails.")] = False,
) -> None:
    """Check every file of OUT against its recorded SHA-256, and the weights against the report."""
    set_debug(debug)
    from isomerge.output import gigabytes
    from isomerge.verify import verify

    with verify_progress(quiet) as progress:
        found = verify(out, progress=progress)
    for problem in found.problems:
        screen.print(problem, markup=False)
    if found.problems:
        raise typer.Exit(1)
    if not quiet:
        for note in found.notes:
            screen.print(f"note: {note}", markup=False)
        screen.print(f"{out}: {found.files} files, {found.tensors} tensors, {gigabytes(found.nbytes)} read: as written")

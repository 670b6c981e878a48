"""The application: the table of commands, the entry point, and what it makes of errors."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from isomerge import __version__
from isomerge.cli import console
from isomerge.cli.about import doctor_command, methods_command
from isomerge.cli.merging import merge_command, plan_command
from isomerge.cli.statistics import capture_command, inspect_command
from isomerge.cli.verifying import verify_command
from isomerge.errors import InputError

app = typer.Typer(
    name="isomerge",
    help="Merge fine-tuned models by the spectra of their updates.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("merge")(merge_command)
app.command("plan")(plan_command)
app.command("capture")(capture_command)
app.command("inspect")(inspect_command)
app.command("verify")(verify_command)
app.command("methods")(methods_command)
app.command("doctor")(doctor_command)

# typer's own or click's, by version
_USAGE_ERROR: type[Exception] = next(c for c in typer.BadParameter.mro() if c.__name__ == "UsageError")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"isomerge {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """The entry point; leaves by `sys.exit` with the codes in the package's docstring."""
    try:
        code = app(standalone_mode=False)
        if code == 130:  # what newer versions of typer make of Ctrl-C
            raise KeyboardInterrupt
    except InputError as error:
        sys.exit(_fail(str(error), 2))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_fail("interrupted" + ("" if console.hint else "; nothing was written"), 130))
    except _USAGE_ERROR as error:
        sys.exit(_fail(_click_message(error), 2))
    except BrokenPipeError:  # `isomerge plan | head`
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        sys.exit(_fail(f"failed: {type(error).__name__}: {error} (run with --debug for a traceback)", 1))
    sys.exit(code if isinstance(code, int) else 0)


def script() -> None:
    """`main`, and the process is gone: to take torch down module by module would need 0.4 s more."""
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a full disk, a pipe that nobody reads
            code = code or 1
    os._exit(code)


def _fail(message: str, code: int) -> int:
    if console.debug:
        traceback.print_exc()
    parts = (message, console.hint) if console.hint else (message,)
    print(f"isomerge: {' '.join('; '.join(parts).split())}", file=sys.stderr)
    return code


def _click_message(error: Exception) -> str:
    message = getattr(error, "format_message", None)
    return f"{message() if message is not None else error} (see isomerge --help)"

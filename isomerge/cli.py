"""The command line: `isomerge merge`, `plan`, `methods`, `doctor`. The only module that prints.

Exit codes: 0 done, 1 failed while running, 2 wrong input, 130 interrupted. Errors are one line on stderr.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from isomerge import __version__
from isomerge.errors import InputError

if TYPE_CHECKING:
    from isomerge.merge import Progress as MergeProgress
    from isomerge.plan import Plan

app = typer.Typer(
    name="isomerge",
    help="Merge fine-tuned models by the spectra of their updates.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_out = Console(highlight=False, soft_wrap=True)
# typer's own or click's, by version
_USAGE_ERROR: type[Exception] = next(c for c in typer.BadParameter.mro() if c.__name__ == "UsageError")
_debug = False  # set by --debug: tracebacks instead of one line

_Recipe = Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)]


def _size(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` or a number of bytes -> bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if found is None:
        raise InputError(f"--shard-size {text}: expected a size such as 5GB, 500MB or 2GiB")
    size = float(found[1]) * (1024 if found[3] else 1000) ** "_kmgt".index(found[2] or "_")
    if size < 1:
        raise InputError(f"--shard-size {text}: expected at least one byte")
    return int(size)


@app.command("merge")
def merge_command(
    recipe: _Recipe,
    out: Annotated[Path, typer.Argument(help="Folder to write the merged model to.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace the output of an earlier merge.")] = False,
    shard_size: Annotated[str, typer.Option(help="Largest size of one weights file.")] = "5GB",
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Leave NaN and Inf of experts out of the merge.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback when something fails.")] = False,
) -> None:
    """Merge the models of RECIPE into the folder OUT."""
    _set_debug(debug)
    from isomerge.merge import merge
    from isomerge.output import gigabytes

    shard_bytes = _size(shard_size)
    with _progress(quiet) as progress:
        report = merge(
            recipe,
            out,
            overwrite=force,
            shard_bytes=shard_bytes,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    if quiet:
        return
    totals = report.totals
    for warning in report.warnings:
        _out.print(f"warning: {warning}", markup=False)
    peak = "" if totals.peak_bytes is None else f", peak memory {gigabytes(totals.peak_bytes)}"
    _out.print(
        f"{out}: {totals.tensors} tensors, {totals.matrices} matrices, {gigabytes(totals.bytes_written)} "
        f"in {_duration(totals.seconds)}{peak}",
        markup=False,
    )


@app.command("plan")
def plan_command(
    recipe: _Recipe,
    out: Annotated[Path | None, typer.Argument(help="Folder to check the space for.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Print one line per tensor.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback when something fails.")] = False,
) -> None:
    """Show what a merge of RECIPE would do and cost, from the headers alone."""
    _set_debug(debug)
    from isomerge.merge import open_job
    from isomerge.output import check_output
    from isomerge.report import plan_data

    with open_job(recipe) as job:
        plan = job.plan
        if out is not None:
            inputs = [m.path for m in (plan.settings.base, *plan.settings.models) if m.path is not None]
            check_output(out, plan.bytes_written, inputs)
    if as_json:
        typer.echo(json.dumps(plan_data(plan, tensors), indent=1, ensure_ascii=False))
        return
    _print_plan(plan)
    if tensors:
        _print_tensors(plan)


@app.command("methods")
def methods_command() -> None:
    """List the merge methods, their parameters and their papers."""
    from isomerge.methods import METHODS

    for method in METHODS.values():
        applies = "tensors of any shape" if method.elementwise else "matrices; other tensors are averaged"
        _out.print(f"[bold]{method.name}[/bold]  {method.title}", highlight=False)
        _out.print(f"    {method.paper}" if method.paper else "    no paper", markup=False)
        _out.print(f"    applies to {applies}", markup=False)
        for p in method.parameters:
            low = "-inf" if p.minimum is None else f"{p.minimum:g}"
            high = "inf" if p.maximum is None else f"{p.maximum:g}"
            limits = "" if p.minimum is None and p.maximum is None else f", {low} to {high}"
            _out.print(f"    {p.name}: {p.type.__name__}{limits}, default {p.default}. {p.help}", markup=False)
    _out.print("Every method takes alpha (or lambda, scaling_factor): the multiplier of its update, default 1.")


@app.command("doctor")
def doctor_command() -> None:
    """Show versions, devices and which backend can run which op here, with the reasons."""
    import torch

    from isomerge.backends import table

    _out.print(f"isomerge {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    _out.print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    _out.print(f"devices: {', '.join(['cpu', *devices])}", markup=False)
    rows = Table("op", "backend", "runs here", box=None, pad_edge=False)
    for op, backend, reason in table():
        rows.add_row(op, backend, "yes" if reason is None else f"no: {reason}")
    _out.print(rows)


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
    """The entry point; leaves by `sys.exit` with the codes in this module's docstring."""
    try:
        code = app(standalone_mode=False)
        if code == 130:  # what newer versions of typer make of Ctrl-C
            raise KeyboardInterrupt
    except InputError as error:
        sys.exit(_fail(str(error), 2))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_fail("interrupted; nothing was written", 130))
    except _USAGE_ERROR as error:
        sys.exit(_fail(_click_message(error), 2))
    except BrokenPipeError:  # `isomerge plan | head`
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        sys.exit(_fail(f"failed: {type(error).__name__}: {error} (run with --debug for a traceback)", 1))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    if _debug:
        traceback.print_exc()
    print(f"isomerge: {' '.join(message.split())}", file=sys.stderr)
    return code


def _click_message(error: Exception) -> str:
    message = getattr(error, "format_message", None)
    return f"{message() if message is not None else error} (see isomerge --help)"


def _set_debug(debug: bool) -> None:
    global _debug
    _debug = debug


# Progress -------------------------------------------------------------------------------------------------------


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[MergeProgress], None] | None]:
    """A bar on a terminal, a line every tenth of the way elsewhere, nothing when quiet."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with Progress(
            TextColumn("merging"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[data]}  {task.fields[matrices]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        ) as bar:
            task = bar.add_task("merging", total=None, data="", matrices="")

            def update(state: MergeProgress) -> None:
                bar.update(
                    task,
                    total=state.bytes_total,
                    completed=state.bytes_done,
                    data=_of_bytes(state),
                    matrices=f"{state.matrices_done}/{state.matrices_total} matrices",
                )

            yield update
    else:
        yield _Lines()


class _Lines:
    """Progress as plain lines on stderr: one per tenth of the bytes."""

    def __init__(self) -> None:
        self._started, self._tenth = time.monotonic(), 0

    def __call__(self, state: MergeProgress) -> None:
        tenth = 10 * state.bytes_done // max(1, state.bytes_total)
        if tenth <= self._tenth:
            return
        self._tenth = tenth
        passed = time.monotonic() - self._started
        left = passed * (state.bytes_total - state.bytes_done) / max(1, state.bytes_done)
        print(
            f"{10 * tenth}%  {_of_bytes(state)}  {state.matrices_done}/{state.matrices_total} matrices  "
            f"{_duration(left)} left",
            file=sys.stderr,
            flush=True,
        )


def _of_bytes(state: MergeProgress) -> str:
    from isomerge.output import gigabytes

    return f"{gigabytes(state.bytes_done)} of {gigabytes(state.bytes_total)}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


# The plan -------------------------------------------------------------------------------------------------------


def _print_plan(plan: Plan) -> None:
    from isomerge.output import gigabytes

    settings = plan.settings
    _out.print(
        f"{len(settings.models)} experts into {settings.base.name} ({plan.family.name}), scope {settings.scope}",
        markup=False,
    )
    rows = Table("method", "tensors", "matrices", "shapes", "FLOPs", "read", "written", box=None, pad_edge=False)
    for name, total in plan.by_method.items():
        shapes = ", ".join(f"{count} of {m}x{n}" for (m, n), count in total.shapes.items())
        flops = f"{total.flops:.2e}" if total.flops else "-"
        counts = str(total.tensors), str(total.matrices) if total.matrices else "-"
        rows.add_row(name, *counts, shapes or "-", flops, gigabytes(total.bytes_read), gigabytes(total.bytes_written))
    _out.print(rows)
    _out.print(
        f"total: {len(plan.assignments)} tensors, {plan.matrices} matrices, {plan.flops:.2e} FLOPs, "
        f"{gigabytes(plan.bytes_read)} read, peak memory about {gigabytes(plan.peak_bytes)}, "
        f"disk {gigabytes(plan.bytes_written)}"
    )
    for warning in plan.warnings:
        _out.print(f"warning: {warning}", markup=False)


def _print_tensors(plan: Plan) -> None:
    for a in plan.assignments:
        if a.call is None:
            what = "keep"
        else:
            parameters = ", ".join(f"{name}={value}" for name, value in a.call.parameters.items())
            what = f"{a.call.method}({parameters})" + (f" alpha={a.call.alpha:g}" if a.call.alpha != 1 else "")
        shape = "x".join(map(str, a.shape)) or "scalar"
        layout = " stored in x out" if a.kind.transposed else ""
        stack = f" {a.kind.slices} matrices" if a.kind.slices > 1 else ""
        _out.print(f"{a.name}  {shape}  {a.kind.kind}{stack}{layout}  {what}", markup=False)


if __name__ == "__main__":
    main()

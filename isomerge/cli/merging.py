"""`isomerge merge` and `isomerge plan`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from isomerge.cli.console import screen, set_debug, set_hint, warn
from isomerge.cli.progress import duration, merge_progress
from isomerge.errors import InputError

if TYPE_CHECKING:
    from isomerge.plan import Plan

_Recipe = Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)]
_Memory = Annotated[str | None, typer.Option(help="Most memory to use, such as 8GB.", show_default=False)]
_Device = Annotated[str, typer.Option(help="Device to compute on: cpu, cuda or cuda:N.")]
_GpuMemory = Annotated[
    str | None, typer.Option(help="Most memory of the GPU to use; by default 0.9 of what is free.", show_default=False)
]


def merge_command(
    recipe: _Recipe,
    out: Annotated[Path, typer.Argument(help="Folder to write the merged model to.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace the output of an earlier merge.")] = False,
    shard_size: Annotated[str, typer.Option(help="Largest size of one weights file.")] = "5GB",
    max_memory: _Memory = None,
    device: _Device = "cpu",
    max_gpu_memory: _GpuMemory = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that read side by side; as many as cores by default.", show_default=False),
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Leave NaN and Inf of experts out of the merge.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what an interrupted merge into OUT has left.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback when something fails.")] = False,
) -> None:
    """Merge the models of RECIPE into the folder OUT, or go on with a merge into it that was interrupted."""
    set_debug(debug)
    from isomerge.merge import merge
    from isomerge.output import gigabytes

    shard_bytes, bounds = _size(shard_size, "--shard-size"), _bounds(max_memory, max_gpu_memory)
    with _saying_what_is_kept(out), merge_progress(quiet) as progress:
        report = merge(
            recipe,
            out,
            overwrite=force,
            shard_bytes=shard_bytes,
            device=device,
            **bounds,
            workers=workers,
            allow_nonfinite=allow_nonfinite,
            restart=restart,
            progress=progress,
        )
    if quiet:
        return
    totals = report.totals
    warn(report.warnings)
    frozen = f" ({totals.frozen} frozen)" if totals.frozen else ""
    peak = "" if totals.peak_bytes is None else f", peak memory {gigabytes(totals.peak_bytes)}"
    restored = f", {totals.restored} parts from an interrupted merge" if totals.restored else ""
    screen.print(
        f"{out}: {totals.tensors} tensors{frozen}, {totals.matrices} matrices, {gigabytes(totals.bytes_written)} "
        f"in {duration(totals.seconds)}{peak}{restored}",
        markup=False,
    )


@contextmanager
def _saying_what_is_kept(out: Path) -> Iterator[None]:
    """When a merge fails or is interrupted: how to go on with what it has written."""
    from isomerge.checkpoint import hidden_folder
    from isomerge.errors import NonFiniteError

    try:
        yield
    except BaseException as error:
        kept = hidden_folder(out)
        if kept.is_dir() and (not isinstance(error, InputError) or isinstance(error, NonFiniteError)):
            set_hint(f"what is merged is kept in {kept}: the same command goes on from there, --restart discards it")
        raise


def plan_command(
    recipe: _Recipe,
    out: Annotated[
        Path | None, typer.Argument(help="Folder whose disk to check for space and speed.", show_default=False)
    ] = None,
    max_memory: _Memory = None,
    device: _Device = "cpu",
    max_gpu_memory: _GpuMemory = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Print one line per tensor.")] = False,
    timed: Annotated[
        bool, typer.Option("--time/--no-time", help="Measure this machine for some seconds to estimate the time.")
    ] = True,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback when something fails.")] = False,
) -> None:
    """Show what a merge of RECIPE would do and cost: from the headers alone, but for the time."""
    set_debug(debug)
    from isomerge.cli.timing import estimated, print_time
    from isomerge.merge import open_job
    from isomerge.output import check_output
    from isomerge.report import plan_data

    with open_job(recipe, device=device, **_bounds(max_memory, max_gpu_memory)) as job:
        plan = job.plan
        if out is not None:
            inputs = [m.path for m in (plan.settings.base, *plan.settings.models) if m.path is not None]
            check_output(out, plan.disk_bytes, inputs)
        estimate = estimated(job, out) if timed else None
    if as_json:
        data = plan_data(plan, tensors, None if estimate is None else estimate.as_data())
        typer.echo(json.dumps(data, indent=1, ensure_ascii=False))
        return
    _print_plan(plan)
    if estimate is not None:
        print_time(estimate)
    warn(plan.warnings)
    if tensors:
        _print_tensors(plan)


def _size(text: str, option: str) -> int:
    """`5GB`, `500MB`, `2GiB` or a number of bytes -> bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if found is None:
        raise InputError(f"{option} {text}: expected a size such as 5GB, 500MB or 2GiB")
    size = float(found[1]) * (1024 if found[3] else 1000) ** "_kmgt".index(found[2] or "_")
    if size < 1:
        raise InputError(f"{option} {text}: expected at least one byte")
    return int(size)


def _bounds(memory: str | None, gpu_memory: str | None) -> dict[str, int | None]:
    """The bounds of `isomerge.merge`, in bytes."""
    return {
        "max_memory": None if memory is None else _size(memory, "--max-memory"),
        "max_gpu_memory": None if gpu_memory is None else _size(gpu_memory, "--max-gpu-memory"),
    }


def _print_plan(plan: Plan) -> None:
    from isomerge.output import gigabytes

    settings = plan.settings
    screen.print(
        f"{len(settings.models)} experts into {settings.base.name} ({plan.family.name}), scope {settings.scope}",
        markup=False,
    )
    rows = Table("method", "tensors", "matrices", "shapes", "FLOPs", "read", "written", box=None, pad_edge=False)
    for name, total in plan.by_method.items():
        shapes = ", ".join(f"{count} of {m}x{n}" for (m, n), count in total.shapes.items())
        flops = f"{total.flops:.2e}" if total.flops else "-"
        counts = str(total.tensors), str(total.matrices) if total.matrices else "-"
        rows.add_row(name, *counts, shapes or "-", flops, gigabytes(total.bytes_read), gigabytes(total.bytes_written))
    screen.print(rows)
    gpu = f", of the GPU {gigabytes(plan.gpu_bytes)}" if plan.on_gpu else ""
    screen.print(
        f"total: {len(plan.assignments)} tensors, {plan.matrices} matrices, {plan.flops:.2e} FLOPs, "
        f"{gigabytes(plan.bytes_read)} read, peak memory about {gigabytes(plan.peak_bytes)}{gpu}, "
        f"disk {gigabytes(plan.disk_bytes)}"
    )


def _print_tensors(plan: Plan) -> None:
    for a in plan.assignments:
        if a.call is None:
            what = "keep"
        else:
            parameters = ", ".join(f"{name}={value}" for name, value in a.call.parameters.items())
            what = f"{a.call.method}({parameters})" + _alphas(a.call.alphas)
        shape = "x".join(map(str, a.shape)) or "scalar"
        layout = " stored in x out" if a.kind.transposed else ""
        stack = f" {a.kind.slices} matrices" if a.kind.slices > 1 else ""
        screen.print(f"{a.name}  {shape}  {a.kind.kind}{stack}{layout}  {what}", markup=False)


def _alphas(alphas: tuple[float, ...]) -> str:
    return "" if alphas == (1.0,) else " alpha=" + ",".join(f"{alpha:g}" for alpha in alphas)

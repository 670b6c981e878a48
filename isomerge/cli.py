"""The command line: `isomerge merge`, `plan`, `capture`, `inspect`, `methods`, `doctor`. The only module that prints.

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
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from isomerge import __version__
from isomerge.errors import InputError

if TYPE_CHECKING:
    from isomerge.capture import Progress as CaptureProgress
    from isomerge.inspect import File, Inspection
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


_Memory = Annotated[str | None, typer.Option(help="Most memory to use, such as 8GB.", show_default=False)]
_Device = Annotated[str, typer.Option(help="Device to compute on: cpu, cuda or cuda:N.")]
_GpuMemory = Annotated[
    str | None, typer.Option(help="Most memory of the GPU to use; by default 0.9 of what is free.", show_default=False)
]


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


@app.command("merge")
def merge_command(
    recipe: _Recipe,
    out: Annotated[Path, typer.Argument(help="Folder to write the merged model to.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace the output of an earlier merge.")] = False,
    shard_size: Annotated[str, typer.Option(help="Largest size of one weights file.")] = "5GB",
    max_memory: _Memory = None,
    device: _Device = "cpu",
    max_gpu_memory: _GpuMemory = None,
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

    shard_bytes, bounds = _size(shard_size, "--shard-size"), _bounds(max_memory, max_gpu_memory)
    with _progress(quiet) as progress:
        report = merge(
            recipe,
            out,
            overwrite=force,
            shard_bytes=shard_bytes,
            device=device,
            **bounds,
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
    max_memory: _Memory = None,
    device: _Device = "cpu",
    max_gpu_memory: _GpuMemory = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Print one line per tensor.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback when something fails.")] = False,
) -> None:
    """Show what a merge of RECIPE would do and cost, from the headers alone."""
    _set_debug(debug)
    from isomerge.merge import open_job
    from isomerge.output import check_output
    from isomerge.report import plan_data

    with open_job(recipe, device=device, **_bounds(max_memory, max_gpu_memory)) as job:
        plan = job.plan
        if out is not None:
            inputs = [m.path for m in (plan.settings.base, *plan.settings.models) if m.path is not None]
            check_output(out, plan.disk_bytes, inputs)
    if as_json:
        typer.echo(json.dumps(plan_data(plan, tensors), indent=1, ensure_ascii=False))
        return
    _print_plan(plan)
    if tensors:
        _print_tensors(plan)


@app.command("capture")
def capture_command(
    model: Annotated[Path, typer.Option(help="Folder of the expert (Hugging Face).", show_default=False)],
    data: Annotated[
        Path, typer.Option(help="Texts (.txt, a sample per line, or .jsonl) or a folder of images.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("-o", "--output", help="Statistics file to write.", show_default=False)],
    samples: Annotated[int, typer.Option(min=1, help="How many samples to draw.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    base: Annotated[
        Path | None,
        typer.Option(help="The model it was tuned from: smaller statistics of wide layers.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples that run at a time.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Truncate texts to so many tokens.", show_default=False)
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of a JSONL line that holds the text.")] = "text",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip images that do not decode.")] = False,
    device: Annotated[str, typer.Option(help="Device to run the model on.")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing statistics file.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback when something fails.")] = False,
) -> None:
    """Run an expert on samples and write the statistics that merge_method esm needs."""
    _set_debug(debug)
    # Before huggingface_hub is imported, which reads them once: a capture never uses the network.
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    from isomerge.capture.pretrained import capture_pretrained
    from isomerge.output import gigabytes

    started = time.monotonic()
    with _capture_progress(quiet) as progress:
        found = capture_pretrained(
            model,
            data,
            path=out,
            samples=samples,
            seed=seed,
            base=base,
            batch_size=batch_size,
            max_length=max_length,
            text_field=text_field,
            skip_bad=skip_bad,
            device=device,
            overwrite=force,
            progress=progress,
        )
    if quiet:
        return
    for warning in found.warnings:
        _out.print(f"warning: {warning}", markup=False)
    _out.print(
        f"{out}: {len(found.layers)} layers, {found.tokens} tokens of {found.samples} samples, "
        f"{gigabytes(out.stat().st_size)} in {_duration(time.monotonic() - started)}",
        markup=False,
    )


@app.command("inspect")
def inspect_command(
    statistics: Annotated[list[Path], typer.Argument(help="Statistics files.", metavar="STATS", show_default=False)],
    base: Annotated[
        Path | None, typer.Option(help="The model that the experts were tuned from.", show_default=False)
    ] = None,
    model: Annotated[
        list[Path] | None, typer.Option(help="The expert of a file; once for each, in order.", show_default=False)
    ] = None,
    tasks: Annotated[
        int | None,
        typer.Option(help="T in s = floor(m / T), by default the number of files.", show_default=False),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw a picture into this file.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback when something fails.")] = False,
) -> None:
    """Show the spectra of second moments or, with the models, the energy that s directions of each layer keep."""
    _set_debug(debug)
    from isomerge.inspect import check_picture, inspect, save_picture

    if png is not None:
        check_picture(png)
    with _layers_progress() as progress:
        found = inspect(statistics, base=base, models=model or (), tasks=tasks, progress=progress)
    if png is not None:
        save_picture(found, png)
    if as_json:
        typer.echo(json.dumps(found.data(), indent=1, ensure_ascii=False))
        return
    _print_inspection(found)
    if png is not None:
        _out.print(f"picture: {png}", markup=False)


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

    from isomerge.backends import BACKENDS, table

    _out.print(f"isomerge {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    _out.print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    _out.print(f"devices: {', '.join(['cpu', *devices])}", markup=False)
    for device in ("cpu", *["cuda"] * bool(devices)):
        alike: dict[tuple[str, str | None], list[str]] = {}
        for op, backend, reason in sorted(table(device), key=lambda cell: list(BACKENDS).index(cell[1])):
            if op in BACKENDS[backend].ops:
                alike.setdefault((backend, reason), []).append(op)
        rows = Table("backend", f"runs on {device}", "ops", box=None, pad_edge=False)
        for (backend, reason), found in alike.items():
            every = len(found) == len(BACKENDS["reference"].ops)
            rows.add_row(backend, "yes" if reason is None else f"no: {reason}", "all" if every else ", ".join(found))
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


def _bar(title: str, *columns: ProgressColumn) -> Progress:
    """A bar on stderr that leaves nothing behind: the title, how far it is, the columns, the time left."""
    return Progress(
        TextColumn(title),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[MergeProgress], None] | None]:
    """A bar on a terminal, a line every tenth of the way elsewhere, nothing when quiet."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar("merging", TaskProgressColumn(), TextColumn("{task.fields[data]}  {task.fields[matrices]}")) as bar:
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


@contextmanager
def _capture_progress(quiet: bool) -> Iterator[Callable[[CaptureProgress], None] | None]:
    """As `_progress`, for the samples of a capture."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar("capturing", TaskProgressColumn(), TextColumn("{task.fields[text]}")) as bar:
            task = bar.add_task("capturing", total=None, text="")

            def update(state: CaptureProgress) -> None:
                bar.update(task, total=state.samples_total, completed=state.samples_done, text=_of_samples(state))

            yield update
    else:
        tenth = 0

        def line(state: CaptureProgress) -> None:
            nonlocal tenth
            now = 10 * state.samples_done // max(1, state.samples_total or 0)
            if now > tenth:
                tenth = now
                print(f"{10 * now}%  {_of_samples(state)}", file=sys.stderr, flush=True)

        yield line


def _of_samples(state: CaptureProgress) -> str:
    return f"{state.samples_done} of {state.samples_total} samples  {state.tokens} tokens"


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


@contextmanager
def _layers_progress() -> Iterator[Callable[[int, int, str], None] | None]:
    """As `_progress`, for the layers of an inspection: a bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    with _bar("inspecting", TextColumn("{task.completed}/{task.total} layers")) as bar:
        task = bar.add_task("inspecting", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total)


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
    gpu = f", of the GPU {gigabytes(plan.gpu_bytes)}" if plan.on_gpu else ""
    _out.print(
        f"total: {len(plan.assignments)} tensors, {plan.matrices} matrices, {plan.flops:.2e} FLOPs, "
        f"{gigabytes(plan.bytes_read)} read, peak memory about {gigabytes(plan.peak_bytes)}{gpu}, "
        f"disk {gigabytes(plan.disk_bytes)}"
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


# An inspection --------------------------------------------------------------------------------------------------

_FIGURES = {  # heads of their columns
    "leading_1": "in 1 %",
    "leading_5": "in 5 %",
    "leading_12.5": "in 12.5 %",
    "esd": "ESD",
    "svd": "SVD",
    "svd_shift": "SVD, shifts",
}


def _print_inspection(inspection: Inspection) -> None:
    for file in inspection.files:
        _print_file(file)
    if inspection.tasks is None:
        _out.print("in x %: the share of the energy, in percent, of that many leading eigenvalues", markup=False)
        return
    _out.print(
        f"energy kept, in percent, by s = floor(m / {inspection.tasks}) directions. ESD: of the feature shifts, by "
        "their leading principal directions; SVD: of the update, by its leading singular directions, and in the last "
        "column of the feature shifts by the same",
        markup=False,
    )


def _print_file(file: File) -> None:
    from isomerge.output import gigabytes
    from isomerge.schedule import layer_type

    of = "" if file.model is None else f" of {file.model}"
    _out.print(
        f"{file.path}{of}: {file.samples} samples, up to {file.tokens} tokens; {len(file.layers)} layers, "
        f"{file.moments} moments, {gigabytes(file.bytes)}",
        markup=False,
    )
    figures = [_FIGURES[name] for name in next(iter(file.layers.values())).figures]
    cells = []
    for name, found in file.layers.items():
        layer, kept = found.layer, found.kept
        shape = [str(layer.size)] if kept is None else [f"{found.m}x{found.n}", str(kept.s)]
        energies = map(_percent, found.figures.values())
        cells.append([name, str(layer.tokens), layer.space, *shape, str(found.rank), *energies])
    shape = ["d"] if file.model is None else ["shape", "s"]
    _print_table(["layer", "tokens", "space", *shape, "rank", *figures], cells)
    cells = []
    for name, total in file.types.items():
        pairs = zip(total.mean.values(), total.least.values(), strict=True)
        cells.append([name, str(total.layers), *(f"{_percent(mean)} / {_percent(least)}" for mean, least in pairs)])
    _print_table(["mean / least", "layers", *figures], cells)
    alike: dict[tuple[str, ...], int] = {}
    for names in file.shared:
        types = tuple(layer_type(name) for name in names)
        alike[types] = alike.get(types, 0) + 1
    for types, count in alike.items():
        times = "" if count == 1 else f" ({count} times)"
        _out.print(f"one moment for {', '.join(types)}{times}", markup=False)
    for warning in file.warnings:
        _out.print(f"warning: {warning}", markup=False)


def _print_table(heads: list[str], cells: list[list[str]]) -> None:
    """Names left and values right; names are shortened where a terminal is too narrow for them."""
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    values = sum(widths[1:]) + 2 * len(widths[1:])
    room = min(widths[0], max(20, _out.width - values)) if _out.is_terminal else widths[0]
    table = Table(box=None, pad_edge=False, width=room + values)
    for index, (head, width) in enumerate(zip(heads, [room, *widths[1:]], strict=True)):
        table.add_column(Text(head), justify="right" if index else "left", no_wrap=True, width=width)
    for name, *others in cells:
        table.add_row(*map(Text, (_shortened(name, room), *others)))
    _out.print(table)


def _shortened(name: str, room: int) -> str:
    """`encoder.layer.0.attention.self.query.weight` -> `e.l.0.a.self.query.weight`: as many first letters as it takes,
    for numbers and last parts tell layers apart; then without its front.
    """
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= room:
            break
        parts[index] = part if part.isdigit() else part[:1]
    short = ".".join(parts)
    return short if len(short) <= room else f"…{short[len(short) - room + 1 :]}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


if __name__ == "__main__":
    main()

"""`isomerge capture` and `isomerge inspect`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from isomerge.cli.console import screen, set_debug, warn
from isomerge.cli.progress import capture_progress, duration, layers_progress

if TYPE_CHECKING:
    from isomerge.inspect import File, Inspection


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
    set_debug(debug)
    # Before huggingface_hub is imported, which reads them once: a capture never uses the network.
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    from isomerge.capture.pretrained import capture_pretrained
    from isomerge.output import gigabytes

    started = time.monotonic()
    with capture_progress(quiet) as progress:
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
    warn(found.warnings)
    screen.print(
        f"{out}: {len(found.layers)} layers, {found.tokens} tokens of {found.samples} samples, "
        f"{gigabytes(out.stat().st_size)} in {duration(time.monotonic() - started)}",
        markup=False,
    )


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
    set_debug(debug)
    from isomerge.inspect import check_picture, inspect, save_picture

    if png is not None:
        check_picture(png)
    with layers_progress() as progress:
        found = inspect(statistics, base=base, models=model or (), tasks=tasks, progress=progress)
    if png is not None:
        save_picture(found, png)
    if as_json:
        typer.echo(json.dumps(found.data(), indent=1, ensure_ascii=False))
        return
    _print_inspection(found)
    if png is not None:
        screen.print(f"picture: {png}", markup=False)


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
        screen.print("in x %: the share of the energy, in percent, of that many leading eigenvalues", markup=False)
        return
    screen.print(
        f"energy kept, in percent, by s = floor(m / {inspection.tasks}) directions. ESD: of the feature shifts, by "
        "their leading principal directions; SVD: of the update, by its leading singular directions, and in the last "
        "column of the feature shifts by the same",
        markup=False,
    )


def _print_file(file: File) -> None:
    from isomerge.output import gigabytes
    from isomerge.schedule import layer_type

    of = "" if file.model is None else f" of {file.model}"
    screen.print(
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
        screen.print(f"one moment for {', '.join(types)}{times}", markup=False)
    warn(file.warnings)


def _print_table(heads: list[str], cells: list[list[str]]) -> None:
    """Names left and values right; names are shortened where a terminal is too narrow for them."""
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    values = sum(widths[1:]) + 2 * len(widths[1:])
    room = min(widths[0], max(20, screen.width - values)) if screen.is_terminal else widths[0]
    for index, (name, *others) in enumerate([heads, *cells]):
        line = [_shortened(name, room).ljust(room), *map(str.rjust, others, widths[1:])]
        screen.print(Text("  ".join(line), style="" if index else "bold"), soft_wrap=True)


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

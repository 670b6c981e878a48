"""The pictures of an inspection, as PNG. The one door to matplotlib, which is imported when a picture is asked for."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from isomerge.checkpoint.staging import sync
from isomerge.errors import InputError
from isomerge.inspect.energy import GRID
from isomerge.inspect.files import ENERGIES, File, Inspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS, _WIDTH, _HEIGHT = 4, 5.0, 3.8  # panels in a row, and inches of each
_CURVES = (  # label, colour and line of the three of `Kept.curves`
    ("ESD: shifts", "C0", "-"),
    ("SVD: update", "C1", "-"),
    ("SVD: shifts", "C1", ":"),
)


def check_picture(path: str | Path) -> None:
    """InputError unless a PNG can be made and written at `path`."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: the picture's name must end in .png")
    if path.is_dir():
        raise InputError(f"{path}: this is a folder, expected the name of a file to write")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"{path}: {path.parent} is not a folder that you may write to")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError(f"{path}: a picture needs matplotlib: pip install 'isomerge[plot]'") from None


def save_picture(inspection: Inspection, path: str | Path) -> None:
    """Writes the PNG, which appears whole or not at all; one that is there is replaced. InputError as `check_picture`.

    A panel for each file. With models, the energy kept against the share of directions, as means over layers, and each
    layer at its s of m directions; without, the eigenvalues of each distinct moment relative to the largest.
    """
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(inspection.files)
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, file in enumerate(inspection.files):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set_title(file.path.name, fontsize="small")
        axes.set_xscale("log")
        axes.set_xticks([0.001, 0.01, 0.1, 1], ["0.1 %", "1 %", "10 %", "100 %"])
        axes.set_xlabel("share of the directions")
        axes.grid(alpha=0.3)
        if inspection.base is None:
            _spectra(axes, file)
        else:
            _energies(axes, file)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    _write(Path(path), png.getvalue())


def _spectra(axes: Axes, file: File) -> None:
    distinct = {found.layer.stored: found.spectrum for found in file.layers.values()}
    for found in distinct.values():
        if found is not None and found.curve:
            # A null eigenvalue has no place on a logarithmic axis: the line ends there.
            axes.plot(GRID, [value or math.nan for value in found.curve], color="C0", linewidth=0.8, alpha=0.5)
    axes.set_yscale("log")
    axes.set_ylabel("eigenvalue / largest")


def _energies(axes: Axes, file: File) -> None:
    for which, (label, color, line) in enumerate(_CURVES):
        if curve := file.curve(which):
            axes.plot(GRID, curve, color=color, linestyle=line, label=f"{label}, mean over layers")
    for which, (_, color, line) in enumerate(_CURVES):
        filled = color if line == "-" else "none"
        shares, energies = [], []
        for found in file.layers.values():
            if found.kept is not None and (energy := found.figures[ENERGIES[which]]) is not None:
                shares.append(found.kept.s / found.m)
                energies.append(energy)
        axes.scatter(shares, energies, s=12, facecolors=filled, edgecolors=color, linewidths=0.8)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("energy kept")
    if axes.lines:
        axes.legend(fontsize="x-small", title="points: layers at floor(m/T)", title_fontsize="x-small")


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        part.write_bytes(content)
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    except OSError as error:
        raise InputError(f"{path}: the picture cannot be written: {error.strerror}; choose another place") from None
    finally:
        part.unlink(missing_ok=True)

"""Statistics files, alone or with the models they are of: what `energy` says of every layer, one layer at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from isomerge.checkpoint import Checkpoint, open_checkpoint
from isomerge.errors import InputError
from isomerge.families import Family, as_matrix, recognise
from isomerge.headers import MERGEABLE
from isomerge.inspect.energy import GRID, LEADING, Kept, Spectrum, kept, spectrum
from isomerge.moments import Layer as Matrix
from isomerge.moments import Moments, check_fingerprints, match
from isomerge.schedule import layer_type
from isomerge.statistics import Layer, Statistics, open_statistics

FIGURES = tuple(f"leading_{share / 10:g}" for share in LEADING)
ENERGIES = ("esd", "svd", "svd_shift")


@dataclass(frozen=True, slots=True)
class Inspected:
    """One layer: its `spectrum` where no models were given, else its update's shape m x n and the energy `kept`."""

    layer: Layer
    m: int = 0
    n: int = 0
    spectrum: Spectrum | None = None
    kept: Kept | None = None

    @property
    def rank(self) -> int:
        found = self.kept or self.spectrum
        assert found is not None
        return found.rank

    @property
    def figures(self) -> dict[str, float | None]:
        """The shares of energy by name: those of `FIGURES`, or with models those of `ENERGIES`."""
        if self.kept is not None:
            return {name: getattr(self.kept, name) for name in ENERGIES}
        assert self.spectrum is not None
        return dict(zip(FIGURES, self.spectrum.leading or [None] * len(FIGURES), strict=True))


@dataclass(frozen=True, slots=True)
class Summary:
    """The layers of one type: how many, and of each figure the mean and the least over those that have one."""

    layers: int
    mean: Mapping[str, float | None]
    least: Mapping[str, float | None]


@dataclass(slots=True)
class File:
    """One statistics file, its layers in natural order, and the model it is of where that was given."""

    path: Path
    model: str | None
    samples: int
    version: str
    bytes: int
    layers: dict[str, Inspected] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def moments(self) -> int:
        """How many tensors hold the moments of the layers."""
        return len({found.layer.stored for found in self.layers.values()})

    @property
    def tokens(self) -> int:
        """Tokens that the layer with most of them saw."""
        return max(found.layer.tokens for found in self.layers.values())

    @property
    def shared(self) -> list[list[str]]:
        """The layers that share a tensor with others, those of one tensor together."""
        names: dict[str, list[str]] = {}
        for name, found in self.layers.items():
            names.setdefault(found.layer.stored, []).append(name)
        return [together for together in names.values() if len(together) > 1]

    @property
    def types(self) -> dict[str, Summary]:
        """Layers at the same place of every block, by their name without the block's index; the last, "all", is all."""
        types: dict[str, list[Inspected]] = {}
        for name, found in self.layers.items():
            types.setdefault(layer_type(name), []).append(found)
        return {name: _summary(layers) for name, layers in {**types, "all": list(self.layers.values())}.items()}

    def curve(self, which: int) -> list[float]:
        """The mean over layers of one of `Kept.curves` at the shares of `GRID`; empty if no layer has it."""
        curves = [found.kept.curves[which] for found in self.layers.values() if found.kept is not None]
        curves = [curve for curve in curves if curve]
        return [sum(values) / len(curves) for values in zip(*curves, strict=True)]


@dataclass(slots=True)
class Inspection:
    """What `inspect` found; `tasks` and `base` are None where no models were given."""

    tasks: int | None
    base: str | None
    files: list[File]

    def data(self) -> dict[str, object]:
        """All of it as JSON can hold it; energies are shares from 0 to 1, null where there is none."""
        return {"tasks": self.tasks, "base": self.base, "files": [_data(file) for file in self.files]}


def inspect(
    paths: Sequence[str | Path],
    *,
    base: str | Path | None = None,
    models: Sequence[str | Path] = (),
    tasks: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Inspection:
    """The spectrum of every layer's moment or, with the models, the energy of its shifts that s directions keep.

    `models` are the experts that the files of `paths` were captured from, in their order, and `base` what they were
    tuned from; s = floor(m / `tasks`) for a layer of m rows, `tasks` by default the number of files. `progress` is
    called after each layer with those done, all of them, and its name. Memory: one layer's moment and update at a
    time, and its eigensolves in float64. InputError for whatever the files or models cannot be used for; all of that
    but values that are not finite is found before the first layer is computed.
    """
    _check(paths, base, models, tasks)
    with ExitStack() as stack:
        statistics = [stack.enter_context(open_statistics(path)) for path in paths]
        todo: Sequence[_Alone | _Paired]
        if base is None:
            todo = [_Alone(source) for source in statistics]
        else:
            before = stack.enter_context(open_checkpoint(base))
            experts = [stack.enter_context(open_checkpoint(path)) for path in models]
            moments = [Moments(source, str(source.path)) for source in statistics]
            check_fingerprints(before, experts, moments)
            tasks = tasks or len(paths)
            todo = [_Paired(*pair, before, tasks) for pair in zip(statistics, experts, moments, strict=True)]
        total, done = sum(len(source.names) for source in todo), 0
        for source in todo:
            for name, found in source.layers():
                source.file.layers[name] = found
                done += 1
                if progress is not None:
                    progress(done, total, name)
    return Inspection(tasks, None if base is None else str(base), [source.file for source in todo])


def _check(
    paths: Sequence[str | Path], base: str | Path | None, models: Sequence[str | Path], tasks: int | None
) -> None:
    """InputError for arguments that do not go together."""
    if not paths:
        raise InputError("inspect: no statistics file is given; give at least one")
    if base is None and models:
        raise InputError("inspect: models are given and no base; give the base that they were tuned from (--base)")
    if base is not None and len(models) != len(paths):
        raise InputError(
            f"inspect: models: expected one for each of the statistics files, which are {len(paths)}, got "
            f"{len(models)}; give them in the order of the files (--model, once for each)"
        )
    if tasks is not None and base is None:
        raise InputError("inspect: tasks are given and no models; give --base and --model, or leave out --tasks")
    if tasks is not None and tasks < 1:
        raise InputError(f"inspect: tasks: expected at least 1, got {tasks}")


class _Alone:
    """A statistics file without its model: each moment is looked at once, whoever shares it."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self.file = _file(statistics, None)
        self.names = sorted(statistics.layers, key=_natural)

    def layers(self) -> Iterator[tuple[str, Inspected]]:
        seen: dict[str, Spectrum] = {}
        for name in self.names:
            layer = self._statistics.layers[name]
            if layer.stored not in seen:
                seen[layer.stored] = spectrum(self._statistics.stored(name))
            yield name, Inspected(layer, spectrum=seen[layer.stored])


class _Paired:
    """A statistics file with its expert and the base."""

    def __init__(
        self, statistics: Statistics, expert: Checkpoint, moments: Moments, base: Checkpoint, tasks: int
    ) -> None:
        self._moments, self._expert, self._base = moments, expert, base
        self.file = _file(statistics, expert.label)
        family = recognise({name: info.shape for name, info in base.tensors.items()})
        self._matrices: dict[str, tuple[Layer, int, int, bool]] = {}
        self._tasks = tasks
        few = []
        for name in sorted(statistics.layers, key=_natural):
            m, n, transposed = self._shape(name, family)
            if m == 0:
                continue
            layer = statistics.layers[name]
            if m < tasks:
                raise InputError(
                    f"{name}: {tasks} tasks for {m} rows, floor({m} / {tasks}) leaves no direction; expected at most "
                    f"{m} tasks"
                )
            if layer.tokens < m // tasks:
                few.append(f"{layer.tokens} tokens for {m // tasks} directions in {name}")
            self._matrices[name] = layer, m, n, transposed
        if not self._matrices:
            raise InputError(f"{moments.label}: the base {base.label} has none of its layers; give their base")
        match([Matrix(name, (name,), m, n) for name, (_, m, n, _) in self._matrices.items()], [moments])
        if few:
            self.file.warnings.append(f"{len(few)} layers saw fewer tokens than directions are kept: {few[0]}")
        self.names = list(self._matrices)

    def layers(self) -> Iterator[tuple[str, Inspected]]:
        for name, (layer, m, n, transposed) in self._matrices.items():
            delta = self._delta(name)
            moment = self._moments.moment(name)
            found = kept(delta.mT if transposed else delta, moment, layer.space, m // self._tasks)
            yield name, Inspected(layer, m, n, kept=found)

    def _shape(self, name: str, family: Family) -> tuple[int, int, bool]:
        """m, n and whether it is stored [n, m], of a layer; zeros, and a warning, where there is no such update."""
        own, theirs = _shape_of(self._expert, name), _shape_of(self._base, name)
        if theirs is None:
            self.file.warnings.append(f"{name} is left out: the base {self._base.label} does not have it")
            return 0, 0, False
        assert own is not None  # its fingerprint was compared
        if own != theirs:
            raise InputError(
                f"{self._expert.label}: {name}: shape {list(own)}, the base {self._base.label} has {list(theirs)}; "
                "give the base that the expert was tuned from"
            )
        if len(own) != 2:
            self.file.warnings.append(f"{name} is left out: shape {list(own)}, expected a matrix")
            return 0, 0, False
        transposed = as_matrix(name, own, family).transposed
        rows, columns = own
        return (columns, rows, True) if transposed else (rows, columns, False)

    def _delta(self, name: str) -> Tensor:
        """expert - base of a layer as stored, in float64."""
        delta = self._expert.read(name).double().sub_(self._base.read(name))
        if not bool(delta.sum().isfinite()):
            for model in (self._base, self._expert):
                count = int((~model.read(name).isfinite()).sum())
                if count:
                    raise InputError(f"{model.label}: {name}: {count} non-finite values (NaN or Inf), expected none")
        return delta


def _file(statistics: Statistics, model: str | None) -> File:
    path = statistics.path
    return File(path, model, statistics.samples, statistics.version, path.stat().st_size)


def _shape_of(checkpoint: Checkpoint, name: str) -> tuple[int, ...] | None:
    """None where there is no such tensor; InputError where it is not of floating point as a merge takes it."""
    found = checkpoint.tensors.get(checkpoint.aliases.get(name, name))
    if found is None:
        return None
    if found.dtype not in MERGEABLE:
        raise InputError(
            f"{checkpoint.label}: {name}: stored as {str(found.dtype).removeprefix('torch.')}, expected float32, "
            "float64, bfloat16 or float16; give the model before it was quantised"
        )
    return found.shape


def _natural(name: str) -> list[tuple[int, str]]:
    """Numbers in names by their value: layer.2 before layer.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _summary(layers: Iterable[Inspected]) -> Summary:
    layers = list(layers)
    values: dict[str, list[float]] = {name: [] for name in layers[0].figures}
    for found in layers:
        for name, value in found.figures.items():
            if value is not None:
                values[name].append(value)
    mean = {name: sum(some) / len(some) if some else None for name, some in values.items()}
    return Summary(len(layers), mean, {name: min(some, default=None) for name, some in values.items()})


def _data(file: File) -> dict[str, object]:
    layers = {}
    for name, found in file.layers.items():
        layer = found.layer
        row: dict[str, object] = {"tokens": layer.tokens, "space": layer.space, "size": layer.size}
        row |= {"stored": layer.stored, "rank": found.rank}
        if found.kept is not None:
            row |= {"m": found.m, "n": found.n, "s": found.kept.s}
        layers[name] = {**row, **found.figures}
    types = {
        name: {"layers": one.layers, "mean": dict(one.mean), "least": dict(one.least)}
        for name, one in file.types.items()
    }
    data: dict[str, object] = {
        "path": str(file.path),
        "model": file.model,
        "samples": file.samples,
        "isomerge": file.version,
        "tokens": file.tokens,
        "moments": file.moments,
        "bytes": file.bytes,
        "layers": layers,
        "shared": file.shared,
        "types": types,
        "warnings": file.warnings,
    }
    if file.model is not None:
        data["curves"] = {"share": list(GRID), **{name: file.curve(i) for i, name in enumerate(ENERGIES)}}
    return data

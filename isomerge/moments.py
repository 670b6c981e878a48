"""Second moments for a merge: which layers all experts have them for, in which space, and whose they are.

`match` compares headers and so belongs to the plan; `check_fingerprints` reads a few KB of each layer of the models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isomerge.errors import InputError
from isomerge.statistics import Statistics, fingerprint, moment_fault

if TYPE_CHECKING:
    from isomerge.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one layer's moment [d, d] before it is read; None where nothing says it."""

    size: int
    space: str | None = None  # "input" or "output"
    tokens: int | None = None
    inputs: bool = False  # whether the inputs [tokens, d] are stored, which give moments in either space


class Moments:
    """The second moments of one expert: those of a statistics file, or tensors in memory by the layer's name."""

    def __init__(self, source: Statistics | Mapping[str, Tensor], label: str) -> None:
        """InputError unless tensors in memory are float32 or float64 and [d, d]."""
        self.label = label
        self.source = source
        self.layers: dict[str, Known] = {}
        if isinstance(source, Statistics):
            self.layers = {
                name: Known(v.size, v.space, v.tokens, source.holds_inputs(name)) for name, v in source.layers.items()
            }
            return
        for name, value in source.items():
            if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
                got = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"{label}: {name!r}: expected second moments in float32 or float64, got {got}")
            if value.dim() != 2 or value.shape[0] != value.shape[1] or value.numel() == 0:
                raise InputError(f"{label}: {name!r}: expected second moments [d, d], got shape {list(value.shape)}")
            self.layers[name] = Known(len(value))

    def moment(self, name: str) -> Tensor:
        """YᵀY [d, d] of a layer; InputError unless it can be one."""
        return self.source.moment(name) if isinstance(self.source, Statistics) else self.stored(name)

    def stored(self, name: str) -> Tensor:
        """YᵀY [d, d] of a layer, or its inputs Y [tokens, d], tokens < d; InputError unless it can be one."""
        if isinstance(self.source, Statistics):
            return self.source.stored(name)
        value = self.source[name].detach().cpu()
        fault = moment_fault(value)
        if fault is not None:
            raise InputError(f"{self.label}: {name}: {fault}")
        return value


@dataclass(frozen=True, slots=True)
class Layer:
    """One matrix m x n of the base that a method wants moments for."""

    name: str
    sources: tuple[str, ...]  # its name in each expert
    m: int
    n: int


@dataclass(slots=True)
class Matched:
    """d of the moments of each layer that has them, and what was noticed on the way.

    `tokens` are the rows of the largest inputs that they are computed from, of layers where some are.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def match(layers: Iterable[Layer], moments: Sequence[Moments]) -> Matched:
    """Which layers all experts have moments for; those that no expert has are left out.

    InputError when only some experts have them, in different spaces, or of a size that does not fit the layer.
    """
    found = Matched()
    ranked: dict[str, list[tuple[int, int, str]]] = {}  # file -> (tokens, rank, layer) where tokens are too few
    for layer in layers:
        known = [m.layers.get(source) for m, source in zip(moments, layer.sources, strict=True)]
        if all(entry is None for entry in known):
            continue
        found.sizes[layer.name] = _size(layer, moments, known)
        inputs = [entry.tokens or 0 for entry in known if entry is not None and entry.inputs]
        if inputs:
            found.tokens[layer.name] = max(inputs)
        rank = layer.m // len(moments)
        for m, entry in zip(moments, known, strict=True):
            if entry is not None and entry.tokens is not None and entry.tokens < rank:
                ranked.setdefault(m.label, []).append((entry.tokens, rank, layer.name))
    for label, few in ranked.items():
        tokens, rank, name = min(few)
        found.warnings.append(
            f"{label}: {len(few)} layers saw fewer tokens than the directions that are kept of each expert; the fewest "
            f"are {tokens} tokens for {rank} directions in {name}: capture more samples"
        )
    return found


def _size(layer: Layer, moments: Sequence[Moments], known: Sequence[Known | None]) -> int:
    """d of one layer's moments, the same for all experts."""
    having = [m.label for m, entry in zip(moments, known, strict=True) if entry is not None]
    lacking = [m.label for m, entry in zip(moments, known, strict=True) if entry is None]
    if lacking:
        raise InputError(
            f"{layer.name}: {_some(having)} {_verb(having, 'has', 'have')} second moments of it, {_some(lacking)} "
            f"{_verb(lacking, 'has', 'have')} none; capture all experts alike, or take another method for it with a "
            f'rule {{filter: "{layer.name}", merge_method: tsvm}}'
        )
    settled: list[tuple[str, str]] = []  # (space, whose) of stored moments: inputs give either
    for m, source, entry in zip(moments, layer.sources, known, strict=True):
        assert entry is not None
        space = entry.space or ("output" if entry.size == layer.m != layer.n else "input")
        if entry.size != (layer.n if space == "input" else layer.m) or (space == "output" and layer.m == layer.n):
            said = f"in {entry.space} space" if entry.space else "in memory"
            output = "" if layer.m == layer.n else f" or [{layer.m}, {layer.m}] in output space"
            raise InputError(
                f"{m.label}: {source}: second moments [{entry.size}, {entry.size}] {said} for a layer of "
                f"{layer.m} x {layer.n}; expected [{layer.n}, {layer.n}] in input space{output}"
            )
        if not entry.inputs:
            settled.append((space, m.label))
    if not settled:
        return min(layer.m, layer.n)
    first, whose = settled[0]
    for space, label in settled:
        if space != first:
            raise InputError(
                f"{layer.name}: second moments in {first} space in {whose} and in {space} space in {label}; capture "
                "all experts alike"
            )
    return layer.n if first == "input" else layer.m


def check_fingerprints(base: Checkpoint, experts: Sequence[Checkpoint], moments: Sequence[Moments]) -> None:
    """InputError unless every statistics file was made from its expert, and shifts by the delta from this base."""
    for expert, m in zip(experts, moments, strict=bool(moments)):
        if not isinstance(m.source, Statistics):
            continue
        expected, layers = m.source.fingerprint, m.source.layers
        difference = _difference(expected, expert, layers)
        if difference is not None:
            raise InputError(
                f"{m.label}: statistics of another model: made from one with the fingerprint {expected[:12]}, "
                f"{difference}; capture them from {expert.label}"
            )
        shifts = [name for name, layer in layers.items() if layer.space == "output"]
        expected = m.source.base_fingerprint or ""
        difference = _difference(expected, base, shifts) if shifts else None
        if difference is not None:
            raise InputError(
                f"{m.label}: statistics of shifts from another base: made with one with the fingerprint "
                f"{expected[:12]}, {difference}; capture them with {base.label} as the base"
            )


def _difference(expected: str, model: Checkpoint, names: Iterable[str]) -> str | None:
    """How a model differs from the one whose fingerprint over `names` is `expected`; None if it does not."""
    lacking = next((name for name in names if model.aliases.get(name, name) not in model.tensors), None)
    if lacking is not None:
        return f"{model.label} has no layer {lacking}"
    found = fingerprint(model, names)
    return None if found == expected else f"{model.label} has {found[:12]}"


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")


def _verb(labels: Sequence[str], one: str, many: str) -> str:
    return one if len(labels) == 1 else many

"""What happens to each tensor of the base: which rule takes it, what it is to a method, and the call on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from isomerge import families, moments
from isomerge.errors import InputError
from isomerge.families import Family, Kind
from isomerge.methods import METHODS, check_parameters
from isomerge.schedule import LAYER_EXPONENT, Call, layer_type
from isomerge.settings import Settings

if TYPE_CHECKING:
    from isomerge.checkpoint import Checkpoint, TensorInfo
    from isomerge.moments import Moments

FALLBACK = "tsvm"  # of layers for which no expert has the statistics that their method needs


@dataclass(frozen=True, slots=True)
class Assignment:
    """What happens to one tensor of the base; `call` is None where the base's values are kept."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    out_dtype: torch.dtype
    kind: Kind
    call: Call | None
    aliases: tuple[str, ...]  # further names under which the result is stored
    rule: int | None
    moment_size: int = 0  # d of the second moments that its method is called with; 0: none
    tokens: int = 0  # rows of the largest inputs that a moment is computed from; 0: all are stored
    layer_type: str | None = None  # its update is scaled by its norm among those of this type; None: it is not

    @property
    def matrix(self) -> tuple[int, int]:
        """m x n = out x in of each of its matrices."""
        return self.kind.sides(self.shape)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes_written(self) -> int:
        """In each output of the merge."""
        return self.numel * self.out_dtype.itemsize * (1 + len(self.aliases))


def check_settings(settings: Settings) -> None:
    """InputError when a method or a parameter of the recipe is unknown or out of range, or when a method needs
    statistics and a model has none. Opens no file.
    """
    Calls(settings)


def needs_statistics(settings: Settings) -> str | None:
    """The first method of the recipe and its rules that is called with second moments."""
    methods = (settings.method, *(rule.merge_method for rule in settings.rules))
    return next((method for method in methods if method is not None and METHODS[method].moments), None)


def _check_statistics(settings: Settings) -> None:
    method = needs_statistics(settings)
    lacking = next((index for index, model in enumerate(settings.models) if model.statistics is None), None)
    if method is not None and lacking is not None:
        key = f"models[{lacking}].statistics" if settings.models[lacking].path is not None else f"statistics[{lacking}]"
        raise InputError(
            f"{settings.source}: {key}: missing; {method} needs the statistics of every expert, "
            "which isomerge capture writes"
        )


class Calls:
    """The calls a recipe makes, checked once: per rule (None: no rule), for matrices and for all other tensors."""

    def __init__(self, settings: Settings) -> None:
        where = settings.source
        self._matrix: dict[int | None, Call] = {
            None: _call(settings.method, settings.parameters, settings.alphas, where)
        }
        for index, rule in enumerate(settings.rules):
            method = rule.merge_method or settings.method
            # The recipe's parameters belong to the recipe's method; another method starts from its own defaults.
            inherited = settings.parameters if method == settings.method else {}
            alphas = settings.alphas if rule.alpha is None else (rule.alpha,) * len(settings.alphas)
            self._matrix[index] = _call(method, {**inherited, **rule.parameters}, alphas, f"{where}: rules[{index}]")
        _check_statistics(settings)

    def __call__(self, rule: int | None, kind: str) -> Call:
        """Tensors that are not matrices are averaged where the method is one for matrices."""
        call = self._matrix[rule]
        if kind == "matrix" or METHODS[call.method].elementwise:
            return call
        return Call("average", check_parameters("average", {}), call.alphas)


def _call(method: str, parameters: Mapping[str, object], alphas: tuple[float, ...], where: str) -> Call:
    try:
        return Call(method, check_parameters(method, parameters), alphas)
    except InputError as error:
        raise InputError(f"{where}{'.' if where.endswith(']') else ': '}{error}") from None


def assign(info: TensorInfo, base: Checkpoint, family: Family, settings: Settings, calls: Calls) -> Assignment:
    """What a recipe says about one tensor, by the first rule that matches its name."""
    rule = settings.rule_for(info.name)
    kind = families.classify(info.name, info.shape, info.dtype, family, settings.scope, settings.flatten_conv)
    call: Call | None = None
    if rule is not None and settings.rules[rule].keep_base:
        kind = Kind("keep")
    if kind.kind != "keep":
        method = METHODS[calls(rule, "matrix").method]
        if method.elementwise:
            kind = Kind("elementwise")
        elif rule is not None and settings.rules[rule].merge_method is not None:
            kind = families.as_matrix(info.name, info.shape, family)  # asked for by name: heads, embeddings, kernels
        call = calls(rule, kind.kind)
    floating = info.dtype.is_floating_point
    return Assignment(
        name=info.name,
        shape=info.shape,
        dtype=info.dtype,
        out_dtype=settings.out_dtype if settings.out_dtype is not None and floating else info.dtype,
        kind=kind,
        call=call,
        aliases=tuple(alias for alias, target in base.aliases.items() if target == info.name),
        rule=rule,
    )


def with_moments(
    assignments: Sequence[Assignment],
    sources: Mapping[str, tuple[str, ...]],
    family: Family,
    statistics: Sequence[Moments],
) -> tuple[list[Assignment], list[str]]:
    """The assignments with the sizes of their moments, and warnings; FALLBACK takes those that want some and have none.

    The layer exponent stays with a tensor that falls to it: the factors are of all layers of a type.
    """
    wanting = [a for a in assignments if a.call is not None and METHODS[a.call.method].moments]
    # No one moment is that of a stack of experts, and under `scope: paper` a weight stored [in, out] is merged as it
    # stands, where its inputs are on the side of the outputs.
    fitting = [a for a in wanting if len(a.shape) == 2 and a.kind == families.as_matrix(a.name, a.shape, family)]
    found = moments.match([moments.Layer(a.name, sources[a.name], *a.matrix) for a in fitting], statistics)
    lacking: list[str] = []
    result = []
    for a in assignments:
        if a.call is None or not METHODS[a.call.method].moments:
            result.append(a)
        elif a.name in found.sizes:
            result.append(replace(a, moment_size=found.sizes[a.name], tokens=found.tokens.get(a.name, 0)))
        else:
            lacking.append(a.name)
            own = {name: value for name, value in a.call.parameters.items() if name == LAYER_EXPONENT}
            call = Call(FALLBACK, {**check_parameters(FALLBACK, {}), **own}, a.call.alphas)
            result.append(replace(a, call=call))
    if lacking:
        found.warnings.append(
            f"{len(lacking)} of {len(wanting)} tensors have no statistics and are merged with {FALLBACK}: "
            + ", ".join(lacking[:3])
            + (", ..." if len(lacking) > 3 else "")
        )
    return result, found.warnings


def with_layer_types(assignments: Sequence[Assignment]) -> list[Assignment]:
    """The assignments with the types of those whose factors depend on other layers: more than one of the type."""
    types = {
        a.name: layer_type(a.name)
        for a in assignments
        if a.call is not None and a.kind.kind == "matrix" and a.call.layer_exponent != 0
    }
    counts = Counter(types.values())
    return [replace(a, layer_type=types[a.name]) if counts[types.get(a.name, "")] > 1 else a for a in assignments]

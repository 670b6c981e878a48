"""Merge methods: pure functions from stacks of deltas [..., T, m, n] to updates [..., m, n], and their table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from torch import Tensor

from isomerge.errors import InputError
from isomerge.methods import costs
from isomerge.methods.esm import PRESETS, esm, layer_factors
from isomerge.methods.iso import iso_c, iso_cts
from isomerge.methods.linear import average, average_from, task_arithmetic, task_arithmetic_from
from isomerge.methods.survey import Survey
from isomerge.methods.ties import (
    dare_linear,
    dare_linear_from,
    dare_ties,
    dare_ties_from,
    dare_ties_survey,
    ties,
    ties_from,
    ties_survey,
)
from isomerge.methods.tsv import tsvm

__all__ = [
    "METHODS",
    "Method",
    "Parameter",
    "average",
    "check_parameters",
    "dare_linear",
    "dare_ties",
    "esm",
    "iso_c",
    "iso_cts",
    "layer_factors",
    "task_arithmetic",
    "ties",
    "tsvm",
]


@dataclass(frozen=True)
class Parameter:
    """One keyword parameter of a method: its type, default and inclusive range."""

    name: str
    type: type
    default: object
    minimum: float | None
    maximum: float | None
    help: str


@dataclass(frozen=True)
class Method:
    """One row of `METHODS`."""

    name: str  # the recipe's merge_method
    function: Callable[..., Tensor]
    title: str
    paper: str
    parameters: tuple[Parameter, ...]
    elementwise: bool  # applies to tensors of any shape; otherwise to matrices alone
    seeded: bool  # takes `seed`, and `first`, the number of elements of the tensor before the deltas'
    flops: Callable[[int, int, int], float]  # (m, n, T) -> floating-point operations per matrix
    peak_floats: Callable[[int, int, int], float]  # (m, n, T) -> float32 working memory per matrix, beside the deltas
    task_floats: Callable[[int, int], float] = lambda m, n: 0.0  # (m, n) -> of each further task at the same time
    alone_floats: Callable[[int, int], float] = lambda m, n: 0.0  # (m, n) -> what only one matrix at a time takes more
    gpu_floats: Callable[[int, int, int, int], float] | None = None  # (m, n, T, L) -> of L matrices together on a GPU,
    # with their updates; None: `peak_floats` and 2 m n of each
    reduction: str = "none"  # "sum", "mean": for this reduction of the deltas over T gives the same as for them, and
    # where it is elementwise, the reduction itself
    survey: Callable[..., Survey] | None = None  # (T, n, dtype, device, parameters): of a tensor of n elements; a
    # piece of it takes what that has `elected`; None: an element of the update depends on that element's deltas alone
    merged_from: Callable[..., Any] | None = None  # (source, parameters): what the update makes of the base, or None,
    # for elements that need not be in memory
    moments: bool = False  # called with (deltas, moments): needs a statistics file of every expert
    presets: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # name -> parameters; first is default

    @property
    def apart(self) -> bool:
        """Whether units of one shape are given arguments of their own, in a call each."""
        return self.seeded or self.survey is not None


DENSITY = "share of the entries that is kept"
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method(
                "average", average, "Weight averaging", "Wortsman et al. 2022, arXiv 2203.05482", (),
                True, False, costs.elementwise_flops(1), costs.elementwise_floats(1), reduction="mean",
                merged_from=average_from,
            ),
            Method(
                "task_arithmetic", task_arithmetic, "Task arithmetic", "Ilharco et al. 2023, arXiv 2212.04089", (),
                True, False, costs.elementwise_flops(1), costs.elementwise_floats(1), reduction="sum",
                merged_from=task_arithmetic_from,
            ),
            Method(
                "ties", ties, "TIES-Merging", "Yadav et al. 2023, arXiv 2306.01708",
                (Parameter("density", float, 0.2, 0.0, 1.0, f"{DENSITY}, the largest"),),
                True, False, costs.elementwise_flops(12), costs.elementwise_floats(1.5), survey=ties_survey,
                merged_from=ties_from,
            ),
            Method(
                "dare_linear", dare_linear, "DARE, linear", "Yu et al. 2024, arXiv 2311.03099",
                (Parameter("density", float, 0.2, 1e-6, 1.0, f"{DENSITY}, at random"),),
                True, True, costs.elementwise_flops(8), costs.elementwise_floats(4), merged_from=dare_linear_from,
            ),
            Method(
                "dare_ties", dare_ties, "DARE, TIES", "Yu et al. 2024, arXiv 2311.03099",
                (Parameter("density", float, 0.2, 1e-6, 1.0, f"{DENSITY}, at random"),),
                True, True, costs.elementwise_flops(12), costs.dare_ties_floats, survey=dare_ties_survey,
                merged_from=dare_ties_from,
            ),
            Method(
                "tsvm", tsvm, "TSV-Merge", "Gargiulo et al. 2025, arXiv 2412.00081", (),
                False, False, costs.tsvm_flops, costs.spectral_floats, costs.spectral_task_floats,
                gpu_floats=costs.tsvm_gpu_floats,
            ),
            Method(
                "iso_c", iso_c, "Iso-C", "Marczak et al. 2025, arXiv 2502.04959", (),
                False, False, costs.iso_c_flops, costs.iso_c_floats, alone_floats=costs.svd_floats,
                gpu_floats=costs.iso_c_gpu_floats, reduction="sum",
            ),
            Method(
                "iso_cts", iso_cts, "Iso-CTS", "Marczak et al. 2025, arXiv 2502.04959",
                (Parameter("common_space_fraction", float, 0.8, 0.0, 1.0, "share of the directions that is common"),),
                False, False, costs.iso_cts_flops, costs.spectral_floats, costs.spectral_task_floats,
                gpu_floats=costs.iso_cts_gpu_floats,
            ),
            Method(
                "esm", esm, "Essential subspace merging", "arXiv 2602.20208, 2606.19164",
                (
                    Parameter("preset", str, "vit", None, None, "vit or text: what the other parameters default to"),
                    Parameter("eigenvalue_power", float, 0.15, 0.0, 2.0, "of the weights of the principal directions"),
                    Parameter("task_exponent", float, 2.0, 0.0, 8.0, "polarization between tasks; 0 is none"),
                    Parameter("dimension_exponent", float, 2.0, 0.0, 8.0, "polarization between columns; 0 is none"),
                    Parameter("layer_exponent", float, 2.0, 0.0, 8.0, "polarization between like layers; 0 is none"),
                ),
                False, False, costs.esm_flops, costs.esm_floats, costs.esm_task_floats,
                gpu_floats=costs.esm_gpu_floats, moments=True, presets=PRESETS,
            ),
        )
    }
)  # fmt: skip


def suggestion(name: str, known: Mapping[str, object] | list[str]) -> str:
    """' (did you mean ...?)' for a misspelt name, or nothing."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def check_parameters(method: str, parameters: Mapping[str, object]) -> dict[str, object]:
    """All parameters of `method`, given ones checked, others at their defaults or at those of the preset.

    Raises InputError for an unknown method or parameter, a wrong type, and a value outside its range.
    """
    if method not in METHODS:
        raise InputError(
            f"merge_method: unknown method {method!r}{suggestion(method, METHODS)}; known: {', '.join(METHODS)}"
        )
    known = {parameter.name: parameter for parameter in METHODS[method].parameters}
    values = {name: parameter.default for name, parameter in known.items()}
    presets = METHODS[method].presets
    if presets:
        preset = parameters.get("preset", next(iter(presets)))
        if not isinstance(preset, str) or preset not in presets:
            hint = suggestion(preset, presets) if isinstance(preset, str) else ""
            raise InputError(f"parameters.preset: expected one of {', '.join(presets)}, got {preset!r}{hint}")
        values = {**values, **presets[preset]}
    for name, value in parameters.items():
        if name not in known:
            expected = f"expected one of: alpha{''.join(f', {other}' for other in known)}"
            raise InputError(
                f"parameters.{name}: unknown parameter of {method}{suggestion(name, ['alpha', *known])}; {expected}"
            )
        values[name] = _checked(known[name], value)
    values.pop("preset", None)
    return values


def _checked(parameter: Parameter, value: object) -> object:
    where = f"parameters.{parameter.name}"
    if isinstance(value, int) and value.bit_length() > 1000:
        raise InputError(f"{where}: expected a {parameter.type.__name__}, got one of {value.bit_length()} bits")
    if parameter.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, parameter.type) or (isinstance(value, bool) and parameter.type is not bool):
        raise InputError(f"{where}: expected a {parameter.type.__name__}, got {value!r}")
    if isinstance(value, float | int):
        low, high = parameter.minimum, parameter.maximum
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            raise InputError(f"{where}: expected a value from {low:g} to {high:g}, got {value!r}")
    return value

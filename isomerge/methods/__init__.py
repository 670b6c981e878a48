"""Merge methods: pure functions from stacks of deltas [..., T, m, n] to updates [..., m, n], and their table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType

from torch import Tensor

from isomerge.errors import InputError
from isomerge.methods.esm import PRESETS, esm, layer_factors
from isomerge.methods.iso import iso_c, iso_cts, subspace_sizes
from isomerge.methods.linear import average, task_arithmetic
from isomerge.methods.ties import dare_linear, dare_ties, ties
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
    chunkable: bool  # an element of the update depends on that element's deltas alone, and if seeded on its place
    seeded: bool  # takes `seed`, and if chunkable `first`, the number of elements of the tensor before the deltas'
    flops: Callable[[int, int, int], float]  # (m, n, T) -> floating-point operations per matrix
    peak_floats: Callable[[int, int, int], float]  # (m, n, T) -> float32 working memory per matrix, beside the deltas
    task_floats: Callable[[int, int], float] = lambda m, n: 0.0  # (m, n) -> of each further task at the same time
    alone_floats: Callable[[int, int], float] = lambda m, n: 0.0  # (m, n) -> what only one matrix at a time takes more
    reduction: str = "none"  # "sum", "mean": for this reduction of the deltas over T gives the same as for them, and
    # where it is elementwise, the reduction itself
    moments: bool = False  # called with (deltas, moments): needs a statistics file of every expert
    presets: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # name -> parameters; first is default


def _polar_flops(m: int, n: int) -> float:
    r = min(m, n)
    return 3.0 * m * n * r + 10.0 * r**3  # half a Gram, eigensolve and inverse root, product


def _iso_c_flops(m: int, n: int, T: int) -> float:
    return T * m * n + _polar_flops(m, n)


def _iso_cts_flops(m: int, n: int, T: int) -> float:
    r = min(m, n)
    k, s = subspace_sizes(r, T, 0.8)
    if m <= n:
        task = 2.0 * (m - k) * m * n + (m - k) ** 2 * n + 9.0 * (m - k) ** 3
    else:
        task = m * n * r + 2.0 * m * n * k + k * n**2 + 9.0 * n**3
    return T * task + _polar_flops(m, n) + _polar_flops(r, n) + _polar_flops(m, T * s) + 2.0 * m * n * r


def _tsvm_flops(m: int, n: int, T: int) -> float:
    r = min(m, n)
    return (
        T * (m * n * r + 9.0 * r**3 + 2.0 * m * n * (r // T))
        + _polar_flops(m, r)
        + _polar_flops(r, n)
        + 2.0 * m * n * r
    )


def _esm_flops(m: int, n: int, T: int) -> float:
    r, s = min(m, n), m // T
    task = 2.0 * r * m * n + 9.0 * r**3 + 4.0 * m * n * s
    return T * task + _polar_flops(m, T * s) + _polar_flops(T * s, n) + 2.0 * m * T * s * min(n, T * s)


def _elementwise_flops(per_element: float) -> Callable[[int, int, int], float]:
    return lambda m, n, T: per_element * m * n * T


def _spectral_floats(m: int, n: int, T: int) -> float:
    r = min(m, n)
    return 8.0 * m * n + 12.0 * r * r + 3.0 * (m + n) * r  # float64 copies of one matrix and its Gram, bases, factors


def _spectral_task_floats(m: int, n: int) -> float:
    return 2.0 * m * n + 6.0 * min(m, n) ** 2  # one more of T = 4 or 8 took 1.4 to 1.6 m n of 4:1, 2.5 to 8 of squares


def _esm_task_floats(m: int, n: int) -> float:
    return 2.0 * m * n + 5.0 * m * m + 4.0 * min(m, n) ** 2  # took 0.5 to 0.97 of it


def _iso_c_floats(m: int, n: int, T: int) -> float:
    return 6.5 * m * n + 5.0 * min(m, n) ** 2  # a polar factor in float64: takes 0.82 to 0.96 of it, 1:1 to 8:1


def _svd_floats(m: int, n: int) -> float:
    return 3.0 * m * n + 5.0 * min(m, n) ** 2  # a float64 SVD: takes 0.82 to 0.91 of both together


def _esm_floats(m: int, n: int, T: int) -> float:
    side = max(m, n)
    return _spectral_floats(m, n, T) + 12.0 * m * m + 4.0 * side * side  # concatenated bases, moments in float64


def _elementwise_floats(per_element: float) -> Callable[[int, int, int], float]:
    return lambda m, n, T: per_element * m * n


def _dare_ties_floats(m: int, n: int, T: int) -> float:
    return (T + 8.0) * m * n


DENSITY = "share of the entries that is kept"
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method(
                "average", average, "Weight averaging", "Wortsman et al. 2022, arXiv 2203.05482", (),
                True, True, False, _elementwise_flops(1), _elementwise_floats(1), reduction="mean",
            ),
            Method(
                "task_arithmetic", task_arithmetic, "Task arithmetic", "Ilharco et al. 2023, arXiv 2212.04089", (),
                True, True, False, _elementwise_flops(1), _elementwise_floats(1), reduction="sum",
            ),
            Method(
                "ties", ties, "TIES-Merging", "Yadav et al. 2023, arXiv 2306.01708",
                (Parameter("density", float, 0.2, 0.0, 1.0, f"{DENSITY}, the largest"),),
                True, False, False, _elementwise_flops(12), _elementwise_floats(1.5),
            ),
            Method(
                "dare_linear", dare_linear, "DARE, linear", "Yu et al. 2024, arXiv 2311.03099",
                (Parameter("density", float, 0.2, 1e-6, 1.0, f"{DENSITY}, at random"),),
                True, True, True, _elementwise_flops(8), _elementwise_floats(4),
            ),
            Method(
                "dare_ties", dare_ties, "DARE, TIES", "Yu et al. 2024, arXiv 2311.03099",
                (Parameter("density", float, 0.2, 1e-6, 1.0, f"{DENSITY}, at random"),),
                True, False, True, _elementwise_flops(12), _dare_ties_floats,
            ),
            Method(
                "tsvm", tsvm, "TSV-Merge", "Gargiulo et al. 2025, arXiv 2412.00081", (),
                False, False, False, _tsvm_flops, _spectral_floats, _spectral_task_floats,
            ),
            Method(
                "iso_c", iso_c, "Iso-C", "Marczak et al. 2025, arXiv 2502.04959", (),
                False, False, False, _iso_c_flops, _iso_c_floats, alone_floats=_svd_floats, reduction="sum",
            ),
            Method(
                "iso_cts", iso_cts, "Iso-CTS", "Marczak et al. 2025, arXiv 2502.04959",
                (Parameter("common_space_fraction", float, 0.8, 0.0, 1.0, "share of the directions that is common"),),
                False, False, False, _iso_cts_flops, _spectral_floats, _spectral_task_floats,
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
                False, False, False, _esm_flops, _esm_floats, _esm_task_floats, moments=True, presets=PRESETS,
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

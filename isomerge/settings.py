"""What a merge is asked to do, as plain data: what a recipe file becomes and what `merge_state_dicts` builds itself.

Torch is the only package needed here; the YAML schema that fills these classes is `isomerge.recipe`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from isomerge.errors import InputError

ALPHA_NAMES = ("alpha", "lambda", "scaling_factor")
SCOPES = ("default", "paper")
ARITHMETIC_DTYPES = {"float32": torch.float32, "float64": torch.float64}
OUTPUT_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class Model:
    """One checkpoint of the merge; `weight` multiplies its delta before any method sees it."""

    name: str  # as the user gave it
    path: Path | None = None  # where it is; None for state dicts in memory
    weight: float = 1.0
    statistics: str | None = None  # as the user gave it
    statistics_path: Path | None = None  # where it is; None for moments in memory


@dataclass(frozen=True, slots=True)
class Rule:
    """Settings for the tensors whose name matches the glob `filter`; of several rules the first that matches wins."""

    filter: str
    merge_method: str | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)
    alpha: float | None = None
    keep_base: bool = False

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.filter)


@dataclass(frozen=True, slots=True)
class Settings:
    """A whole recipe. `parameters` are the method's own, which `isomerge.assignments` checks."""

    method: str
    base: Model
    models: tuple[Model, ...]
    parameters: Mapping[str, object] = field(default_factory=dict)
    alpha: float | tuple[float, ...] = 1.0  # several: as many outputs from one pass over the models
    scope: str = "default"
    flatten_conv: bool = False  # whether the kernels of convolutions are matrices
    rules: tuple[Rule, ...] = ()
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype | None = None  # None: each tensor keeps the base's
    seed: int = 0
    source: str = "recipe"  # the file's name, for messages

    @property
    def alphas(self) -> tuple[float, ...]:
        """One for each output."""
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The folder of each output below that of the merge: "" for itself, `alpha-0.8` where there are several."""
        return tuple(f"alpha-{alpha}" for alpha in self.alpha) if isinstance(self.alpha, tuple) else ("",)

    def rule_for(self, name: str) -> int | None:
        """The index of the first rule that matches the tensor `name`."""
        return next((index for index, rule in enumerate(self.rules) if rule.matches(name)), None)


def finite_number(value: object, where: str) -> float:
    """`value` as a float; InputError unless it is a finite number. `where` starts the message."""
    if isinstance(value, (list, tuple)):
        raise InputError(f"{where}: expected one number, got a list")
    if isinstance(value, int) and value.bit_length() > 1000:
        raise InputError(f"{where}: expected a finite number, got one of {value.bit_length()} bits")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{where}: expected a finite number, got {value!r}{_number_hint(value)}")
    return float(value)


def _number_hint(value: object) -> str:
    """YAML 1.1 reads 1e-3 as text: say how to write it."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    return f" (text in YAML: write {number})" if math.isfinite(number) else ""


def split_alpha(
    parameters: Mapping[str, object], where: str
) -> tuple[float | tuple[float, ...] | None, dict[str, object]]:
    """Parameters -> (one alpha, several or None; the method's own). `lambda` and `scaling_factor` are its aliases."""
    given = [name for name in ALPHA_NAMES if name in parameters]
    if len(given) > 1:
        raise InputError(f"{where}: `{given[0]}` and `{given[1]}` are the same parameter; give one of them")
    alpha = _alpha(parameters[given[0]], f"{where}.{given[0]}") if given else None
    return alpha, {name: value for name, value in parameters.items() if name not in ALPHA_NAMES}


def one_alpha(alpha: float | tuple[float, ...] | None, where: str) -> float | None:
    """`alpha` where only one can be; InputError for several."""
    if isinstance(alpha, tuple):
        raise InputError(
            f"{where}.alpha: expected one number, got a list; only a recipe's own `parameters` take several"
        )
    return alpha


def _alpha(value: object, where: str) -> float | tuple[float, ...]:
    if not isinstance(value, (list, tuple)):
        return finite_number(value, where)
    alphas = tuple(finite_number(entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if len(set(alphas)) < len(alphas) or not alphas:
        raise InputError(f"{where}: expected a number or a list of different ones, got {list(value)}")
    return alphas


def as_recipe(settings: Settings) -> dict[str, object]:
    """The settings as the plain data of a recipe with every value written out; no value of it is None."""
    out_dtype = {} if settings.out_dtype is None else {"out_dtype": dtype_name(settings.out_dtype)}
    return {
        "merge_method": settings.method,
        "base_model": settings.base.name,
        "models": [_plain_model(model) for model in settings.models],
        "parameters": {"alpha": _plain_alpha(settings.alpha), **settings.parameters},
        "scope": settings.scope,
        "flatten_conv": settings.flatten_conv,
        "rules": [_plain_rule(rule) for rule in settings.rules],
        "dtype": dtype_name(settings.dtype),
        **out_dtype,
        "seed": settings.seed,
    }


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _plain_alpha(alpha: float | tuple[float, ...]) -> float | list[float]:
    return list(alpha) if isinstance(alpha, tuple) else alpha


def _plain_model(model: Model) -> dict[str, object]:
    statistics = {} if model.statistics is None else {"statistics": model.statistics}
    return {"model": model.name, "parameters": {"weight": model.weight}, **statistics}


def _plain_rule(rule: Rule) -> dict[str, object]:
    if rule.keep_base:
        return {"filter": rule.filter, "keep_base": True}
    method = {} if rule.merge_method is None else {"merge_method": rule.merge_method}
    parameters = {**({} if rule.alpha is None else {"alpha": rule.alpha}), **rule.parameters}
    return {"filter": rule.filter, **method, **({"parameters": parameters} if parameters else {})}


def rule_from(value: Rule | Mapping[str, object], where: str) -> Rule:
    """A rule from a mapping with a recipe's keys; `where` starts the messages of an InputError."""
    if isinstance(value, Rule):
        return value
    known = ("filter", "merge_method", "parameters", "keep_base")
    unknown = [key for key in value if key not in known]
    if unknown:
        raise InputError(f"{where}: unknown key `{unknown[0]}`; known are {', '.join(known)}")
    pattern, method, parameters = value.get("filter"), value.get("merge_method"), value.get("parameters")
    keep = value.get("keep_base") or False
    if not isinstance(pattern, str) or not pattern:
        raise InputError(f"{where}.filter: expected a glob on tensor names, got {pattern!r}")
    if method is not None and not isinstance(method, str):
        raise InputError(f"{where}.merge_method: expected a method's name, got {method!r}")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InputError(f"{where}.parameters: expected a mapping, got {parameters!r}")
    if keep is not False and keep is not True:
        raise InputError(f"{where}.keep_base: expected true, got {keep!r}")
    if keep and (method is not None or parameters is not None):
        raise InputError(f"{where}: keep_base copies the base's tensors; drop its merge_method and parameters")
    if not keep and method is None and not parameters:
        raise InputError(f"{where}: changes nothing; give merge_method, parameters or keep_base")
    alpha, own = split_alpha(parameters or {}, f"{where}.parameters")
    return Rule(pattern, method, own, one_alpha(alpha, f"{where}.parameters"), keep)

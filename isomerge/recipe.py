"""The recipe file: mergekit's keys, read strictly.

    merge_method: iso_cts
    base_model: path/to/base                     # relative paths start at the recipe's folder
    models:
      - model: path/to/expert
        parameters: {weight: 1.0}
        statistics: path/to/expert.stats.safetensors   # for methods that need them
    parameters: {alpha: 1.2, common_space_fraction: 0.8}
    scope: default                               # or paper
    flatten_conv: false                          # true: kernels of convolutions are matrices, not averaged
    rules:                                       # the first rule whose filter matches a tensor's name wins
      - {filter: "*.mlp.*", parameters: {common_space_fraction: 0.9}}
      - {filter: "lm_head.*", keep_base: true}
    dtype: float32                               # of the arithmetic
    out_dtype: bfloat16                          # default: each tensor's own in the base
    seed: 0

A rule's own `merge_method` takes every 2-D tensor and every kernel that it matches: output heads, embeddings and
depthwise kernels too. Which tensors are kernels, and what matrix one is, `isomerge.families` says.

Anything that is not understood is an `InputError` of one line that starts with the file's name and the key.
Whether the method knows its parameters is checked by `isomerge.assignments`, beside the methods.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from isomerge.errors import InputError
from isomerge.recipe_text import one_line, read_yaml
from isomerge.settings import (
    ARITHMETIC_DTYPES,
    OUTPUT_DTYPES,
    Model,
    Settings,
    as_recipe,
    finite_number,
    rule_from,
    split_alpha,
)

UNSUPPORTED = {  # mergekit's keys that mean something there and cannot be honoured here
    "slices": "merge whole models with `models`",
    "modules": "merge whole models with `models`",
    "tokenizer": "the base model's tokenizer files are copied",
    "tokenizer_source": "the base model's tokenizer files are copied",
    "chat_template": "the base model's chat template is copied",
    "architecture": "tensors are matched by name",
    "override_architecture": "tensors are matched by name",
    "lora": "merge the adapter into its base first",
    "name": "one recipe describes one merge",
}

_Name = Annotated[StrictStr, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Model(_Strict):
    model: _Name
    parameters: dict[StrictStr, object] = Field(default_factory=dict)
    statistics: _Name | None = None


class _Rule(_Strict):
    filter: _Name
    merge_method: _Name | None = None
    parameters: dict[StrictStr, object] | None = None
    keep_base: Literal[True] | None = None


class _Recipe(_Strict):
    merge_method: _Name
    base_model: _Name
    models: list[_Model]
    parameters: dict[StrictStr, object] = Field(default_factory=dict)
    scope: Literal["default", "paper"] = "default"
    flatten_conv: StrictBool = False
    rules: list[_Rule] = Field(default_factory=list)
    dtype: Literal["float32", "float64"] = "float32"
    out_dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = None
    seed: StrictInt = 0


def load_recipe(path: str | Path) -> Settings:
    """The recipe in the YAML file `path`; relative model paths start at the file's folder."""
    path = Path(path)
    return parse_recipe(read_yaml(path), path.parent, source=path.name)


def parse_recipe(data: object, folder: Path, *, source: str = "recipe") -> Settings:
    """The recipe in the mapping `data`; relative model paths start at `folder`; `source` starts every message."""
    if not isinstance(data, Mapping):
        raise InputError(f"{source}: expected keys such as `merge_method:` and `models:`, got {_describe(data)}")
    try:
        recipe = _Recipe.model_validate(dict(data))
    except ValidationError as error:
        raise InputError(f"{source}: {_validation_message(error)}") from None
    if not recipe.models:
        raise InputError(f"{source}: models: no experts are listed; give at least one `- model: path`")
    alpha, parameters = split_alpha(recipe.parameters, f"{source}: parameters")
    return Settings(
        method=recipe.merge_method,
        base=Model(recipe.base_model, _locate(recipe.base_model, folder)),
        models=tuple(_model(entry, folder, f"{source}: models[{index}]") for index, entry in enumerate(recipe.models)),
        parameters=parameters,
        alpha=1.0 if alpha is None else alpha,
        scope=recipe.scope,
        flatten_conv=recipe.flatten_conv,
        rules=tuple(
            rule_from(entry.model_dump(exclude_none=True), f"{source}: rules[{index}]")
            for index, entry in enumerate(recipe.rules)
        ),
        dtype=ARITHMETIC_DTYPES[recipe.dtype],
        out_dtype=None if recipe.out_dtype is None else OUTPUT_DTYPES[recipe.out_dtype],
        seed=recipe.seed,
        source=source,
    )


def dump_recipe(settings: Settings) -> str:
    """The settings as a recipe file with every value written out; `load_recipe` reads it back to the same merge."""
    return yaml.safe_dump(as_recipe(settings), sort_keys=False, allow_unicode=True, width=1000)


def _model(entry: _Model, folder: Path, where: str) -> Model:
    extra = [name for name in entry.parameters if name != "weight"]
    if extra:
        raise InputError(
            f"{where}.parameters.{extra[0]}: a model has the parameter `weight` only; "
            "put the method's parameters under `parameters:` of the recipe or of a rule"
        )
    weight = finite_number(entry.parameters.get("weight", 1.0), f"{where}.parameters.weight")
    statistics = None if entry.statistics is None else _locate(entry.statistics, folder)
    return Model(entry.model, _locate(entry.model, folder), weight, entry.statistics, statistics)


def _locate(name: str, folder: Path) -> Path:
    try:
        return folder / Path(name).expanduser()
    except RuntimeError:  # ~somebody, who has no home here: a file of that name, then
        return folder / name


# Messages -------------------------------------------------------------------------------------------------------


def _validation_message(error: ValidationError) -> str:
    """One of pydantic's complaints as `key[0].key: what was wrong`, and how many more there are.

    Unknown keys come first: a misspelt key is also reported as missing under its right name.
    """
    errors = sorted(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
    first = errors[0]
    location, kind, value = first["loc"], first["type"], first["input"]
    if kind == "extra_forbidden":
        message = _unknown_key(str(location[-1]), location[:-1])
    elif kind == "missing":
        message = f"{_key(location)}: missing; the recipe needs it"
    else:
        expected = str(first["msg"]).removeprefix("Input should be ").rstrip(".")
        message = f"{_key(location)}: expected {expected}, got {_describe(value)}"
    return message + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")


def _unknown_key(key: str, parents: Sequence[int | str]) -> str:
    where = _key((*parents, key))
    if key in UNSUPPORTED:
        return f"{where}: mergekit's `{key}` is not supported by isomerge; {UNSUPPORTED[key]}"
    schema: type[BaseModel] = _Recipe
    if parents and parents[0] == "models":
        schema = _Model
    elif parents and parents[0] == "rules":
        schema = _Rule
    known = list(schema.model_fields)
    close = difflib.get_close_matches(key[:60], known, 1)
    return f"{where}: unknown key" + (f"; did you mean `{close[0]}`?" if close else f"; known are {', '.join(known)}")


def _key(location: Sequence[int | str]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:60]}" for part in location if part != "[key]")
    return text.lstrip(".") or "recipe"


def _describe(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, (list, tuple)) else one_line(repr(value))[:80]

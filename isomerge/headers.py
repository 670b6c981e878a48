"""Compares the experts' headers with the base's: every mismatch a user can make is found here, before any tensor
is read, and says which file, which tensor and what to do.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from isomerge.errors import InputError
from isomerge.families import Family, tied_embedding

if TYPE_CHECKING:
    from isomerge.checkpoint import Checkpoint, TensorInfo

MERGEABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_QUANTISED = re.compile(r"(weight|_packed|_blocks)$")  # names of weights among the tensors of whole numbers
_OF_EXPERTS = re.compile(r"(.*?)(\w+\.)?experts\.")  # the block that a mixture of experts is in
_PREFIX_PARTS = 3  # of a name, in which models of another class or another version of transformers differ


@dataclass(slots=True)
class Sources:
    """For each tensor to merge, its name in every expert; and what was noticed on the way."""

    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def match(base: Checkpoint, experts: Sequence[Checkpoint], merged: Iterable[str], family: Family) -> Sources:
    """Where every tensor of `merged` (names of the base) stands in each expert.

    InputError when an expert lacks it, has another shape or another kind of dtype, or ties weights that the base
    keeps apart or the reverse, in a way that one merged file cannot hold.
    """
    wanted = list(merged)
    sources = Sources()
    columns = []
    for expert in experts:
        columns.append(_names_in(base, expert, wanted, family, sources.warnings))
        _refuse_untied(base, expert, family)
        _note_extra(base, expert, sources.warnings)
    for row, name in enumerate(wanted):
        sources.names[name] = tuple(column[row] for column in columns)
        for expert, source in zip(experts, sources.names[name], strict=True):
            _compare(base, base.tensors[name], expert, expert.tensors[source])
    for expert, column in zip(experts, columns, strict=True):
        _note_rounding(base, expert, dict(zip(wanted, column, strict=True)), sources.warnings)
    return sources


def _names_in(
    base: Checkpoint, expert: Checkpoint, wanted: Sequence[str], family: Family, warnings: list[str]
) -> list[str]:
    """The name in `expert` of each wanted tensor."""
    names, missing = [], []
    for name in wanted:
        candidates = (name, *(alias for alias, target in base.aliases.items() if target == name))
        found = next((c for c in candidates if c in expert.tensors), None)
        found = found or next((expert.aliases[c] for c in candidates if c in expert.aliases), None)
        if found is None:
            found = _tied_source(base, expert, name, family)
            if found is not None:
                warnings.append(
                    f"{expert.label} ties {name} to {found} and the base does not: its {found} is read for both"
                )
        if found is None:
            missing.append(name)
        names.append(found or "")
    if missing:
        raise InputError(_missing_message(base, expert, missing))
    return names


def _tied_source(base: Checkpoint, expert: Checkpoint, name: str, family: Family) -> str | None:
    """The input embedding of an expert whose output head `name` is tied to it and therefore not stored."""
    if not _ties_embeddings(expert):
        return None
    for ending in tied_embedding(name, family):
        for candidate, info in expert.tensors.items():
            if (candidate == ending or candidate.endswith("." + ending)) and info.shape == base.tensors[name].shape:
                return candidate
    return None


def _refuse_untied(base: Checkpoint, expert: Checkpoint, family: Family) -> None:
    """An expert with an output head of its own cannot be merged into a base whose head is its embedding."""
    for alias, name in base.aliases.items():
        if alias in expert.tensors and name in expert.tensors:
            raise InputError(
                f"{expert.label}: {alias} and {name} are two tensors here and one (tied) in the base {base.label}; "
                "untie the base, or tie the expert's"
            )
    untied = _ties_embeddings(expert) is False
    for name in expert.tensors:
        if untied and tied_embedding(name, family) and name not in base.tensors and name not in base.aliases:
            raise InputError(
                f"{expert.label}: {name} is a weight of its own (tie_word_embeddings is false) and the base "
                f"{base.label} has none: the base ties it to the embedding; untie the base first"
            )


def _note_extra(base: Checkpoint, expert: Checkpoint, warnings: list[str]) -> None:
    known = {*base.tensors, *base.aliases}
    known |= {expert.aliases[name] for name in known & expert.aliases.keys()}
    known |= {alias for alias, name in expert.aliases.items() if name in known}
    extra = [name for name in (*expert.tensors, *expert.aliases) if name not in known]
    if extra:
        warnings.append(
            f"{expert.label}: {len(extra)} tensors that the base does not have are left out: {_some(extra)}"
        )


def _note_rounding(base: Checkpoint, expert: Checkpoint, sources: Mapping[str, str], warnings: list[str]) -> None:
    """Weights that were saved in fewer bits than the base's differ from it even where no training has touched them."""
    coarse: dict[tuple[str, str], list[str]] = {}
    for name, source in sources.items():
        own, theirs = expert.tensors[source].dtype, base.tensors[name].dtype
        if torch.finfo(own).eps > torch.finfo(theirs).eps:
            coarse.setdefault((_dtype(own), _dtype(theirs)), []).append(name)
    for (own_name, base_name), names in coarse.items():
        warnings.append(
            f"{expert.label}: {len(names)} tensors are {own_name} where the base has {base_name}: their rounding is "
            f"part of the updates: {_some(names)}"
        )


def _compare(base: Checkpoint, wanted: TensorInfo, expert: Checkpoint, found: TensorInfo) -> None:
    where = f"{expert.label}: {found.name}"
    if found.dtype not in MERGEABLE:
        kind = "integers" if not found.dtype.is_floating_point and not found.dtype.is_complex else "values"
        raise InputError(
            f"{where}: {kind} of type {_dtype(found.dtype)}, where the base has {_dtype(wanted.dtype)}; "
            "quantised weights cannot be merged: give the checkpoint in float32, bfloat16 or float16"
        )
    if found.shape == wanted.shape:
        return
    if found.shape[1:] == wanted.shape[1:] and len(wanted.shape) == 2:
        raise InputError(
            f"{where}: {found.shape[0]} rows, the base {base.label} has {wanted.shape[0]} (shapes "
            f"{list(found.shape)} and {list(wanted.shape)}); is the vocabulary padded or extended, or the head for "
            f'other labels? Resize one of them, or keep the base\'s: rule {{filter: "{wanted.name}", keep_base: true}}'
        )
    raise InputError(
        f"{where}: shape {list(found.shape)}, the base {base.label} has {list(wanted.shape)}; "
        "experts must be fine-tuned from this base"
    )


def check_base_dtypes(base: Checkpoint, merged: Iterable[str]) -> None:
    """InputError for floating-point formats that cannot be subtracted, such as scaled 8-bit ones."""
    for name in merged:
        if base.tensors[name].dtype not in MERGEABLE:
            raise InputError(
                f"{base.label}: {name}: stored as {_dtype(base.tensors[name].dtype)}, which cannot be merged; "
                "give the checkpoint in float32, bfloat16 or float16"
            )


def check_buffers(base: Checkpoint, experts: Sequence[Checkpoint], names: Iterable[str]) -> None:
    """InputError when a tensor of whole numbers in the base is a weight and no buffer: the model is quantised."""
    for name in names:
        stored = _dtype(base.tensors[name].dtype)
        floating = next((e for e in experts if name in e.tensors and e.tensors[name].dtype.is_floating_point), None)
        if floating is not None:
            raise InputError(
                f"{floating.label}: {name}: {_dtype(floating.tensors[name].dtype)} where the base {base.label} has "
                f"{stored}; give the base in the experts' format"
            )
        if _QUANTISED.search(name):
            raise InputError(
                f"{base.label}: {name}: integers of type {stored}; quantised weights cannot be merged: give the "
                "checkpoint in float32, bfloat16 or float16"
            )


def _missing_message(base: Checkpoint, expert: Checkpoint, missing: Sequence[str]) -> str:
    first = missing[0]
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    what = f"{expert.label}: {first} is missing{more}, the base {base.label} has it"
    extra = [name for name in expert.tensors if name not in base.tensors]
    blocks = {found[1] for name in missing if (found := _OF_EXPERTS.match(name))}
    other = next((name for name in extra if (found := _OF_EXPERTS.match(name)) and found[1] in blocks), None)
    if other is not None:
        return f"{what}; the experts of its layers are stored as {other}; save both models in one layout"
    close = [n for n in extra if n.endswith("." + first) or first.endswith("." + n)]
    endings = {ending for name in extra for ending in _endings(name)}
    if all(any(ending in endings for ending in _endings(name)) for name in missing):
        close = close or [n for n in extra if set(_endings(n)) & set(_endings(first))]
        return (
            f"{what}; the closest name there is {close[0]}: names differ in their prefixes; save both models from one "
            "class, with one version of transformers"
        )
    close = close or difflib.get_close_matches(first, list(expert.tensors), 1, 0.85)
    hint = f"; the closest name there is {close[0]}" if close else ""
    return (
        f"{what}{hint}; merge models of one architecture, or keep the base's with a rule "
        f'{{filter: "{first}", keep_base: true}}'
    )


def _endings(name: str) -> list[str]:
    """A name without none, one, ... of its first parts; numbers and the last two parts stay. The longest first."""
    parts = name.split(".")
    most = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return [".".join(parts[first:]) for first in range(min(max(most, 0), _PREFIX_PARTS) + 1)]


def _ties_embeddings(checkpoint: Checkpoint) -> bool | None:
    """What config.json says, True when it says nothing (as transformers takes it); None without a config.json.

    Versions of transformers differ in whether the whole model's key counts or that of its text part: one is enough.
    """
    for path in checkpoint.side_files:
        if path.name == "config.json" and path.parent == checkpoint.path:
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                return None
            if not isinstance(config, dict):
                return None
            parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
            said = [bool(part["tie_word_embeddings"]) for part in parts if "tie_word_embeddings" in part]
            return any(said) or not said
    return None


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

"""Merging through the command line, as a user does it: a recipe, `isomerge merge`, a Hugging Face folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from commands import run_isomerge


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method of the table: its name there and its name and parameters in a recipe."""

    title: str
    recipe_name: str
    parameters: tuple[tuple[str, float | str], ...] = ()
    fixed_alpha: bool = False
    needs_statistics: bool = False


METHODS = (
    Method("average", "average", fixed_alpha=True),
    Method("task arithmetic", "task_arithmetic"),
    Method("TIES", "ties", (("density", 0.2),)),
    Method("TSV-M", "tsvm"),
    Method("Iso-C", "iso_c"),
    Method("Iso-CTS", "iso_cts", (("common_space_fraction", 0.8),)),
    Method("ESM", "esm", (("preset", "text"),), needs_statistics=True),
)
REFERENCE = "task arithmetic"

# Preferred numbers, ten to the decade: neighbours differ by a quarter, which moves the accuracy by less than its error.
ALPHAS = (
    *(0.1, 0.125, 0.16, 0.2, 0.25, 0.32, 0.4, 0.5, 0.63, 0.8),
    *(1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0, 6.3, 8.0, 10.0),
)


@dataclass(frozen=True, slots=True)
class Merge:
    """One run of `isomerge merge`: the process's wall time, and its peak resident memory by its own report."""

    seconds: float
    peak_bytes: int | None  # None where the system does not tell


def write_recipe(
    path: Path, method: Method, base: Path, experts: Sequence[Path], alpha: float, statistics: Sequence[Path] = ()
) -> None:
    """The recipe of one merge, in the keys that mergekit's users know; paths start at the recipe's folder.

    `statistics` are the experts' files; only the recipe of a method that needs them names them.
    """
    models = [{"model": os.path.relpath(expert, path.parent)} for expert in experts]
    if method.needs_statistics:
        for model, file in zip(models, statistics, strict=True):
            model["statistics"] = os.path.relpath(file, path.parent)
    recipe = {
        "merge_method": method.recipe_name,
        "base_model": os.path.relpath(base, path.parent),
        "models": models,
        "parameters": {"alpha": alpha, **dict(method.parameters)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))


def run_merge(recipe: Path, out: Path) -> Merge:
    """Runs `isomerge merge recipe out` in a process of its own.

    Raises:
        CommandFailed: it exited with anything but 0.
    """
    seconds = run_isomerge("merge", recipe, out, "--force")
    report = json.loads((out / "isomerge_report.json").read_text())
    return Merge(seconds, report["totals"]["peak_bytes"])


def choose_alpha(
    score: Callable[[float], float], alphas: Sequence[float] = ALPHAS, start: float = 1.25
) -> tuple[float, dict[float, float]]:
    """The best of ascending `alphas` for a score with one peak, and every score that was taken on the way.

    Climbs from `start`, two steps at a time and then one; of equal scores the smaller alpha wins. A climb takes about
    seven scores where the whole list has twenty-one.
    """
    taken: dict[float, float] = {}

    def at(index: int) -> float:
        if not 0 <= index < len(alphas):
            return float("-inf")
        alpha = alphas[index]
        if alpha not in taken:
            taken[alpha] = score(alpha)
        return taken[alpha]

    best = list(alphas).index(start)
    for stride in (2, 1):
        while at(best + stride) > at(best):
            best += stride
        while at(best - stride) >= at(best):
            best -= stride
    return alphas[best], dict(sorted(taken.items()))

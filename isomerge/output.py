"""The output folder of a merge, beside its weights: may it be written, and what else goes into it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from isomerge.checkpoint import disk_bytes, hidden_folder
from isomerge.errors import InputError
from isomerge.report import Report, model_card
from isomerge.settings import dtype_name

if TYPE_CHECKING:
    from isomerge.checkpoint import Checkpoint
    from isomerge.plan import Plan

REPORT, RECIPE, CARD = "isomerge_report.json", "isomerge_recipe.yaml", "README.md"
_RECIPE_HEAD = (
    "# The recipe of this merge. Paths stand as they were given: relative ones start at that recipe's folder.\n"
)


class FileSink(Protocol):
    """What takes the side files: the checkpoint writers."""

    def add_file(self, relative: str, content: bytes | Path, output: int = 0) -> None: ...


def check_output(out: Path, needed: int, inputs: Iterable[Path], *, overwrite: bool = False) -> None:
    """InputError unless a model of `needed` bytes can be written at `out` without harming anything that is there.

    With `overwrite`, what stands there must be the output of an earlier merge or an empty folder.
    """
    for model in inputs:
        if model.resolve() == out.resolve() or out.resolve() in model.resolve().parents:
            raise InputError(f"{out}: the output would replace the input {model}; choose another folder")
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise InputError(f"{out}: exists already; choose another folder, or replace it with --force")
        if out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not reports(out)):
            raise InputError(f"{out}: is not the output of a merge (no {REPORT} in it); remove it yourself")
    parent = next(folder for folder in (out.absolute().parent, *out.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{out}: cannot be made: {parent} is not a folder that you may write to")
    free = shutil.disk_usage(parent).free + disk_bytes(hidden_folder(out))
    if free < needed:
        raise InputError(f"{out}: needs {gigabytes(needed)}, {gigabytes(free)} are free there; choose another disk")


def reports(out: Path) -> list[Path]:
    """The reports in the output of a merge: one, or one in the folder of each alpha."""
    return [path for path in (out / REPORT, *sorted(out.glob(f"alpha-*/{REPORT}"))) if path.is_file()]


def identity(report: Report, base: Checkpoint, experts: Sequence[Checkpoint]) -> dict[str, object]:
    """What has to be the same for a process to go on with a merge that another has begun: all that bytes depend on."""
    return {
        "recipe": report.settings,
        "base": {**report.base, "modified": base.modified},
        "experts": [
            {**entry, "modified": expert.modified} for entry, expert in zip(report.experts, experts, strict=True)
        ],
        "versions": {name: report.versions[name] for name in ("isomerge", "torch", "scipy")},
        **{name: report.machine[name] for name in ("device", "instructions")},
    }


def add_side_files(sink: FileSink, base: Checkpoint, plan: Plan, report: Report, recipe: str, index: int = 0) -> None:
    """The base's side files (config.json with the new dtype), the recipe, the report and the model card."""
    library = "isomerge"
    for path in base.side_files:
        relative = path.relative_to(base.path).as_posix()
        if relative == "config.json":
            library = "transformers"
            sink.add_file(relative, _config(path, plan), index)
        else:
            sink.add_file(relative, path, index)
    sink.add_file(RECIPE, (_RECIPE_HEAD + recipe).encode(), index)
    sink.add_file(CARD, model_card(plan, report, library).encode(), index)
    sink.add_file(REPORT, report.to_json().encode(), index)


def _config(path: Path, plan: Plan) -> bytes | Path:
    """config.json with `out_dtype` under the key that it uses for the dtype; untouched when no out_dtype was asked."""
    out_dtype = plan.settings.out_dtype
    if out_dtype is None:
        return path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return path
    if not isinstance(config, dict):
        return path
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype_name(out_dtype)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def gigabytes(count: float) -> str:
    """Bytes for people, in decimal units as disks are sold: `1.50 GB`, `12.0 MB`, `3 kB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.0f} kB"

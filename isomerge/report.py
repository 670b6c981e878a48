"""What happened in a merge: a record as plain data, its JSON file, and the model card."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

import torch

from isomerge.methods import METHODS
from isomerge.settings import as_recipe, dtype_name
from isomerge.statistics import Statistics

if TYPE_CHECKING:
    from isomerge.checkpoint import Checkpoint
    from isomerge.moments import Moments
    from isomerge.plan import Plan
    from isomerge.settings import Model


@dataclass(slots=True)
class TensorRecord:
    """One tensor of the output. Norms are Frobenius norms; both are None where the base's values are kept."""

    name: str
    shape: tuple[int, ...]
    kind: str
    method: str | None
    matrices: int = 0
    delta_sum_norm: float | None = None  # of the sum of the experts' deltas
    update_norm: float | None = None  # of layer factor * update; alpha times that was added to the base
    alpha: float | tuple[float, ...] | None = None  # one for each output of the merge
    layer_factor: float | None = None  # by its norm among the layers of its type; None where there is none
    seconds: float = 0.0
    nonfinite: dict[str, int] = field(default_factory=dict)  # expert -> entries left out of the merge
    dtype: str = ""

    @property
    def frozen(self) -> bool:
        """Whether no expert has changed it, or what they have changed cancels: the output has the base's values."""
        return self.delta_sum_norm == 0 and self.update_norm == 0


@dataclass(slots=True)
class Totals:
    """Sums over the merge; times in seconds, memory and data in bytes."""

    seconds: float = 0.0
    read_seconds: float = 0.0  # mostly in the reading thread, beside the computation
    compute_seconds: float = 0.0
    write_seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    tensors: int = 0
    matrices: int = 0
    frozen: int = 0  # tensors to be merged that no expert had changed: the output has the base's
    restored: int = 0  # units that an earlier process had done; their bytes and computing times are counted here
    flops: float = 0.0
    planned_peak_bytes: int = 0
    peak_bytes: int | None = None  # of the whole process so far; None where the system does not tell
    planned_gpu_bytes: int | None = None
    gpu_peak_bytes: int | None = None  # of what tensors took on the GPU; None without one


@dataclass(slots=True)
class Report:
    """The record of one merge."""

    versions: Mapping[str, str]
    machine: Mapping[str, str | int]
    base: Mapping[str, object]
    experts: Sequence[Mapping[str, object]]
    family: str
    settings: Mapping[str, object]
    tensors: list[TensorRecord]
    totals: Totals
    warnings: list[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def new_report(
    plan: Plan,
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    version: str,
    *,
    statistics: Sequence[Moments] = (),
    device: str = "cpu",
) -> Report:
    """The report of a merge that is about to start: everything but the numbers."""
    settings = plan.settings
    captured: Sequence[Moments | None] = statistics or [None] * len(experts)
    return Report(
        versions={
            "isomerge": version,
            "torch": torch.__version__,
            "scipy": _scipy_version(),
            "python": platform.python_version(),
        },
        machine={
            "system": f"{platform.system()} {platform.machine()}",
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cpus": os.cpu_count() or 1,
            "threads": torch.get_num_threads(),
            "device": device,
        },
        base={"model": settings.base.name, "digest": base.digest},
        experts=[
            {"model": model.name, "weight": model.weight, "digest": expert.digest, **_statistics(model, found)}
            for model, expert, found in zip(settings.models, experts, captured, strict=True)
        ],
        family=plan.family.name,
        settings=as_recipe(settings),
        tensors=[
            TensorRecord(
                a.name,
                a.shape,
                a.kind.kind,
                a.call.method if a.call else None,
                a.kind.slices,
                dtype=dtype_name(a.out_dtype),
                alpha=_alpha(a.call.alphas) if a.call else None,
            )
            for a in plan.assignments
        ],
        totals=Totals(
            tensors=len(plan.assignments),
            matrices=plan.matrices,
            flops=plan.flops,
            planned_peak_bytes=plan.peak_bytes,
            planned_gpu_bytes=plan.gpu_bytes if plan.on_gpu else None,
        ),
        warnings=list(plan.warnings),
    )


def _alpha(alphas: tuple[float, ...]) -> float | tuple[float, ...]:
    return alphas[0] if len(alphas) == 1 else alphas


def of_output(plan: Plan, report: Report, index: int) -> tuple[Plan, Report]:
    """The plan and the report of one output of a merge that has one for each alpha."""
    settings = replace(plan.settings, alpha=plan.settings.alphas[index])
    assignments = [
        a if a.call is None else replace(a, call=replace(a.call, alphas=(a.call.alphas[index],)))
        for a in plan.assignments
    ]
    tensors = [
        record if not isinstance(record.alpha, tuple) else replace(record, alpha=record.alpha[index])
        for record in report.tensors
    ]
    narrowed = replace(plan, settings=settings, assignments=tuple(assignments))
    return narrowed, replace(report, settings=as_recipe(settings), tensors=tensors)


def _statistics(model: Model, found: Moments | None) -> dict[str, object]:
    """What a report says of an expert's statistics: the file, its header's digest, and how many samples it is from."""
    if found is None or not isinstance(found.source, Statistics):
        return {}
    file = found.source
    return {"statistics": model.statistics, "statistics_digest": file.digest, "samples": file.samples}


@cache
def _scipy_version() -> str:
    """As its package says, without loading it; its LAPACK and BLAS have a part in results on a CPU."""
    try:
        return metadata.version("scipy")
    except metadata.PackageNotFoundError:
        return "none"


def model_card(plan: Plan, report: Report, library: str) -> str:
    """README.md of the output: the front matter that model hubs read, and what was done. No times, no machine."""
    settings = plan.settings
    method = METHODS[settings.method]
    names = list(dict.fromkeys([settings.base.name, *(model.name for model in settings.models)]))
    lines = ["---", "base_model:", *(f"- {json.dumps(name, ensure_ascii=False)}" for name in names)]
    lines += [f"library_name: {library}", "tags:", "- merge", "- isomerge", "---", "", "# Merged model", ""]
    lines += [
        f"{len(settings.models)} fine-tuned models merged into their base `{settings.base.name}` with {method.title} "
        f"(`{method.name}`, {method.paper}), alpha {settings.alphas[0]:g}, by isomerge {report.versions['isomerge']}.",
        "",
        "| expert | weight |",
        "|---|---|",
        *(f"| `{model.name}` | {model.weight:g} |" for model in settings.models),
        "",
        "| method | tensors | matrices | parameters | alpha |",
        "|---|---|---|---|---|",
        *_method_rows(plan),
        "",
        *_frozen_lines(report),
        "`isomerge_recipe.yaml` is the recipe and `isomerge_report.json` the record of every tensor.",
    ]
    papers = {METHODS[name].paper for name in plan.by_method if name in METHODS and METHODS[name].paper}
    lines += ["", "## References", "", *(f"- {paper}" for paper in sorted(papers))] if papers else []
    lines += ["", "## Warnings", "", *(f"- {warning}" for warning in report.warnings)] if report.warnings else []
    return "\n".join(lines) + "\n"


def _frozen_lines(report: Report) -> list[str]:
    count = report.totals.frozen
    return [f"{count} of these tensors are equal in all models and stand as in the base.", ""] if count else []


def _method_rows(plan: Plan) -> list[str]:
    """A row per distinct call, in the order of the base file."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for a in plan.assignments:
        if a.call is None:
            key = ("kept from the base", "", "")
        else:
            parameters = ", ".join(f"{name}={value}" for name, value in a.call.parameters.items())
            key = (a.call.method, parameters, f"{a.call.alphas[0]:g}")
        count = rows.setdefault(key, [0, 0])
        count[0] += 1
        count[1] += a.kind.slices
    return [
        f"| {method} | {tensors} | {matrices} | {parameters} | {alpha} |"
        for (method, parameters, alpha), (tensors, matrices) in rows.items()
    ]


def plan_data(plan: Plan, tensors: bool, time: Mapping[str, object] | None = None) -> dict[str, object]:
    """The plan as plain data, with one entry per tensor when `tensors`; `time` is an estimate's, if there is one."""
    data: dict[str, object] = {
        "settings": as_recipe(plan.settings),
        "family": plan.family.name,
        "methods": {
            name: {
                "tensors": total.tensors,
                "matrices": total.matrices,
                "shapes": [{"m": m, "n": n, "matrices": count} for (m, n), count in total.shapes.items()],
                "flops": total.flops,
                "bytes_read": total.bytes_read,
                "bytes_written": total.bytes_written,
            }
            for name, total in plan.by_method.items()
        },
        "tensors": len(plan.assignments),
        "matrices": plan.matrices,
        "flops": plan.flops,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "peak_bytes": plan.peak_bytes,
        "gpu_bytes": plan.gpu_bytes,
        "spool_bytes": plan.spool_bytes,
        "disk_bytes": plan.disk_bytes,
        "time": None if time is None else dict(time),
        "warnings": list(plan.warnings),
    }
    if tensors:
        data["assignments"] = [
            {
                "name": a.name,
                "shape": list(a.shape),
                "dtype": dtype_name(a.dtype),
                "out_dtype": dtype_name(a.out_dtype),
                "kind": a.kind.kind,
                "matrices": a.kind.slices,
                "transposed": a.kind.transposed,
                "method": a.call.method if a.call else None,
                "parameters": dict(a.call.parameters) if a.call else {},
                "alpha": _alpha(a.call.alphas) if a.call else None,
                "moment_size": a.moment_size or None,
                "layer_type": a.layer_type,
            }
            for a in plan.assignments
        ]
    return data

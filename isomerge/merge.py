"""Merging: a recipe and checkpoints on disk, or models in memory -> the merged model. One engine for both, in
`isomerge.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from isomerge import output
from isomerge.assignments import check_settings, needs_statistics
from isomerge.checkpoint import Checkpoint, MemoryWriter, TensorSpec, Writer, from_state_dict, open_checkpoint
from isomerge.errors import InputError
from isomerge.moments import Moments, check_fingerprints
from isomerge.place import Place, open_place
from isomerge.plan import Plan, build_plan
from isomerge.report import Report, new_report, of_output
from isomerge.run import Job, Progress, run
from isomerge.settings import (
    OUTPUT_DTYPES,
    SCOPES,
    Model,
    Rule,
    Settings,
    finite_number,
    one_alpha,
    rule_from,
    split_alpha,
)
from isomerge.spool import Spool
from isomerge.statistics import open_statistics

SHARD_BYTES = 5_000_000_000
GPU_SHARE = 0.9  # of what is free; the rest is for cuSOLVER's and cuBLAS's workspaces and for fragments


def merge(
    recipe: str | Path | Mapping[str, object],
    out: str | Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    group_bytes: int | None = None,
    max_memory: int | None = None,
    device: str = "cpu",
    max_gpu_memory: int | None = None,
    workers: int | None = None,
    allow_nonfinite: bool = False,
    restart: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Merges the checkpoints of a recipe into the folder `out` and returns what happened.

    `recipe` is a YAML file, or its content as a mapping (relative paths then start at the working directory).
    `group_bytes` bounds the deltas and moments that a CPU reads at a time, one unit at least; else the plan chooses.
    `max_memory` bounds the process's memory, in bytes. On a `device` such as "cuda" groups are computed there, within
    `max_gpu_memory`, by default nine tenths of what is free. `workers` threads read side by side, by default as many
    as torch has. No result depends on the bounds or on their number.
    With `allow_nonfinite`, NaN and Inf entries of experts count as a delta of zero. InputError, with nothing written,
    for any mistake in the inputs; the folder appears whole at the end, or not at all. Where the process was killed, or
    the disk was full, the same call goes on from what is done, to the same bytes; with `restart` from the beginning. A
    recipe with several alphas gives a folder for each in `out`, `alpha-0.8` for 0.8, from one pass over the models.
    """
    out = Path(out)
    bounds = {"group_bytes": group_bytes, "max_memory": max_memory, "max_gpu_memory": max_gpu_memory}
    with open_job(recipe, device=device, workers=workers, **bounds) as job:
        settings = job.plan.settings
        inputs = [model.path for model in (settings.base, *settings.models) if model.path is not None]
        inputs += [model.statistics_path for model in settings.models if model.statistics_path is not None]
        output.check_output(out, job.plan.disk_bytes, inputs, overwrite=overwrite)
        from isomerge import __version__
        from isomerge.recipe import dump_recipe

        report = new_report(
            job.plan, job.base, job.experts, __version__, statistics=job.statistics, device=str(job.place.device)
        )
        with Writer(
            out,
            _specs(job.plan),
            outputs=settings.outputs,
            shard_bytes=shard_bytes,
            metadata={**job.base.metadata, "isomerge_version": __version__},
            overwrite=overwrite,
            identity={**output.identity(report, job.base, job.experts), "shard_bytes": shard_bytes},
            restart=restart,
        ) as writer:
            with Spool(writer.scratch("updates.part")) as spool:
                run(job, writer, spool, report, allow_nonfinite, progress)
            for index in range(len(settings.outputs)):
                plan, record = of_output(job.plan, report, index)
                output.add_side_files(writer, job.base, plan, record, dump_recipe(plan.settings), index)
            writer.commit()
    return report


def merge_state_dicts(
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    *,
    method: str,
    weights: Sequence[float] | None = None,
    statistics: Sequence[str | Path | Mapping[str, Tensor]] | None = None,
    scope: str = "default",
    flatten_conv: bool = False,
    rules: Sequence[Rule | Mapping[str, object]] = (),
    out_dtype: torch.dtype | None = None,
    seed: int = 0,
    **parameters: object,
) -> dict[str, Tensor]:
    """The merge of models in memory, on the CPU, with the keys of `base` in their order: what `merge` would write.

    `parameters` are `alpha` and the method's own; `rules` are mappings with a recipe's keys. The inputs are not
    modified. Tensors that share memory in `base` share it in the result. `statistics`, for methods that need them, has
    for each expert a file or the second moments [d, d] by the weight's name, d = n for XᵀX of the layer's inputs, or m
    for those of its shifts X deltaᵀ. With a `layer_exponent` other than 0 the updates of one type of layers at a time
    wait in a file in the system's temporary folder. InputError for mistakes in the inputs.
    """
    where = "merge_state_dicts"
    if not experts:
        raise InputError(f"{where}: experts: none are given; give at least one state dict")
    if scope not in SCOPES:
        raise InputError(f"{where}: scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    if not isinstance(flatten_conv, bool):
        raise InputError(f"{where}: flatten_conv: expected True or False, got {flatten_conv!r}")
    if out_dtype is not None and out_dtype not in OUTPUT_DTYPES.values():
        raise InputError(f"{where}: out_dtype: expected one of {', '.join(OUTPUT_DTYPES)}, got {out_dtype}")
    given = [1.0] * len(experts) if weights is None else list(weights)
    if len(given) != len(experts):
        raise InputError(f"{where}: weights: {len(given)} for {len(experts)} experts; give one per expert")
    sources = _statistics_given(statistics, len(experts), where)
    alpha, own = split_alpha(parameters, f"{where}: parameters")
    alpha = one_alpha(alpha, f"{where}: parameters")
    settings = Settings(
        method=method,
        base=Model("base"),
        models=tuple(
            Model(f"experts[{i}]", None, finite_number(w, f"{where}: weights[{i}]"), *sources[i][:2])
            for i, w in enumerate(given)
        ),
        parameters=own,
        alpha=1.0 if alpha is None else alpha,
        scope=scope,
        flatten_conv=flatten_conv,
        rules=tuple(rule_from(rule, f"{where}: rules[{i}]") for i, rule in enumerate(rules)),
        out_dtype=out_dtype,
        seed=seed,
        source=where,
    )
    check_settings(settings)
    from isomerge import __version__

    opened = from_state_dict(base, "base")
    tuned = tuple(from_state_dict(expert, f"experts[{i}]") for i, expert in enumerate(experts))
    with ExitStack() as stack:
        moments = _open_statistics(settings, stack, [values for *_, values in sources])
        plan = build_plan(settings, opened, tuned, statistics=moments)
        check_fingerprints(opened, tuned, moments)
        # Names on one tensor are joined again below, so that they share memory.
        plan = replace(plan, assignments=tuple(replace(a, aliases=()) for a in plan.assignments))
        job = Job(plan, opened, tuned, moments)
        writer = stack.enter_context(MemoryWriter(_specs(plan)))
        spool = stack.enter_context(Spool())
        run(job, writer, spool, new_report(plan, opened, tuned, __version__), False, None)
        writer.commit()
    return {name: writer.tensors[opened.aliases.get(name, name)] for name in base}


_Given = tuple[str | None, Path | None, Mapping[str, Tensor] | None]  # name, file, or tensors in memory


def _statistics_given(statistics: Sequence[object] | None, experts: int, where: str) -> list[_Given]:
    """What `merge_state_dicts` was given for each expert."""
    if statistics is None:
        return [(None, None, None)] * experts
    if isinstance(statistics, (str, Path, Mapping)) or len(statistics) != experts:
        count = "one value" if isinstance(statistics, (str, Path, Mapping)) else str(len(statistics))
        raise InputError(f"{where}: statistics: {count} for {experts} experts; give a list with one per expert")
    given: list[_Given] = []
    for index, value in enumerate(statistics):
        if isinstance(value, (str, Path)):
            given.append((str(value), Path(value), None))
        elif isinstance(value, Mapping):
            given.append((f"statistics[{index}]", None, value))
        else:
            raise InputError(
                f"{where}: statistics[{index}]: expected a file or a mapping from names to tensors, got "
                f"{type(value).__name__}"
            )
    return given


@contextmanager
def open_job(
    recipe: str | Path | Mapping[str, object],
    *,
    device: str = "cpu",
    group_bytes: int | None = None,
    max_memory: int | None = None,
    max_gpu_memory: int | None = None,
    workers: int | None = None,
) -> Iterator[Job]:
    """The plan of a recipe with its checkpoints open; bounds as in `merge`. InputError for every mistake that headers
    can show, and for statistics of other models, of which a few KB per layer are read.
    """
    from isomerge.recipe import load_recipe, parse_recipe

    settings = parse_recipe(recipe, Path()) if isinstance(recipe, Mapping) else load_recipe(recipe)
    check_settings(settings)
    if workers is not None and workers < 1:
        raise InputError(f"workers: expected 1 or more, got {workers}")
    place = open_place(device, "device")
    with ExitStack() as stack:
        base = stack.enter_context(_open(settings.base))
        experts = tuple(stack.enter_context(_open(model)) for model in settings.models)
        moments = _open_statistics(settings, stack, [None] * len(experts))
        plan = build_plan(
            settings,
            base,
            experts,
            statistics=moments,
            group_bytes=group_bytes,
            max_memory=max_memory,
            gpu_memory=_gpu_memory(place, max_gpu_memory),
            workers=workers,
        )
        check_fingerprints(base, experts, moments)
        yield Job(plan, base, experts, moments, place)


def _gpu_memory(place: Place, given: int | None) -> int | None:
    """Bytes that a merge may take of a place of its own memory; None on the CPU."""
    free = place.memory()
    if free is None:
        return None
    return int(GPU_SHARE * free) if given is None else min(given, free)


def _open_statistics(
    settings: Settings, stack: ExitStack, given: Sequence[Mapping[str, Tensor] | None]
) -> tuple[Moments, ...]:
    """The statistics of every expert, or none where no method needs them; `given` has those in memory."""
    if needs_statistics(settings) is None:
        return ()
    found = []
    for model, values in zip(settings.models, given, strict=True):
        path, name = model.statistics_path, model.statistics
        assert name is not None  # check_settings has seen to it
        if values is not None:
            found.append(Moments(values, name))
            continue
        assert path is not None
        if not path.exists() and Path(name).exists():
            raise InputError(f"{path}: does not exist; relative paths in a recipe start at the recipe's folder")
        found.append(Moments(stack.enter_context(open_statistics(path)), str(path)))
    return tuple(found)


def _open(model: Model) -> Checkpoint:
    assert model.path is not None
    if not model.path.exists() and Path(model.name).exists():
        raise InputError(f"{model.path}: does not exist; relative paths in a recipe start at the recipe's folder")
    return open_checkpoint(model.path)


def _specs(plan: Plan) -> list[TensorSpec]:
    return [TensorSpec(name, a.out_dtype, a.shape) for a in plan.assignments for name in (a.name, *a.aliases)]

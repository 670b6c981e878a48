"""What the worker processes do: train an expert, capture its statistics, run a merge method from recipe to accuracy.

A worker computes on one thread and never shares a computation with another, so that results depend neither on the
number of workers nor on which of them takes which job.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from capturing import Capture, Sampling, draw, run_capture
from encoder import (
    FAST_BFLOAT16,
    MAX_TOKENS,
    Ids,
    Training,
    embed,
    finetune,
    hits,
    load_encoder,
    save_expert,
    tokenise,
)
from merging import Merge, Method, choose_alpha, run_merge, write_recipe
from scores import accuracy, normalised_accuracy
from sources import BASE
from splits import Labelled, Task

torch.set_num_threads(1)

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Study:
    """One base, several tasks, one training seed; everything a worker needs to know."""

    base: Path
    experts: Path  # folder of all experts ever trained
    scratch: Path  # folder of this study: texts, recipes, merged models
    tasks: tuple[str, ...]
    training: Training
    fast_test: bool  # test in bfloat16, too


@dataclass(frozen=True, slots=True)
class Expert:
    """A fine-tuned model, and its marks on its own task."""

    task: str
    folder: Path
    seconds: float  # spent in training; 0 when it was trained in an earlier run
    validation: list[bool]
    test: list[bool]


@dataclass(frozen=True, slots=True)
class Merged:
    """A merge method's outcome: the alpha it got, the validation scores that chose it, its marks on every test."""

    method: Method
    alpha: float
    curve: dict[float, float]  # alpha -> mean normalised accuracy on the validation texts
    merge: Merge  # the final one, at `alpha`
    test: dict[str, list[bool]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A task as the encoder sees it: token ids, targets, and the classifier [classes, d] from its label names."""

    classifier: Tensor
    parts: dict[str, tuple[Ids, list[int]]]


def warm_up() -> None:
    """Imports what the other jobs need, which takes seconds: a worker that has done this is ready."""
    from transformers import BertModel  # noqa: F401


def write_texts(study: Study, task: Task) -> None:
    """Puts a task's texts where the workers read them."""
    path = _texts_path(study, task.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(task.to_json(), ensure_ascii=False))


def train_expert(study: Study, task: str) -> Expert:
    """Fine-tunes the base on one task and tests it there; an expert of the same settings and texts is trained once."""
    folder = study.experts / f"{task}-{_fingerprint(study, task)}"
    record = folder.with_suffix(".json")  # written last: it vouches for the folder
    if record.exists() and folder.exists():
        return Expert(task, folder, 0.0, **json.loads(record.read_text()))
    prepared, model = _prepare(study, task), load_encoder(study.base)
    started = time.perf_counter()
    finetune(model, prepared.classifier, *prepared.parts["train"], study.training)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder, ignore_errors=True)
    save_expert(model, study.base, folder)
    marks = {
        "validation": hits(model, prepared.classifier, *prepared.parts["validation"], fast=True),
        "test": hits(model, prepared.classifier, *prepared.parts["test"], fast=study.fast_test),
    }
    record.write_text(json.dumps(marks))
    return Expert(task, folder, seconds, **marks)


def test_base(study: Study) -> dict[str, list[bool]]:
    """The base model's marks on every test."""
    return _marks(study, load_encoder(study.base), "test", study.fast_test)


def capture_statistics(study: Study, expert: Expert, sampling: Sampling) -> Capture:
    """What the expert's layers see on a few training texts."""
    task = _read_texts(study, sampling.source(study.tasks, expert.task))
    return run_capture(expert.folder, draw(task, sampling), MAX_TOKENS)


def run_method(
    study: Study, method: Method, experts: list[Expert], statistics: Sequence[Path] = (), name: str | None = None
) -> Merged:
    """Merges, chooses alpha on the validation texts, merges again with it, and tests the folder that came out.

    The merged weights are base + alpha * update, so one merge at alpha = 1 gives the models of every alpha. Recipe and
    folder are called `name`, by default as the method is in recipes.
    """
    name = name or method.recipe_name
    recipe, out = study.scratch / "recipes" / f"{name}.yaml", study.scratch / "merged" / name

    def merge(alpha: float) -> Merge:
        write_recipe(recipe, method, study.base, [expert.folder for expert in experts], alpha, statistics)
        return run_merge(recipe, out)

    alpha, curve = 1.0, {}
    if not method.fixed_alpha:
        merge(alpha)
        model, update = load_encoder(study.base), _Update(study.base, out)
        expert_accuracy = {expert.task: accuracy(expert.validation) for expert in experts}

        def score(alpha: float) -> float:
            update.apply(model, alpha)
            return normalised_accuracy(_marks(study, model, "validation", fast=True), expert_accuracy)

        alpha, curve = choose_alpha(score)
    final = merge(alpha)
    return Merged(method, alpha, curve, final, _marks(study, load_encoder(out), "test", study.fast_test))


class _Update:
    """The weights on the line from the base through a model merged at alpha = 1."""

    def __init__(self, base: Path, merged: Path) -> None:
        self.base = load_file(base / WEIGHTS)
        self.merged = load_file(merged / WEIGHTS)

    def apply(self, model: nn.Module, alpha: float) -> None:
        """Sets every parameter of `model` to base + alpha * (merged - base), in float32."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                base = self.base[name]
                parameter.copy_(base + alpha * (self.merged[name] - base))


def _marks(study: Study, model: nn.Module, part: str, fast: bool) -> dict[str, list[bool]]:
    marks = {}
    for task in study.tasks:
        prepared = _prepare(study, task)
        marks[task] = hits(model, prepared.classifier, *prepared.parts[part], fast=fast)
    return marks


@cache
def _prepare(study: Study, task: str) -> Prepared:
    texts = _read_texts(study, task)
    classifier = embed(_base_encoder(study.base), tokenise(study.base, texts.labels))

    def part(rows: list[Labelled]) -> tuple[Ids, list[int]]:
        return tokenise(study.base, [text for text, _ in rows]), [index for _, index in rows]

    parts = {"train": part(texts.train), "validation": part(texts.validation), "test": part(texts.test)}
    return Prepared(classifier, parts)


@lru_cache(maxsize=1)
def _base_encoder(folder: Path) -> nn.Module:
    return load_encoder(folder)


def _texts_path(study: Study, task: str) -> Path:
    return study.scratch / "texts" / f"{task}.json"


def _read_texts(study: Study, task: str) -> Task:
    return Task.from_json(json.loads(_texts_path(study, task).read_text()))


def _fingerprint(study: Study, task: str) -> str:
    """What an expert and its marks depend on, in twelve hexadecimal digits."""
    settings = {
        "base": BASE.spec,
        "training": asdict(study.training),
        "max_tokens": MAX_TOKENS,
        "bfloat16": [FAST_BFLOAT16, study.fast_test],
        "torch": torch.__version__,
        "texts": asdict(_read_texts(study, task)),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

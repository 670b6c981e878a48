"""Statistics for ESM: a few of a task's training texts, `isomerge capture`, a file beside the expert."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import isomerge
import torch
from isomerge.statistics import Layer, open_statistics, write_statistics

from commands import run_isomerge
from splits import Task


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which training texts an expert's statistics are captured on."""

    texts: int = 32
    seed: int = 0
    foreign: bool = False  # texts of the next task instead of the expert's own

    def source(self, tasks: Sequence[str], task: str) -> str:
        """The task whose texts the expert of `task` is shown."""
        return tasks[(tasks.index(task) + self.foreign) % len(tasks)]


@dataclass(frozen=True, slots=True)
class Capture:
    """One run of `isomerge capture`: the file, its size, and the process's wall time."""

    statistics: Path
    bytes: int
    seconds: float
    cached: bool  # captured in an earlier run, which took these seconds


def draw(task: Task, sampling: Sampling) -> list[str]:
    """Training texts drawn without replacement, labels unused; fewer are the first of more."""
    texts = [text for text, _ in task.train]
    return random.Random(f"{task.name} {sampling.seed}").sample(texts, len(texts))[: sampling.texts]


def capture_key(texts: Sequence[str], max_tokens: int) -> str:
    """What an expert's statistics depend on, in twelve hexadecimal digits."""
    settings = [list(texts), max_tokens, isomerge.__version__, torch.__version__]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]


def write_samples(path: Path, texts: Sequence[str]) -> None:
    """One text a line, in the order drawn: white space is folded in them, so none holds a line break."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{text}\n" for text in texts).encode())


def run_capture(expert: Path, texts: Sequence[str], max_tokens: int) -> Capture:
    """`isomerge capture` of the expert on `texts`, each cut to `max_tokens`; the same is captured once.

    Raises:
        CommandFailed: it exited with anything but 0.
    """
    folder = expert.with_name(f"{expert.name}-statistics")
    stem = f"{len(texts)}-{capture_key(texts, max_tokens)}"
    samples, statistics = folder / f"{stem}.txt", folder / f"{stem}.safetensors"
    record = folder / f"{stem}.json"  # written last: it vouches for the statistics
    cached = record.exists() and statistics.exists()
    if not cached:
        write_samples(samples, texts)
        # fmt: off
        seconds = run_isomerge(
            "capture", "--model", expert, "--data", samples, "--samples", len(texts), "--max-length", max_tokens,
            "-o", statistics, "--force",
        )
        # fmt: on
        record.write_text(json.dumps({"seconds": seconds}))
    return Capture(statistics, statistics.stat().st_size, json.loads(record.read_text())["seconds"], cached)


def write_identities(captured: Path) -> Path:
    """Statistics of the same expert and layers with identity matrices for moments, in a file beside `captured`.

    The principal directions of the shifts are then those of Δ Δᵀ: the left singular vectors of the update itself.
    """
    path = captured.with_name("identities.safetensors")
    with open_statistics(captured) as statistics:
        layers = {
            name: Layer(layer.size, "input", layer.size, f"identity.{layer.size}")  # each unit vector seen once
            for name, layer in statistics.layers.items()
            if layer.space == "input"
        }
        moments = {layer.stored: torch.eye(layer.size) for layer in layers.values()}
        write_statistics(path, moments, layers, samples=1, fingerprint=statistics.fingerprint)
    return path

"""Accuracies, their ratio to the experts', and how sure one may be of it given the number of test texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Hits = Mapping[str, Sequence[bool]]  # per task, for each test text in a fixed order: was it classified right?

REPLICATES = 2000  # the bootstrap's own error is then about 1.6 % of the standard error it estimates


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Row:
    """What the table says of one model (averaged over runs, when there are several)."""

    accuracy: dict[str, float]
    mean: float  # of the accuracies
    normalised: Estimate  # mean over tasks of accuracy / the expert's accuracy
    gain: Estimate  # normalised minus the reference method's, on the same resampled texts
    spread: float  # standard deviation of `normalised` over runs; 0 with one


def accuracy(marks: Sequence[bool]) -> float:
    """The share of True."""
    return sum(marks) / len(marks)


def normalised_accuracy(hits: Hits, expert_accuracy: Mapping[str, float]) -> float:
    """Mean over tasks of accuracy / expert's accuracy."""
    return float(np.mean([accuracy(hits[task]) / expert_accuracy[task] for task in expert_accuracy]))


def summarise(runs: Sequence[Mapping[str, Hits]], experts: str, reference: str, seed: int = 0) -> dict[str, Row]:
    """One row per model: `runs` holds the hits of every model on the same test texts.

    There is a run for each training seed, or each draw of the samples that statistics are captured on.

    Standard errors are bootstrapped: within each task the test texts are drawn with replacement, the same ones for
    all models and all runs, so that differences between models are paired.
    """
    models, tasks = list(runs[0]), list(runs[0][experts])
    rng = np.random.default_rng(seed)
    observed = np.empty((len(runs), len(models), len(tasks)))  # accuracies
    resampled = np.empty((len(runs), len(models), len(tasks), REPLICATES))
    for position, task in enumerate(tasks):
        marks = np.array([[run[model][task] for model in models] for run in runs], dtype=np.float32)
        texts = marks.shape[-1]
        counts = rng.multinomial(texts, np.full(texts, 1 / texts), size=REPLICATES).astype(np.float32)
        observed[:, :, position] = marks.mean(axis=-1, dtype=np.float64)
        resampled[:, :, position] = marks @ counts.T / texts
    expert, rival = models.index(experts), models.index(reference)
    normalised = (observed / observed[:, [expert]]).mean(axis=2)  # [runs, models]
    replicates = (resampled / resampled[:, [expert]]).mean(axis=2).mean(axis=0)  # [models, replicates]
    gains = replicates - replicates[rival]
    rows = {}
    for index, model in enumerate(models):
        over_runs = normalised[:, index]
        rows[model] = Row(
            accuracy=dict(zip(tasks, observed[:, index].mean(axis=0).tolist(), strict=True)),
            mean=float(observed[:, index].mean()),
            normalised=Estimate(float(over_runs.mean()), float(replicates[index].std(ddof=1))),
            gain=Estimate(float((over_runs - normalised[:, rival]).mean()), float(gains[index].std(ddof=1))),
            spread=float(over_runs.std(ddof=1)) if len(runs) > 1 else 0.0,
        )
    return rows

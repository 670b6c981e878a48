"""Takes ESM apart on the demo's experts: its scalings, its decomposition, its samples.

    python examples/ablation.py               five tasks
    python examples/ablation.py --tasks 8     eight tasks, more texts (also needs npm and apt)

Experts, recipes and statistics are in the demo's cache; experts that it lacks are fine-tuned. See README.md beside this
file for the rows and how to read the table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # one thread a process here and in the workers: results repeat exactly

import steps
import tables
from capturing import Capture, Sampling, write_identities
from jobs import Expert, Merged, Study, run_method, test_base
from scores import summarise
from steps import Narrator, collect
from variants import FULL, VARIANTS, Variant


def main() -> int:
    """Runs the ablation; 0 when the table was printed, 1 when something failed, 2 when the machine lacks something."""
    options = steps.parser(__doc__)
    options.add_argument("--draws", type=steps.positive, default=3, help="samples drawn so many times (default 3)")
    arguments = options.parse_args()

    def work(studies: list[Study], pool: ProcessPoolExecutor, narrator: Narrator) -> None:
        _ablate(studies[0], arguments, pool, narrator)

    return steps.run("ablation", arguments, 1, work)


def run_variant(study: Study, variant: Variant, experts: list[Expert], captured: Sequence[Path], name: str) -> Merged:
    """One run of a row; the merged model goes when its marks are known: all of them would be gigabytes."""
    merged = run_method(study, variant.method, experts, captured, name)
    shutil.rmtree(study.scratch / "merged" / name)
    return merged


def _ablate(study: Study, arguments: argparse.Namespace, pool: ProcessPoolExecutor, narrator: Narrator) -> None:
    """Experts, statistics of every kind, all rows side by side, the table."""
    base = pool.submit(test_base, study)
    [experts] = steps.train([study], pool, narrator)
    wanted = [
        sampling
        for variant in VARIANTS
        if variant.method.needs_statistics
        for sampling in variant.samplings(arguments.draws)
    ]
    captures = steps.capture(study, experts, list(dict.fromkeys(wanted)), pool, narrator)
    identities = [write_identities(file.statistics) for file in captures[Sampling()]]

    def submit(number: int, variant: Variant, sampling: Sampling) -> Future[Merged]:
        files = identities if variant.identities else [file.statistics for file in captures.get(sampling, [])]
        name = f"ablation-{number:02}-{sampling.seed}"
        return pool.submit(run_variant, study, variant, experts, files, name)

    def tell(found: Merged) -> None:
        narrator.say(f"{found.method.title:<26}alpha {found.alpha:g} is the best of {len(found.curve)}")

    jobs = [
        [submit(number, variant, sampling) for sampling in variant.samplings(arguments.draws)]
        for number, variant in enumerate(VARIANTS)
    ]
    found = {row[0].method.title: row for row in collect(jobs, tell)}
    _conclude(study, base.result(), experts, captures, found, arguments, narrator)


def _conclude(
    study: Study,
    base: dict[str, list[bool]],
    experts: Sequence[Expert],
    captures: Mapping[Sampling, Sequence[Capture]],
    found: Mapping[str, Sequence[Merged]],
    arguments: argparse.Namespace,
    narrator: Narrator,
) -> None:
    """Means over the draws, with every row on the same test texts; a row of one run counts in each draw."""
    fixed = {"base": base, "experts": {expert.task: expert.test for expert in experts}}
    runs = [
        fixed | {title: row[min(draw, len(row) - 1)].test for title, row in found.items()}
        for draw in range(arguments.draws)
    ]
    rows = summarise(runs, experts="experts", reference=FULL)
    alphas = {title: [merged.alpha for merged in row] for title, row in found.items()}
    repeated = [variant.method.title for variant in VARIANTS if variant.repeated and arguments.draws > 1]
    settings = steps.settings(study, steps.sizes(arguments), narrator) | {"draws": arguments.draws}
    record = {
        "settings": settings,
        "variants": [asdict(variant) for variant in VARIANTS],
        "rows": {title: asdict(row) for title, row in rows.items()},
        "merges": {title: [steps.trace(merged) for merged in row] for title, row in found.items()},
        "captures": [asdict(sampling) | {"costs": list(map(steps.cost, row))} for sampling, row in captures.items()],
    }
    grid = tables.ablation(rows, alphas, FULL, repeated)
    steps.publish(f"ablation-{len(study.tasks)}-tasks", record, [grid], arguments.cache, narrator)


if __name__ == "__main__":
    sys.exit(main())

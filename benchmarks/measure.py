"""How every number here is measured, and what is recorded beside it."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()


def machine() -> dict[str, object]:
    """Processor, threads, versions and commit."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    commit = git("describe", "--always", "--exclude=*")
    changed = git("status", "--porcelain", "--", ":/", ":!results")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(names),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "blas": "MKL" if torch.backends.mkl.is_available() else "other",
        "commit": (commit + "-dirty" * bool(changed)) or "unknown",
    }


def seconds(function: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int
) -> tuple[dict[str, float], dict[str, object]]:
    """Median seconds of each candidate over `rounds`, one call of each in turn per round; and its last result."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    results: dict[str, object] = {}
    for _ in range(rounds):
        for name, function in candidates.items():
            elapsed, results[name] = seconds(function)
            times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}, results


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return (torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected)).item()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def save(name: str, title: str, tables: Sequence[str], data: Mapping[str, object]) -> Path:
    """`results/NAME.md` and `.json`: the tables, the figures, the machine."""
    RESULTS.mkdir(exist_ok=True)
    facts = machine()
    about = ", ".join(f"{key} {value}" for key, value in facts.items())
    (RESULTS / f"{name}.md").write_text("\n".join([f"# {title}\n", f"{about}\n", *tables]), encoding="utf-8")
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": facts, **data}, indent=1), encoding="utf-8")
    return RESULTS / f"{name}.md"

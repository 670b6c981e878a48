"""Merging a model of 1e9 parameters from disk: `python benchmarks/from_disk.py --mergekit /path/to/bin/mergekit-yaml`.

Seconds, start-up included, and peak resident memory of `isomerge merge` by the elementwise methods, of mergekit on the
same files, and of the same reading and writing without a merge: `cat` of all inputs, `cp` of one model, and sync of the
copy. Each command is a process of its own; they run in turn, round after round, with the models' files in the page
cache (warm) and evicted from it (cold). Then the peak of Iso-C under `--max-memory 3GB` with four and eight experts.

Takes 13 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import measure
import synthetic
import torch
from torch import Tensor

from isomerge.checkpoint import open_checkpoint

EXPERTS = 4
CHECKED = "model.layers.0.self_attn.k_proj.weight"  # the tensor whose values are checked
MEMORY = 3_000_000_000  # bytes that Iso-C may take
BARE, START = "cat, cp, sync", "isomerge methods: start-up alone"
BLOCKS = """rules:
  - {filter: "model.layers.[01].*", merge_method: iso_c}
  - {filter: "*", keep_base: true}
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class Run(NamedTuple):
    """One process, by the operating system's account."""

    seconds: float
    cpu_seconds: float
    peak: int  # bytes


def timed(command: Sequence[str], folder: Path) -> Run:
    """Runs a command to its end, which has to be a good one."""
    account, log = folder / "time", folder / "log"
    whole, environment = ["/usr/bin/time", "-o", str(account), "-f", "%U %S %M", *command], {**os.environ, **OFFLINE}
    with log.open("wb") as output:
        started = time.perf_counter()
        code = subprocess.run(whole, stdout=output, stderr=output, env=environment, cwd=folder).returncode
        wall = time.perf_counter() - started
    assert code == 0, log.read_text(errors="replace")[-2000:]
    user, system, peak = account.read_text().split()
    return Run(wall, float(user) + float(system), int(peak) * 1024)


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def inputs(folder: Path) -> list[Path]:
    return [file for name in ("base", *(f"expert{t}" for t in range(EXPERTS))) for file in weights(folder / name)]


def evict(files: Sequence[Path]) -> None:
    """Takes files out of the page cache; what lies under the disk, a host's cache for one, is out of reach."""
    os.sync()
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def load(files: Sequence[Path]) -> None:
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def isomerge(folder: Path, method: str, experts: int = EXPERTS, rules: str = "", *options: str) -> list[str]:
    """The command for a recipe of the first experts, from the beginning again where there are fewer on disk."""
    models = "".join(f"  - model: expert{t % EXPERTS}\n" for t in range(experts))
    recipe = folder / f"{method}-{experts}.yaml"
    recipe.write_text(f"merge_method: {method}\nbase_model: base\nmodels:\n{models}{rules}", encoding="utf-8")
    return [sys.executable, "-m", "isomerge.cli", "merge", "--quiet", str(recipe), str(folder / "out"), *options]


def mergekit(program: str, folder: Path, method: str) -> list[str]:
    """mergekit's command for the same merge, by its defaults but for what it would ask the hub: tokenizer and card."""
    own = {"linear": "{weight: 1.0}", "ties": "{weight: 1.0, density: 0.2}"}[method]
    models = "".join(f"  - model: {folder / f'expert{t}'}\n    parameters: {own}\n" for t in range(EXPERTS))
    base = f"base_model: {folder / 'base'}\n" if method == "ties" else ""
    recipe = folder / f"mergekit-{method}.yaml"
    recipe.write_text(f"merge_method: {method}\n{base}models:\n{models}dtype: bfloat16\n", encoding="utf-8")
    return [program, str(recipe), str(folder / "out"), "--no-copy-tokenizer", "--no-write-model-card", "--quiet"]


def exact(folder: Path, method: str) -> Tensor:
    """The tensor that is checked, by definition, in float64."""
    models = ("base", *(f"expert{t}" for t in range(EXPERTS)))
    base, *tuned = (open_checkpoint(folder / model).read(CHECKED).double() for model in models)
    deltas = torch.stack([weight - base for weight in tuned])
    if method != "ties":
        return base + deltas.sum(0) / (1 if method == "task_arithmetic" else EXPERTS)
    limits = deltas.abs().flatten(1).sort(descending=True).values[:, int(0.2 * base.numel()) - 1]
    deltas = deltas * (deltas.abs() >= limits[:, None, None])
    total = deltas.sum(0).sign()
    agree = deltas * torch.where(total == 0, total.sum().sign(), total) > 0
    return base + (deltas * agree).sum(0) / agree.sum(0).clamp_min(1)


def check(folder: Path, name: str, method: str) -> None:
    """The output is the definition's: rounded once to bfloat16, or computed in it, with three roundings more."""
    error = measure.error(open_checkpoint(folder / "out").read(CHECKED), exact(folder, method))
    assert error <= (1 if name.startswith("isomerge") else 4) * 2**-9, (name, error)


def time_merges(folder: Path, program: str | None, rounds: int) -> tuple[list[list[object]], dict[str, object]]:
    """A row for each command and state of the cache."""
    read, written = inputs(folder), weights(folder / "base")
    size = sum(file.stat().st_size for file in (*read, *written))
    copy = 'mkdir out && cat "$@" > /dev/null && cp base/*.safetensors out/ && sync out/*'
    commands: dict[tuple[str, str], list[str]] = {(BARE, ""): ["sh", "-c", copy, "sh", *map(str, read)]}
    commands[START, ""] = [sys.executable, "-m", "isomerge.cli", "methods"]
    for method in ("average", "task_arithmetic", "ties"):
        commands["isomerge", method] = isomerge(folder, method)
    for method in ("linear", "ties") if program is not None else ():
        commands["mergekit", method] = mergekit(program, folder, method)
    rows: list[list[object]] = []
    data: dict[str, object] = {"bytes": size}
    for state in ("warm", "cold"):
        runs: dict[tuple[str, str], list[Run]] = {}
        for number in range(rounds):
            for (name, method), command in commands.items():
                if (name, method) == ("mergekit", "ties") and (state == "cold" or number > 0):
                    continue  # minutes each, of which reading is a few seconds
                evict(read) if state == "cold" else load(read)
                runs.setdefault((name, method), []).append(timed(command, folder))
                print(state, name, method, runs[name, method][-1], flush=True)
                if method and number == 0:
                    check(folder, name, method)
                shutil.rmtree(folder / "out", ignore_errors=True)
        bare, start = (statistics.median(run.seconds for run in runs[name, ""]) for name in (BARE, START))
        for (name, method), found in runs.items():
            walls = [run.seconds for run in found]
            wall, cpu = statistics.median(walls), statistics.median(run.cpu_seconds for run in found)
            rate = ["", ""] if name == START else [f"{size / wall / 1e9:.2f}", f"{bare / wall:.0%}"]
            rate.append(f"{bare / (wall - start):.0%}" if name == "isomerge" else "")
            span, peak = f"{min(walls):.1f} to {max(walls):.1f}", max(run.peak for run in found) / 1e6
            label = f"{name} {method}".strip()
            rows.append([label, state, len(found), f"{wall:.1f}", span, f"{cpu:.1f}", *rate, f"{peak:.0f}"])
            data[f"{label}, {state}"] = [run._asdict() for run in found]
    return rows, data


def bound_memory(folder: Path) -> tuple[list[list[object]], dict[str, object]]:
    """Iso-C in 3 GB: peaks with four experts and with eight, which are the four twice, on two of the like blocks."""
    found = {}
    for experts in (EXPERTS, 2 * EXPERTS):
        load(inputs(folder))
        found[experts] = timed(isomerge(folder, "iso_c", experts, BLOCKS, "--max-memory", "3GB"), folder)
        shutil.rmtree(folder / "out")
        print("iso_c", experts, found[experts], flush=True)
        assert found[experts].peak < MEMORY, found
    assert found[2 * EXPERTS].peak <= 1.1 * found[EXPERTS].peak, found
    rows: list[list[object]] = [[n, f"{run.peak / 1e6:.0f}", f"{run.seconds:.0f}"] for n, run in found.items()]
    return rows, {f"iso_c, {experts} experts": run._asdict() for experts, run in found.items()}


def versions(program: str | None) -> Mapping[str, str]:
    if program is None:
        return {}
    python = Path(program).with_name("python")
    code = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'))"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(("mergekit", "mergekit's torch"), found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the models are, or are put and left; else a temporary one")
    parser.add_argument("--size", choices=synthetic.SIZES, default="1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", help="mergekit-yaml in an environment of its own; else its rows are left out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        if not (folder / f"expert{EXPERTS - 1}").exists():
            synthetic.write_set(folder, synthetic.SIZES[arguments.size], EXPERTS)
        shutil.rmtree(folder / "out", ignore_errors=True)
        merges, times = time_merges(folder, arguments.mergekit, arguments.rounds)
        bounded, peaks = bound_memory(folder)
    found = versions(arguments.mergekit)
    about = "".join(f", {name} {version}" for name, version in found.items())
    shapes = synthetic.SIZES[arguments.size].shapes().values()
    parameters = sum(torch.Size(shape).numel() for shape in shapes)
    title = f"Merging {EXPERTS} bfloat16 experts of {parameters / 1e9:.2f}e9 parameters from disk to disk{about}"
    tables = [
        measure.table(
            (
                "command",
                "cache",
                "runs",
                "s, median",
                "least to most",
                "CPU s",
                "GB/s",
                "of cat's speed",
                "start-up apart",
                "peak MB",
            ),
            merges,
        ),
        measure.table(("Iso-C on two blocks, --max-memory 3GB: experts", "peak MB", "s"), bounded),
    ]
    print(measure.save("from-disk-cpu", title, tables, {"versions": found, **times, **peaks}))


if __name__ == "__main__":
    main()

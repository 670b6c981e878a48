"""Everything that is to be known of a GPU, in one command: `python benchmarks/gpu.py` (README.md, "On a GPU").

build       the extension, where nvcc is found
tests       pytest -m gpu
ceilings    what the device copies and multiplies at most: the roofs of all that follows
svd         torch.linalg.svd by each of cuSOLVER's drivers
primitives  the products of which iterations are made, in every format
ops         every op on every backend that answers here, on the shapes of three models
methods     whole methods on these models, beside the papers' computation on the same device
merge       from checkpoints on disk to a checkpoint on disk, beside the CPU

Writes results/gpu-DEVICE.json and .md after every case. A section that has had its share of the time stops with a line
that says how much it left out. Cases run in a process of their own, which is started again after one that ended it,
lost the device or took more than a minute and a half.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # isomerge need not be installed

import gpu_measure  # noqa: E402
import gpu_methods  # noqa: E402
import gpu_ops  # noqa: E402
import measure  # noqa: E402
import torch  # noqa: E402
from gpu_setting import Setting  # noqa: E402

CASES: Mapping[str, Callable[[Setting], Iterator[gpu_measure.Case]]] = {
    "ceilings": gpu_ops.ceiling_cases,
    "svd": gpu_methods.driver_cases,
    "primitives": gpu_ops.primitive_cases,
    "ops": gpu_ops.op_cases,
    "methods": gpu_methods.method_cases,
    "merge": gpu_methods.merge_cases,
}
WEIGHTS = {
    "build": 60,
    "tests": 150,
    "ceilings": 10,
    "svd": 45,
    "primitives": 40,
    "ops": 105,
    "methods": 90,
    "merge": 40,
}
"""Shares of the time, seconds in nine minutes; what a section leaves over is shared by those after it."""

CALL_SECONDS = 0.5  # of timed calls of one candidate
CASE_SECONDS = 90  # of a case, its inputs and its float64 answer included
LOST = 3  # exit status of a worker whose CUDA context is unusable

COLUMNS = ("case", "shape", "layers", "who", "ms", "times faster", "error", "allowed", "% of roof", "roof", "note")


class Results:
    """The JSON file and the Markdown table beside it; each is replaced whole, so nobody finds half of one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"machine": {}, "sections": {}}
        if path.exists():
            self.data = json.loads(path.read_text("utf-8"))

    def section(self, name: str) -> dict[str, Any]:
        """`next` is the index of the case that is due; `begun` the case that runs at this moment."""
        empty = {"lines": [], "rows": [], "next": 0, "begun": None, "done": False}
        section: dict[str, Any] = self.data["sections"].setdefault(name, empty)
        return section

    def rows(self, name: str) -> list[gpu_measure.Row]:
        rows: list[gpu_measure.Row] = self.data["sections"].get(name, {}).get("rows", [])
        return rows

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".json", json.dumps(self.data, indent=1, default=str)), (".md", markdown(self.data))):
            new = self.path.with_suffix(f"{suffix}.new")
            new.write_text(text, encoding="utf-8")
            os.replace(new, self.path.with_suffix(suffix))


# ---------------------------------------------------------------------------------------------- the table


def markdown(data: Mapping[str, Any]) -> str:
    machine = data["machine"]
    parts = [f"# {machine.get('device', 'unknown device')}\n", ", ".join(f"{k} {v}" for k, v in machine.items()), ""]
    for name in WEIGHTS:
        if name not in data["sections"]:
            continue
        section = data["sections"][name]
        parts += [f"## {name}\n", *(f"{line}\n" for line in section["lines"])]
        rows = section["rows"] + (totals(section["rows"]) if name == "methods" else [])
        if rows:
            parts.append(measure.table(COLUMNS, [cells(row) for row in rows]))
    return "\n".join(parts)


def cells(row: gpu_measure.Row) -> list[object]:
    """A row of the table; what was not measured is empty."""
    notes = [f"failed: {row['failure']}".replace("|", "\\|")] if "failure" in row else []
    notes += ["**wrong**"] if row.get("wrong") else []
    notes += (
        [f"{row['amount'] / row['seconds'] / 1e12:.4g} T{row['of']}/s"] if {"amount", "seconds"} <= set(row) else []
    )
    notes += [f"{key} {row[key]}" for key in ("k", "s", "tokens", "inputs", "shifts") if key in row]
    notes += [row["note"]] if row.get("note") else []

    def number(key: str, form: str, scale: float = 1.0) -> str:
        return form.format(row[key] * scale) if row.get(key) is not None else ""

    return [
        row["case"],
        row["shape"],
        row.get("layers", ""),
        row.get("who", ""),
        number("seconds", "{:.4g}", 1e3),
        number("ratio", "{:.2f}"),
        number("error", "{:.1e}"),
        number("allowed", "{:.1e}"),
        number("share", "{:.0f}", 100),
        row.get("roof", ""),
        ", ".join(notes),
    ]


def totals(rows: Sequence[gpu_measure.Row]) -> list[gpu_measure.Row]:
    """Seconds per method and model over all its matrices, where every shape was measured and no answer is wrong."""
    by_kind: dict[tuple[str, str, str], list[gpu_measure.Row]] = {}
    for row in rows:
        if "seconds" in row and "model" in row and not row.get("wrong"):
            by_kind.setdefault((row["case"], row["model"], row["who"]), []).append(row)
    sums = {
        kind: sum(row["seconds"] / row["layers"] * row["matrices"] for row in mine)
        for kind, mine in by_kind.items()
        if len(mine) == mine[0]["shapes"]
    }
    found = []
    for (case, model, who), seconds in sums.items():
        papers = sums.get((case, model, "papers"))
        ratio = {"ratio": papers / seconds} if papers and who != "papers" else {}
        found.append({"case": case, "shape": f"**{model}, whole**", "who": who, "seconds": seconds, **ratio})
    return found


# ---------------------------------------------------------------------------------------------- cases, in a worker


def work(results: Results, setting: Setting, names: Sequence[str], until: float) -> None:
    """Goes on where the file says that the last worker stopped."""
    clock = gpu_measure.Clock(setting.device)
    for name in names:
        section = results.section(name)
        if section["done"]:
            continue
        stop = deadline(name, names, until)
        setting = Setting(setting.device, setting.quick, fastest_drivers(results.rows("svd")))
        cases = list(CASES[name](setting))
        clock.settle()
        while section["next"] < len(cases):
            case, left = cases[section["next"]], len(cases) - section["next"]
            if time.time() > stop:
                section["lines"].append(f"Out of time: {left} of {len(cases)} cases were not measured.")
                break
            section["begun"] = {"case": case.name, "shape": case.shape}
            results.save()
            # A hanging kernel cannot be interrupted, so the signal ends the process.
            signal.setitimer(signal.ITIMER_REAL, min(CASE_SECONDS, max(5.0, until + 10 - time.time())))
            rows = gpu_measure.rows_of(case, clock, 0.02 if setting.quick else CALL_SECONDS, best_rates(results))
            signal.setitimer(signal.ITIMER_REAL, 0)
            section["rows"] += rows
            section["begun"], section["next"] = None, section["next"] + 1
            results.save()
            for row in rows:
                print(name, *(cell for cell in cells(row) if cell), flush=True)
            if "lost" in rows[-1]:
                sys.exit(LOST)
        if setting.device.type == "cuda":
            section["lines"].append(
                f"SM clock, its maximum, memory clock, power, °C at the end: {gpu_measure.clocks()}."
            )
        section["done"] = True
        results.save()


def deadline(name: str, names: Sequence[str], until: float) -> float:
    """When a section must stop, if it and those after it share the time that is left."""
    now, after = time.time(), list(names)[list(names).index(name) :]
    return now + max(0.0, until - now) * WEIGHTS[name] / sum(WEIGHTS[other] for other in after)


def best_rates(results: Results) -> dict[str, float]:
    """The highest rate at which each unit was seen, in FLOP/s or bytes/s: a roof is above everything."""
    rates: dict[str, float] = {}
    for row in results.rows("ceilings"):
        if "seconds" in row:
            rates[row["unit"]] = max(rates.get(row["unit"], 0.0), row["amount"] / row["seconds"])
    return rates


def fastest_drivers(rows: Sequence[gpu_measure.Row]) -> Callable[[int, int], str | None]:
    """The fastest SVD for a shape, or for that of the nearest rank, with an error within ten times the least."""
    by_shape: dict[tuple[int, int], list[gpu_measure.Row]] = {}
    for row in rows:
        if "seconds" in row and "error" in row:
            by_shape.setdefault((row["m"], row["n"]), []).append(row)
    chosen = {}
    for shape, mine in by_shape.items():
        least = min(row["error"] for row in mine)
        chosen[shape] = min((row for row in mine if row["error"] <= 10 * least), key=lambda row: row["seconds"])["who"]

    def driver(m: int, n: int) -> str | None:
        nearest = min(chosen, key=lambda s: (abs(min(s) - min(m, n)), abs(max(s) - max(m, n))), default=None)
        return None if nearest is None else chosen[nearest]

    return driver


def supervise(path: Path, command: Sequence[str], names: Sequence[str], until: float) -> None:
    """Starts a worker, again and again, until every section is done; a case that ended its worker becomes a row."""
    while not all(Results(path).section(name)["done"] for name in names):
        with tempfile.TemporaryDirectory(prefix="isomerge-gpu-") as folder:  # a worker that is ended cannot tidy up
            process = subprocess.Popen(command, env={**os.environ, "TMPDIR": folder})
            try:
                status = process.wait(max(10.0, until + 30 - time.time()))
            except subprocess.TimeoutExpired:  # it hangs where no alarm is set
                process.kill()
                status = process.wait()
        results = Results(path)
        undone = [results.section(name) for name in names if not results.section(name)["done"]]
        begun = next((section for section in undone if section["begun"]), None)
        if begun:
            why = f"more than {CASE_SECONDS} s, or than was left" if status == -signal.SIGALRM else f"status {status}"
            begun["rows"].append({**begun["begun"], "failure": f"ended its process: {why}"})
            begun["begun"], begun["next"] = None, begun["next"] + 1
        elif undone and status != LOST:
            undone[0]["lines"].append(f"Its process ended with status {status}, outside any case.")
            undone[0]["done"] = True
        results.save()


# ---------------------------------------------------------------------------------------------- build and tests


def ran(command: Sequence[str], seconds: float, **variables: str) -> tuple[int | None, str]:
    """Exit status, None when the time was up, and the output of a command and its children."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
        output.seek(0)
        return status, output.read()


def build(section: dict[str, Any], seconds: float) -> None:
    begin = time.perf_counter()
    status, output = ran([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, ISOMERGE_CUDA="1")
    last = " ".join(output.strip().splitlines()[-1:])
    outcome = {0: "isomerge._C was built", None: "isomerge._C was not built in time"}.get(status, f"not built: {last}")
    section["lines"].append(f"{outcome}, {time.perf_counter() - begin:.0f} s.")
    section["output"] = output[-4000:]


def tests(section: dict[str, Any], seconds: float) -> None:
    # a module that cannot be imported here, for lack of a package that it tests, keeps no other from being run
    options = ["-rfE", "--tb=short", "--continue-on-collection-errors"]
    status, output = ran([sys.executable, "-m", "pytest", "-m", "gpu", *options, "tests"], seconds)
    lines = output.strip().splitlines()
    summary = lines[-1] if lines and status is not None else f"stopped after {seconds:.0f} s"
    section["lines"] += [f"`pytest -m gpu`: {summary.strip('= ')}"]
    section["lines"] += [f"- {line}" for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    section["output"] = output[-40000:]


# ---------------------------------------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(WEIGHTS), metavar="SECTION,..", help="others stay as they are")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, metavar="FOLDER")
    parser.add_argument("--commit", help="what is measured, where the working tree is not a git repository")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of a worker: seconds since 1970
    arguments = parser.parse_args()
    names = [name for name in WEIGHTS if name in arguments.only.split(",")]
    if unknown := set(arguments.only.split(",")) - set(WEIGHTS):
        parser.error(f"--only: unknown section {', '.join(sorted(unknown))}; there are {', '.join(WEIGHTS)}")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no CUDA device; --device cpu --quick tries the script without one")
    label = re.sub(r"[^a-z0-9]+", "-", gpu_measure.name_of(device).lower())
    path: Path = arguments.out / f"gpu-{label}.json"
    if arguments.until:
        work(Results(path), Setting(device, arguments.quick), names, arguments.until)
        return

    until = time.time() + 60 * arguments.minutes
    results = Results(path)
    before = results.data["machine"].get("commit")
    results.data["machine"] = gpu_measure.facts(device) | ({"commit": arguments.commit} if arguments.commit else {})
    kept = results.data["sections"] if before == results.data["machine"].get("commit") else {}
    results.data["sections"] = {name: section for name, section in kept.items() if name not in names}
    results.save()
    for name, run in (("build", build), ("tests", tests)):
        if name in names:
            run(results.section(name), deadline(name, names, until) - time.time())
            results.section(name)["done"] = True
            results.save()
            print(*results.section(name)["lines"], sep="\n", flush=True)
    measured = [name for name in names if name in CASES]
    command = [sys.executable, __file__, "--only", ",".join(measured), "--device", arguments.device]
    command += ["--out", str(arguments.out), "--until", str(until), *(["--quick"] if arguments.quick else [])]
    supervise(path, command, measured, until)
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    main()

"""What one row of `gpu.py` is: calls that are timed beside one another, checked against float64, held to a roof.

A row never raises: what goes wrong is its content. An answer that is too far from float64 is a row that says so.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from typing import Any

import measure
import torch
from torch import Tensor

CALLS = 30
"""Timed calls of a candidate at most; medians of more do not move."""

FLUSH = 256 * 2**20
"""Bytes overwritten before each timed call: four times the largest L2 cache, so that inputs come from memory."""

SPECTRAL = 1e-4
"""Error that a spectral op may have, or twice the float32 SVD's where that is more."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One way to compute: a function that is timed, and on how many of the problem's layers it works."""

    run: Callable[[], Any]
    layers: float | None = None  # None: all; its time is then counted as that of all
    once: bool = False  # one timed call and no other: takes seconds
    checked: bool = True  # its result is an answer to the whole problem


@dataclass(frozen=True)
class Problem:
    """Candidates for one piece of work on `layers` matrices, the first of which is checked."""

    candidates: Mapping[str, Candidate]
    baseline: str  # the candidate that speed and error are compared with
    answer: Callable[[Any], Tensor]  # result -> what is compared, unique whatever signs and rotations
    exact: Callable[[], Tensor] | None  # the same in float64; None where that takes too long
    floor: float | None  # error that is allowed if twice the baseline's is less; None: no verdict
    layers: int = 1
    flops: Mapping[str, float] = field(default_factory=dict)  # by the unit that they run on, for all layers
    bytes: float = 0.0  # each input read once, each output written once
    facts: Mapping[str, Any] = field(default_factory=dict)  # further entries of its rows


@dataclass(frozen=True)
class Case:
    """A problem that is set up when its turn comes."""

    name: str
    shape: str
    build: Callable[[], Problem]


@dataclass
class Sample:
    """Seconds of each timed call, the last result, or why there is none."""

    times: list[float] = field(default_factory=list)
    result: Any = None
    failure: str | None = None


class DeviceLost(RuntimeError):
    """The CUDA context is unusable after an error; a new process is needed."""


class Clock:
    """Times calls on a device: by events and with a cold L2 cache on CUDA, by the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._cuda = device, device.type == "cuda"
        if self._cuda:
            torch.cuda.set_device(device)
        self._flush = torch.empty(FLUSH, dtype=torch.uint8, device=device) if self._cuda else None

    def settle(self, seconds: float = 0.5) -> None:
        """Keeps the tensor cores busy until clocks have risen."""
        if not self._cuda:
            return
        A = torch.randn(4096, 4096, device=self.device).bfloat16()
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop:
            A @ A
            torch.cuda.synchronize(self.device)

    def call(self, run: Callable[[], Any]) -> tuple[float, Any]:
        if self._flush is None:
            return measure.seconds(run)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()  # also keeps the device busy while the host launches what follows
        start.record()
        result = run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, result

    def interleaved(self, candidates: Mapping[str, Candidate], seconds: float) -> dict[str, Sample]:
        """One call of each in turn, round after round, `seconds` of each at most but one call at least.

        The first call of a candidate is not timed, but for those that are called once.
        """
        samples = {name: Sample() for name in candidates}
        for turn in range(CALLS + 1):
            for name, candidate in candidates.items():
                sample = samples[name]
                spent = sum(sample.times) + (sample.times or [0.0])[-1]
                if sample.failure or (sample.times and (candidate.once or spent > seconds)):
                    continue
                sample.result = None  # its memory is for the next
                try:
                    elapsed, sample.result = self.call(candidate.run)
                except Exception as error:
                    sample.failure, sample.times = said(error), []
                    self.recover()
                else:
                    if turn or candidate.once:
                        sample.times.append(elapsed)
        return samples

    def recover(self) -> None:
        """After an exception: frees memory. `DeviceLost` if the error was one that a CUDA context does not survive."""
        if self._cuda:
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except Exception as error:
                raise DeviceLost(said(error)) from error


def said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def rows_of(case: Case, clock: Clock, seconds: float, rates: Mapping[str, float]) -> list[Row]:
    """One row per candidate: time, speed against the baseline, error, share of the roof; or what went wrong.

    After an error that the CUDA context does not survive, the last row has `lost`.
    """
    head: Row = {"case": case.name, "shape": case.shape}
    try:
        problem = case.build()
        head |= {"layers": problem.layers, **problem.facts}
        samples = clock.interleaved(problem.candidates, seconds)
        errors, allowed = _judged(problem, samples)
    except Exception as error:
        row = {**head, "failure": said(error)}
        try:
            clock.recover()
        except DeviceLost as lost:
            row["lost"] = said(lost)
        return [row]
    bound, binds = roof(problem.flops, problem.bytes, rates)
    rows = []
    for name, sample in samples.items():
        row = {**head, "who": name, "calls": len(sample.times)}
        if sample.failure:
            rows.append({**row, "failure": sample.failure})
            continue
        part = problem.candidates[name].layers
        scale = 1.0 if part is None else problem.layers / part
        row["seconds"] = scale * statistics.median(sample.times)
        row["least"], row["most"] = scale * min(sample.times), scale * max(sample.times)
        if name in errors:
            row["error"] = errors[name] if isfinite(errors[name]) else None  # JSON knows no NaN
            if name != problem.baseline and problem.floor is not None:
                row["allowed"], row["wrong"] = allowed, not errors[name] <= allowed
        if bound and part is None:
            row |= {"roof seconds": bound, "roof": binds, "share": bound / row["seconds"]}
            row |= {"flops": dict(problem.flops), "bytes": problem.bytes}
        rows.append(row)
    base = next((row["seconds"] for row in rows if row["who"] == problem.baseline and "seconds" in row), None)
    for row in rows:
        if base and "seconds" in row and row["who"] != problem.baseline:
            row["ratio"] = base / row["seconds"]
    return rows


def _judged(problem: Problem, samples: Mapping[str, Sample]) -> tuple[dict[str, float], float]:
    """Errors of the results, and what is allowed: twice the baseline's, or the floor."""
    if problem.exact is None:
        return {}, 0.0
    exact, errors = problem.exact(), {}
    for name, sample in samples.items():
        if sample.failure is None and problem.candidates[name].checked:
            try:
                errors[name] = measure.error(problem.answer(sample.result), exact)
            except Exception as error:  # an answer of another shape or kind
                sample.failure = said(error)
    known = errors.get(problem.baseline, 0.0)
    return errors, max(2 * known if isfinite(known) else 0.0, problem.floor or 0.0)


def roof(flops: Mapping[str, float], moved: float, rates: Mapping[str, float]) -> tuple[float, str]:
    """Seconds below which no code gets, and what binds: the units one after the other, or memory. 0 if not known."""
    if not moved + sum(flops.values()) or not {"copy", *flops} <= set(rates):
        return 0.0, ""
    work, memory = sum(count / rates[unit] for unit, count in flops.items()), moved / rates["copy"]
    return (memory, "copy") if memory >= work else (work, "+".join(unit for unit, count in flops.items() if count))


def facts(device: torch.device) -> Row:
    """Device, driver, clocks, versions, processor and commit; what cannot be found out is left out."""
    found: Row = {"device": name_of(device), "python": platform.python_version(), "cuda": torch.version.cuda}
    try:
        found |= measure.machine()
    except OSError:  # no git, no /proc
        found["torch"] = torch.__version__
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = None
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"multiprocessors": about.multi_processor_count, "memory bytes": about.total_memory}
        found["driver"], found["clocks"] = smi("driver_version"), clocks()
    return found


def clocks() -> str:
    """Clocks in MHz, draw in W and temperature in °C at this moment."""
    return smi("clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu")


def smi(query: str) -> str:
    command = ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return said(error)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

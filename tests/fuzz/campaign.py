"""Runs one target on numbered inputs and keeps count of what became of them."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Protocol

from isomerge.errors import InputError

SECONDS = 1.0  # for one input, of two tries: a machine may be busy with other things
HANG = 10.0  # seconds by the clock after which an input is given up
MEGABYTES = 100  # by which one input may raise the peak of the process
LINE = 10_000  # characters of a message
WARM_UP = 200  # inputs before memory counts: libraries load, allocators grow


class Target(Protocol):
    """A reader under test."""

    def __init__(self, folder: Path) -> None:
        """`folder` is empty and is the target's own."""

    def make(self, random: Random) -> bytes:
        """The next input."""

    def check(self, content: bytes) -> str:
        """Read an input and return what kind of object it became; AssertionError if an invariant does not hold."""


class Hang(BaseException):
    """No `except Exception` of a reader can keep this."""


@dataclass
class Campaign:
    """`findings` maps a description to (how often, number of the first input)."""

    what: str
    target: Target
    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, tuple[int, int]] = field(default_factory=dict)
    inputs: int = 0
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, 0)
    peak: float = 0.0  # MB

    def make(self, number: int) -> bytes:
        """Input `number`: a function of the seed and the number alone."""
        return self.target.make(Random(f"{self.what}:{self.seed}:{number}"))

    def replay(self, number: int) -> None:
        """Prints what became of one input, with the traceback of whatever it raised."""
        try:
            print("accepted:", self.target.check(self.make(number)))
        except Exception:
            traceback.print_exc()

    def run(self, inputs: int) -> None:
        """Inputs 0 to `inputs`, one after another."""
        began, self.peak = time.perf_counter(), _peak()
        for number in range(inputs):
            self._one(number)
        self.inputs += inputs
        self.seconds += time.perf_counter() - began

    def summary(self) -> str:
        rate = self.inputs / self.seconds if self.seconds else 0.0
        lines = [f"{self.what}: {self.inputs} inputs of seed {self.seed} in {self.seconds:.0f} s, {rate:.0f} a second"]
        lines.append(f"  slowest: {self.slowest[0]:.3f} s, input {self.slowest[1]}")
        lines += [f"{count:9}  {outcome}" for outcome, count in sorted(self.outcomes.items())]
        lines.append(f"{len(self.findings)} findings")
        again = f"python -m tests.fuzz --what {self.what} --seed {self.seed} --only"
        lines += [f"{count:9}  {what}: {again} {number}" for what, (count, number) in self.findings.items()]
        return "\n".join(lines)

    def _one(self, number: int) -> None:
        content = self.make(number)
        began = time.perf_counter()
        try:
            with _deadline():
                self.outcomes[f"accepted, {self.target.check(content)}"] += 1
        except InputError as error:
            self.outcomes[f"refused, {_place(error)}"] += 1
            message = str(error)
            if len(message) > LINE:
                self._found(f"a message of more than {LINE} characters, from {_place(error)}", number)
        except (Exception, Hang) as error:
            text = re.sub(r"\d+", "N", str(error))[:80]
            self._found(f"{type(error).__name__} {text!r} from {_place(error)}", number)
        spent = time.perf_counter() - began
        if spent > SECONDS:
            spent = min(spent, self._again(content))
        self.slowest = max(self.slowest, (spent, number))
        if spent > SECONDS:
            self._found(f"more than {SECONDS} s", number)
        peak = _peak()
        if peak > self.peak + MEGABYTES and number >= WARM_UP:
            self._found(f"more than {MEGABYTES} MB", number)
        self.peak = peak

    def _again(self, content: bytes) -> float:
        """Seconds that an input takes."""
        began = time.perf_counter()
        with suppress(Exception, Hang), _deadline():
            self.target.check(content)
        return time.perf_counter() - began

    def _found(self, what: str, number: int) -> None:
        count, first = self.findings.get(what, (0, number))
        if not count:
            print(f"input {number}: {what}", file=sys.stderr, flush=True)
        self.findings[what] = count + 1, first


def _place(error: BaseException) -> str:
    """Where in isomerge an exception comes from, as file:function:line."""
    place, mine, step = "nowhere", False, error.__traceback__
    while step is not None:
        if (ours := str(step.tb_frame.f_globals.get("__name__")).startswith("isomerge.")) or not mine:
            code = step.tb_frame.f_code
            place, mine = f"{os.path.basename(code.co_filename)}:{code.co_name}:{step.tb_lineno}", ours
        step = step.tb_next
    return place


def _peak() -> float:
    """Peak of the resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


@contextmanager
def _deadline() -> Iterator[None]:
    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise Hang(f"no end after {HANG} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

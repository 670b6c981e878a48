"""How far a command is: a bar on a terminal, plain lines elsewhere, all on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from isomerge.capture import Progress as CaptureProgress
    from isomerge.merge import Progress as MergeProgress


def _bar(title: str, *columns: ProgressColumn) -> Progress:
    """A bar on stderr that leaves nothing behind: the title, how far it is, the columns, the time left."""
    return Progress(
        TextColumn(title),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


@contextmanager
def merge_progress(quiet: bool) -> Iterator[Callable[[MergeProgress], None] | None]:
    """A bar on a terminal, a line every tenth of the way elsewhere, nothing when quiet."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar("merging", TaskProgressColumn(), TextColumn("{task.fields[data]}  {task.fields[matrices]}")) as bar:
            task = bar.add_task("merging", total=None, data="", matrices="")

            def update(state: MergeProgress) -> None:
                bar.update(
                    task,
                    total=state.bytes_total,
                    completed=state.bytes_done,
                    data=_of_bytes(state),
                    matrices=f"{state.matrices_done}/{state.matrices_total} matrices",
                )

            yield update
    else:
        yield _Lines()


@contextmanager
def capture_progress(quiet: bool) -> Iterator[Callable[[CaptureProgress], None] | None]:
    """As `merge_progress`, for the samples of a capture."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar("capturing", TaskProgressColumn(), TextColumn("{task.fields[text]}")) as bar:
            task = bar.add_task("capturing", total=None, text="")

            def update(state: CaptureProgress) -> None:
                bar.update(task, total=state.samples_total, completed=state.samples_done, text=_of_samples(state))

            yield update
    else:
        tenth = 0

        def line(state: CaptureProgress) -> None:
            nonlocal tenth
            now = 10 * state.samples_done // max(1, state.samples_total or 0)
            if now > tenth:
                tenth = now
                print(f"{10 * now}%  {_of_samples(state)}", file=sys.stderr, flush=True)

        yield line


def _of_samples(state: CaptureProgress) -> str:
    return f"{state.samples_done} of {state.samples_total} samples  {state.tokens} tokens"


class _Lines:
    """Progress as plain lines on stderr: one per tenth of the bytes."""

    def __init__(self) -> None:
        self._started, self._tenth = time.monotonic(), 0

    def __call__(self, state: MergeProgress) -> None:
        tenth = 10 * state.bytes_done // max(1, state.bytes_total)
        if tenth <= self._tenth:
            return
        self._tenth = tenth
        passed = time.monotonic() - self._started
        left = passed * (state.bytes_total - state.bytes_done) / max(1, state.bytes_done)
        print(
            f"{10 * tenth}%  {_of_bytes(state)}  {state.matrices_done}/{state.matrices_total} matrices  "
            f"{duration(left)} left",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def layers_progress() -> Iterator[Callable[[int, int, str], None] | None]:
    """As `merge_progress`, for the layers of an inspection: a bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    with _bar("inspecting", TextColumn("{task.completed}/{task.total} layers")) as bar:
        task = bar.add_task("inspecting", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total)


@contextmanager
def verify_progress(quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """As `layers_progress`, for the bytes of a verification."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    with _bar("verifying", TaskProgressColumn(), TextColumn("{task.fields[name]}")) as bar:
        task = bar.add_task("verifying", total=None, name="")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, name=name)


def _of_bytes(state: MergeProgress) -> str:
    from isomerge.output import gigabytes

    return f"{gigabytes(state.bytes_done)} of {gigabytes(state.bytes_total)}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"

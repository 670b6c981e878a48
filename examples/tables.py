"""The tables of the demo and the ablation, once for the terminal and once as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from capturing import Capture
from merging import Merge
from scores import Estimate, Row


@dataclass(frozen=True, slots=True)
class Grid:
    """Headings and cells, all text."""

    headings: list[str]
    rows: list[list[str]]

    def to_rich(self) -> Table:
        """For `Console.print`."""
        table = Table(box=None, pad_edge=False)
        for column, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if column == 0 else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """A table in the dialect of GitHub."""
        rule = ["---"] + ["---:"] * (len(self.headings) - 1)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in [self.headings, rule, *self.rows]) + "\n"


def quality(rows: Mapping[str, Row], alphas: Mapping[str, Sequence[float]], reference: str, seeds: int) -> Grid:
    """One line per model, in percent; `alphas` names the chosen ones (one per training seed) of merged models."""
    tasks = list(next(iter(rows.values())).accuracy)
    headings = ["model", "alpha", *tasks, "mean", "normalised", f"against {reference}"]
    if seeds > 1:
        headings.append("spread over seeds")
    lines = []
    for model, row in rows.items():
        line = [model, ", ".join(f"{alpha:g}" for alpha in alphas.get(model, ())) or "-"]
        line += [f"{100 * row.accuracy[task]:.1f}" for task in tasks]
        line += [f"{100 * row.mean:.1f}", _percent(row.normalised), _percent(row.gain, sign="+")]
        lines.append([*line, f"{100 * row.spread:.1f}"] if seeds > 1 else line)
    return Grid(headings, lines)


def costs(merges: Mapping[str, Sequence[Merge]], captures: Mapping[str, Sequence[Capture]]) -> Grid:
    """Wall time and peak memory of each method's last merge (the slowest and the largest over the training seeds).

    Where a method needs statistics, also what those of one task cost: mean seconds of its capture, the largest file.
    """
    lines = []
    for model, runs in merges.items():
        peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
        seconds = max(run.seconds for run in runs)
        line = [model, f"{seconds:.1f}", f"{max(peaks) / 1e6:.0f}" if peaks else "-"]
        if model in captures:
            files = captures[model]
            mean = sum(file.seconds for file in files) / len(files)
            line += [f"{mean:.1f}", f"{max(file.bytes for file in files) / 1e6:.1f}"]
        lines.append(line if model in captures else [*line, "-", "-"])
    return Grid(["isomerge merge", "seconds", "peak MB", "capture, s per task", "statistics, MB per task"], lines)


def ablation(
    rows: Mapping[str, Row], alphas: Mapping[str, Sequence[float]], reference: str, repeated: Collection[str]
) -> Grid:
    """One line per variant, in percent; those in `repeated` are means over several draws of the samples."""
    lines = []
    for title, row in rows.items():
        chosen = ", ".join(f"{alpha:g}" for alpha in alphas.get(title, ())) or "-"
        figures = [f"{100 * row.mean:.1f}", _percent(row.normalised), _percent(row.gain, sign="+")]
        lines.append([title, chosen, *figures, f"{100 * row.spread:.1f}" if title in repeated else "-"])
    return Grid(["variant", "alpha", "mean", "normalised", f"against {reference}", "spread over draws"], lines)


def _percent(estimate: Estimate, sign: str = "") -> str:
    """`95.6 ± 0.5`, and a dash where the number is exact: a model compared with itself."""
    if estimate.error == 0:
        return f"{100 * estimate.value:.1f}" if estimate.value else "-"
    return f"{100 * estimate.value:{sign}.1f} ± {100 * estimate.error:.1f}"

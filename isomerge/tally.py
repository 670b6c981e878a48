"""What became of the units of a merge: counted into the report, and as plain data for a process that goes on later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from isomerge.report import Report
from isomerge.spool import Slot

Key = tuple[str, int]  # tensor, flat index of the unit's first element


@dataclass(slots=True)
class Outcome:
    """What became of one unit, or of one tensor that was copied."""

    name: str
    start: int
    matrix: bool = False
    seconds: float = 0.0
    written: int = 0  # bytes; 0 while its update waits
    delta_square: float | None = None  # squared norm of the sum of its deltas
    update_square: float | None = None  # squared norm of its update, times its layer factor
    layer_factor: float | None = None
    slot: Slot | None = None  # where its update waits for its layer factor

    @property
    def key(self) -> Key:
        return self.name, self.start

    def plain(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in _FIELDS}
        plain["slot"] = self.slot and asdict(self.slot)
        return plain


_FIELDS = tuple(each.name for each in fields(Outcome))


@dataclass(slots=True)
class Batch:
    """Units that were done together, and what was read for them: written all, or waiting all."""

    outcomes: list[Outcome] = field(default_factory=list)
    read: int = 0  # bytes
    nonfinite: dict[str, dict[str, int]] = field(default_factory=dict)  # tensor -> expert -> entries left out

    def plain(self) -> dict[str, Any]:
        """As asdict() gives it, in a tenth of its time."""
        return {
            "outcomes": [outcome.plain() for outcome in self.outcomes],
            "read": self.read,
            "nonfinite": self.nonfinite,
        }

    @property
    def waits(self) -> bool:
        return any(outcome.slot is not None for outcome in self.outcomes)

    @property
    def keys(self) -> set[Key]:
        return {outcome.key for outcome in self.outcomes}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Batch:
        outcomes = [
            Outcome(**{**entry, "slot": Slot(**entry["slot"]) if entry["slot"] else None}) for entry in data["outcomes"]
        ]
        return cls(outcomes, data["read"], data["nonfinite"])


class Tally:
    """Counts batches into a report; which process did them makes no difference to it."""

    def __init__(self, report: Report) -> None:
        self.done: set[Key] = set()
        self.matrices = 0
        self._report = report
        self._records = {record.name: record for record in report.tensors}
        self._squares: dict[str, list[float]] = {}  # tensor -> sums over its units of both squares

    def add(self, batch: Batch) -> None:
        totals = self._report.totals
        totals.bytes_read += batch.read
        for name, counts in batch.nonfinite.items():
            found = self._records[name].nonfinite
            for label, count in counts.items():
                found[label] = found.get(label, 0) + count
        for outcome in batch.outcomes:
            record = self._records[outcome.name]
            record.seconds += outcome.seconds
            totals.compute_seconds += outcome.seconds
            totals.bytes_written += outcome.written
            if outcome.key not in self.done:
                self.done.add(outcome.key)
                self.matrices += outcome.matrix
            record.layer_factor = outcome.layer_factor
            for index, square in enumerate((outcome.delta_square, outcome.update_square)):
                if square is not None:
                    self._squares.setdefault(outcome.name, [0.0, 0.0])[index] += square

    def close(self) -> None:
        """Norms of whole tensors, and the warnings that only the data could give; after the last unit."""
        for name, (deltas, update) in self._squares.items():
            self._records[name].delta_sum_norm, self._records[name].update_norm = deltas**0.5, update**0.5
        self._report.totals.frozen = sum(record.frozen for record in self._report.tensors)
        totals: dict[str, int] = {}
        for record in self._report.tensors:
            for label, count in record.nonfinite.items():
                totals[label] = totals.get(label, 0) + count
        for label, count in totals.items():
            self._report.warnings.append(f"{label}: {count} non-finite values were left out of the merge")

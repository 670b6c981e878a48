"""What tensors that are merged in pieces decide as a whole first, such as the thresholds of TIES."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from isomerge.delta_reader import DeltaReader, Passage
from isomerge.deltas import PIECE_ELEMENTS, SURVEY_BYTES, Unit, cut, pieces, unit_seed
from isomerge.methods import METHODS
from isomerge.methods.survey import TABLE_BYTES, Election, Survey
from isomerge.place import Place
from isomerge.plan import Plan
from isomerge.schedule import Step


class Surveys:
    """The elections of a plan's tensors, each made before the first of its pieces is merged.

    A survey reads all pieces of a tensor several times. Tensors of few pieces are surveyed together, so that no thread
    waits; no more of them than that a system with memory to spare has their files there after the first pass.
    """

    def __init__(self, plan: Plan, reader: DeltaReader, place: Place) -> None:
        self._reader, self._place, self._seed = reader, place, plan.settings.seed
        self._numel = {a.name: a.numel for a in plan.assignments}
        self._elected: dict[str, Election] = {}
        longest: dict[tuple[str, torch.dtype], tuple[int, int]] = {}
        for step in plan.steps:
            key, length = _kind(step), (step.group.n, len(step.group.units))
            longest[key] = max(longest.get(key, length), length)
        self._lengths = {key: length for key, (_, length) in longest.items()}  # pieces in the groups of the plan

    def arguments(self, step: Step, unit: Unit) -> dict[str, object]:
        """Those of the method that are a unit's own, once `prepare` was called for its step."""
        arguments = self._drawn(step, unit)
        if METHODS[step.call.method].seeded:
            arguments["first"] = unit.start
        if unit.name in self._elected:
            arguments["elected"] = self._elected[unit.name]
        return arguments

    def prepare(self, step: Step) -> None:
        """Makes the elections that the units of a step need, in the thread that is to read them."""
        if METHODS[step.call.method].survey is None:
            return
        new = {unit.name: unit for unit in step.group.units if not unit.whole and unit.name not in self._elected}
        for units in self._together(step, new.values()):
            surveys = {unit.name: self._survey(step, unit) for unit in units}
            while going := [unit for unit in units if not surveys[unit.name].finished]:
                self._see(step, going, surveys)
                for unit in going:
                    surveys[unit.name].turn()
            self._elected.update((name, survey.elected) for name, survey in surveys.items())

    def _drawn(self, step: Step, unit: Unit) -> dict[str, object]:
        return {"seed": unit_seed(self._seed, unit.label)} if METHODS[step.call.method].seeded else {}

    def _survey(self, step: Step, unit: Unit) -> Survey:
        """Of the tensor that a unit is of."""
        survey = METHODS[step.call.method].survey
        assert survey is not None
        arguments = {**step.call.arguments, **self._drawn(step, unit)}
        return survey(len(unit.sources), self._numel[unit.name], step.group.dtype, self._place.device, **arguments)

    def _together(self, step: Step, units: Iterable[Unit]) -> Iterator[list[Unit]]:
        """Units of tensors that are surveyed together: of as many pieces as a group has, and one tensor at least."""
        tables = SURVEY_BYTES // TABLE_BYTES
        elements = self._lengths[_kind(step)] * PIECE_ELEMENTS
        chosen: list[Unit] = []
        for unit in units:
            more = [*chosen, unit]
            full = sum(len(u.sources) for u in more) > tables or sum(self._numel[u.name] for u in more) > elements
            if chosen and full:
                yield chosen
                more = [unit]
            chosen = more
        if chosen:
            yield chosen

    def _see(self, step: Step, units: Sequence[Unit], surveys: Mapping[str, Survey]) -> None:
        """Shows all pieces of the tensors that `units` are of; as many at a time as the plan has counted memory for."""
        found = [piece for unit in units for piece in pieces(unit.name, unit.sources, self._numel[unit.name])]
        for count in sorted({piece.count for piece in found}, reverse=True):
            alike = [piece for piece in found if piece.count == count]
            for run in cut(alike, self._lengths[_kind(step)]):
                group = replace(step.group, m=1, n=count, units=run)
                if self._place.memory() is None:
                    self._reader.map(group, lambda passage: _show(passage, surveys[passage.unit.name]))
                else:
                    for unit, deltas in zip(run, self._reader.read(group).deltas, strict=True):
                        surveys[unit.name].see(deltas, unit.start)


def _show(passage: Passage, survey: Survey) -> None:
    """On the CPU, from the files if that can be."""
    if not survey.ask(passage.direct, passage.unit.start):
        survey.see(passage.load()[1], passage.unit.start)


def _kind(step: Step) -> tuple[str, torch.dtype]:
    """Of what has pieces that take the same memory."""
    return step.call.method, step.group.dtype

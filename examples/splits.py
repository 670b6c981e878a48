"""From labelled texts to train, validation and test: cleaned, no duplicates, as even over the classes as can be."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

Labelled = tuple[str, int]  # a text and the index of its label

MAX_CHARACTERS = 240  # the encoder reads 32 tokens, about 150 characters; texts that agree in 240 are duplicates to it
MIN_CHARACTERS = 8


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many texts of each kind a task may have at most."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a source holds of one task, in the source's order; `held_out` is its own test part, where it has one."""

    labels: tuple[str, ...]
    pool: Sequence[Labelled]
    held_out: Sequence[Labelled] | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """One classification task: `labels[index]` names the class of each (text, index)."""

    name: str
    labels: tuple[str, ...]
    train: list[Labelled]
    validation: list[Labelled]
    test: list[Labelled]

    def to_json(self) -> dict[str, object]:
        """Plain lists and strings; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, list]) -> Task:
        parts = {part: [(text, index) for text, index in data[part]] for part in ("train", "validation", "test")}
        return cls(str(data["name"]), tuple(data["labels"]), **parts)


def split(name: str, corpus: Corpus, sizes: Sizes, seed: int = 0) -> Task:
    """Train, validation and test with no text in two of them.

    A source with a test part of its own keeps it: train and validation come from its pool, and what also occurs
    anywhere in that pool is dropped from test. When there are too few texts for all three, each gets its share.
    """
    rng = random.Random(f"{name} {seed}")
    pool = distinct(corpus.pool)
    if corpus.held_out is None:
        train, validation, test = _cut(evenly(pool, rng), (sizes.train, sizes.validation, sizes.test), rng)
    else:
        train, validation = _cut(evenly(pool, rng), (sizes.train, sizes.validation), rng)
        (test,) = _cut(evenly(distinct(corpus.held_out, known=pool), rng), (sizes.test,), rng)
    return Task(name, corpus.labels, train, validation, test)


def distinct(rows: Iterable[Labelled], known: Iterable[Labelled] = ()) -> list[Labelled]:
    """Each text once, the first time it comes and unless `known` holds it; white space folded, cut, short ones dropped.

    Texts that differ in case alone are the same text.
    """
    seen = {text.casefold() for text, _ in known}
    kept = []
    for raw, index in rows:
        text = " ".join(raw.split())[:MAX_CHARACTERS]
        if len(text) >= MIN_CHARACTERS and text.casefold() not in seen:
            seen.add(text.casefold())
            kept.append((text, index))
    return kept


def evenly(rows: Sequence[Labelled], rng: random.Random) -> list[Labelled]:
    """All rows, shuffled, then dealt class by class in turn: every prefix is as balanced as the rows allow."""
    shuffled = rng.sample(rows, len(rows))
    dealt: dict[int, int] = {}
    turns = []
    for row in shuffled:
        turns.append(dealt.get(row[1], 0))
        dealt[row[1]] = turns[-1] + 1
    order = sorted(range(len(shuffled)), key=turns.__getitem__)
    return [shuffled[position] for position in order]


def _cut(rows: Sequence[Labelled], sizes: tuple[int, ...], rng: random.Random) -> list[list[Labelled]]:
    """The first sum(sizes) rows, shuffled so that every piece has the same mixture, in consecutive pieces."""
    chosen = list(rows[: sum(sizes)])
    rng.shuffle(chosen)
    bounds = [round(len(chosen) * sum(sizes[:piece]) / sum(sizes)) for piece in range(len(sizes) + 1)]
    return [chosen[start:stop] for start, stop in pairwise(bounds)]

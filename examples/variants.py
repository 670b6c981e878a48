"""The rows of the ablation: ESM with parts of it switched off or exchanged, and two methods for reference."""

from __future__ import annotations

from dataclasses import dataclass

from capturing import Sampling
from merging import METHODS, Method


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of the table: a merge method, and the statistics it gets."""

    method: Method
    texts: int = 32
    foreign: bool = False  # each expert's statistics come from the next task's texts
    identities: bool = False  # its moments are identity matrices: what no text says
    repeated: bool = False  # once for every sampling seed, not for the first alone

    def samplings(self, seeds: int) -> list[Sampling]:
        """One per run of the row."""
        return [Sampling(self.texts, seed, self.foreign) for seed in range(seeds if self.repeated else 1)]


def _levels(**exponents: float) -> tuple[tuple[str, float], ...]:
    """All of ESM's scalings off but the given ones."""
    levels = ("eigenvalue_power", "task_exponent", "dimension_exponent", "layer_exponent")
    return tuple((level, exponents.get(level, 0.0)) for level in levels)


def _esm(title: str, *parameters: tuple[str, float | str]) -> Method:
    return Method(title, "esm", parameters, needs_statistics=True)


TEXT = ("preset", "text")
FULL = "text, 32 samples"

VARIANTS = (
    Variant(_esm("no scaling", *_levels())),
    Variant(_esm("eigenvalue weights alone", *_levels(eigenvalue_power=0.15))),
    Variant(_esm("task level alone", *_levels(task_exponent=2.0))),
    Variant(_esm("dimension level alone", *_levels(dimension_exponent=2.0))),
    Variant(_esm("layer level alone", *_levels(layer_exponent=2.0))),
    Variant(_esm("vit, 32 samples", ("preset", "vit")), repeated=True),
    Variant(_esm(FULL, TEXT), repeated=True),
    Variant(_esm("text, SVD instead of ESD", TEXT), identities=True),
    Variant(_esm("text, 1 sample", TEXT), texts=1, repeated=True),
    Variant(_esm("text, 4 samples", TEXT), texts=4, repeated=True),
    Variant(_esm("text, 32 foreign samples", TEXT), foreign=True, repeated=True),
    *(Variant(method) for method in METHODS if method.recipe_name in ("tsvm", "iso_cts")),
)

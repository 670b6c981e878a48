"""Where a module reads the inputs of its matrices, and what those matrices are called in a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from isomerge.checkpoint import Checkpoint, from_state_dict
from isomerge.families import Family, Shapes, classify, recognise
from isomerge.statistics import sample_values


@dataclass(frozen=True, slots=True)
class Site:
    """One call site of the matrix `name` [m, n]: the inputs of `module`; `packed`: the in_proj of an attention."""

    name: str
    module: nn.Module
    parameter: nn.Parameter
    m: int
    n: int
    transposed: bool
    packed: bool


@dataclass(slots=True)
class Sites:
    """All call sites of linear layers in a module, and the matrices for which there are none, with the reason."""

    sites: list[Site] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def find_sites(model: nn.Module) -> Sites:
    """Every linear layer of a module: torch's own and its subclasses, transformers' Conv1D, and attentions of torch.

    Names are those of the state dict; a parameter with several names goes by the first, and counts the calls of every
    module that holds it.
    """
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    family = recognise({name: tuple(value.shape) for name, value in state.items()})
    found = Sites()
    names: dict[int, str] = {}
    for name, value in state.items():
        names.setdefault(id(value), name)
    for module in model.modules():
        for site, reason in _sites_of(module, names):
            if isinstance(site, Site):
                found.sites.append(site)
            else:
                found.left_out[site] = reason
    reached = {site.name for site in found.sites} | set(found.left_out)
    for name, value in state.items():
        kind = classify(name, tuple(value.shape), value.dtype, family, "default").kind
        if kind == "matrix" and names[id(value)] == name and name not in reached:
            found.left_out[name] = "applied by no torch.nn.Linear, Conv1D or torch.nn.MultiheadAttention"
    return found


def matrix_sites(sites: Iterable[Site], names: Mapping[str, str], family: Family) -> tuple[list[Site], dict[str, str]]:
    """The sites of what a merge takes for a matrix, by its name in a checkpoint of `family`; all in an unknown family.

    Of the others, the second result has those that a merge takes for a matrix and that are not usable, with the reason.
    """
    chosen, left_out = [], {}
    for site in sites:
        name = names.get(site.name, site.name)
        kind = classify(name, tuple(site.parameter.shape), site.parameter.dtype, family, "default")
        if kind.kind != "matrix" and family.name != "generic":
            continue
        if site.name not in names:
            left_out[site.name] = "not in the checkpoint"
        elif kind.kind == "matrix" and kind.transposed != site.transposed:
            left_out[site.name] = "stored [in, out] under a name of another family"
        else:
            chosen.append(site)
    return chosen, left_out


def _sites_of(module: nn.Module, names: Mapping[int, str]) -> Iterator[tuple[Site | str, str]]:
    """The sites of one module by itself; or the name of a matrix that it has, and why there is no site."""

    def own(key: str) -> nn.Parameter | None:
        value = module._parameters.get(key)
        usable = value is not None and value.dim() == 2 and value.is_floating_point() and id(value) in names
        return value if usable else None

    if isinstance(module, nn.MultiheadAttention):
        packed = own("in_proj_weight")
        if packed is not None and runs_as_torch(module):
            yield Site(names[id(packed)], module, packed, packed.shape[0], packed.shape[1], False, True), ""
        elif packed is not None:
            yield names[id(packed)], "in an attention with a forward of its own"
        for value in map(own, ("q_proj_weight", "k_proj_weight", "v_proj_weight")):
            if value is not None:
                yield names[id(value)], "in an attention whose inputs have different widths"
        return
    weight = own("weight")
    if weight is None:
        return
    if isinstance(module, nn.Linear):
        yield Site(names[id(weight)], module, weight, weight.shape[0], weight.shape[1], False, False), ""
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # of transformers: x @ weight + bias
        yield Site(names[id(weight)], module, weight, weight.shape[1], weight.shape[0], True, False), ""


def runs_as_torch(attention: nn.MultiheadAttention) -> bool:
    """Whether an attention has torch's own forward, so that what it reads and calls is known."""
    return type(attention).forward is nn.MultiheadAttention.forward


@contextmanager
def out_proj_is_called(attention: nn.MultiheadAttention) -> Iterator[None]:
    """Makes an attention call its out_proj as a module, on the same input as the product that it hides in a function.

    The attention runs with the identity in the place of out_proj, and out_proj on its result.
    """
    original = cast(Callable[..., tuple[Tensor, object]], attention.forward)
    shadowed = "forward" in attention.__dict__
    stands_in: list[nn.Linear] = []

    def forward(*arguments: object, **keywords: object) -> object:
        real = attention.out_proj
        if not stands_in:
            width, like = real.out_features, real.weight
            # skip_init: drawing initial weights would move the caller's random state
            identity = nn.utils.skip_init(nn.Linear, width, width, device=like.device, dtype=like.dtype)
            identity.requires_grad_(False)
            nn.init.eye_(identity.weight)
            nn.init.zeros_(identity.bias)
            stands_in.append(identity)
        attention._modules["out_proj"] = stands_in[0]
        try:
            result, weights = original(*arguments, **keywords)
        finally:
            attention._modules["out_proj"] = real
        return real(result), weights

    attention.__dict__["forward"] = forward
    try:
        yield
    finally:
        if shadowed:
            attention.__dict__["forward"] = original
        else:
            del attention.__dict__["forward"]


def match_names(names: Shapes, tensors: Shapes) -> dict[str, str]:
    """Names of a module -> names of a checkpoint, for those that are in it in their shapes; shapes by name.

    The two may differ by a prefix, one for all: `encoder.layer.0.x` is `bert.encoder.layer.0.x`. The prefixes are what
    the longest common suffixes leave, and of those the pair under which most names are found. Nothing is matched where
    two pairs fit equally well, unless one of them is no prefix at all.
    """
    if all(tensors.get(name) == shape for name, shape in names.items()):
        return {name: name for name in names}  # no other pair can have more votes
    by_ending: dict[object, list[str]] = {}
    for name, shape in tensors.items():
        by_ending.setdefault((*name.split(".")[-2:], shape), []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for name, shape in names.items():
        for other in by_ending.get((*name.split(".")[-2:], shape), ()):
            votes[_prefixes(name, other)] += 1
    most = max(votes.values(), default=0)
    best = sorted(pair for pair, count in votes.items() if count == most)
    if not best or (len(best) > 1 and best[0] != ("", "")):
        return {}
    own, theirs = best[0]
    mapped = {name: theirs + name[len(own) :] for name in names if name.startswith(own)}
    return {name: other for name, other in mapped.items() if tensors.get(other) == names[name]}


def match_values(parameters: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, str]:
    """Names of a module -> names of the checkpoint that it was loaded from, told by the values alone.

    For modules whose library renames what it loads. Values are compared in the dtype of the parameter, up to 256 of
    them; one that fits several tensors, or shares its tensor with another, is left out.
    """
    wanted = {(tuple(value.shape), value.dtype) for value in parameters.values()}
    by_values: dict[object, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        for shape, dtype in wanted:
            if info.shape == shape and info.dtype.is_floating_point:
                by_values.setdefault((shape, dtype, sample_values(checkpoint, name, dtype)), []).append(name)
    mapped: dict[str, str] = {}
    for name, value in parameters.items():
        own = sample_values(from_state_dict({name: value}, "the model"), name, value.dtype)
        fits = by_values.get((tuple(value.shape), value.dtype, own), [])
        if len(fits) == 1:
            mapped[name] = fits[0]
    count = Counter(mapped.values())
    return {name: other for name, other in mapped.items() if count[other] == 1}


def _prefixes(name: str, other: str) -> tuple[str, str]:
    """What is left of both names, trailing dot included, before their longest common suffix of whole parts."""
    left, right = name.split("."), other.split(".")
    common = 0
    while common < min(len(left), len(right)) and left[-1 - common] == right[-1 - common]:
        common += 1
    heads = left[: len(left) - common], right[: len(right) - common]
    return tuple("".join(f"{part}." for part in head) for head in heads)  # type: ignore[return-value]

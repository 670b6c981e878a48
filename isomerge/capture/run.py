"""Runs a module on batches and sums what each of its matrices sees; everything it changes on the module it undoes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from isomerge.capture.masks import Masks
from isomerge.capture.moments import Moments
from isomerge.capture.sites import (
    Site,
    find_sites,
    match_names,
    match_values,
    matrix_sites,
    out_proj_is_called,
    runs_as_torch,
)
from isomerge.checkpoint import Checkpoint, from_state_dict, open_checkpoint
from isomerge.errors import InputError
from isomerge.families import recognise
from isomerge.statistics import Layer, as_moment, fingerprint, sample_values, write_statistics

Weights = str | Path | Checkpoint | Mapping[str, Tensor] | nn.Module

_SHOWN = 3  # names in a warning


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a capture is; `samples_total` is None where nobody said how many there are."""

    batches_done: int
    samples_done: int
    samples_total: int | None
    tokens: int


@dataclass(slots=True)
class Captured:
    """What a capture found.

    stored    stored name -> YᵀY [d, d], or the inputs Y [tokens, d] where those are fewer than d, on the CPU
    layers    tensor name -> what it saw, and its stored name
    samples   how many samples the model was run on
    tokens    rows that the layer with most of them saw
    warnings  what was left out and what the numbers are too few for, one line each
    fingerprint, base_fingerprint   as in `statistics.Statistics`
    """

    stored: dict[str, Tensor]
    layers: dict[str, Layer]
    samples: int
    fingerprint: str
    base_fingerprint: str | None = None
    warnings: list[str] = field(default_factory=list)
    _moments: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def moments(self) -> dict[str, Tensor]:
        """Stored name -> YᵀY [d, d], float32 or float64; computed where the inputs are stored, the first time."""
        if not self._moments:
            self._moments = {name: as_moment(value) for name, value in self.stored.items()}
        return self._moments

    @property
    def tokens(self) -> int:
        return max(layer.tokens for layer in self.layers.values())

    def save(self, path: str | Path, *, overwrite: bool = False) -> int:
        """Writes the statistics file, which appears whole or not at all; the number of bytes written."""
        check_place(path, overwrite)
        return write_statistics(
            path,
            self.stored,
            self.layers,
            samples=self.samples,
            fingerprint=self.fingerprint,
            base_fingerprint=self.base_fingerprint,
        )


def capture(
    model: nn.Module,
    batches: Iterable[object],
    *,
    path: str | Path | None = None,
    checkpoint: Weights | None = None,
    base: Weights | None = None,
    names: Iterable[str] | None = None,
    forward: Callable[..., object] | None = None,
    samples: int | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Captured:
    """XᵀX of the inputs X [tokens, n] of every matrix of a model, over all batches; saved to `path` if it is given.

    A batch is a tensor, a tuple of positional or a mapping of keyword arguments of `model`, or of `forward` (such as
    `model.encode_image`) if that is given; its tensors are moved to the model's device. Rows that a 2-D
    `attention_mask` of the batch sets to 0 do not count. The model runs in eval mode and without gradients, and is
    afterwards as it was. Batches are read once, one at a time.

    checkpoint  where the model was loaded from: gives layers their names and the fingerprint; else the state dict does
    base        the model it was tuned from, or where that is: layers with m < n then keep the moment [m, m] of X Δᵀ,
                Δ = model - base
    names       patterns (`*.mlp.*`) of the layers to capture; all matrices of linear layers by default
    samples     how many samples the batches hold; by default their first dimensions are counted
    dtype       of the sums, float32 or float64; products are taken in float32, or float64 for a float64 model

    Layers that always read the same tensors share one moment, and those that see fewer tokens than they have inputs
    keep the inputs instead, [tokens, n] in the model's dtype. InputError for inputs that cannot be used.
    """
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"capture: dtype: expected torch.float32 or torch.float64, got {dtype}")
    if path is not None:
        check_place(path, overwrite)
    with ExitStack() as stack:
        weights = _weights(model if checkpoint is None else checkpoint, "the model", stack)
        before = None if base is None else _weights(base, "base", stack)
        run = _Run(model, weights, before, names, dtype, own_names=checkpoint is None)
        counted, seen = 0, 0
        with run.watching():
            for batch in batches:
                counted += run.batch(batch, forward or model)
                seen += 1
                if progress is not None:
                    progress(Progress(seen, counted, samples, run.tokens()))
            run.moments.flush()
        if seen == 0:
            raise InputError("capture: there are no batches; give at least one sample")
        result = run.result(counted if samples is None else samples)
    if path is not None:
        result.save(path, overwrite=overwrite)
    return result


def check_place(path: str | Path, overwrite: bool) -> None:
    """InputError if something is at `path` that is not to be replaced, or if its folder cannot be written to."""
    if os.path.isdir(path):
        raise InputError(f"{path}: the output is a folder, expected the name of a file to write")
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"{path}: the output exists already; choose another name, or overwrite it (--force)")
    above = next(parent for parent in Path(os.path.abspath(path)).parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{path}: the file cannot be written here: {above} is no folder to write to; choose another")


def _weights(given: Weights, label: str, stack: ExitStack) -> Checkpoint:
    if isinstance(given, Checkpoint):
        return given
    if isinstance(given, nn.Module):
        given = {name: value for name, value in given.state_dict().items() if isinstance(value, Tensor)}
    if isinstance(given, Mapping):
        return from_state_dict(given, label)
    return stack.enter_context(open_checkpoint(given))


class _Run:
    """One capture: the sites of a model, their sums, and the masks of the batch that is running."""

    def __init__(
        self,
        model: nn.Module,
        weights: Checkpoint,
        base: Checkpoint | None,
        names: Iterable[str] | None,
        dtype: torch.dtype,
        own_names: bool,
    ) -> None:
        """`own_names`: whether `weights` are the model's own state dict, so that names need not be looked for."""
        self.model, self.weights, self.base = model, weights, base
        found = find_sites(model)
        if not found.sites:
            raise InputError(f"capture: {type(model).__name__} has no torch.nn.Linear, Conv1D or attention to capture")
        self.warnings: list[str] = []
        family = recognise(_shapes(weights))
        if family.name == "generic":
            self.warnings.append("the model is of no known family: every torch.nn.Linear is captured")
        if own_names:
            mapped = {site.name: site.name for site in found.sites}
        else:
            mapped = _names_in(weights, {site.name: site.parameter for site in found.sites})
        self.sites, unusable = matrix_sites(found.sites, mapped, family)
        if not self.sites:
            raise InputError(f"{weights.label}: no matrix of the model is in it; give the model's own weights")
        self.left_out = {**found.left_out, **unusable}
        self.names = {site.name: mapped[site.name] for site in self.sites}
        if names is not None:
            self._keep(names)
        self.by_name = {site.name: site for site in self.sites}
        self.base_names = {} if base is None else self._names_in_base(base)
        self.moments = Moments(dtype, self._delta, lambda name: self.by_name[name].m)
        self.dropped: dict[str, str] = {}
        self._masks = Masks(model, self.names)
        parameters = list(model.parameters())
        devices = {p.device for p in parameters}
        self._device = devices.pop() if len(devices) == 1 else None

    def _keep(self, names: Iterable[str]) -> None:
        """Only the layers whose name in the module or the checkpoint matches a pattern."""
        chosen: set[str] = set()
        for pattern in [names] if isinstance(names, str) else names:
            hits = {
                own for own, theirs in self.names.items() if fnmatchcase(own, pattern) or fnmatchcase(theirs, pattern)
            }
            if not hits:
                raise InputError(
                    f"capture: names: {pattern!r} is the name of no layer, such as {next(iter(self.names))}"
                )
            chosen |= hits
        self.names = {own: theirs for own, theirs in self.names.items() if own in chosen}
        self.sites = [site for site in self.sites if site.name in chosen]
        self.left_out = {}

    def _names_in_base(self, base: Checkpoint) -> dict[str, str]:
        """The base's name of every layer: as in the expert's checkpoint, or as in the module."""
        shapes = {site.name: tuple(site.parameter.shape) for site in self.sites}
        theirs = match_names({self.names[own]: shape for own, shape in shapes.items()}, _shapes(base))
        found = {**match_names(shapes, _shapes(base)), **{k: theirs[v] for k, v in self.names.items() if v in theirs}}
        missing = sorted(set(shapes) - set(found))
        if missing:
            name, shape = self.names[missing[0]], list(shapes[missing[0]])
            raise InputError(f"{base.label}: {name} {shape} is missing; give the base that the expert was tuned from")
        return found

    # While running

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every site, eval mode, no gradients and no fused attention inside; all as before outside."""
        training = [(module, module.training) for module in self.model.modules()]
        fused = torch.backends.mha.get_fastpath_enabled()
        with ExitStack() as stack:
            try:
                for site in self.sites:
                    hook = self._attention_hook(site) if site.packed else self._linear_hook(site)
                    stack.callback(site.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                for module in self.model.modules():
                    if isinstance(module, nn.MultiheadAttention) and runs_as_torch(module):
                        stack.enter_context(out_proj_is_called(module))
                torch.backends.mha.set_fastpath_enabled(False)  # it would bypass the modules inside an encoder layer
                self.model.eval()
                # Not inference mode, even inside one: its tensors do not tell whether they were changed in place.
                with torch.inference_mode(False), torch.no_grad():
                    yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fused)
                for module, flag in training:
                    module.training = flag

    def batch(self, batch: object, call: Callable[..., object]) -> int:
        """Runs one batch; the number of its samples."""
        arguments, keywords = _arguments(batch)
        if self._device is not None:
            arguments = tuple(_to(value, self._device) for value in arguments)
            keywords = {name: _to(value, self._device) for name, value in keywords.items()}
        self._masks.take(arguments, keywords)
        call(*arguments, **keywords)
        self.moments.end_of_batch()
        first = next((v for v in (*arguments, *keywords.values()) if isinstance(v, Tensor) and v.dim() > 0), None)
        return 0 if first is None else len(first)

    def tokens(self) -> int:
        return max((found.tokens for found in self.moments.sums()), default=0)

    def _linear_hook(self, site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object]) -> None:
            given = (*arguments, *keywords.values())
            if given and isinstance(given[0], Tensor) and given[0].shape[-1:] == (site.n,):
                self._add(site, given[0])

        return hook

    def _attention_hook(self, site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object]) -> None:
            given = [*arguments[:3], *(keywords[key] for key in ("query", "key", "value") if key in keywords)]
            query, key, value = (x if isinstance(x, Tensor) else torch.empty(0) for x in (given + [None] * 3)[:3])
            if _same(query, key) and _same(query, value):
                self._add(site, query)
            else:
                self.dropped[site.name] = "query, key and value are not one tensor"

        return hook

    def _add(self, site: Site, X: Tensor) -> None:
        space = "output" if self.base is not None and site.m < site.n else "input"
        rule, rows = self._masks.rows(site.name, site.module, X)
        self.moments.add(site.name, X, rows, space=space, rule=rule)

    def _delta(self, name: str) -> Tensor:
        """Δ [m, n] of a layer, in float32 or wider: read and subtracted anew for every batch, never kept."""
        assert self.base is not None
        site = self.by_name[name]
        weight = site.parameter.detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        before = self.base.read(self.base_names[name]).to(weight.device, dtype)
        delta = torch.sub(weight, before, out=before)
        return delta.mT if site.transposed else delta

    # Afterwards

    def result(self, samples: int) -> Captured:
        """The moments under the checkpoint's names, and everything there is to say."""
        layers: dict[str, Layer] = {}
        stored: dict[str, Tensor] = {}
        for found in self.moments.sums():
            names = sorted(self.names[name] for name in found.members if name not in self.dropped)
            if names and found.tokens == 0:
                self.dropped.update(dict.fromkeys(found.members, "the attention mask keeps none of its tokens"))
                continue
            value = found.stored()
            if not names or value is None:
                continue
            stored[names[0]] = value.to("cpu")
            layer = Layer(found.tokens, found.space, value.shape[1], names[0])
            layers.update(dict.fromkeys(names, layer))
        never = set(self.by_name) - {name for name, _ in self.moments} - set(self.dropped)
        self.dropped.update(dict.fromkeys(never, "never ran"))
        warnings = self.warnings + _by_reason({**self.left_out, **self.dropped})
        if not layers:
            raise InputError(f"capture: nothing was captured: {'; '.join(warnings)}")
        few = [name for name in sorted(layers) if layers[name].tokens < layers[name].size]
        if few:
            worst = min(few, key=lambda name: layers[name].tokens / layers[name].size)
            warnings.append(
                f"{len(few)} of {len(layers)} layers saw fewer tokens than the size of their moment, at worst {worst}:"
                f" {layers[worst].tokens} for {layers[worst].size}; give more samples"
            )
        base, own = None, {theirs: name for name, theirs in self.names.items()}
        shifts = [self.base_names[own[name]] for name, layer in layers.items() if layer.space == "output"]
        if self.base is not None and shifts:
            base = fingerprint(self.base, shifts)
        order = {name: layers[name] for name in sorted(layers)}
        return Captured(stored, order, samples, fingerprint(self.weights, layers), base, warnings)


def _arguments(batch: object) -> tuple[tuple[object, ...], dict[str, object]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, tuple):
        return batch, {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    raise InputError(
        f"capture: a batch is a {type(batch).__name__}, expected a tensor, a tuple of positional arguments or a mapping"
        " of keyword arguments"
    )


def _to(value: object, device: torch.device) -> object:
    return value.to(device) if isinstance(value, Tensor) else value


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are the same memory, seen in the same way."""
    if left is right:
        return True
    places = [(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in (left, right)]
    return left.numel() > 0 and places[0] == places[1]


def _names_in(weights: Checkpoint, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of a module's parameters in the checkpoint it was loaded from: by name and value, else by value alone."""
    named = match_names({name: tuple(value.shape) for name, value in parameters.items()}, _shapes(weights))
    own = from_state_dict(dict(parameters), "the model")
    sure = {
        name: other
        for name, other in named.items()
        if sample_values(own, name) == sample_values(weights, other, parameters[name].dtype)
    }
    rest = {name: value for name, value in parameters.items() if name not in sure}
    found = match_values(rest, weights) if rest else {}
    return {**sure, **{name: other for name, other in found.items() if other not in sure.values()}}


def _shapes(weights: Checkpoint) -> dict[str, tuple[int, ...]]:
    shapes = {name: info.shape for name, info in weights.tensors.items()}
    return {**shapes, **{name: shapes[first] for name, first in weights.aliases.items()}}


def _by_reason(left_out: Mapping[str, str]) -> list[str]:
    """One line per reason, with the names of the first layers."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    return [f"left out, {reason}: {_listed(sorted(names))}" for reason, names in reasons.items()]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

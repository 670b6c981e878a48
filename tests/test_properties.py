"""What holds for every header, layout of shards and set of keys: drawn by hypothesis, held to the library and the
definition.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import hypothesis.strategies as st
import pytest
import tiny
import torch
from checkpoints import DTYPES, pickles, random_tensor, same, write_sharded
from hypothesis import assume, given, settings
from safetensors.torch import load, save
from torch import Tensor

from isomerge.checkpoint import TensorSpec, Writer, open_checkpoint
from isomerge.checkpoint.format import Entry, build_header, parse_header
from isomerge.errors import InputError
from isomerge.merge import merge

quick = settings(max_examples=40, deadline=None)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
names = texts.filter(lambda name: name != "__metadata__")
tensors = st.builds(
    random_tensor, st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3).map(tuple), st.integers(0, 99)
)
state_dicts = st.dictionaries(names, tensors, max_size=7)


@quick
@given(state=state_dicts, metadata=st.dictionaries(texts, texts, max_size=3), data=st.data())
def test_headers_and_their_metadata_go_both_ways(
    state: dict[str, Tensor], metadata: dict[str, str], data: st.DataObject
) -> None:
    """In whatever order: a header lists tensors by name, by offset, or neither."""
    stored, entries, end = data.draw(st.permutations(list(state))), {}, 0
    for name in stored:
        nbytes = state[name].nbytes
        entries[name] = Entry(name, state[name].dtype, tuple(state[name].shape), end, end + nbytes)
        end += nbytes
    header = build_header([entries[name] for name in data.draw(st.permutations(stored))], metadata)
    found, found_metadata = parse_header(Path("ours"), header[8:], end)
    assert {entry.name: entry for entry in found} == entries
    assert [entry.begin for entry in found] == sorted(entry.begin for entry in found)
    assert found_metadata == metadata
    content = header + b"".join(bytes(state[name].reshape(-1).view(torch.uint8).tolist()) for name in stored)
    assert_equal(load(content), state)
    theirs = save(state, metadata or None)
    length = int.from_bytes(theirs[:8], "little")
    found, found_metadata = parse_header(Path("theirs"), theirs[8 : 8 + length], len(theirs) - 8 - length)
    assert {(e.name, e.dtype, e.shape) for e in found} == {(n, t.dtype, tuple(t.shape)) for n, t in state.items()}
    assert found_metadata == metadata


@quick
@given(state=state_dicts.filter(bool), suffix=st.sampled_from([".safetensors", ".bin"]), data=st.data())
def test_any_layout_of_shards_holds_the_same_tensors(
    state: dict[str, Tensor], suffix: str, data: st.DataObject
) -> None:
    assume(suffix != ".bin" or all(pickles(tensor.dtype) for tensor in state.values()))
    homes = {name: data.draw(st.integers(0, 3)) for name in state}
    shards = {
        f"s{home}{suffix}": {name: state[name] for name in state if homes[name] == home}
        for home in sorted(set(homes.values()))
    }
    ties = {}
    if suffix == ".bin":  # a torch file keeps that two names are one tensor
        for shard in shards.values():
            for name in data.draw(st.lists(st.sampled_from(list(shard)), unique=True)):
                if state[name].numel():
                    ties[f"{name} tied"] = name
                    shard[f"{name} tied"] = state[name]
    with tempfile.TemporaryDirectory() as folder, open_checkpoint(write_sharded(Path(folder) / "m", shards)) as found:
        assert dict(found.aliases) == ties
        assert_equal({name: found.read(name) for name in (*found.tensors, *found.aliases)}, tied(state, ties))


@quick
@given(state=state_dicts, shard_bytes=st.integers(1, 300), data=st.data())
def test_what_is_written_in_any_order_and_size_of_shards_is_the_same(
    state: dict[str, Tensor], shard_bytes: int, data: st.DataObject
) -> None:
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        with Writer(out, specs, shard_bytes=shard_bytes) as writer:
            for name in data.draw(st.permutations(list(state))):
                cut = data.draw(st.integers(0, state[name].numel()))
                pieces = {0: state[name].reshape(-1)[:cut], cut: state[name].reshape(-1)[cut:]}
                for start in data.draw(st.permutations(sorted(pieces))):
                    writer.write(name, pieces[start], start)
            writer.commit()
        assert_equal(tiny.load_output(out), state)
        with open_checkpoint(out) as checkpoint:
            assert_equal({name: checkpoint.read(name) for name in checkpoint.tensors}, state)


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(same(found[name], value) for name, value in expected.items())


def tied(state: Mapping[str, Tensor], ties: Mapping[str, str]) -> dict[str, Tensor]:
    return {**state, **{alias: state[name] for alias, name in ties.items()}}


KEYS = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.up_proj.bias",
    "model.norm.weight",
)
SHAPES = dict(zip(KEYS, ((7, 4), (6, 4), (6,), (4,)), strict=True))
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FAULTS = ("missing", "renamed", "reshaped", "transposed", "whole numbers", "scaled")
CHANGES = ("same", "other dtype", *FAULTS)


@st.composite
def key_sets(draw: st.DrawFn) -> tuple[list[dict[str, Tensor]], set[tuple[int, str]], set[str]]:
    """Base and experts; the (expert, key) that cannot be merged; the keys that a rule keeps as the base has them."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def new(name: str, dtype: torch.dtype) -> Tensor:
        return torch.randn(SHAPES[name], generator=random).to(dtype)

    chosen = draw(st.lists(st.sampled_from(KEYS), min_size=1, unique=True))
    base = {name: new(name, draw(st.sampled_from(FLOATS))) for name in chosen}
    base["model.steps"] = torch.tensor([3, 4])
    kept = set(draw(st.lists(st.sampled_from(chosen), unique=True)))
    experts: list[dict[str, Tensor]] = []
    faults: set[tuple[int, str]] = set()
    sound = draw(st.booleans())
    for number in range(draw(st.integers(1, 3))):
        expert = {"model.steps": base["model.steps"] + 1} if draw(st.booleans()) else {}
        for name in chosen:
            change = draw(st.sampled_from(CHANGES[:2] if sound and name not in kept else CHANGES))
            value = new(name, draw(st.sampled_from(FLOATS)) if change == "other dtype" else base[name].dtype)
            expert |= changed(name, value, change)
            same_shape = change == "transposed" and value.mT.shape == value.shape if value.dim() == 2 else False
            if change in FAULTS and name not in kept and not same_shape:
                faults.add((number, name))
        if draw(st.booleans()):
            expert["model.layers.1.extra.weight"] = torch.randn(3, 3, generator=random)
        experts.append(expert)
    return [base, *experts], faults, kept


def changed(name: str, value: Tensor, change: str) -> dict[str, Tensor]:
    """The entries that an expert has in place of the tensor `name`."""
    return {
        "missing": {},
        "renamed": {f"other.{name}": value},
        "reshaped": {name: torch.cat([value, value[:1]])},
        "transposed": {name: value.mT.contiguous() if value.dim() == 2 else value[None]},
        "whole numbers": {name: value.to(torch.int8)},
        "scaled": {name: value.to(torch.float8_e4m3fn)},
    }.get(change, {name: value})


def by_definition(states: list[dict[str, Tensor]], kept: set[str]) -> dict[str, Tensor]:
    """base + the sum of the updates, in float32, or float64 where an input is, tensor by tensor."""
    base, result = states[0], {}
    for name, value in base.items():
        if name in kept or not value.is_floating_point():
            result[name] = value
            continue
        wide = torch.float64 if any(state[name].dtype == torch.float64 for state in states) else torch.float32
        update = sum(state[name].to(wide) - value.to(wide) for state in states[1:])
        result[name] = (value.to(wide) + update).to(value.dtype)
    return result


@settings(max_examples=80, deadline=None)
@given(drawn=key_sets())
def test_any_set_of_keys_merges_by_definition_or_is_refused_by_name(
    drawn: tuple[list[dict[str, Tensor]], set[tuple[int, str]], set[str]],
) -> None:
    states, faults, kept = drawn
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [folder / "base", *(folder / f"e{number}" for number in range(len(states) - 1))]
        for path, state in zip(paths, states, strict=True):
            tiny.save_model(path, state)
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": str(paths[0]),
            "models": [{"model": str(path)} for path in paths[1:]],
            "rules": [{"filter": key, "keep_base": True} for key in sorted(kept)],
        }
        before = sorted(folder.rglob("*"))
        if not faults:
            merge(recipe, folder / "out")
            tiny.assert_same(tiny.load_output(folder / "out"), by_definition(states, kept))
            return
        with pytest.raises(InputError) as caught:
            merge(recipe, folder / "out")
        assert sorted(folder.rglob("*")) == before
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        assert any(message.startswith(f"{paths[1 + number]}: {key}") for number, key in faults), message

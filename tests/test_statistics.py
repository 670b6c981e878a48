"""The statistics file: round trip, exact bytes, fingerprints, and one clear line for each way to be wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from isomerge.checkpoint import from_state_dict, open_checkpoint, write_safetensors
from isomerge.errors import InputError
from isomerge.statistics import KEY, Layer, fingerprint, moment_fault, open_statistics, write_statistics

LAYERS = {
    "a.q.weight": Layer(12, "input", 6, "a.k.weight"),
    "a.k.weight": Layer(12, "input", 6, "a.k.weight"),
    "b.weight": Layer(7, "output", 3, "b.weight"),
    "c.weight": Layer(4, "input", 6, "c.weight"),
}


def gram(d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    X = torch.randn(2 * d, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return X.mT @ X


def inputs(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(5)).to(dtype)


def stored() -> dict[str, Tensor]:
    return {"b.weight": gram(3), "c.weight": inputs(), "a.k.weight": gram(6, torch.float64)}


def write(path: Path) -> Path:
    write_statistics(path, stored(), LAYERS, samples=5, fingerprint="ab" * 32, base_fingerprint="cd" * 32)
    return path


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "expert.safetensors"
    written = write_statistics(path, stored(), LAYERS, samples=5, fingerprint="f", base_fingerprint="b")
    assert written == path.stat().st_size
    with open_statistics(path) as statistics:
        assert dict(statistics.layers) == LAYERS
        assert (statistics.path, statistics.samples) == (path, 5)
        assert (statistics.fingerprint, statistics.base_fingerprint) == ("f", "b")
        for name, layer in LAYERS.items():
            found = statistics.stored(name)
            assert found.dtype == stored()[layer.stored].dtype
            assert torch.equal(found, stored()[layer.stored])
            assert statistics.holds_inputs(name) == (name == "c.weight")
            if name != "c.weight":
                assert torch.equal(statistics.moment(name), found)
        X = inputs().double()
        moment = statistics.moment("c.weight")
        assert moment.dtype == torch.float32
        assert float((moment - X.mT @ X).norm() / (X.mT @ X).norm()) < 1e-6
        with pytest.raises(KeyError):
            statistics.moment("d.weight")
    with pytest.raises(ValueError, match="close"):
        statistics.moment("b.weight")


def test_other_libraries_can_read_it_and_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    one = write(tmp_path / "one")
    found = load_file(one)
    assert {name: value.dtype for name, value in found.items()} == {
        "a.k.weight": torch.float64,
        "b.weight": torch.float32,
        "c.weight": torch.bfloat16,
    }
    with safe_open(one, "pt") as file:
        header = json.loads(file.metadata()[KEY])
    assert header["layers"]["a.q.weight"] == {"tokens": 12, "space": "input", "size": 6, "stored": "a.k.weight"}
    two = tmp_path / "two"
    shuffled = dict(reversed(stored().items()))
    write_statistics(
        two, shuffled, dict(reversed(LAYERS.items())), samples=5, fingerprint="ab" * 32, base_fingerprint="cd" * 32
    )
    assert one.read_bytes() == two.read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "s.safetensors")
    before = path.read_bytes()

    def fails(*paths: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="Input/output error"):
        write(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_place_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/s: the file cannot be written here: .*; choose another place"):
        write(tmp_path / "file" / "s")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"stored": {"b.weight": gram(3)}}, "not those that the layers are stored in"),
        ({"stored": {**stored(), "x": gram(2)}}, "not those that the layers are stored in"),
        (
            {"stored": {**stored(), "b.weight": gram(4)}},
            r"b\.weight: expected a moment \[3, 3\] in float32 or float64, got",
        ),
        (
            {"stored": {**stored(), "b.weight": gram(3).bfloat16()}},
            r"expected a moment \[3, 3\] in float32 or float64, got",
        ),
        (
            {"stored": {**stored(), "b.weight": torch.ones(2, 3)}},
            r"expected a moment \[3, 3\] in float32 or float64, got",
        ),
        (
            {"stored": {**stored(), "c.weight": torch.ones(3, 6)}},
            r"float64, or inputs \[4, 6\], got torch.float32 \(3, 6\)",
        ),
        (
            {"stored": {**stored(), "c.weight": inputs().int()}},
            r"float64, or inputs \[4, 6\], got torch.int32 \(4, 6\)",
        ),
        ({"layers": {**LAYERS, "b.weight": Layer(0, "output", 3, "b.weight")}}, "at least one token"),
        ({"layers": {**LAYERS, "b.weight": Layer(1, "both", 3, "b.weight")}}, "expected one of"),
        ({"stored": {**stored(), "b.weight": gram(3) * torch.nan}}, "9 non-finite values"),
        ({"stored": {**stored(), "c.weight": inputs() / 0}}, "the inputs have 24 non-finite values, expected none"),
    ],
)
def test_what_does_not_belong_together_is_not_written(
    tmp_path: Path, change: dict[str, dict[str, object]], expected: str
) -> None:
    arguments = {"stored": stored(), "layers": LAYERS, **change}
    with pytest.raises(ValueError, match=expected):
        write_statistics(tmp_path / "s", **arguments, samples=1, fingerprint="f", base_fingerprint="b")
    assert list(tmp_path.iterdir()) == []


def spoil(path: Path, change: Callable[[dict], object], **tensors: Tensor) -> None:
    """Rewrites a statistics file by the safetensors library, with its header changed."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[KEY])
    change(header)
    save_file({**load_file(path), **tensors}, path, {KEY: json.dumps(header)})


def layer(header: dict, **values: object) -> None:
    header["layers"]["b.weight"].update(values)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "no such file"),
    "folder": (lambda p: (p.unlink(), p.mkdir()), "this is a folder, expected a statistics file"),
    "empty": (lambda p: p.write_bytes(b""), "the file is empty"),
    "text": (lambda p: p.write_text("hello world, no statistics"), "the header length is"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "truncated"),
    "trailing": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "trailing"),
    "a model": (lambda p: save_file({"w": torch.ones(2)}, p), "not a statistics file"),
    "no JSON": (lambda p: save_file({"w": torch.ones(2)}, p, {KEY: "{"}), "is not valid JSON"),
    "a list": (lambda p: save_file({"w": torch.ones(2)}, p, {KEY: "[]"}), "expected a JSON object"),
    "newer": (lambda p: spoil(p, lambda h: h.update(format=2)), "format of the statistics is 2, expected 1"),
    "no layers": (lambda p: spoil(p, lambda h: h.update(layers={})), "expected at least one layer"),
    "layer": (lambda p: spoil(p, lambda h: h["layers"].update(x=3)), "layer 'x': is 3"),
    "tokens 0": (lambda p: spoil(p, lambda h: layer(h, tokens=0)), "layer 'b.weight': it saw 0 tokens"),
    "tokens": (lambda p: spoil(p, lambda h: layer(h, tokens=-1)), "layer 'b.weight': tokens is -1"),
    "tokens true": (lambda p: spoil(p, lambda h: layer(h, tokens=True)), "layer 'b.weight': tokens is True"),
    "space": (lambda p: spoil(p, lambda h: layer(h, space="x")), "space is 'x', expected one of input, output"),
    "stored": (lambda p: spoil(p, lambda h: layer(h, stored="x")), "its moment 'x' is not in the file"),
    "stored list": (lambda p: spoil(p, lambda h: layer(h, stored=[])), "its moment [] is not in the file"),
    "size": (lambda p: spoil(p, lambda h: layer(h, size=4)), "shape [3, 3], expected a moment [4, 4] in float32"),
    "dtype": (
        lambda p: spoil(p, lambda h: None, **{"b.weight": gram(3).half()}),
        "torch.float16 and shape [3, 3], expected a moment [3, 3] in float32 or float64; capture",
    ),
    "inputs": (
        lambda p: spoil(p, lambda h: h["layers"]["c.weight"].update(tokens=5)),
        "shape [4, 6], expected a moment [6, 6] in float32 or float64, or inputs [5, 6]; capture",
    ),
    "inputs of shifts": (
        lambda p: spoil(p, lambda h: h["layers"]["c.weight"].update(space="output")),
        "shape [4, 6], expected a moment [6, 6] in float32 or float64; capture",
    ),
    "unused": (lambda p: spoil(p, lambda h: None, more=gram(3)), "tensor 'more' belongs to no layer"),
    "samples": (lambda p: spoil(p, lambda h: h.update(samples="5")), "samples is '5'"),
    "fingerprint": (lambda p: spoil(p, lambda h: h.pop("fingerprint")), "fingerprint is None"),
    "base": (lambda p: spoil(p, lambda h: h.pop("base_fingerprint")), "base_fingerprint is missing"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_wrong_file_is_one_line(tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "s.safetensors")
    fault, expected = FAULTS[case]
    fault(path)
    with pytest.raises(InputError) as caught:
        open_statistics(path)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (gram(3).index_fill(0, torch.tensor([1]), torch.nan), "3 non-finite"),
        (gram(3) + torch.tensor([[0, 1e-2, 0], [0, 0, 0], [0, 0, 0]]), "not symmetric"),
        (-gram(3), "negative values on its diagonal"),
    ],
)
def test_a_wrong_moment_is_found_when_it_is_read(tmp_path: Path, value: Tensor, expected: str) -> None:
    path = write(tmp_path / "s.safetensors")
    spoil(path, lambda h: None, **{"b.weight": value})
    with open_statistics(path) as statistics:
        assert torch.equal(statistics.moment("a.q.weight"), stored()["a.k.weight"])
        with pytest.raises(InputError, match=f"b.weight: the moment .*{expected}"):
            statistics.moment("b.weight")


def test_wrong_inputs_are_found_when_they_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "s.safetensors")
    spoil(path, lambda h: None, **{"c.weight": inputs() * 1e30})
    with (
        open_statistics(path) as statistics,
        pytest.raises(InputError, match=r"c\.weight: its second moment overflows"),
    ):
        statistics.moment("c.weight")
    spoil(path, lambda h: None, **{"c.weight": inputs().index_fill(0, torch.tensor([1]), torch.inf)})
    with (
        open_statistics(path) as statistics,
        pytest.raises(InputError, match=r"c\.weight: the inputs have 6 non-finite"),
    ):
        statistics.moment("c.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_symmetric_to_rounding_is_enough_and_zero_is_a_moment(dtype: torch.dtype) -> None:
    M = gram(1100, dtype)
    eps = torch.finfo(dtype).eps
    assert moment_fault(M * (1 + 8 * eps * torch.randn_like(M))) is None
    assert moment_fault(torch.zeros(4, 4, dtype=dtype)) is None
    assert moment_fault(torch.full((4, 4), 1e38, dtype=torch.float32)) is None  # whose sum is not finite
    M[1090, 3] += 4096 * eps * M.diagonal().max()
    assert "not symmetric" in str(moment_fault(M))


# Fingerprints ---------------------------------------------------------------------------------------------------


def test_fingerprints_tell_experts_apart_and_not_dtypes_or_files(tmp_path: Path) -> None:
    base, one, two = tiny.bert_models(tmp_path, 2, torch.bfloat16)
    names = [name for name, value in base.items() if value.dim() == 2]
    prints = {}
    for label in ("base", "e0", "e1"):
        with open_checkpoint(tmp_path / label) as checkpoint:
            prints[label] = fingerprint(checkpoint, names)
            assert fingerprint(checkpoint, reversed(names)) == prints[label]
            assert fingerprint(checkpoint, names[1:]) != prints[label]
    assert len(set(prints.values())) == 3
    loaded = from_state_dict({name: value.float() for name, value in one.items() if value.is_floating_point()}, "m")
    floats = [name for name in names if base[name].is_floating_point()]
    with open_checkpoint(tmp_path / "e0") as checkpoint:
        assert fingerprint(checkpoint, floats) == fingerprint(loaded, floats)
    assert prints["e1"] != prints["e0"]
    assert two is not one


def test_fingerprints_of_small_shapes_aliases_and_missing_names() -> None:
    W = torch.arange(300.0)
    empty = {"e": torch.empty(0, 3), "s": torch.tensor(2.0), "w": W}
    assert fingerprint(from_state_dict(empty, "m"), empty) != fingerprint(from_state_dict(empty, "m"), ["w", "e"])
    tied = from_state_dict({"a": W, "b": W}, "m")
    copied = from_state_dict({"a": W, "b": W.clone()}, "m")
    assert fingerprint(tied, ["a", "b"]) == fingerprint(copied, ["a", "b"])
    reshaped = from_state_dict({"a": W.view(20, 15), "b": W}, "m")
    assert fingerprint(tied, ["a", "b"]) != fingerprint(reshaped, ["a", "b"])
    for index in (0, 299):  # the first and the last value count
        changed = W.clone()
        changed[index] += 1
        assert fingerprint(from_state_dict({"a": changed}, "m"), ["a"]) != fingerprint(tied, ["a"])
    with pytest.raises(InputError, match="m: c is missing"):
        fingerprint(tied, ["c"])


def test_write_safetensors_refuses_what_the_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="__metadata__"):
        write_safetensors(tmp_path / "s", {"__metadata__": torch.ones(1)}, {})
    strided = torch.arange(6.0).view(2, 3).mT
    write_safetensors(tmp_path / "s", {"w": strided, "h": torch.ones(3).half()}, {"k": "v"})
    assert torch.equal(load_file(tmp_path / "s")["w"], strided)

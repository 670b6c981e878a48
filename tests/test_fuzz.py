"""What the fuzzer found, kept as inputs of its kind; a short run of it; and that it finds what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import torch
from checkpoints import write_raw, write_sharded
from fuzz import campaign
from fuzz.__main__ import TARGETS
from fuzz.campaign import Campaign

from isomerge.checkpoint import open_checkpoint
from isomerge.checkpoint.show import show
from isomerge.errors import InputError
from isomerge.recipe import load_recipe


@pytest.mark.parametrize("what", TARGETS)
def test_a_short_run_finds_nothing(tmp_path: Path, what: str) -> None:
    run = Campaign(what, TARGETS[what](tmp_path), seed=0)
    run.run(300)
    assert run.findings == {}, run.summary()
    assert any(outcome.startswith("accepted") for outcome in run.outcomes)
    assert len([outcome for outcome in run.outcomes if outcome.startswith("refused")]) > 5


class Wrong:
    """A reader with a mistake for every input, and one message that is fine."""

    def __init__(self, folder: Path) -> None:
        pass

    def make(self, random: Random) -> bytes:
        return random.choice([b"fine", b"other exception", b"long", b"invariant", b"endless", b"memory"])

    def check(self, content: bytes) -> str:
        if content == b"other exception":
            raise KeyError("x")
        if content == b"memory":
            peak = int(1e6 * campaign._peak())  # what earlier tests took, and have given back since
            torch.zeros(peak + 10**8, dtype=torch.uint8).add_(1)
        while content == b"endless":
            with suppress(Exception):
                sum(range(1000))
        assert content != b"invariant"
        raise InputError("a" * 20_000 if content == b"long" else "one line")


def test_it_finds_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "HANG", 0.2)
    monkeypatch.setattr(campaign, "SECONDS", 0.1)
    monkeypatch.setattr(campaign, "WARM_UP", 0)
    run = Campaign("wrong", Wrong(tmp_path), seed=0)
    run.run(20)
    found = "\n".join(run.findings)
    for what in ("KeyError", "more than 10000", "AssertionError", "no end", "0.1 s", "100 MB"):
        assert what in found
    inputs = [run.make(number) for number in range(20)]
    assert all(inputs[number] != b"fine" for _, number in run.findings.values())
    assert inputs == [Campaign("wrong", Wrong(tmp_path), seed=0).make(number) for number in range(20)]
    assert inputs != [Campaign("wrong", Wrong(tmp_path), seed=1).make(number) for number in range(20)]


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


HEADERS = {
    # a value that the merged file could not be written with
    "surrogate in metadata": (b'{"__metadata__":{"a":"\\ud800"}}', "not UTF-8"),
    "NaN": (b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"x":NaN}}', "not valid JSON"),
    "strides": (b'{"w":{"dtype":"F32","shape":[0,4611686018427387904,8],"data_offsets":[0,0]}}', "more than 2^63"),
    "infinity": (b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"x":-Infinity}}', "not valid JSON"),
}


@pytest.mark.parametrize(("header", "fragment"), HEADERS.values(), ids=HEADERS.keys())
def test_headers(tmp_path: Path, header: bytes, fragment: str) -> None:
    assert fragment in refusal(write_raw(tmp_path / "h.safetensors", header))


def test_metadata_of_null_is_none_as_in_the_library(tmp_path: Path) -> None:
    with open_checkpoint(write_raw(tmp_path / "h.safetensors", b'{"__metadata__":null}')) as checkpoint:
        assert checkpoint.metadata == {}


@pytest.mark.parametrize(
    "shard", ["\n.safetensors", "\x1b[2J.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors"]
)
def test_shards_that_no_message_should_repeat(tmp_path: Path, shard: str) -> None:
    folder = write_sharded(tmp_path / "m", {"one.safetensors": {"a": torch.ones(2)}})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    message = refusal(folder)
    assert "is not" in message or "not UTF-8" in message
    assert len(message) < 500


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading fails")
@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "model.safetensors.index.json"])
def test_a_disk_that_fails_under_a_header(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/proc/self/mem")  # a regular file; nothing is mapped at 0, so that reading fails
    path = tmp_path if name.endswith(".json") else tmp_path / name
    assert refusal(path) == f"{tmp_path / name}: cannot be read: Input/output error"


def test_a_path_that_the_system_refuses(tmp_path: Path) -> None:
    assert "cannot be read: File name too long" in refusal(tmp_path / ("x" * 300))


def twice(levels: int) -> bytes:
    """Opcodes of a tuple of one number, put `levels` times into a tuple with itself."""
    return b"K\x01\x85" + b"2\x86" * levels


NEW_TABLE, NAME, REBUILD = b"ccollections\nOrderedDict\n", b"X\x01\0\0\0w", b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu%stQ"
HUGE = pickle.dumps(1 << 40_000, protocol=2)[2:-1]
PICKLES = {
    "key": (b"}" + twice(24) + b"Ns", "damaged"),
    "keys": (b"}(" + twice(24) + b"Nu", "damaged"),
    "key of a mark": (b"(" + twice(24) + b"Nd", "damaged"),
    "item of a set": (b"\x8f(" + twice(24) + b"\x90", "damaged"),
    "item of a frozen set": (b"(" + twice(24) + b"\x91", "damaged"),
    "key of a number": (b"}" + HUGE + b"Ns", "damaged"),
    "shape": (b"}" + NAME + REBUILD + b"(NK\0" + twice(24) + b"K\x01\x85tRs", "make no sense"),
    "name": (b"}" + REBUILD + b"(NK\0)))tR" + twice(24) + b"s", "damaged"),
    "number in a shape": (b"}" + NAME + REBUILD + b"(NK\0" + HUGE + b"\x85K\x01\x85tRs", "40001 bits"),
    "size of a storage": (b"}" + NAME + REBUILD + b"(" + STORAGE % HUGE + b"K\0)))tRs", "damaged"),
    "bytearray": (b"\x96" + (2**28).to_bytes(8, "little"), "damaged"),
    "call of a tuple": (twice(24) + b"NR", "damaged"),
    "name of a storage": (
        b"}"
        + NAME
        + REBUILD
        + b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0\nX\x03\0\0\0cpuK\x02tQK\0)))tRs",
        "its storage data/\\n has 0 bytes",
    ),
    "copy of a table": (b"]" + NEW_TABLE + b"}\x85R", "damaged"),
}


@pytest.mark.parametrize(("text", "fragment"), PICKLES.values(), ids=PICKLES.keys())
def test_pickles_that_cost_more_than_they_say(tmp_path: Path, text: bytes, fragment: str) -> None:
    with zipfile.ZipFile(tmp_path / "p.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x05" + text + b".")
        archive.writestr("archive/data/0", bytes(8))
    tracemalloc.start()
    message = refusal(tmp_path / "p.pt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert fragment in message
    assert len(message) < 400
    assert peak < 1e6


def test_what_they_forbid_is_fine_where_it_is_small(tmp_path: Path) -> None:
    content = {"w": torch.ones(2), "sizes": {(1, 2): 3, "x": {4}}, "raw": bytearray(b"abc"), "frozen": frozenset([5])}
    torch.save(content, tmp_path / "p.pt", pickle_protocol=5)
    with open_checkpoint(tmp_path / "p.pt") as checkpoint:
        assert checkpoint.read("w").tolist() == [1, 1]


def test_values_are_shown_short() -> None:
    deep: object = (1,)
    for _ in range(24):
        deep = (deep, deep)
    endless: list[object] = []
    endless.append(endless)
    for value in (deep, endless, {"a": deep}, "x" * 10**6, [1] * 10**6, {str(i): i for i in range(10**5)}):
        assert len(show(value)) == 120
    assert show(2**5000) == "a whole number of 5001 bits"
    for plain in ([1, [2.5, None]], (1,), (), {}, {"a": 1, "b": [True]}, "a\nb", b"x", torch.float32, -3):
        assert show(plain) == repr(plain)


HEAD = "merge_method: iso_c\nbase_model: b\nmodels: [{model: e}]\n"
NINEFOLD = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} %s\n" % f"[{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES = {
    "date": ("seed: 2001-99-99", "line 4, column 7: not valid YAML: '2001-99-99' is no timestamp"),
    "int": ("seed: !!int x", "'x' is no int"),
    "bool": ("scope: !!bool x", "'x' is no bool"),
    "no digits": ("seed: 0b_", "'0b_' is no int"),
    "escape": ('scope: "\\U00110000"', "not valid YAML"),
    "digits": ("seed: " + "9" * 5000, "is no int"),
    "hexadecimal digits": ("seed: 0x" + "f" * 5000, "beyond 64 bits"),
    "beyond float": ("parameters: {alpha: " + "9" * 400 + "}", "beyond 64 bits"),
    "brackets": ("rules: " + "[" * 3000, "nested more than 50 deep"),
    "indented": ("rules:\n" + "".join(" " * level + "-\n" for level in range(1, 1500)), "nested too deeply"),
    "line break in a key": ('"a\\nb": 1', "control character"),
    "escape sequence": ('parameters: {"\\x1b[2J": 1}', "control character"),
    "itself": ("parameters: &a {alpha: *a}", "an alias (*) within what it stands for"),
    "aliases": (NINEFOLD + "parameters: {alpha: *i}", "more than 100000 values"),
    "merges": (NINEFOLD.replace("[", "{<<: [").replace("]", "]}") + "parameters: *i", "more than 100000 values"),
}


@pytest.mark.parametrize(("text", "fragment"), RECIPES.values(), ids=RECIPES.keys())
def test_recipes(tmp_path: Path, text: str, fragment: str) -> None:
    (tmp_path / "r.yaml").write_text(HEAD + text + "\n")
    with pytest.raises(InputError) as caught:
        load_recipe(tmp_path / "r.yaml")
    message = str(caught.value)
    assert message.startswith("r.yaml: ")
    assert fragment in message
    assert len(message) < 400
    assert message.isprintable()


def test_anchors_and_merge_keys_are_fine_where_they_are_few(tmp_path: Path) -> None:
    models = "models: [{model: e, parameters: &p {weight: 2}}, {model: f, parameters: *p}]\n"
    rules = "rules: [{filter: a, <<: {merge_method: average}}]\n"
    (tmp_path / "r.yaml").write_text("merge_method: ties\nbase_model: b\n" + models + rules)
    settings = load_recipe(tmp_path / "r.yaml")
    assert [model.weight for model in settings.models] == [2, 2]
    assert settings.rules[0].merge_method == "average"


def test_a_home_that_nobody_has(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(HEAD.replace("base_model: b", "base_model: ~nobody.has.this.name/b"))
    assert load_recipe(tmp_path / "r.yaml").base.path == tmp_path / "~nobody.has.this.name/b"


def test_a_recipe_whose_path_is_none() -> None:
    with pytest.raises(InputError, match="cannot be read as a recipe"):
        load_recipe(f"a{os.sep}\0")

"""Reading safetensors files and folders, held to the safetensors library, and every way a header can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoints import DTYPES, random_tensor, same, small_state_dict, write_raw, write_sharded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import isomerge
from isomerge.checkpoint import TensorSpec, Writer, from_state_dict, open_checkpoint
from isomerge.checkpoint.files import read_into
from isomerge.errors import InputError

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
layouts = st.dictionaries(
    names, st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=8
)
quick = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tensors_of(layout):
    return {name: random_tensor(dtype, tuple(shape), seed=7) for name, (dtype, shape) in layout.items()}


@quick
@given(layout=layouts)
def test_reads_what_the_library_writes(tmp_path, layout):
    tensors = tensors_of(layout)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"k": "v"})
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        assert checkpoint.metadata == {"k": "v"}
        assert [info.offset for info in checkpoint.tensors.values()] == sorted(
            info.offset for info in checkpoint.tensors.values()
        )
        for name, tensor in tensors.items():
            assert same(checkpoint.read(name), tensor)
            assert checkpoint.tensors[name].nbytes == tensor.nbytes


@quick
@given(layout=layouts)
def test_library_reads_what_is_written(tmp_path_factory, layout):
    tensors = tensors_of(layout)
    folder = tmp_path_factory.mktemp("written") / "out"
    with Writer(folder, [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit()
    loaded = load_file(folder / "model.safetensors")
    assert set(loaded) == set(tensors)
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())
    with open_checkpoint(folder) as checkpoint:
        for name, info in checkpoint.tensors.items():
            assert info.offset % info.dtype.itemsize == 0
            assert same(checkpoint.read(name), tensors[name])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_headers_raise_nothing_but_input_errors(tmp_path, data):
    content = bytearray(save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int8)}))
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, end - 1))
        piece = data.draw(st.binary(max_size=2) | st.sampled_from([b"-1", b"1e9", b"null", b"[", b"{", b'"', b"99999"]))
        content[at : at + data.draw(st.integers(0, 3))] = piece
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    try:
        with open_checkpoint(path) as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.read(name)
    except InputError as error:
        message = str(error)
    else:
        load_file(path)  # what is accepted, the library accepts
        return
    assert message.startswith(str(path))
    assert "\n" not in message


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def without(key):
    return {name: value for name, value in entry().items() if name != key}


HEADERS = {
    "not json": (b"{nonsense", ["valid JSON"]),
    "not utf-8": (b'{"\xff": 1}', ["UTF-8"]),
    "lone surrogate": (b'{"\\ud800": 1}', ["UTF-8"]),
    "not an object": (b"[1]", ["JSON object", "[1]"]),
    "leading space": (b" {}", ["starts with a space"]),
    "deep": (b"[" * 100_000, ["valid JSON"]),
    "duplicate tensor": (b'{"w": {}, "w": {}}', ["'w'", "twice"]),
    "duplicate field": (b'{"w": {"dtype": "F32", "dtype": "F32"}}', ["'dtype'", "twice"]),
    "metadata not strings": ({"__metadata__": {"a": 1}}, ["__metadata__", "strings"]),
    "metadata not an object": ({"__metadata__": "a"}, ["__metadata__"]),
    "entry not an object": ({"w": 3}, ["'w'", "3"]),
    "dtype missing": ({"w": without("dtype")}, ["'w'", "dtype is missing"]),
    "dtype unknown": ({"w": entry(dtype="F31")}, ["'w'", "'F31'", "BF16"]),
    "dtype not a string": ({"w": entry(dtype=["F32"])}, ["'w'", "dtype"]),
    "shape missing": ({"w": without("shape")}, ["'w'", "shape is missing"]),
    "shape negative": ({"w": entry(shape=[-2])}, ["'w'", "[-2]"]),
    "shape boolean": ({"w": entry(shape=[True, 2])}, ["'w'", "True"]),
    "shape fraction": ({"w": entry(shape=[2.0])}, ["'w'", "2.0"]),
    "shape overflow": ({"w": entry(shape=[2**40, 2**40])}, ["'w'", "2^63"]),
    "shape overflow to zero": ({"w": entry(shape=[2**62, 4, 0], offsets=(0, 0))}, ["'w'", "2^63"]),
    "offsets missing": ({"w": without("data_offsets")}, ["'w'", "data_offsets is missing"]),
    "offsets not a pair": ({"w": entry(offsets=[0, 4, 8])}, ["'w'", "[0, 4, 8]"]),
    "offsets negative": ({"w": entry(offsets=[-8, 0])}, ["'w'", "[-8, 0]"]),
    "offsets reversed": ({"w": entry(offsets=[8, 0])}, ["'w'", "-8 bytes", "expected 8"]),
    "offsets of another shape": ({"w": entry(shape=[3])}, ["'w'", "8 bytes", "expected 12"]),
    "offsets out of range": ({"w": entry(), "x": entry(offsets=[8, 16])}, ["'x'", "truncated", "byte 16"]),
    "offsets overlap": ({"w": entry(), "x": entry(offsets=[4, 12])}, ["'x'", "overlap"]),
    "offsets with a hole": ({"w": entry(shape=[1], offsets=[4, 8])}, ["'w'", "hole"]),
    "trailing bytes": ({"w": entry(shape=[1], offsets=[0, 4])}, ["4 trailing bytes"]),
}


@pytest.mark.parametrize(("header", "fragments"), HEADERS.values(), ids=HEADERS.keys())
def test_wrong_header(tmp_path, header, fragments):
    path = write_raw(tmp_path / "w.safetensors", header, bytes(8))
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(fragment in message for fragment in [str(path), *fragments]), message


FILES = {
    "empty": (b"", "is empty"),
    "no length": (b"\x08\0\0", "truncated"),
    "length past the end": ((1000).to_bytes(8, "little") + b"{}", "1000 bytes and the file has 2"),
    "absurd length": (b"\xff" * 8 + b"{}", "at most 100000000"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "torch file": (b"PK\x03\x04" + bytes(40), "torch.save"),
}


@pytest.mark.parametrize(("content", "fragment"), FILES.values(), ids=FILES.keys())
def test_wrong_file(tmp_path, content, fragment):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=fragment) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_truncated_at_every_length(tmp_path):
    content = save({"a": torch.ones(2), "b": torch.ones(3)})
    path = tmp_path / "t.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"empty|truncated"):
            open_checkpoint(path)


def edit_index(folder: Path, **weight_map: object) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], **weight_map}}))


def replace_shard(folder: Path, name: str, *keys: str) -> None:
    save_file({key: torch.ones(2) for key in keys}, folder / name)


FOLDERS = {
    "nothing": (
        lambda f: [file.unlink() for file in f.iterdir()],
        ["looked for model.safetensors", "pytorch_model.bin"],
    ),
    "other name": (
        lambda f: ((f / "one.safetensors").rename(f / "w.safetensors"), (f / "model.safetensors.index.json").unlink()),
        ["no weights", "give the file itself"],
    ),
    "index not json": (lambda f: (f / "model.safetensors.index.json").write_text("x"), ["index.json", "JSON"]),
    "index empty": (lambda f: (f / "model.safetensors.index.json").write_text(""), ["index.json", "empty"]),
    "no weight_map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ["weight_map"]),
    "shard not a name": (lambda f: edit_index(f, a=3), ["'a'", "3"]),
    "shard above": (lambda f: edit_index(f, a="../one.safetensors"), ["'a'", "../one", "not the name of a file"]),
    "shard dots": (lambda f: edit_index(f, a=".."), ["'a'", "'..'"]),
    "shard absolute": (lambda f: edit_index(f, a="/one.safetensors"), ["'a'", "'/one"]),
    "shard backslash": (lambda f: edit_index(f, a="x\\one.safetensors"), ["'a'", "not the name of a file"]),
    "shard of another kind": (lambda f: edit_index(f, a="one.bin"), ["'a'", "one.bin", ".safetensors"]),
    "shard missing": (lambda f: (f / "two.safetensors").unlink(), ["two.safetensors", "no such file", "index.json"]),
    "shard a folder": (
        lambda f: ((f / "two.safetensors").unlink(), (f / "two.safetensors").mkdir()),
        ["two.safetensors", "regular file"],
    ),
    "shard truncated": (lambda f: os.truncate(f / "two.safetensors", 90), ["two.safetensors", "truncated"]),
    "tensor not in its shard": (lambda f: edit_index(f, z="two.safetensors"), ["two.safetensors", "'z'", "index.json"]),
    "tensor in another shard": (lambda f: edit_index(f, a="two.safetensors"), ["one.safetensors", "'a'", "two"]),
    "tensor in two shards": (
        lambda f: replace_shard(f, "two.safetensors", "a", "b"),
        ["two.safetensors", "'a'", "also in one.safetensors"],
    ),
    "tensor in no index": (
        lambda f: replace_shard(f, "two.safetensors", "b", "x"),
        ["two.safetensors", "'x'", "index"],
    ),
}


@pytest.mark.parametrize(("breaking", "fragments"), FOLDERS.values(), ids=FOLDERS.keys())
def test_wrong_folder(tmp_path, breaking, fragments):
    shards = {"one.safetensors": {"a": torch.ones(2), "c": torch.ones(2)}, "two.safetensors": {"b": torch.ones(2)}}
    folder = write_sharded(tmp_path / "model", shards)
    open_checkpoint(folder).close()
    breaking(folder)
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert all(fragment in message for fragment in [str(folder), *fragments]), message


@pytest.mark.parametrize(
    "name", ["missing", "missing.safetensors", "nul\0byte", "notes.txt", "model.safetensors.index.json"]
)
def test_wrong_path(tmp_path, name):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"no such file|not a path|unknown kind|give its folder"):
        open_checkpoint(f"{tmp_path}/{name}")


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "p.safetensors")
    with pytest.raises(InputError, match="not a regular file"):
        open_checkpoint(tmp_path / "p.safetensors")


def test_sharded_folder_as_in_a_cache_of_links(tmp_path):
    tensors = small_state_dict()
    parts = [dict(list(tensors.items())[i::2]) for i in range(2)]
    real = write_sharded(tmp_path / "blobs", {f"s{i}.safetensors": part for i, part in enumerate(parts)})
    (tmp_path / "snapshot").mkdir()
    for file in real.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    save_file({"stray": torch.ones(1)}, tmp_path / "snapshot" / "unlisted.safetensors")
    with open_checkpoint(tmp_path / "snapshot") as checkpoint, open_checkpoint(real) as original:
        assert {name: str(info.file.name) for name, info in checkpoint.tensors.items()} == {
            name: f"s{i}.safetensors" for i, part in enumerate(parts) for name in part
        }
        assert all(same(checkpoint.read(name), tensor) for name, tensor in tensors.items())
        assert [file.name for file in checkpoint.side_files] == ["config.json"]
        assert checkpoint.digest == original.digest


def test_digest_tells_layouts_apart_and_forgets_the_path(tmp_path):
    for name, tensor in {"a": torch.ones(2, 3), "b": torch.zeros(2, 3), "c": torch.ones(3, 2)}.items():
        save_file({"w": tensor}, tmp_path / f"{name}.safetensors")
    a, b, c = (open_checkpoint(tmp_path / f"{name}.safetensors").digest for name in "abc")
    assert a == b != c
    assert from_state_dict({"w": torch.ones(2)}, "x").digest != from_state_dict({"w": torch.ones(3)}, "x").digest


def test_side_files(tmp_path):
    folder = write_sharded(tmp_path / "model", {"model-1.safetensors": {"a": torch.ones(2)}})
    keep = ["tokenizer.json", "merges.txt", "spiece.model", "chat_template.jinja", "modeling_x.py", "LICENSE"]
    drop = ["README.md", "training_args.bin", "optimizer.pt", "isomerge_recipe.yaml", "isomerge_report.json"]
    drop += [
        ".gitattributes",
        ".git/config",
        "model.gguf",
        "checkpoint-5/config.json",
        "checkpoint-5/model.safetensors",
    ]
    for name in [*keep, *drop, "1_Pooling/config.json"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    found = {str(file.relative_to(folder)) for file in open_checkpoint(folder).side_files}
    assert found == {*keep, "config.json", "1_Pooling/config.json"}


@pytest.mark.parametrize("in_memory", [False, True], ids=["file", "memory"])
def test_ranges(tmp_path, in_memory):
    tensor = random_tensor(torch.float16, (3, 4, 5))
    save_file({"w": tensor, "e": torch.empty(0, 2)}, tmp_path / "a.safetensors")
    source = from_state_dict({"w": tensor, "e": torch.empty(0, 2)}, "m") if in_memory else None
    with source or open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        flat = tensor.flatten()
        for start in range(61):
            for count in range(0, 61 - start, 7):
                assert same(checkpoint.read("w", start, count), flat[start : start + count])
        assert same(checkpoint.read("w", 58), flat[58:])
        assert checkpoint.read("w", 0, 60).shape == (60,)
        assert checkpoint.read("e").shape == (0, 2)
        for start, count in [(-1, 2), (0, 61), (61, None), (59, 2), (0, -1)]:
            with pytest.raises(ValueError, match="outside"):
                checkpoint.read("w", start, count)
        with pytest.raises(KeyError, match="'v'"):
            checkpoint.read("v")
        out = torch.zeros(9, dtype=torch.float16)
        assert checkpoint.read("w", 50, 9, out=out) is out
        assert same(out, flat[50:59])
        assert same(checkpoint.read("w", out=torch.zeros(60, dtype=torch.float16)), tensor)
        assert checkpoint.read("e", out=torch.zeros(0)).shape == (0, 2)
        for wrong in (out[:8], out.float(), out.view(3, 3), torch.zeros(18).half()[::2], out.to("meta")):
            with pytest.raises(ValueError, match=r"w: out must be contiguous, 9 of torch\.float16 on the CPU, got"):
                checkpoint.read("w", 50, 9, out=wrong)


def test_what_is_read_is_its_own(tmp_path):
    tensor = torch.ones(3, 4)
    save_file({"w": tensor}, tmp_path / "a.safetensors")
    for checkpoint in (open_checkpoint(tmp_path / "a.safetensors"), from_state_dict({"w": tensor}, "m")):
        checkpoint.read("w").zero_()
        checkpoint.read("w", 0, 3).zero_()
        assert torch.equal(checkpoint.read("w"), torch.ones(3, 4))
    assert torch.equal(tensor, torch.ones(3, 4))


CHANGES = {
    "shrunk": lambda path: os.truncate(path, path.stat().st_size - 4),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 4),
    "touched": lambda path: os.utime(path, ns=(1, 1)),
    "replaced": lambda path: (
        path.with_suffix(".new").write_bytes(path.read_bytes()),
        path.with_suffix(".new").replace(path),
    ),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_file_that_changes_is_noticed(tmp_path, change):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    with open_checkpoint(path) as checkpoint:
        change(path)
        with pytest.raises(InputError, match="changed while it was being read") as caught:
            checkpoint.read("b")
    assert str(path) in str(caught.value)


def test_many_threads_and_more_shards_than_open_files(tmp_path):
    shards = {f"s{i:02}.safetensors": {f"t{i}": torch.full((5000,), float(i))} for i in range(12)}
    with open_checkpoint(write_sharded(tmp_path / "m", shards)) as checkpoint, ThreadPoolExecutor(8) as pool:
        numbers = [i % 12 for i in range(240)]
        for i, tensor in zip(numbers, pool.map(lambda i: checkpoint.read(f"t{i}"), numbers), strict=True):
            assert torch.equal(tensor, torch.full((5000,), float(i)))
        checkpoint.close()
        with pytest.raises(ValueError, match="close"):
            checkpoint.read("t1")


def test_a_read_past_the_end_says_so(tmp_path):
    (tmp_path / "short").write_bytes(bytes(10))
    with open(tmp_path / "short", "rb") as file:
        assert read_into(file.fileno(), 2, torch.empty(2))
        assert not read_into(file.fileno(), 4, torch.empty(2))
        assert not read_into(file.fileno(), 12, torch.empty(2))


MEASURE = """
import re, resource, sys, torch
import isomerge
from isomerge.checkpoint import TensorSpec, Writer, open_checkpoint
def peak():
    try:
        return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
with open_checkpoint(sys.argv[1]) as checkpoint:
    checkpoint.read("w", 0, 1)
    before = peak()
    tensor = checkpoint.read("w")
    read = peak()
with Writer(sys.argv[2], [TensorSpec("w", tensor.dtype, tuple(tensor.shape))]) as writer:
    writer.write("w", tensor)
    writer.commit()
print(read - before, peak() - read)
"""


def test_memory_is_what_was_asked_for(tmp_path):
    save_file({"w": torch.zeros(4096, 4096)}, tmp_path / "a.safetensors")  # 64 MiB
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a.safetensors"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(isomerge.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    reading, writing = map(float, done.stdout.split())  # MiB
    assert 60 < reading < 80
    assert writing < 16
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as written:
        assert written.get_slice("w").get_shape() == [4096, 4096]

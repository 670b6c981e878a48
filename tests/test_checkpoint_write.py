"""The streaming writer: whole or not at all, whatever the order of the writes, and whoever is killed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import resource
import select
import signal
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoints import model_files, random_tensor, same, small_state_dict, write_sharded
from safetensors import safe_open

from isomerge.checkpoint import MemoryWriter, TensorSpec, Writer, open_checkpoint, shard_files, staging
from isomerge.checkpoint.files import crc32, crc32_at, memory_of
from isomerge.errors import InputError


def specs_of(tensors):
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write_all(folder: Path, tensors, **options) -> None:
    with Writer(folder, specs_of(tensors), **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.add_file("config.json", b"{}")
        writer.commit()


def content_of(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_holds(folder: Path, tensors) -> None:
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        assert all(same(checkpoint.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 100, 1], ids=["one", "several", "each"])
def test_layout(tmp_path, shard_bytes):
    tensors = small_state_dict()
    write_all(tmp_path / "new" / "out", tensors, shard_bytes=shard_bytes, metadata={"made_by": "test"})
    folder = tmp_path / "new" / "out"
    assert_holds(folder, tensors)
    assert [file.name for file in folder.parent.iterdir()] == ["out"]
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    if shard_bytes > 1000:
        assert shards == ["model.safetensors"]
        assert not (folder / "model.safetensors.index.json").exists()
    else:
        count = len(shards)
        assert shards == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert set(index["weight_map"]) == set(tensors)
    for name in shards:
        with safe_open(folder / name, "pt") as file:
            assert file.metadata() == {"format": "pt", "made_by": "test"}
            sizes = [tensors[key].nbytes for key in file.keys()]  # noqa: SIM118 (safe_open is no mapping)
            assert len(sizes) == 1 or sum(sizes) <= shard_bytes


def test_nothing_to_write(tmp_path):
    write_all(tmp_path / "out", {})
    assert_holds(tmp_path / "out", {})


def test_same_bytes_in_any_order_from_any_thread_in_any_pieces(tmp_path):
    tensors = small_state_dict()
    write_all(tmp_path / "a", tensors, shard_bytes=100, metadata={"x": "1", "b": "2"})
    chance = random.Random(0)
    pieces = []
    for name, tensor in tensors.items():
        flat, start = tensor.flatten(), 0
        while start < flat.numel():
            size = chance.randint(1, 4)
            pieces.append((name, flat[start : start + size], start))
            start += size
    chance.shuffle(pieces)
    with Writer(tmp_path / "b", specs_of(tensors), shard_bytes=100, metadata={"b": "2", "x": "1"}) as writer:
        writer.add_file("config.json", b"{}")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda piece: writer.write(*piece), pieces))
        writer.commit()
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


def test_views_are_written_in_logical_order_and_left_alone(tmp_path):
    base = random_tensor(torch.float32, (6, 8))
    tensors = {"t": base.t(), "s": base[::2, 1::3], "c": torch.ones(3, dtype=torch.complex64).mul(1j).conj()}
    before = base.clone()
    write_all(tmp_path / "out", tensors)
    assert_holds(tmp_path / "out", {name: tensor.resolve_conj().contiguous() for name, tensor in tensors.items()})
    assert same(base, before)


def test_side_files(tmp_path):
    (tmp_path / "source.txt").write_text("from a file")
    with Writer(tmp_path / "out", []) as writer:
        writer.add_file("a/b/c.txt", tmp_path / "source.txt")
        writer.add_file("d.bin", b"\0\1")
        writer.commit()
    assert (tmp_path / "out" / "a" / "b" / "c.txt").read_text() == "from a file"
    assert (tmp_path / "out" / "d.bin").read_bytes() == b"\0\1"


@pytest.mark.parametrize("name", ["", ".", "/etc/x", "../x", "a/../../x", "a\\b", "a\0b", "model.safetensors", "taken"])
def test_wrong_side_file(tmp_path, name):
    for writer in (Writer(tmp_path / "out", []), MemoryWriter([])):
        with writer:
            writer.add_file("taken", b"")
            if name == "model.safetensors" and isinstance(writer, MemoryWriter):
                continue
            with pytest.raises(ValueError, match="side file"):
                writer.add_file(name, b"")
            with pytest.raises(InputError, match="no such file"):
                writer.add_file("copy", tmp_path / "missing")


BAD_SPECS = {
    "twice": ([TensorSpec("w", torch.int8, (1,)), TensorSpec("w", torch.int8, (2,))], "'w'"),
    "reserved": ([TensorSpec("__metadata__", torch.int8, (1,))], "__metadata__"),
    "dtype": ([TensorSpec("w", torch.complex128, (1,))], "'w'.*complex128"),
    "shape": ([TensorSpec("w", torch.int8, (-1,))], "'w'.*-1"),
}


@pytest.mark.parametrize(("specs", "pattern"), BAD_SPECS.values(), ids=BAD_SPECS.keys())
def test_wrong_specs(tmp_path, specs, pattern):
    with pytest.raises(ValueError, match=pattern):
        Writer(tmp_path / "out", specs)
    assert list(tmp_path.iterdir()) == []


BAD_WRITES = {
    "unknown": (lambda w: w.write("v", torch.ones(4)), "'v'"),
    "dtype": (lambda w: w.write("w", torch.ones(4, dtype=torch.float16)), r"'w'.*float16, expected torch.float32"),
    "too long": (lambda w: w.write("w", torch.ones(5)), r"'w'.*\[0, 5\)"),
    "past the end": (lambda w: w.write("w", torch.ones(2), 3), r"'w'.*\[3, 5\)"),
    "before the start": (lambda w: w.write("w", torch.ones(2), -1), r"'w'.*\[-1, 1\)"),
    "twice": (lambda w: (w.write("w", torch.ones(4)), w.write("w", torch.ones(4))), r"'w'.*before"),
    "overlap left": (lambda w: (w.write("w", torch.ones(2), 1), w.write("w", torch.ones(2), 0)), r"'w'.*before"),
    "overlap right": (lambda w: (w.write("w", torch.ones(2), 1), w.write("w", torch.ones(2), 2)), r"'w'.*before"),
    "overlap around": (lambda w: (w.write("w", torch.ones(1), 1), w.write("w", torch.ones(4), 0)), r"'w'.*before"),
    "overlap inside": (lambda w: (w.write("w", torch.ones(3), 1), w.write("w", torch.ones(1), 2)), r"'w'.*before"),
    "missing": (lambda w: w.commit(), r"'w': 0 of 4"),
    "missing middle": (lambda w: (w.write("w", torch.ones(1)), w.write("w", torch.ones(2), 2), w.commit()), "3 of 4"),
    "commit twice": (lambda w: (w.write("w", torch.ones(4)), w.commit(), w.write("w", torch.ones(0))), "committed"),
}


@pytest.mark.parametrize("in_memory", [False, True], ids=["disk", "memory"])
@pytest.mark.parametrize(("wrong", "pattern"), BAD_WRITES.values(), ids=BAD_WRITES.keys())
def test_wrong_write(tmp_path, wrong, pattern, in_memory):
    specs = [TensorSpec("w", torch.float32, (2, 2))]
    writer = MemoryWriter(specs) if in_memory else Writer(tmp_path / "deep" / "out", specs)
    with writer, pytest.raises(ValueError, match=pattern):
        wrong(writer)
    if pattern != "committed":
        assert list(tmp_path.iterdir()) == []


def test_memory_writer():
    tensors = small_state_dict()
    with MemoryWriter(specs_of(tensors), metadata={"a": "b"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.add_file("x/config.json", b"{}")
        assert writer.tensors == {}
        writer.commit()
    assert list(writer.tensors) == list(tensors)
    assert all(same(writer.tensors[name], tensor) for name, tensor in tensors.items())
    assert writer.tensors["step"].data_ptr() != tensors["step"].data_ptr()
    assert writer.files == {"x/config.json": b"{}"}


def test_leaving_without_commit_removes_everything(tmp_path):
    tensors = small_state_dict()
    with Writer(tmp_path / "a" / "out", specs_of(tensors)) as writer:
        writer.write("step", tensors["step"])
        assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {".lock", "model.safetensors.part"}
    assert list(tmp_path.iterdir()) == []


def test_existing_output(tmp_path):
    old, new = small_state_dict(1), small_state_dict(2)
    write_all(tmp_path / "out", old)
    with pytest.raises(InputError, match="exists") as caught:
        Writer(tmp_path / "out", specs_of(new))
    assert str(tmp_path / "out") in str(caught.value)
    with Writer(tmp_path / "out", specs_of(new), overwrite=True) as writer:
        writer.write("step", new["step"])
    assert_holds(tmp_path / "out", old)  # not committed
    (tmp_path / "link").symlink_to(tmp_path / "out")
    write_all(tmp_path / "link", new, overwrite=True, shard_bytes=1)
    assert_holds(tmp_path / "out", new)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "out"]


def test_only_models_are_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for name, pattern in [
        ("home", "does not look like a model"),
        ("file", "is a file"),
        ("file/out", "cannot be made"),
    ]:
        with pytest.raises(InputError, match=pattern):
            Writer(tmp_path / name, [], overwrite=True)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "home", "thesis.txt"]


def test_a_disk_too_small_is_seen_first(tmp_path):
    with pytest.raises(InputError, match=r"GB free, expected 1152921504\.6 GB"):
        Writer(tmp_path / "out", [TensorSpec("w", torch.int8, (2**60,))])
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Writer(tmp_path / "out", [TensorSpec("w", torch.float32, (2**18,))]) as writer:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
            with pytest.raises(OSError, match=r"cannot write tensor 'w'.*model\.safetensors\.part"):
                writer.write("w", torch.ones(2**18))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with pytest.raises(ValueError, match="0 of 262144 elements"):
            writer.commit()
        assert list(tmp_path.iterdir()) == []


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def kill_at(call: int) -> None:
    """From now on, the process is killed at the `call`-th step that changes the disk."""
    left = call

    def counted(function):
        def run(*arguments, **options):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*arguments, **options)

        return run

    for name in ("pwrite", "fsync", "rename", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_killed_at_any_step(tmp_path, overwrite):
    old, new = small_state_dict(1), small_state_dict(2)
    out = tmp_path / "out"
    for call in range(1000):
        if overwrite:
            write_all(out, old, overwrite=True)
        status = in_child(lambda call=call: (kill_at(call), write_all(out, new, overwrite=overwrite, shard_bytes=100)))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        # What loads is whole: the old output or the new one, and a single file of weights holds all of its tensors.
        for file in model_files(tmp_path):
            with open_checkpoint(file.parent if file.name == "config.json" else file) as checkpoint:
                values = {name: checkpoint.read(name) for name in checkpoint.tensors}
            assert any(all(same(values[name], one[name]) for name in values) for one in (old, new))
            assert file.name != "config.json" or set(values) == set(new)
        write_all(out, new, overwrite=overwrite or out.exists())  # as the user would do next
        assert [file.name for file in tmp_path.iterdir()] == ["out"]
        assert_holds(out, new)
        if not overwrite:
            write_all(tmp_path / "aside", {})
            for folder in (out, tmp_path / "aside"):
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()
    assert call > 20
    assert_holds(out, new)


def test_killed_half_way_through_writing(tmp_path):
    tensors = small_state_dict()

    def work() -> None:
        writer = Writer(tmp_path / "out", specs_of(tensors), shard_bytes=100)
        writer.add_file("config.json", b"{}")
        for name in list(tensors)[:3]:
            writer.write(name, tensors[name])
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(in_child(work)) == signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    assert model_files(tmp_path) == []
    write_all(tmp_path / "out", tensors)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert_holds(tmp_path / "out", tensors)


def test_two_live_writers(tmp_path):
    tensors = small_state_dict()
    out = tmp_path / "out"

    def refused() -> bool:
        try:
            Writer(out, specs_of(tensors))
        except InputError as error:
            return f"process {os.getppid()} is writing" in str(error)
        return False

    with Writer(out, specs_of(tensors)) as writer:
        with pytest.raises(InputError, match=f"process {os.getpid()} is writing"):
            Writer(out, specs_of(tensors), overwrite=True)
        assert in_child(lambda: os._exit(0 if refused() else 2)) == 0
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit()
    assert_holds(out, tensors)


def test_of_writers_that_start_at_once_one_wins(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    check = staging.Staging._check_place
    monkeypatch.setattr(staging.Staging, "_check_place", lambda self: (check(self), time.sleep(0.05)))

    def work() -> None:
        os.close(writing)
        try:
            Writer(tmp_path / "out", [])
        except InputError:
            os._exit(3)
        select.select([reading], [], [], 5)  # until the parent closes its end, when the others have given up

    children = []
    for _ in range(4):
        if (pid := os.fork()) == 0:
            try:
                work()
            finally:
                os._exit(0)
        children.append(pid)
    losers = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in children[1:]]
    os.close(writing)
    assert losers == [3, 3, 3]
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    os.close(reading)
    write_all(tmp_path / "out", {})


def test_without_file_locks_the_process_number_decides(tmp_path, monkeypatch):
    def unsupported(fd: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with Writer(tmp_path / "out", []), pytest.raises(InputError, match="is writing"):
        Writer(tmp_path / "out", [])
    in_child(lambda: (Writer(tmp_path / "out", []), os.kill(os.getpid(), signal.SIGKILL)))
    assert len(list(tmp_path.iterdir())) == 1
    write_all(tmp_path / "out", {})
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_written_folder_is_a_source_again(tmp_path):
    source = write_sharded(tmp_path / "source", {"one.safetensors": small_state_dict()})
    with open_checkpoint(source) as checkpoint:
        specs = [TensorSpec(info.name, info.dtype, info.shape) for info in checkpoint.tensors.values()]
        with Writer(tmp_path / "copy", specs, metadata=checkpoint.metadata) as writer:
            for name in checkpoint.tensors:
                writer.write(name, checkpoint.read(name))
            for file in checkpoint.side_files:
                writer.add_file(str(file.relative_to(checkpoint.path)), file)
            writer.commit()
    assert_holds(tmp_path / "copy", small_state_dict())
    assert (tmp_path / "copy" / "config.json").read_text() == "{}"


def test_a_disk_that_fails_while_the_file_grows(tmp_path, monkeypatch):
    """The error of a flush is the error of the merge: the kernel tells it once."""
    real, failed = shard_files.sync, []

    def sync(path: Path) -> None:
        if not failed:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(shard_files, "sync", sync)
    monkeypatch.setattr(shard_files, "FLUSH_BYTES", 64)
    tensors = {"a": torch.ones(32), "b": torch.ones(32)}
    writer = Writer(tmp_path / "out", specs_of(tensors))
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    with pytest.raises(OSError, match="Input/output error"):
        writer.commit()
    assert failed == [tmp_path / ".out.partial" / "model.safetensors.part"]
    assert list(tmp_path.iterdir()) == []


def test_the_checksum_is_zlibs(tmp_path: Path) -> None:
    for count in (0, 1, 63, 4099, 5 << 20):
        values = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
        raw = bytes(values.tolist()) if count < 10_000 else memory_of(values).tobytes()
        (tmp_path / "file").write_bytes(b"ab" + raw)
        fd = os.open(tmp_path / "file", os.O_RDONLY)
        assert crc32(values) == crc32_at(fd, 2, count) == zlib.crc32(raw)
        os.close(fd)

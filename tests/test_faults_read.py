"""Faults of files that a merge reads, injected for real: before it, while it runs, in every bit of a header."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from checkpoints import same, write_sharded
from command_line import COMMAND, Run
from safetensors.torch import load, load_file, save

from isomerge.checkpoint import open_checkpoint
from isomerge.errors import InputError
from isomerge.merge import merge, merge_state_dicts

LONG_AGO = (10**18, 10**18)  # ns: a change now has another time of modification, however coarse the clock


def models(folder: Path) -> Path:
    """A base and two experts, the second in six shards, more than are kept open; the recipe."""
    states = tiny.bert_models(folder, experts=2)
    shutil.rmtree(folder / "e1")
    names = list(states[2])
    shards = {f"s{i}.safetensors": {name: states[2][name] for name in names[i::6]} for i in range(6)}
    write_sharded(folder / "e1", shards)
    for file in folder.rglob("*.safetensors"):
        os.utime(file, ns=LONG_AGO)
    return tiny.write_recipe(folder, tiny.recipe_for("task_arithmetic", experts=2))


def refusal(call: Callable[[], object]) -> str:
    """The message of the InputError that a call raises, or nothing."""
    try:
        call()
    except InputError as error:
        return str(error)
    return ""


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def make_link(file: Path, to: str) -> None:
    file.unlink()
    file.symlink_to(to)


BEFORE = {
    "truncated": (lambda file: os.truncate(file, file.stat().st_size - 1), "truncated"),
    "empty": (lambda file: os.truncate(file, 0), "empty"),
    "grown": (lambda file: os.truncate(file, file.stat().st_size + 1), "1 trailing bytes"),
    "a folder": (make_folder, "not a regular file"),
    "a pipe": (make_pipe, "not a regular file"),
    "a link to nothing": (lambda file: make_link(file, "nowhere"), "no such file"),
    "a link to itself": (lambda file: make_link(file, file.name), "symbolic links"),
}


@pytest.mark.parametrize("file", ["base/model.safetensors", "e1/s3.safetensors"])
@pytest.mark.parametrize(("break_it", "fragment"), BEFORE.values(), ids=BEFORE.keys())
def test_broken_before_the_merge(
    tmp_path: Path, run: Run, file: str, break_it: Callable[[Path], None], fragment: str
) -> None:
    recipe = models(tmp_path)
    break_it(tmp_path / file)
    before = sorted(tmp_path.rglob("*"))
    done = run("merge", recipe, tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"isomerge: {tmp_path / file}: ")
    assert done.stderr.count("\n") == 1
    assert fragment in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def nobody(tmp_path: Path) -> Iterator[None]:
    """Root may read what nobody may: the process is someone else for the length of a test."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("name", ["model", "m.safetensors", "m.pt"])
def test_a_folder_that_may_not_be_searched(tmp_path: Path, name: str) -> None:
    if os.geteuid() != 65534:
        tmp_path.chmod(0)  # pytest's folders are their owner's alone: nobody is shut out as they are
    with pytest.raises(InputError, match=f"^{tmp_path / name}: cannot be read: Permission denied"):
        open_checkpoint(tmp_path / name)


def overwrite(file: Path) -> None:
    """Other values in the same bytes of header, in the same file of the same size."""
    with open(file, "r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.write(b"\x3f" * 8)


def replace(file: Path) -> None:
    """Another file of the same header and size."""
    new = Path(shutil.copy2(file, file.with_suffix(".new")))
    overwrite(new)
    os.utime(new, ns=LONG_AGO)
    new.replace(file)


DURING = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "grown": lambda file: os.truncate(file, file.stat().st_size + 4),
    "overwritten": overwrite,
    "replaced": replace,
    "removed": lambda file: file.unlink(),
}


@pytest.mark.parametrize("when", [1, 9], ids=["at once", "later"])
@pytest.mark.parametrize("file", ["base/model.safetensors", "e0/model.safetensors", "e1/s5.safetensors"])
@pytest.mark.parametrize("change", DURING)
def test_changed_during_the_merge(tmp_path: Path, change: str, file: str, when: int) -> None:
    recipe = models(tmp_path)
    merge(recipe, tmp_path / "undisturbed")
    before = sorted(path for path in tmp_path.rglob("*"))
    calls = 0

    def progress(_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == when:
            DURING[change](tmp_path / file)

    message = refusal(lambda: merge(recipe, tmp_path / "out", group_bytes=1, progress=progress))
    if message:
        assert message.startswith(f"{tmp_path / file}: the file changed while it was being read; wait until")
        assert set(tmp_path.rglob("*")) == set(before) - ({tmp_path / file} if change == "removed" else set())
    else:  # a file that is open stays what it was when its name comes to mean another, or nothing
        assert change in ("replaced", "removed")
        assert when == 9 or file.startswith("base")  # of which one tensor is copied before the first call
        assert weights(tmp_path / "out") == weights(tmp_path / "undisturbed")


def test_every_bit_of_a_header(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(4, 3, generator=random), "b.bias": torch.randn(6, generator=random)}
    expert = {name: value + 1 for name, value in base.items()}
    content = save(expert, {"format": "pt"})
    (tmp_path / "base.safetensors").write_bytes(save(base))
    path = tmp_path / "expert.safetensors"
    recipe = {
        "merge_method": "average",
        "base_model": str(tmp_path / "base.safetensors"),
        "models": [{"model": str(path)}],
    }
    kinds: Counter[str] = Counter()
    seen: set[int] = set()
    for bit in range(8 * (8 + int.from_bytes(content[:8], "little"))):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        message = refusal(lambda: open_checkpoint(path).close())
        if message:
            assert message.startswith(str(path))
            assert len(message.splitlines()) == 1
            kinds["no header"] += 1
            continue
        theirs = load(bytes(flipped))
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.tensors.keys() == theirs.keys()
            assert all(same(checkpoint.read(name), value) for name, value in theirs.items())
        if bit // 8 in seen:
            continue
        seen.add(bit // 8)
        message = refusal(lambda: merge(recipe, tmp_path / "out"))
        assert (tmp_path / "out").exists() == (not message)
        kinds["other tensors" if message else "merged"] += 1
        if message:
            assert message.startswith(f"{path}: ")
        else:
            expected = merge_state_dicts(base, [theirs], method="average")
            tiny.assert_same(load_file(tmp_path / "out/model.safetensors"), expected)
            shutil.rmtree(tmp_path / "out")
    assert kinds["no header"] > 500
    assert kinds["other tensors"] >= len("a.weight" + "b.bias")
    assert kinds["merged"] > 0


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* What may be read at `offset` of a file that FAULT_FILE is part of the path of: all, FAULT_MOST bytes, or EIO. */
static ssize_t allowed(int fd, size_t length, off64_t offset) {
    char link[64], path[4096];
    const char *file = getenv("FAULT_FILE"), *from = getenv("FAULT_FROM"), *most = getenv("FAULT_MOST");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return length;
    path[n] = 0;
    if (!file || !strstr(path, file)) return length;
    if (from && offset >= atoll(from)) { errno = EIO; return -1; }
    return most && length > (size_t)atoll(most) ? atoll(most) : (ssize_t)length;
}

static ssize_t read_at(int fd, void *to, size_t length, off64_t offset) {
    static ssize_t (*real)(int, void *, size_t, off64_t);
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "pread64");
    ssize_t n = allowed(fd, length, offset);
    return n < 0 ? n : real(fd, to, n, offset);
}

ssize_t pread(int fd, void *to, size_t length, off_t offset) { return read_at(fd, to, length, offset); }
ssize_t pread64(int fd, void *to, size_t length, off64_t offset) { return read_at(fd, to, length, offset); }
ssize_t preadv(int fd, const struct iovec *v, int n, off_t offset) {
    return read_at(fd, v->iov_base, v->iov_len, offset);
}
ssize_t preadv64(int fd, const struct iovec *v, int n, off64_t offset) {
    return read_at(fd, v->iov_base, v->iov_len, offset);
}
ssize_t preadv2(int fd, const struct iovec *v, int n, off_t offset, int flags) {
    return read_at(fd, v->iov_base, v->iov_len, offset);
}
ssize_t preadv64v2(int fd, const struct iovec *v, int n, off64_t offset, int flags) {
    return read_at(fd, v->iov_base, v->iov_len, offset);
}
"""


@pytest.mark.skipif(shutil.which("cc") is None or not Path("/proc/self/fd").exists(), reason="needs Linux and cc")
def test_reads_that_fail_or_end_early(tmp_path: Path) -> None:
    recipe = models(tmp_path)
    merge(recipe, tmp_path / "undisturbed")
    (tmp_path / "shim.c").write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "shim.so", tmp_path / "shim.c", "-ldl"], check=True)

    def merged(out: str, **fault: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "shim.so"), **fault}
        command = [*COMMAND, "merge", str(recipe), str(tmp_path / out), "--quiet"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = merged("short", FAULT_FILE=".safetensors", FAULT_MOST="61")
    assert (done.returncode, done.stderr) == (0, "")
    assert weights(tmp_path / "short") == weights(tmp_path / "undisturbed")
    shard = tmp_path / "e1" / "s2.safetensors"
    done = merged("failed", FAULT_FILE="e1/s2.safetensors", FAULT_FROM=str(shard.stat().st_size // 2))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Input/output error" in done.stderr
    assert str(shard) in done.stderr
    assert "cannot read tensor '" in done.stderr
    assert not (tmp_path / "failed").exists()

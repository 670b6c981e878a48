"""SHA-256 of files that are still being written."""

from __future__ import annotations

import hashlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from isomerge.checkpoint.sums import GrowingSum

SIZE, HEADER = 5000, 100


def filled(path: Path) -> bytes:
    content = random.Random(0).randbytes(SIZE)
    path.write_bytes(content)
    return content


def stretch(content: bytes, begin: int, end: int) -> tuple[int, memoryview]:
    return begin, memoryview(content)[begin:end]


@pytest.mark.parametrize("order", ["forward", "backward", 1, 2, 3])
def test_stretches_in_any_order(tmp_path: Path, order: str | int) -> None:
    content = filled(tmp_path / "f")
    cuts = [HEADER, *sorted(random.Random(0).sample(range(HEADER + 1, SIZE), 30)), SIZE]
    stretches = list(pairwise(cuts))
    if order == "backward":
        stretches.reverse()
    elif order != "forward":
        random.Random(order).shuffle(stretches)
    growing = GrowingSum(tmp_path / "f", HEADER)
    for begin, end in stretches:
        growing.arrived(*stretch(content, begin, end))
    assert growing.finish() == hashlib.sha256(content).hexdigest()


def test_what_comes_in_order_is_summed_from_memory_and_the_rest_from_the_file(tmp_path: Path) -> None:
    path, content = tmp_path / "f", filled(tmp_path / "f")
    growing = GrowingSum(path, HEADER)
    growing.arrived(*stretch(content, HEADER, 1000))  # with the header before it: from the file
    path.write_bytes(bytes(SIZE))
    growing.arrived(*stretch(content, 1000, 2000))
    path.write_bytes(bytes(2000) + content[2000:])
    growing.arrived(*stretch(content, 3000, 4000))  # behind a gap: nothing is read
    growing.arrived(*stretch(bytes(SIZE), 2500, 3000))
    growing.arrived(*stretch(content, 2000, 2500))  # closes it: the two behind from the file
    path.write_bytes(bytes(4000) + content[4000:])
    assert growing.finish() == hashlib.sha256(content).hexdigest()


def test_a_gap_that_nobody_told_of_is_read_in_the_end(tmp_path: Path) -> None:
    content = filled(tmp_path / "f")
    growing = GrowingSum(tmp_path / "f", HEADER)
    growing.arrived(*stretch(content, 2000, 3000))
    assert growing.finish() == hashlib.sha256(content).hexdigest()


def test_an_empty_stretch_and_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    growing = GrowingSum(tmp_path / "f", 0)
    growing.arrived(*stretch(b"", 0, 0))
    assert growing.finish() == hashlib.sha256(b"").hexdigest()


def test_a_file_that_somebody_cut_does_not_hold_anybody_up(tmp_path: Path) -> None:
    path, content = tmp_path / "f", filled(tmp_path / "f")
    growing = GrowingSum(path, HEADER)
    path.write_bytes(content[:500])
    growing.arrived(*stretch(content, HEADER, 2000))
    assert growing.finish() == hashlib.sha256(content[:500]).hexdigest()


@pytest.mark.parametrize("shuffled", [False, True])
def test_writers_in_threads(tmp_path: Path, shuffled: bool) -> None:
    """Bytes are written, then told of, by several threads, each of which may sum what others have written."""
    path, content = tmp_path / "f", random.Random(1).randbytes(400_000)
    growing = GrowingSum(path, 0)
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(4) as pool:

        def write(begin: int) -> None:
            os.pwrite(file.fileno(), content[begin : begin + 1000], begin)
            growing.arrived(*stretch(content, begin, begin + 1000))

        order = list(range(0, len(content), 1000))
        if shuffled:
            random.Random(2).shuffle(order)
        list(pool.map(write, order))
    assert growing.finish() == hashlib.sha256(content).hexdigest()

"""SHA-256 of files that are still being written."""

from __future__ import annotations

import hashlib
import os
import random
import threading
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


@pytest.mark.parametrize("seed", range(5))
def test_stretches_in_any_order(tmp_path: Path, seed: int) -> None:
    content, draw = filled(tmp_path / "f"), random.Random(seed)
    cuts = [HEADER, *sorted(draw.sample(range(HEADER + 1, SIZE), 30)), SIZE]
    stretches = list(pairwise(cuts))
    draw.shuffle(stretches)
    growing = GrowingSum(HEADER)
    for begin, end in stretches:
        growing.arrived(begin, end)
        if draw.random() < 0.5:
            growing.advance(tmp_path / "f")
    assert growing.finish(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_only_what_has_arrived_is_summed(tmp_path: Path) -> None:
    """What is behind a gap is still to come, and may be anything now."""
    path, content = tmp_path / "f", filled(tmp_path / "f")
    path.write_bytes(content[:2000] + bytes(1000) + content[3000:4000] + bytes(1000))
    growing = GrowingSum(HEADER)
    growing.arrived(3000, 4000)
    growing.arrived(HEADER, 2000)
    growing.advance(path)
    path.write_bytes(bytes(2000) + content[2000:])  # the first part is not read again, all else is
    growing.arrived(2000, 3000)
    growing.advance(path)
    assert growing.finish(path) == hashlib.sha256(content).hexdigest()


def test_a_gap_that_nobody_told_of_is_read_in_the_end(tmp_path: Path) -> None:
    content = filled(tmp_path / "f")
    growing = GrowingSum(HEADER)
    growing.arrived(2000, 3000)
    growing.advance(tmp_path / "f")
    assert growing.finish(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_an_empty_stretch_and_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    growing = GrowingSum(0)
    growing.arrived(0, 0)
    growing.advance(tmp_path / "f")
    assert growing.finish(tmp_path / "f") == hashlib.sha256(b"").hexdigest()


def test_writers_in_threads(tmp_path: Path) -> None:
    """Bytes are written, then told of, by several threads while another sums."""
    path, content = tmp_path / "f", random.Random(1).randbytes(400_000)
    growing, done = GrowingSum(0), threading.Event()
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(4) as pool:

        def write(begin: int) -> None:
            os.pwrite(file.fileno(), content[begin : begin + 1000], begin)
            growing.arrived(begin, begin + 1000)

        def advance() -> None:
            while not done.is_set():
                growing.advance(path)

        summing = pool.submit(advance)
        order = list(range(0, len(content), 1000))
        random.Random(2).shuffle(order)
        list(pool.map(write, order))
        done.set()
        summing.result()
    assert growing.finish(path) == hashlib.sha256(content).hexdigest()

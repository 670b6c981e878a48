"""What malloc keeps back of freed arrays is given back, and only where it is too much."""

from __future__ import annotations

import subprocess
import sys

import pytest

from isomerge.memory import give_back, peak_rss, resident

CODE = """
import torch
from isomerge.memory import give_back, peak_rss, resident

large = torch.ones(31 << 18)
del large  # from here on malloc takes arrays of up to 31 MB from its pools
arrays = [torch.ones(1 << 18) for _ in range(200)]
del arrays[:-1]  # the last one keeps the pool from shrinking by itself
before = resident()
give_back(above=2 * before)
kept = resident()
give_back(above=before / 2)
assert peak_rss() >= before - 2**20  # the kernel counts by threads, not to the page
print(before >> 20, kept >> 20, resident() >> 20)
"""


linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell")


@linux
def test_the_system_tells() -> None:
    assert 0 < resident() <= peak_rss() + 2**20
    give_back(above=0)


@linux
def test_freed_arrays_go_back_to_the_system_above_a_bound() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, kept, after = map(int, done.stdout.split())
    assert abs(kept - before) <= 8
    assert after <= before - 150  # of 199 MB that were freed

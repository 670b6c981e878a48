"""What malloc keeps back of freed arrays is given back, and only where it is too much."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


PAGES = """
import resource, torch
from isomerge.memory import on_huge_pages, resident

def fill(tensor):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, resident()
    tensor.fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before[0], resident() - before[1]

count = 2**24 + 5
plain, _ = fill(torch.empty(count))
array = torch.empty(count)
assert on_huge_pages(array) is array
few, taken = fill(array)
assert taken <= 4 * count + 2**19, taken
for size in (0, 1, 2**20):
    on_huge_pages(torch.empty(size)).fill_(1)
print(plain, few)
"""
SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


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


@pytest.mark.skipif(
    not SYSTEM.exists() or "[madvise]" not in SYSTEM.read_text(), reason="the system gives huge pages to all, or none"
)
def test_large_arrays_come_in_few_pages_and_take_no_more_memory() -> None:
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    plain, few = map(int, done.stdout.split())
    assert plain >= 2**14  # 64 MiB in pages of 4 KiB
    assert few <= plain / 8  # 31 huge pages, and what does not fit into them

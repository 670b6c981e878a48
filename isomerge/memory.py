"""The memory of this process: how much it has taken, in which pages, and freed memory given back to the system."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAPPED = 32 * 2**20  # bytes from which malloc always maps an array by itself
HUGE = 2**21  # bytes of a huge page


def peak_rss() -> int | None:
    """The largest resident memory of this process so far, in bytes; None where the system does not tell.

    Linux's own file comes first: getrusage there starts from the peak of the process that launched this one.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def give_back(above: float) -> None:
    """Gives the system what was freed and malloc still holds, if the process has more than `above` bytes resident.

    glibc keeps freed arrays of up to 32 MB, in a pool per thread. Nothing is done where it is not the C library.
    """
    trim = _malloc_trim()
    if trim is not None and resident() > above:
        trim(0)


def on_huge_pages(values: Tensor) -> Tensor:
    """The same tensor, of which nothing was written yet: in memory that comes in pages of 2 MiB, as far as they fit.

    To be given fresh pages of 4 KiB is a quarter of the time of TIES on matrices of 2048 x 8192. Only for arrays that
    malloc maps by themselves, of 32 MiB and more, and with the pages that lie inside: no more memory is taken.
    """
    begin, end = values.data_ptr(), values.data_ptr() + values.nbytes
    advise = _madvise() if values.device.type == "cpu" and values.nbytes >= MAPPED else None
    if advise is not None:
        begin, end = -(-begin // HUGE) * HUGE, end // HUGE * HUGE
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 14)  # MADV_HUGEPAGE; refused where there are none
    return values


def resident() -> int:
    """The resident memory of this process, in bytes; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@cache
def _malloc_trim() -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


@cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None

"""Runs the CUDA kernels of csrc/ on the CPU: the very same sources, compiled by g++ against tests/cuda_on_cpu.

    kernels = emulate.library("cholesky.cu")                     # compiled once per session
    G = emulate.guarded(G)                                       # an access beyond its end is an error
    kernels.run("small_eigh_launch", G, values, vectors, status, 3, 8, None)  # extern "C" entry; raises on errors
    values, = kernels.in_every_order(compute)                    # bit-identical whatever thread runs first, or an error
    kernels.launches                                             # grid, block, shared memory of what `run` launched

Tensors become pointers, ints int64_t, floats double, None a null pointer (as a stream: the default one).
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "cuda_on_cpu"
COMPILER = shutil.which("g++")

# -fno-gnu-unique: each library has an emulator of its own. -ffp-contract=off: one meaning of a * b + c on every CPU.
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-fno-gnu-unique", "-ffp-contract=off"]
FLAGS += ["-U_FORTIFY_SOURCE", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]

ORDERS = {"forward": 0, "reverse": -1, "random 1": 1, "random 2": 2}
"""In which order the threads run between two barriers, as the emulator counts them: a positive number is a seed."""

Argument = Tensor | int | float | None


class Launch(NamedTuple):
    """One launch: sizes, and how many block-wide barriers all its blocks passed."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    barriers: int

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]


class EmulationError(RuntimeError):
    """What the emulator found: a divergent barrier, an access out of bounds, an invalid launch."""


class Library:
    """Entries of one compiled source, called by name."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.emulated_error.restype = ctypes.c_char_p
        self._library.emulated_launches.restype = ctypes.c_int64

    def run(self, entry: str, *arguments: Argument, order: str = "forward") -> None:
        """Calls an entry that returns cudaError_t; raises EmulationError for anything but success."""
        self._library.emulated_begin(ctypes.c_int64(ORDERS[order]))
        code = getattr(self._library, entry)(*map(_converted, arguments))
        if code != 0:
            message = self._library.emulated_error().decode() or f"cudaError {code}"
            raise EmulationError(f"{entry}, {order}: {message}")

    def value(self, entry: str, *arguments: Argument) -> int:
        """Calls an entry that returns int64_t, such as the size of a workspace."""
        function = getattr(self._library, entry)
        function.restype = ctypes.c_int64
        result: int = function(*map(_converted, arguments))
        return result

    def in_every_order(self, compute: Callable[[str], Sequence[Tensor]]) -> Sequence[Tensor]:
        """compute(order) for each of ORDERS, on fresh outputs; AssertionError where the bits differ."""
        first, *others = [(order, compute(order)) for order in ORDERS]
        for order, results in others:
            for i, (expected, actual) in enumerate(zip(first[1], results, strict=True)):
                same = expected.contiguous().view(torch.uint8).equal(actual.contiguous().view(torch.uint8))
                assert same, f"result {i} depends on the order of the threads: {first[0]} and {order} differ"
        return first[1]

    @property
    def launches(self) -> list[Launch]:
        """The launches of the last `run`, in their order."""
        result = []
        for i in range(self._library.emulated_launches()):
            numbers = (ctypes.c_int64 * 8)()
            self._library.emulated_launch(ctypes.c_int64(i), numbers)
            x, y, z, bx, by, bz, shared_bytes, barriers = numbers
            result.append(Launch((x, y, z), (bx, by, bz), shared_bytes, barriers))
        return result


def _converted(argument: Argument) -> object:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return ctypes.c_void_p(None) if argument is None else ctypes.c_int64(argument)


@functools.cache
def _directory() -> Path:
    path = Path(tempfile.mkdtemp(prefix="isomerge-emulated-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def _compile(source: Path) -> Path:
    target = _directory() / (str(source).replace("/", "_") + ".o")
    if not target.exists():
        assert COMPILER is not None, "g++ is needed to emulate CUDA kernels"
        command = [COMPILER, *FLAGS, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile for the CPU:\n{done.stderr}")
    return target


@functools.cache
def library(*sources: str) -> Library:
    """The emulated kernels of these sources, named relative to csrc/ or, if not there, to tests/cuda_on_cpu/."""
    paths = [ROOT / "csrc" / name if (ROOT / "csrc" / name).exists() else HERE / name for name in sources]
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(_compile, [*paths, HERE / "fibers.cpp", HERE / "memory.cpp"]))
    target = _directory() / f"{len(list(_directory().iterdir()))}.so"
    command = [str(COMPILER), "-shared", "-Wl,-Bsymbolic", "-o", str(target), *map(str, objects)]
    subprocess.run(command, check=True)
    return Library(target)


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy whose memory ends, to 16 bytes, at a page that may not be touched; the slack is NaN."""
    bytes_ = tensor.numel() * tensor.element_size()
    allocator = library()._library
    allocator.emulated_allocate.restype = ctypes.c_void_p
    address = allocator.emulated_allocate(ctypes.c_int64(bytes_))
    memory = (ctypes.c_char * max(bytes_, 1)).from_address(address)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()) if bytes_ else tensor.new_empty(0)
    weakref.finalize(memory, allocator.emulated_free, ctypes.c_void_p(address))
    return flat.view(tensor.shape).copy_(tensor)

"""A CUDA device that the CPU plays, and that is stricter than a real one.

    with played_gpu.played(monkeypatch) as gpu:
        isomerge.merge(recipe, out, device="cuda")
    gpu.complaints  # what was forgotten between streams
    gpu.peak        # the most bytes that tensors have taken at a time

Tensors say that they are on cuda:0 and hold tensors of the CPU, on which torch computes and Triton interprets. Each
operation and each kernel is a step of the stream that is current in its thread. Which steps a stream is known to come
after is kept as a vector clock, to which events and waits add; that the host has waited for something adds nothing, for
it shows only what happened to happen first. Errors at once: tensors of two devices in one operation, a kernel on a
tensor of the CPU, a tensor that another stream has written, or still reads, without a wait. At the end, in
`complaints`: memory that was freed while another stream might be using it and that `record_stream` had not been told
of. Copies to pinned memory are made when they are waited for, NaN until then. What it cannot find: anything about
speed, CUDA's limits, operations that a GPU lacks or answers otherwise, and memory that libraries take for themselves.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from emulate import COMPILER
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
FREE = 10**11  # bytes that the device says are free

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using namespace c10;
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}  // namespace
"""
"""Without one, torch refuses to index a tensor that says it is on a device which torch was not built for."""

Stamp = tuple[int, int]  # a stream, and which of its steps


class Stream:
    """Stands for torch.cuda.Stream. `known` is, by stream, up to which step this one comes after."""

    cuda_stream = 0

    def __init__(self, device: object = None) -> None:
        gpu = Gpu.current
        assert gpu is not None
        self.number = len(gpu.streams)
        self.known = {self.number: 0}
        gpu.streams.append(self)

    def step(self) -> Stamp:
        self.known[self.number] += 1
        return self.number, self.known[self.number]

    def after(self, stamp: Stamp) -> bool:
        return self.known.get(stamp[0], 0) >= stamp[1]

    def join(self, known: dict[int, int]) -> None:
        for number, step in known.items():
            self.known[number] = max(self.known.get(number, 0), step)

    def wait_event(self, event: Event) -> None:
        self.join(event.known)

    def wait_stream(self, stream: Stream) -> None:
        self.join(stream.known)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.known, event.seconds = dict(self.known), time.perf_counter()
        return event

    def synchronize(self) -> None:
        assert Gpu.current is not None
        Gpu.current.host_waits(self.known)


class Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, **options: bool) -> None:
        self.known: dict[int, int] = {}
        self.seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        assert Gpu.current is not None
        (stream or Gpu.current.stream()).record_event(self)

    def synchronize(self) -> None:
        assert Gpu.current is not None
        Gpu.current.host_waits(self.known)

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.seconds - self.seconds)


class Memory:
    """The bytes under one tensor and its views: who has written and read them last, and who may still."""

    def __init__(self, gpu: Gpu, nbytes: int, stream: Stream) -> None:
        self.gpu, self.nbytes, self.stream = gpu, nbytes, stream
        self.written: Stamp | None = None
        self.read: dict[int, int] = {}
        self.recorded: set[int] = set()
        gpu.bytes += nbytes
        gpu.peak = max(gpu.peak, gpu.bytes)

    def __del__(self) -> None:
        self.gpu.bytes -= self.nbytes
        for stamp in [*self.read.items(), *([self.written] if self.written else [])]:
            if not self.stream.after(stamp) and stamp[0] not in self.recorded:
                self.gpu.complaints.append(
                    f"{self.nbytes} bytes of stream {self.stream.number} freed before step {stamp[1]} of {stamp[0]}"
                )


class Gpu:
    """The device, from `played` to the end of it."""

    current: Gpu | None = None

    def __init__(self) -> None:
        Gpu.current = self
        self.bytes = self.peak = 0
        self.complaints: list[str] = []
        self.host: dict[int, int] = {}  # the steps that the host has seen to be done
        self.streams: list[Stream] = []
        self.default = Stream()
        self.memories: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()
        self._late: list[tuple[Stamp, Callable[[], object]]] = []  # copies to pinned memory under way
        self._pinned: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self._own = threading.local()
        self._lock = threading.RLock()

    def stream(self) -> Stream:
        found: Stream = getattr(self._own, "stream", self.default)
        return found

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        before = self.stream()
        self._own.stream = stream or before
        try:
            yield
        finally:
            self._own.stream = before

    def host_waits(self, known: dict[int, int]) -> None:
        with self._lock:
            for number, step in known.items():
                self.host[number] = max(self.host.get(number, 0), step)
            due = [copy for (number, step), copy in self._late if self.host.get(number, 0) >= step]
            self._late = [(stamp, copy) for stamp, copy in self._late if self.host.get(stamp[0], 0) < stamp[1]]
        with _disable_current_modes():
            for copy in due:
                copy()

    def step(self, read: Sequence[Played], written: Sequence[Played], what: str) -> Stamp:
        """One operation on the current stream, which must come after all that it builds on."""
        stream = self.stream()
        with self._lock:
            stamp = stream.step()
            for tensor in (*read, *written):
                before = tensor.memory.written
                if before and not stream.after(before):
                    raise RuntimeError(f"{what} on stream {stamp[0]} did not wait for stream {before[0]}")
            for tensor in written:
                waited = [other for other in tensor.memory.read.items() if not stream.after(other)]
                if waited:
                    raise RuntimeError(f"{what} on stream {stamp[0]} writes what stream {waited[0][0]} reads")
                tensor.memory.written = stamp
            for tensor in read:
                tensor.memory.read[stamp[0]] = stamp[1]
        return stamp

    def memory_of(self, data: Tensor) -> Memory:
        storage = data.untyped_storage()
        memory = self.memories.get(storage.data_ptr()) if storage.nbytes() else None
        if memory is None:
            memory = Memory(self, storage.nbytes(), self.stream())
            if storage.nbytes():
                self.memories[storage.data_ptr()] = memory
        return memory

    def pinned(self, values: Tensor) -> Tensor:
        self._pinned.add(values)
        return values

    def is_pinned(self, values: Tensor) -> bool:
        return any(values is other for other in self._pinned)

    def later(self, stamp: Stamp, target: Tensor, values: Tensor) -> None:
        """A copy to pinned memory: as of now, but seen when the host has waited for it."""
        taken = values.clone()
        target.fill_(torch.nan if target.is_floating_point() else -1)
        with self._lock:
            self._late.append((stamp, lambda: target.copy_(taken)))


class Played(Tensor):
    """A tensor on the device; `data_` is its own on the CPU."""

    data_: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, data: Tensor) -> Played:
        assert Gpu.current is not None
        options: dict[str, Any] = {"storage_offset": data.storage_offset(), "dtype": data.dtype, "device": DEVICE}
        made: Played = Tensor._make_wrapper_subclass(cls, data.size(), strides=data.stride(), **options)
        made.data_, made.memory = data, Gpu.current.memory_of(data)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.data_.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.data_.untyped_storage()

    def record_stream(self, stream: Any) -> None:
        self.memory.recorded.add(stream.number)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        made = torch.tensor(data, dtype=dtype or self.dtype)
        return made.to(DEVICE if device is None else device)

    def numpy(self, *args: object, **kwargs: object) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def inner(value: Any) -> Any:
    return value.data_ if isinstance(value, Played) else value


MIXED = ("aten.copy_", "aten._to_copy", "aten.index.", "aten.index_put", "aten._index_put_impl_")
"""Operations that take tensors of the CPU beside those of a device; indices are copied there."""


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation of torch, as the device would see it."""
    gpu, name = Gpu.current, str(func)
    assert gpu is not None
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    ours = [value for value in tensors if isinstance(value, Played)]
    if name.startswith("aten._pin_memory"):
        assert not ours
        return gpu.pinned(args[0].clone())
    if ours and not name.startswith(MIXED) and any(t.ndim for t in tensors if not isinstance(t, Played)):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {DEVICE} and cpu")

    options = dict(kwargs)
    device = None if options.get("device") is None else torch.device(options["device"])
    target = device.type if device else "cuda" if ours else "cpu"
    if name.startswith("aten.copy_"):
        target = args[0].device.type
    if device:
        options["device"] = torch.device("cpu")
    pinned = options.pop("pin_memory", False)
    given, named = tree_map(inner, (args, options))
    if not ours and target == "cpu":
        made = func(*given, **named)
        return gpu.pinned(made) if pinned else made

    waits = name.startswith("aten._local_scalar_dense") or (bool(ours) and target == "cpu")
    written = [value for value in _written(func._schema, args, kwargs) if isinstance(value, Played)]
    if any(returned.alias_info and not returned.alias_info.is_write for returned in func._schema.returns):
        stamp = None  # a view: nothing is read yet
    else:
        stamp = gpu.step([value for value in ours if all(value is not other for other in written)], written, name)
    if name.startswith("aten.copy_") and waits and args[2:] == (True,) and gpu.is_pinned(args[0]):
        assert stamp is not None
        gpu.later(stamp, args[0], given[1])
        return args[0]
    if name == "aten.bmm.dtype":  # which torch has for CUDA alone
        func, given = torch.ops.aten.bmm.default, (given[0].to(given[2]), given[1].to(given[2]))
    made = func(*given, **named)
    if waits:
        gpu.host_waits(gpu.stream().known)
    mine = {id(inner(value)): value for value in tensors}

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in mine or target == "cpu":
            return mine.get(id(value), value)
        tensor = Played(value)
        tensor.memory.written = tensor.memory.written or stamp
        return tensor

    return tree_map(outer, made)


def _written(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Any]:
    """What an operation changes of its arguments."""
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tree_leaves(args[index] if index < len(args) else kwargs.get(argument.name))


class Generator(torch.Generator):
    """On the CPU, whatever the device."""

    def __new__(cls, device: object = None) -> Generator:
        return super().__new__(cls)


class Everything(TorchDispatchMode):
    """Sees operations without a tensor of the device too: what makes one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def launch(run: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel by Triton's interpreter, in place of `run`; what it has changed it has written."""

    def on_the_device(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        gpu, values = Gpu.current, [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        assert gpu is not None
        if not all(isinstance(value, Played) for value in values):
            raise ValueError(f"{kernel.__name__}: Pointer argument cannot be accessed from Triton (cpu tensor?)")
        with _disable_current_modes():
            before = [value.data_.clone() for value in values]
            given = {name: inner(value) for name, value in kwargs.items()}
            done = run(kernel, *map(inner, args), grid=grid, warmup=warmup, **given)
            same = [torch.equal(_bits(a), _bits(b.data_)) for a, b in zip(before, values, strict=True)]
        read = [value for value, unchanged in zip(values, same, strict=True) if unchanged]
        gpu.step(read, [value for value in values if all(value is not other for other in read)], kernel.__name__)
        return done

    return on_the_device


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


@cache
def _guard() -> None:
    """Registers `GUARD` in this process, for good."""
    root, folder = Path(torch.__file__).parent, Path(tempfile.mkdtemp())
    (folder / "guard.cpp").write_text(GUARD)
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
    subprocess.run([COMPILER, "guard.cpp", *flags, "-o", "guard.so"], cwd=folder, check=True, timeout=120)
    torch.ops.load_library(str(folder / "guard.so"))
    shutil.rmtree(folder)


@contextmanager
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """torch.cuda with one device of compute capability 9.0, until the end of the block."""
    from triton.runtime.interpreter import InterpretedFunction

    _guard()
    gpu, make, thread = Gpu(), torch.tensor, threading.Thread.run

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        return make(data, **options).to("cpu" if device is None else device)

    def in_mode(self: threading.Thread) -> None:
        with Everything():
            thread(self)

    here = nullcontext()
    replaced: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (FREE - gpu.bytes, FREE),
        "max_memory_allocated": lambda device=None: gpu.peak,
        "reset_peak_memory_stats": lambda device=None: setattr(gpu, "peak", gpu.bytes),
        "synchronize": lambda device=None: [stream.synchronize() for stream in gpu.streams],
        "current_stream": lambda device=None: gpu.stream(),
        "default_stream": lambda device=None: gpu.default,
        "stream": gpu.on,
        "device": lambda device: here,
        "device_of": lambda tensor: here,
        "Stream": Stream,
        "Event": Event,
    }
    with monkeypatch.context() as patch:
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(threading.Thread, "run", in_mode)
        patch.setattr(InterpretedFunction, "run", launch(InterpretedFunction.run))
        library = torch.library.Library("aten", "IMPL")  # for indices in lists, which torch uploads below the mode
        library.impl("empty_strided", _empty_strided, "CUDA")
        library.impl("copy_", _copy, "CUDA")
        try:
            with Everything():
                yield gpu
        finally:
            library._destroy()
            Gpu.current = None


def _empty_strided(size: Any, stride: Any, **options: Any) -> Tensor:
    return Played(torch.empty_strided(size, stride, dtype=options["dtype"]))


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    inner(target).copy_(inner(source))
    return target

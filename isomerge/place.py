"""Where a merge computes, and how tensors get there and back: the CPU, or a GPU with copies beside the computing.

On a GPU the reading thread uploads through pinned memory on a stream of its own and forms the deltas there, so that
checkpoints cross the bus in their own dtype; results come back on a third stream. No thread waits for another's copies
but by the events between them, and the allocator is told of every tensor that changes streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from isomerge.errors import InputError


class Place:
    """The CPU, where nothing need be moved; subclasses are other devices."""

    device = torch.device("cpu")

    def memory(self) -> int | None:
        """Bytes that are free on the device; None where it uses the process's own memory."""
        return None

    def peak(self) -> int | None:
        """The most bytes of the device that tensors have taken at a time so far; None as for `memory`."""
        return None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """In here the reading thread uploads, and computes on what it has uploaded."""
        yield

    def up(self, values: Tensor) -> Tensor:
        """Values on the CPU -> the same on the device."""
        return values

    def mark(self) -> Callable[[Iterable[Tensor]], None]:
        """Called inside `reading`: a function that makes tensors computed so far usable in the thread that calls it."""
        return lambda tensors: None

    def down(self, values: Tensor) -> Callable[[], Tensor]:
        """Starts the way back of values on the device; what it returns waits for that and gives them, on the CPU."""
        return lambda: values


class Gpu(Place):
    """One CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._uploads = torch.cuda.Stream(device)
        self._downloads = torch.cuda.Stream(device)
        torch.cuda.reset_peak_memory_stats(device)

    def memory(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    @contextmanager
    def reading(self) -> Iterator[None]:
        with torch.cuda.stream(self._uploads):
            yield

    def up(self, values: Tensor) -> Tensor:
        # The pinned copy goes back to torch's cache, which gives it out again only when the upload is over.
        return values.pin_memory().to(self.device, non_blocking=True)

    def mark(self) -> Callable[[Iterable[Tensor]], None]:
        done = self._uploads.record_event()

        def take(tensors: Iterable[Tensor]) -> None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(done)
            for tensor in tensors:
                tensor.record_stream(stream)

        return take

    def down(self, values: Tensor) -> Callable[[], Tensor]:
        if values.device.type == "cpu":  # the base's own values, which are only copied
            return super().down(values)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._downloads.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._downloads):
            host.copy_(values, non_blocking=True)
            values.record_stream(self._downloads)
            done = self._downloads.record_event()

        def wait() -> Tensor:
            done.synchronize()
            return host

        return wait


def open_place(name: str, where: str) -> Place:
    """The place called `name`: `cpu`, `cuda` or `cuda:N`. InputError, which begins with `where`, if it is not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"{where}: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cpu":
        return Place()
    if device.type != "cuda":
        raise InputError(f"{where}: expected cpu, cuda or cuda:N, got {name!r}")
    if not torch.cuda.is_available():
        raise InputError(f"{where}: {name}: torch {torch.__version__} finds no CUDA device; use cpu")
    count, index = torch.cuda.device_count(), device.index
    if index is not None and index >= count:
        raise InputError(f"{where}: {name}: this machine has {count} CUDA devices, cuda:0 to cuda:{count - 1}")
    return Gpu(torch.device("cuda", torch.cuda.current_device() if index is None else index))

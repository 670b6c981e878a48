"""Run matrices side by side: one matrix per core instead of all cores on one matrix.

LAPACK's own threads gain 1.0x to 1.3x on a 768 x 768 eigenproblem with two cores, two problems side by side 1.6x to
1.9x. Since every matrix is computed by one thread and starts on a 64-byte boundary, the bits of its result do not
depend on how many others it is batched with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from os import register_at_fork
from threading import Barrier, local
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
_thread = local()  # `worker` is set in the threads of the pool
ALIGNMENT = 64  # bytes: an AVX-512 register, and what torch's CPU allocator gives


def single_threaded(workers: int, name: str) -> ThreadPoolExecutor:
    """Threads in each of which torch computes with one; to be made while no other thread makes its first call."""
    # torch.set_num_threads acts on the calling thread, but a thread's first operation replaces its number by the one
    # set last anywhere: so every worker sets 1 and makes that first call now, then the caller's number is put back
    threads, started = torch.get_num_threads(), Barrier(workers + 1)

    def start() -> None:
        _thread.worker = True
        torch.set_num_threads(1)
        torch.get_num_threads()
        started.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
    for _ in range(workers):
        pool.submit(start)
    started.wait()
    torch.set_num_threads(threads)
    return pool


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    return single_threaded(workers, "isomerge")


register_at_fork(after_in_child=_pool.cache_clear)  # a child process has none of the threads


def _aligned(A: Tensor) -> Tensor:
    """A where it starts on the boundary and has no gaps between its rows or columns, else a copy that does."""
    dense = A.is_contiguous() or (A.dim() == 2 and A.mT.is_contiguous())
    if dense and A.data_ptr() % ALIGNMENT == 0:
        return A
    return A.clone(memory_format=torch.preserve_format if dense else torch.contiguous_format)


def matrices(stack: Tensor) -> list[Tensor]:
    """The matrices of [..., m, n] in order, as views: an expanded dimension is not copied."""
    views = [stack]
    for _ in range(stack.dim() - 2):
        views = [part for view in views for part in view.unbind(0)]
    return views


def side_by_side(
    function: Callable[..., Result], *inputs: Sequence[Tensor], out: Sequence[Tensor] | None = None
) -> list[Result]:
    """[function(a, b, ...) for each a, b, ... of the inputs]; on the CPU one worker per torch thread.

    With `out`, each call also gets `out=` the tensor it may write to. Exceptions are raised as by `concurrently`.
    """
    calls = list(zip(*inputs, strict=True))
    targets: list[dict[str, Tensor]] = [{}] * len(calls) if out is None else [{"out": target} for target in out]
    if not calls or calls[0][0].device.type != "cpu":
        return [function(*call, **target) for call, target in zip(calls, targets, strict=True)]

    def run(call: Sequence[Tensor], target: dict[str, Tensor]) -> Result:
        return function(*map(_aligned, call), **target)

    return concurrently([partial(run, call, target) for call, target in zip(calls, targets, strict=True)])


def concurrently(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of the calls, which torch's threads share out, each call by one thread; in a call, one by one.

    The first exception that a call raises is raised here, after all calls have ended.
    """
    if getattr(_thread, "worker", False):
        return [call() for call in calls]
    pool = _pool(torch.get_num_threads())
    futures = [pool.submit(call) for call in calls]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]

"""Matrices run side by side, each on one thread, and the caller's threads are left as they were."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from torch import Tensor

from isomerge.backends import side_by_side as module
from isomerge.backends.side_by_side import side_by_side


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_worker_computes_with_one_thread_and_the_caller_keeps_its_own(threads: int) -> None:
    def used(A: Tensor) -> tuple[int, str]:
        torch.linalg.eigh(A @ A.mT)
        return torch.get_num_threads(), threading.current_thread().name

    seen = side_by_side(used, torch.randn(8, 40, 40).unbind())
    assert {count for count, _ in seen} == {1}
    assert all(name.startswith("isomerge") for _, name in seen)
    assert torch.get_num_threads() == threads
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [threads], "threads that start later begin with the caller's number"


def test_results_keep_their_order_and_every_matrix_is_aligned() -> None:
    stack = torch.arange(7 * 3 * 5, dtype=torch.float32).reshape(7, 3, 5)  # 60 bytes a matrix
    results = side_by_side(lambda A: (A.data_ptr() % module.ALIGNMENT, A.clone()), stack.unbind())
    assert [offset for offset, _ in results] == [0] * 7
    assert torch.equal(torch.stack([A for _, A in results]), stack)


def test_the_first_error_comes_after_all_calls_have_ended() -> None:
    ended = []

    def call(A: Tensor) -> None:
        ended.append(int(A[0, 0]))
        if A[0, 0] >= 2:
            raise ValueError(f"matrix {int(A[0, 0])}")

    with pytest.raises(ValueError, match="matrix 2"):
        side_by_side(call, torch.arange(5.0).reshape(5, 1, 1).unbind())
    assert sorted(ended) == [0, 1, 2, 3, 4]


def test_a_call_may_itself_run_matrices_side_by_side() -> None:
    """Its own run on its thread: were they put in the queue, all workers would wait for one another."""

    def traces(A: Tensor) -> list[Tensor]:
        return side_by_side(torch.trace, [A, 2 * A])

    results = side_by_side(traces, [k * torch.eye(3) for k in range(8)])
    assert [[float(value) for value in pair] for pair in results] == [[3.0 * k, 6.0 * k] for k in range(8)]


def trace(queue: multiprocessing.Queue) -> None:
    queue.put([float(value) for value in side_by_side(torch.trace, [torch.eye(3)] * 4)])


def test_a_forked_child_starts_workers_of_its_own() -> None:
    side_by_side(torch.trace, [torch.eye(3)] * 4)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=trace, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == [3.0] * 4
    child.join(60)

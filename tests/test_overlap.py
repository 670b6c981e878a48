"""Reading ahead and writing behind: order, bounds, and what happens when a call fails."""

from __future__ import annotations

import queue
import threading
import time
import weakref

import pytest

from isomerge.overlap import Behind, ahead


class Value:
    """Something whose life can be watched."""

    def __init__(self, key: int) -> None:
        self.key = key


def test_values_come_in_order_and_two_live_at_a_time() -> None:
    alive: weakref.WeakSet[Value] = weakref.WeakSet()
    counts: queue.Queue[int] = queue.Queue()

    def fetch(key: int) -> Value:
        value = Value(key)
        alive.add(value)
        counts.put(len(alive))
        return value

    seen = []
    stream = ahead(fetch, range(20))
    assert counts.empty()
    for _ in range(20):
        value = next(stream)
        while counts.qsize() < min(len(seen) + 2, 20):  # until the next one is there too
            time.sleep(0.001)
        seen.append(value.key)
        del value
    assert seen == list(range(20))
    assert [counts.get() for _ in range(20)] == [1] + [2] * 19
    assert list(ahead(fetch, [])) == []


def test_the_next_value_is_fetched_while_the_caller_works() -> None:
    fetched = [threading.Event() for _ in range(3)]

    def fetch(key: int) -> int:
        fetched[key].set()
        return key

    stream = ahead(fetch, range(3))
    assert next(stream) == 0
    assert fetched[1].wait(30), "fetched while value 0 is in use"
    assert not fetched[2].wait(0.05), "but no further ahead"
    assert list(stream) == [1, 2]


def test_an_error_of_a_fetch_reaches_the_caller_in_its_turn() -> None:
    def fetch(key: int) -> int:
        if key == 2:
            raise ValueError("key 2")
        return key

    stream = ahead(fetch, range(4))
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ValueError, match="key 2"):
        next(stream)


def test_calls_run_in_order_in_one_other_thread() -> None:
    done: list[tuple[int, str]] = []
    with Behind(2) as behind:
        for i in range(50):
            behind.put(lambda i=i: done.append((i, threading.current_thread().name)))
    assert [i for i, _ in done] == list(range(50))
    assert {name for _, name in done} == {"isomerge-write_0"}


def test_put_waits_while_enough_calls_are_not_done() -> None:
    go, entered = threading.Event(), threading.Event()
    with Behind(1) as behind:
        behind.put(lambda: go.wait(30))
        blocked = threading.Thread(target=lambda: (behind.put(lambda: None), entered.set()))
        blocked.start()
        assert not entered.wait(0.1)
        go.set()
        assert entered.wait(30)
        blocked.join(30)


@pytest.mark.parametrize("depth", [1, 3])
def test_after_a_failure_nothing_more_is_run_and_the_error_is_raised(depth: int) -> None:
    done: list[int] = []

    def call(i: int) -> None:
        if i == 4:
            raise OSError("disk full")
        done.append(i)

    def put_all() -> None:
        with Behind(depth) as behind:
            for i in range(20):
                behind.put(lambda i=i: call(i))

    with pytest.raises(OSError, match="disk full"):
        put_all()
    assert done == [0, 1, 2, 3]


def test_an_error_of_the_last_call_is_raised_at_the_end() -> None:
    with pytest.raises(ZeroDivisionError), Behind(4) as behind:
        behind.put(lambda: 1 // 0)


def test_an_error_inside_the_block_comes_first_and_the_thread_ends() -> None:
    def fail() -> None:
        with Behind(2) as behind:
            behind.put(lambda: None)
            raise KeyError

    before = threading.active_count()
    with pytest.raises(KeyError):
        fail()
    assert threading.active_count() == before

"""Reading ahead and writing behind: one thread fetches what comes next, another puts away what is done.

Order is kept on both sides, so that results depend on neither thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


def ahead(fetch: Callable[[Key], Value], keys: Sequence[Key]) -> Generator[Value, None, None]:
    """What `fetch` gives for each key in order; the next is fetched in a thread while the caller works on one."""
    if not keys:
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="isomerge-read") as pool:
        coming = pool.submit(fetch, keys[0])
        for key in keys[1:]:
            value = coming.result()
            coming = pool.submit(fetch, key)
            yield value
            del value  # the caller's turn is over: two values in memory, never three
        yield coming.result()


class Behind:
    """Runs calls one after another in a thread, at most `depth` of them waiting; a context manager.

    What a call raises is raised by the next `put`, or by `close`, and no later call is run.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="isomerge-write")
        self._waiting: deque[tuple[Future[None], int]] = deque()  # and how much of the depth each one takes
        self._failed = False

    def put(self, call: Callable[[], None]) -> None:
        """Hands over a call; waits while `depth` others are not done."""
        while sum(size for _, size in self._waiting) >= self._depth:
            self._next()
        self._waiting.append((self._pool.submit(self._run, call), 1))

    def follow(self, call: Callable[[], None]) -> None:
        """Hands over a call that holds no memory to speak of: it is run in its turn, and nobody waits for room."""
        self._waiting.append((self._pool.submit(self._run, call), 0))

    def close(self) -> None:
        """Waits until every call is done."""
        while self._waiting:
            self._next()

    def _run(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except BaseException:
            self._failed = True
            raise

    def _next(self) -> None:
        self._waiting.popleft()[0].result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

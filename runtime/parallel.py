"""Several things at once in threads, with results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from runtime.errors import CapacityError

_A = TypeVar("_A")
_B = TypeVar("_B")


def no_thread(error: RuntimeError) -> CapacityError:
    """Return what to raise where the system gives no thread, as it does when it has no memory for one."""
    return CapacityError(
        f"not enough memory, or too many threads ({error})", remedy="end other threads, or raise the limit (ulimit -u)"
    )


def ordered_map(function: Callable[[_A], _B], items: Sequence[_A], num_threads: int) -> Iterator[_B]:
    """Yield `function(item)` of each item, in order; as many are computed at once as there are threads.

    At most one result for each thread is made ahead of the one that is taken. What a call raises is raised in its turn,
    and ends all; so does closing the iterator.
    """
    if num_threads < 2 or len(items) < 2:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(min(num_threads, len(items)), "qwen3vl-input")
    try:
        running: deque[Future[_B]] = deque()
        for item in items:
            if len(running) >= num_threads:
                yield running.popleft().result()
            try:
                running.append(pool.submit(function, item))
            except RuntimeError as error:
                raise no_thread(error) from error
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

"""A way to wait for another thread that an interrupt cannot break."""

from __future__ import annotations

import contextlib
import threading


class Wakeup:
    """One thread waits; any other wakes it, before or while it waits.

    A plain lock, not `threading.Event` or a `Condition`: these take a lock in Python code, which Ctrl-C leaves taken if
    it comes right behind (CPython 3.11 looks for signals after each call), and then who wakes waits for ever. For the
    same reason locks that callers take are entered as such, never through a condition.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is woken, once for any number of times; return False after `timeout_s`."""
        return self._lock.acquire(timeout=-1 if timeout_s is None else timeout_s)

    def wake(self) -> None:
        """Wake who waits, or will wait next."""
        with contextlib.suppress(RuntimeError):  # it was woken already
            self._lock.release()

"""Signals that end a process, while it has something to tidy up."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], Any] | int | None


class Interrupts:
    """Unwind the stack on SIGINT, SIGTERM and SIGHUP, but not inside `held()`."""

    def __init__(self) -> None:
        self._previous: dict[int, Handler] = {}
        self._is_held = False
        self._waiting: int | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals until the block ends; a signal that is ignored (`nohup`) stays so.

        Python gives signals to the main thread alone, so in another one this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        try:
            for number in _SIGNALS:
                # None: a handler that Python did not install and could not put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.getsignal(number)
                    signal.signal(number, self._handle)
            yield
        finally:
            for previous, handler in self._previous.items():
                signal.signal(previous, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let the block end before a signal that comes meanwhile has its effect."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            if self._waiting is not None:
                number, self._waiting = self._waiting, None
                self._handle(number, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_held:
            self._waiting = number
            return
        previous = self._previous[number]
        if callable(previous):
            previous(number, frame)
        else:
            raise KeyboardInterrupt

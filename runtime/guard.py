"""What stands between a call and an engine: the process that opened it, and the errors of its library."""

from __future__ import annotations

import ctypes
import os
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from runtime.errors import CapacityError, EngineError, Qwen3VLError, UsageError
from runtime.shown import shorten

_LONGEST_REASON = 300
_PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : (Non-zero status code returned while )?")
# What ONNX Runtime says when memory runs out: its arena, the allocator below, the C++ library.
_WANT_OF_MEMORY = ("failed to allocate", "bad_alloc", "bad allocation", "out of memory", "available memory")


class Owner:
    """Remember the process that opened an engine.

    A fork copies the memory of an engine and not its threads, so a call in the copy waits for threads that are not
    there; if another thread was inside of a call, it also waits for a turn that nobody will end. To free the engine
    there would wait for them too, so the copy keeps it until it ends.

    Args:
        engine: What holds the threads, if this is the owner of an engine.
    """

    def __init__(self, engine: object | None = None) -> None:
        self._pid = os.getpid()
        if engine is not None and hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=partial(_keep_for_ever, weakref.ref(engine)))

    @property
    def is_here(self) -> bool:
        """Whether this is the process that opened the engine."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raise in a process that was forked from the owner.

        Raises:
            UsageError: This is another process.
        """
        if not self.is_here:
            raise UsageError(
                f"the model was opened in process {self._pid}, and process {os.getpid()} was forked from it, without "
                "the threads of the engine",
                remedy="open the model in each worker process, after the fork, or start workers with multiprocessing's "
                "'spawn'",
            )


def _is_of_onnxruntime(error: Exception) -> bool:
    """Return whether ONNX Runtime raised an error: a class of its own, or a `RuntimeError` in one of its files."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    places = [type(error).__module__, "" if frame is None else str(frame.tb_frame.f_globals.get("__name__"))]
    return any(place.startswith("onnxruntime") for place in places)


def _keep_for_ever(reference: weakref.ref[object]) -> None:
    engine = reference()
    if engine is not None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


@contextmanager
def naming_errors() -> Iterator[None]:
    """Turn what an engine's library raises, and want of memory, into errors of this project's tree."""
    try:
        yield
    except Exception as error:
        known = as_engine_error(error)
        if known is None:
            raise
        raise known from error


def as_engine_error(error: Exception) -> Qwen3VLError | None:
    """Return the error of this project's tree for one that an engine's library raised, or None for any other."""
    if isinstance(error, MemoryError):
        return CapacityError("not enough memory for this call", remedy="use a smaller image, prompt or max_context")
    if not _is_of_onnxruntime(error):
        return None
    reason = _PREFIX.sub("", (str(error).splitlines() or [type(error).__name__])[0])
    reason = shorten(reason, _LONGEST_REASON)
    if any(words in str(error).lower() for words in _WANT_OF_MEMORY):
        return CapacityError(
            f"not enough memory for this call ({reason})", remedy="use a smaller image, prompt or max_context"
        )
    return EngineError(f"the engine failed ({reason})", remedy="build the engine again with this version")

"""What TensorRT and TensorRT-RTX say when a call fails: the call itself gives no reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# One failure is often reported by each function it passes through.
_SHOWN_ERRORS = 3


def make_logger(trt: Any) -> Any:
    """Return a logger for the library `trt` that keeps the errors: `errors` lists them, `take()` empties the list."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

        def take(self) -> list[str]:
            errors, self.errors = self.errors, []
            return errors

    return Logger()


def is_out_of_memory(errors: Sequence[str]) -> bool:
    """Return whether one of the errors says so; the first ones often name only what failed because of it."""
    return any("outofmemory" in error.lower().replace(" ", "") for error in errors)


def first_errors(errors: Sequence[str]) -> str:
    """Return what is worth showing of them, in one line."""
    return "; ".join(errors[:_SHOWN_ERRORS]) or "it does not say why"

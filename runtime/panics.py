"""Recognise a panic of a library that is written in Rust."""

from __future__ import annotations


def is_panic(error: BaseException) -> bool:
    """Return whether this is how pyo3 hands on a panic: no `Exception`, and of a class that no module exports."""
    return not isinstance(error, Exception) and type(error).__name__ == "PanicException"

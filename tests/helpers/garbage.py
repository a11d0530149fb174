"""Searches for garbage that take a moment, in a process that holds bundles and libraries of a million objects."""

from __future__ import annotations

import gc


def set_aside() -> None:
    """Leave all that lives now out of later searches: a test looks for what it let go itself."""
    gc.collect()
    gc.freeze()

"""Rows of a KV cache on their way to another engine's cache.

Shapes: N layers' keys and values in turn, K kv heads, R rows, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.device_cache import from_bfloat16
from runtime.errors import EngineError
from runtime.session import KVCache

FLOATS = frozenset({"float32", "float16", "bfloat16"})
"""Types of a cache's elements that are converted into each other; codes go to codes of the same scales only."""
_MOST_FLOAT16 = 65504.0


class MovableCache(KVCache, Protocol):
    """A KV cache whose rows can be read and written from the host.

    Attributes:
        dtype: Of its elements, as the capability `cache_dtype` names it.
    """

    dtype: str

    def read_rows(self, slot: int, start: int, stop: int) -> list[NDArray[Any]]:
        """Return rows start … stop - 1 of a slot as they are stored, N arrays [K, R, H].

        A bfloat16 is its bits, uint16. The arrays may be the cache's own memory, for the caller to read at once.
        """

    def write_rows(self, slot: int, start: int, rows_NKRH: Sequence[NDArray[Any]]) -> None:
        """Write rows from `start` on, in the form that `read_rows` has."""


def converted(rows_NKRH: Sequence[NDArray[Any]], source: str, target: str) -> list[NDArray[Any]]:
    """Return rows of a cache of one type in the form of a cache of another; to fewer bits, they are rounded to nearest.

    Raises:
        EngineError: An element is too large for float16.
    """
    if source == target:
        return list(rows_NKRH)
    assert {source, target} <= FLOATS, "the route was not checked"
    return [_from_float32(_to_float32(rows_KRH, source), target) for rows_KRH in rows_NKRH]


def rounds(source: str, target: str) -> bool:
    """Return whether elements of one type lose bits in the other."""
    return source != target and target != "float32"


def _to_float32(rows_KRH: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    return from_bfloat16(rows_KRH) if dtype == "bfloat16" else rows_KRH.astype(np.float32, copy=False)


def _from_float32(rows_KRH: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    if dtype == "float16":
        largest = float(np.abs(rows_KRH).max(initial=0.0))
        if largest > _MOST_FLOAT16:
            raise EngineError(
                f"a key or value of {largest:.3g} does not fit float16, the type of the KV cache it has to move to",
                remedy="route to an engine whose cache is of bfloat16 or float32, or leave prefill_engine out",
            )
        return rows_KRH.astype(np.float16)
    return _rounded_bfloat16(rows_KRH) if dtype == "bfloat16" else rows_KRH


def _rounded_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the upper halves of float32, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    # A NaN stays one: its lower half, cut off, may hold all that says so.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded >> 16).astype(np.uint16)

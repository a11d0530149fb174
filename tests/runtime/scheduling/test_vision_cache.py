"""Embeddings are kept by digest within a number of bytes."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.scheduling.vision_cache import VisionCache

pytestmark = pytest.mark.portable


def embeds(value: float) -> np.ndarray:
    return np.full((2, 4, 8), value, np.float32)


SIZE = embeds(0).nbytes


def test_what_was_used_least_recently_makes_room() -> None:
    cache = VisionCache(2 * SIZE)
    cache.put(b"a", embeds(1))
    cache.put(b"b", embeds(2))
    found = cache.get(b"a")
    assert found is not None and (found == 1).all()
    cache.put(b"c", embeds(3))
    assert cache.get(b"b") is None and cache.get(b"a") is not None and cache.get(b"c") is not None
    assert (cache.hits, cache.misses, cache.evictions, cache.num_bytes, len(cache)) == (3, 1, 1, 2 * SIZE, 2)


def test_the_bytes_are_bounded() -> None:
    cache = VisionCache(SIZE - 1)
    cache.put(b"a", embeds(1))
    assert cache.get(b"a") is None and cache.num_bytes == 0
    cache = VisionCache(SIZE)
    for name in (b"a", b"a", b"b"):
        cache.put(name, embeds(1))
        assert cache.num_bytes == SIZE
    none = VisionCache(0)
    none.put(b"a", embeds(1))
    assert len(none) == 0

"""The KV cache of the CPU's session takes the memory of the rows that are written, not of whole slots."""

from __future__ import annotations

import os
import sys

import pytest

from runtime.cache_types import CacheType
from runtime.sessions.ort_cpu import OrtKVCache

FLOAT = CacheType("float32", 32)


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_few_rows_commit_little_memory() -> None:
    cache = OrtKVCache([FLOAT] * 2, (2, 8, 8192, 128))
    assert cache.num_bytes == 4 * 2 * 8 * 8192 * 128 * 4
    before = resident_bytes()
    cache.copy_rows(0, 1, 16)
    assert resident_bytes() - before < cache.num_bytes // 16
    before = resident_bytes()
    cache.copy_rows(0, 1, 8192)
    assert resident_bytes() - before > cache.num_bytes // 4, "the measure sees memory that is written"
    assert not cache.layer(0)[0].any()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may promise any memory")
def test_more_than_there_are_addresses_is_a_lack_of_memory() -> None:
    with pytest.raises(MemoryError):
        OrtKVCache([FLOAT], (1, 1, 1 << 40, 128))

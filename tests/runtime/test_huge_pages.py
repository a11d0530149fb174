"""Huge pages: contents stay, and only new memory is touched."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.huge_pages import anonymous_regions, use_huge_pages
from runtime.model import Qwen3VLModel

linux = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")


def gives_huge_pages() -> bool:
    """Ask for one mapping of our own: an older kernel, its setting or memory in small pieces may refuse any."""
    with mmap.mmap(-1, 48 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        mapping.write(bytes(48 << 20))
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        first = -(-start // (2 << 20)) * (2 << 20)
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        # 25 is MADV_COLLAPSE of linux/mman.h.
        return libc.madvise(first, 44 << 20, 25) == 0


@linux
def test_contents_stay_and_what_was_there_before_is_left_alone() -> None:
    before = anonymous_regions()
    # Memory of our own: malloc may give what others have freed, which is not new.
    array = np.frombuffer(mmap.mmap(-1, 48 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    array[:] = np.random.default_rng(0).integers(0, 255, 48 << 20, np.uint8)
    copy = array[::-1].copy()
    exchanged = use_huge_pages(before)
    assert np.array_equal(array[::-1], copy)
    assert use_huge_pages(anonymous_regions()) == 0
    if not gives_huge_pages():
        pytest.skip("the kernel gives no huge pages on request")
    # Most of the array; the kernel may leave some pages, and exchange what lies beside them in one region.
    assert exchanged >= 32 << 20


@linux
def test_regions_are_those_of_memory_without_a_file() -> None:
    regions = anonymous_regions()
    address = id(sys.modules)
    assert any(start <= address < end for start, end in regions)
    assert all(start < end for start, end in regions)


def test_a_kernel_that_gives_none_is_said(demo_engine: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr("runtime.sessions.ort_cpu.use_huge_pages", lambda before: 0)
    Qwen3VLModel.from_engine(demo_engine, huge_pages=True)
    assert "the kernel gave no huge pages" in caplog.text
    caplog.clear()
    Qwen3VLModel.from_engine(demo_engine)
    assert not caplog.text


def test_an_engine_answers_the_same(demo_engine: Path) -> None:
    messages = [{"role": "user", "content": "Read the digits."}]
    plain = Qwen3VLModel.from_engine(demo_engine)
    huge = Qwen3VLModel.from_engine(demo_engine, huge_pages=True)
    assert np.array_equal(plain.logits(messages), huge.logits(messages))

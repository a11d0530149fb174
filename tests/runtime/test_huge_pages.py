"""Huge pages: contents stay, and only new memory is touched."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import ROOT
from helpers.mappings import mapping
from runtime.huge_pages import anonymous_regions, copy_to_huge_pages, use_huge_pages
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


@linux
def test_what_is_mapped_from_a_file_is_copied_where_it_lies(tmp_path: Path) -> None:
    path, other = tmp_path / "engine" / "weights", tmp_path / "weights"
    path.parent.mkdir()
    contents = np.random.default_rng(0).integers(0, 255, 9 << 20, np.uint8).tobytes()
    mapped = []
    for each in (path, other):
        each.write_bytes(contents)
        with each.open("rb") as file:
            mapped.append(np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8))
    addresses = [array.ctypes.data for array in mapped]
    copied = copy_to_huge_pages(path.parent)
    assert [array.tobytes() == contents for array in mapped] == [True, True]
    assert addresses == [array.ctypes.data for array in mapped]
    # Whole pages of 2 MiB between the ends; of the other folder nothing.
    assert mapping(path)["Size"] == (9 << 20) - copied and mapping(other)["Size"] == 9 << 20
    assert copy_to_huge_pages(path.parent) == 0, "what is left fills no page"
    if not gives_huge_pages():
        pytest.skip("the kernel gives no huge pages on request")
    assert copied >= 6 << 20


WITHOUT = """
import ctypes, mmap, sys
from pathlib import Path
from runtime.huge_pages import copy_to_huge_pages

# PR_SET_THP_DISABLE of linux/prctl.h: no huge pages for this process.
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0
path = Path(sys.argv[1])
with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
    print(copy_to_huge_pages(path.parent), mapped[:] == path.read_bytes())
    print(str(path) in Path("/proc/self/maps").read_text())
"""


@linux
def test_a_kernel_without_huge_pages_leaves_the_mapping(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (9 << 12))
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["0", "True", "True"], "")


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

"""Ask the kernel for huge pages under the memory of an opened engine.

A token reads every weight once, so that the translation of addresses counts: on the 2B shape in 4 bits with 2 threads a
decode step takes 54 ms on pages of 4 KiB and 45 ms on pages of 2 MiB. Where the kernel's setting is `madvise`, as on
Debian, a program gets them only by asking, and ONNX Runtime, which allocates with malloc, does not. The exchange takes
2 to 4 s for that engine, so it is an option: it pays for a process that answers more than once.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_HUGE_PAGE_BYTES = 2 << 20
# From linux/mman.h: prefer huge pages, and exchange the pages that are there now (since Linux 6.1).
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25

Region = tuple[int, int]


def anonymous_regions() -> set[Region]:
    """Return start and end of the process's writable memory that no file is behind; empty where there is no Linux."""
    if sys.platform != "linux":
        return set()
    regions = set()
    for line in _MAPS.read_text(encoding="utf-8").splitlines():
        addresses, access, _, _, inode, *_ = line.split()
        if access == "rw-p" and inode == "0":
            start, end = (int(address, 16) for address in addresses.split("-"))
            regions.add((start, end))
    return regions


def use_huge_pages(before: set[Region]) -> int:
    """Exchange the pages of all regions that are new since `before` for huge ones; contents stay as they are.

    It is advice: a kernel that is older, switched off or short of whole huge pages leaves what it cannot do as it is.

    Returns:
        Bytes that have huge pages now, as far as the kernel said.
    """
    exchanged = 0
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, end in sorted(anonymous_regions() - before):
        first, last = -(-start // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES, end // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
        if first >= last or libc.madvise(first, last - first, _MADV_HUGEPAGE) != 0:
            continue
        # One by one: a call for the whole region fails if a single page cannot be exchanged.
        for page in range(first, last, _HUGE_PAGE_BYTES):
            exchanged += _HUGE_PAGE_BYTES * (libc.madvise(page, _HUGE_PAGE_BYTES, _MADV_COLLAPSE) == 0)
    return exchanged

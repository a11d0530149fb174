"""Ask the kernel for huge pages under the memory of an opened engine.

A token reads every weight once, so that the translation of addresses counts: on the 2B shape in 4 bits with 2 threads a
decode step takes 54 ms on pages of 4 KiB and 45 ms on pages of 2 MiB. Where the kernel's setting is `madvise`, as on
Debian, a program gets them only by asking, and ONNX Runtime, which allocates with malloc, does not. The exchange takes
2 to 4 s for that engine, so it is an option: it pays for a process that answers more than once.

Weights of our own kernels lie in mapped files, whose pages most file systems cannot join. They are copied: the process
then holds them as memory of its own, which the system cannot drop as it can the pages of a file.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_HUGE_PAGE_BYTES = 2 << 20
# From linux/mman.h: prefer huge pages, and exchange the pages that are there now (since Linux 6.1).
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
# From the same place: move to an address that is given, in place of what is there; and what a call returns that failed.
_MREMAP_MAYMOVE_FIXED = 1 | 2
_FAILED = ctypes.c_void_p(-1).value
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

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
    return sum(_collapse(*_whole_pages(*region)) for region in sorted(anonymous_regions() - before))


def copy_to_huge_pages(folder: Path) -> int:
    """Put copies on huge pages in the place of what is mapped privately from files of a folder; addresses stay.

    Nothing may read the memory meanwhile. Parts at the ends that do not fill a page stay as they are.

    Returns:
        Bytes that have huge pages now; a kernel that gives none leaves all as it is.
    """
    copied = 0
    for region in list(_mapped_regions(folder)):
        first, last = _whole_pages(*region)
        if first < last:
            copied += _copy(first, last)
    return copied


def _mapped_regions(folder: Path) -> Iterator[Region]:
    """Yield start and end of the writable private mappings of files in a folder."""
    if sys.platform != "linux":
        return
    parent = folder.resolve()
    for line in _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        addresses, access, _, _, inode, *path = line.split(maxsplit=5)
        if access == "rw-p" and inode != "0" and path and Path(path[0]).parent == parent:
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield start, end


def _copy(first: int, last: int) -> int:
    """Exchange whole pages for a copy on huge ones; return the bytes that have huge pages."""
    libc = _libc()
    size = last - first
    spare = libc.mmap(None, size + _HUGE_PAGE_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, _ANONYMOUS, -1, 0)
    if spare == _FAILED:
        return 0
    start = -(-spare // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    libc.madvise(start, size, _MADV_HUGEPAGE)
    ctypes.memmove(start, first, size)
    huge = _collapse(start, start + size)
    # In one step of the kernel, old pages go and the new ones are there.
    if huge and libc.mremap(start, size, size, _MREMAP_MAYMOVE_FIXED, ctypes.c_void_p(first)) == first:
        libc.munmap(spare, start - spare)
        libc.munmap(start + size, spare + _HUGE_PAGE_BYTES - start)
        return huge
    libc.munmap(spare, size + _HUGE_PAGE_BYTES)
    return 0


def _whole_pages(start: int, end: int) -> Region:
    """Return the part of a region that whole huge pages fill; the first is not before the last if there is none."""
    return -(-start // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES, end // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES


def _collapse(first: int, last: int) -> int:
    """Exchange whole pages for huge ones where the kernel can; return the bytes that are on huge ones."""
    libc = _libc()
    if first >= last or libc.madvise(first, last - first, _MADV_HUGEPAGE) != 0:
        return 0
    # One by one: a call for the whole region fails if a single page cannot be exchanged.
    pages = range(first, last, _HUGE_PAGE_BYTES)
    done = [page for page in pages if libc.madvise(page, _HUGE_PAGE_BYTES, _MADV_COLLAPSE) == 0]
    return _HUGE_PAGE_BYTES * len(done)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.madvise.argtypes = [address, size, number]
    libc.munmap.argtypes = [address, size]
    libc.mmap.argtypes, libc.mmap.restype = [address, size, number, number, number, ctypes.c_long], address
    libc.mremap.argtypes, libc.mremap.restype = [address, size, size, number, address], address
    return libc

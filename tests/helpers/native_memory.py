"""Memory for arrays that a kernel reads and writes: at any address, and with nothing readable beside it."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_libc = ctypes.CDLL(None, use_errno=True)


def at_address(array: Array, offset: int) -> Array:
    """Return a copy whose address is `offset` bytes after a multiple of 64."""
    memory = np.zeros(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Fence:
    """Memory whose next page (or the one before) stops the process when it is touched."""

    def __init__(self) -> None:
        self._held: list[mmap.mmap] = []

    def copy(self, array: Array, *, at_end: bool = True) -> Array:
        """Return a copy that ends where the fence begins; or begins where it ends."""
        page = mmap.PAGESIZE
        inner = max(1, -(-array.nbytes // page)) * page
        memory = mmap.mmap(-1, inner + 2 * page)
        self._held.append(memory)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for start in (base, base + page + inner):
            if _libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(page), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        start = page + (inner - array.nbytes if at_end else 0)
        copy = np.frombuffer(memory, np.uint8, array.nbytes, start).view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy

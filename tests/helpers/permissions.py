"""Let the system refuse this process what it would let root do."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import pytest

# CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of linux/capability.h, and the version of the call that takes two words.
_PERMISSIONS = (1 << 1) | (1 << 2)
_VERSION_3 = 0x20080522
_EFFECTIVE = 0  # of each word's effective, permitted and inheritable


@contextlib.contextmanager
def as_plain_user() -> Iterator[None]:
    """Give up, in this thread, root's right to pass over the permissions of files; a plain user has none to give up."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    words = (ctypes.c_uint32 * 6)()

    def call(function: object) -> None:
        if function(header, words):  # type: ignore[operator]
            pytest.skip(f"capabilities cannot be changed here: {os.strerror(ctypes.get_errno())}")

    call(libc.capget)
    before = words[_EFFECTIVE]
    words[_EFFECTIVE] = before & ~_PERMISSIONS
    call(libc.capset)
    try:
        yield
    finally:
        words[_EFFECTIVE] = before
        call(libc.capset)

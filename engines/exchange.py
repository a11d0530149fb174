"""Exchange two names of a file system in one step."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
# The kernel, the file system, or a filter of system calls does not have it.
_LACKING = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP})


def exchange(first: Path, second: Path) -> bool:
    """Let each of two names stand for what the other stood for; there is no moment at which one is missing.

    `renameat2` of Linux, since 3.15; ext4, xfs, btrfs, tmpfs and overlayfs have it, NFS and FUSE mostly do not.

    Returns:
        False, with nothing changed, where the system or the file system cannot do it.

    Raises:
        OSError: A name is missing, busy (a mount point), or may not be changed.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library without it
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _LACKING:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))

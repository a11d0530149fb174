"""A file of results: appended line by line, so that whatever ends the process, it holds whole lines and knows which."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import CapacityError, Qwen3VLError, UsageError
from runtime.server.batch.lines import ID, key_of, number_of

_START = f'{{"id": "{ID}'.encode()
_FULL_DISK = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_BLOCK_BYTES = 1 << 16


class Results:
    """A file of results that one process at a time appends to.

    Args:
        path: The file; made if it is missing. Its folder is not.

    Raises:
        UsageError: It is no regular file, cannot be written, another process writes to it, or it holds something else
            than results.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        except (OSError, ValueError) as error:
            raise _unwritable(path, error) from error
        try:
            self._check_regular()
            self._lock()
            self._end = self._checked_end()
        except BaseException:
            self._file.close()
            raise
        self._is_dirty = False

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def finished(self) -> tuple[array[int], array[int]]:
        """Return the keys and the first 64 bits of the ids of all results, as `Line` has them.

        Raises:
            UsageError: A line is no result.
        """
        keys, ids = array("Q"), array("Q")
        left = self._end
        with open(self.path, "rb") as file:
            for number, raw in enumerate(file, 1):
                left -= len(raw)
                if left < 0:
                    break
                try:
                    values = json.loads(raw)
                    line_id, custom_id = values["id"], values["custom_id"]
                    ids.append(number_of(line_id))
                    keys.append(key_of(custom_id, line_id))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise _foreign(self.path, number) from error
        return keys, ids

    def cut(self) -> None:
        """Take off the part of a line that a dead process left at the end.

        Raises:
            UsageError: It cannot be written.
        """
        try:
            os.ftruncate(self._file.fileno(), self._end)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def append(self, result: dict[str, Any]) -> None:
        """Append a result; it is safe from the end of this process now, from that of the machine after `sync`.

        Raises:
            CapacityError: The disk is full.
            UsageError: It cannot be written.
        """
        left = memoryview(json.dumps(result, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n")
        self._is_dirty = True
        try:
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def sync(self) -> None:
        """Wait until all results are on the disk.

        Raises:
            CapacityError: The disk is full.
            UsageError: It cannot be written.
        """
        if self._is_dirty:
            self._is_dirty = False
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise _unwritable(self.path, error) from error

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _check_regular(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            raise UsageError(
                f"{self.path}: expected a file, found something else",
                remedy="give the name of a file: a batch that was interrupted looks there for what is done",
            )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{self.path}: another process writes to it just now", remedy="wait until it has ended, or stop it"
            ) from error
        except OSError:  # a file system without locks, such as some of NFS
            return

    def _checked_end(self) -> int:
        """Return the offset behind the last whole line; what follows is the beginning of a result, or zeros.

        Raises:
            UsageError: It is something else.
        """
        end = _end_of_lines(self._file)
        # After the end of the machine, zeros may stand where data were not written.
        rest = os.pread(self._file.fileno(), len(_START), end).strip(b"\0")
        if not _START.startswith(rest):
            raise _foreign(self.path, None)
        return end


def _end_of_lines(file: BinaryIO | Any) -> int:
    """Return the offset behind the last line feed of a file."""
    for start, block in _blocks_from_the_end(file):
        place = block.rfind(b"\n")
        if place >= 0:
            return start + place + 1
    return 0


def _blocks_from_the_end(file: BinaryIO | Any) -> Iterator[tuple[int, bytes]]:
    start = os.fstat(file.fileno()).st_size
    while start > 0:
        size = min(start, _BLOCK_BYTES)
        start -= size
        yield start, os.pread(file.fileno(), size, start)


def _foreign(path: Path, number: int | None) -> UsageError:
    place = "its last line" if number is None else f"line {number}"
    return UsageError(
        f"{path}: {place} is no result of a batch, so nothing is written to it",
        remedy="give another file; only one that an earlier run of the same batch wrote is continued",
    )


def _unwritable(path: Path, error: OSError | ValueError) -> Qwen3VLError:
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return CapacityError(
            f"{path}: the disk is full, or the file may not become larger ({error.strerror})",
            remedy="free space, and run the same command again: it goes on where it was",
        )
    reason = error.strerror if isinstance(error, OSError) else error
    return UsageError(f"{path}: cannot be written: {reason}", remedy="give another file, in a folder that exists")

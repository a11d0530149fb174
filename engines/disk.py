"""What the disk takes: room and limits before the work, errors in plain words, files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import CapacityError, Qwen3VLError, UsageError

_OTHER_PLACE = "choose another place"


def check_disk_space(folder: Path, num_bytes: int, name: Path | None = None) -> None:
    """Raise before any work if `folder` cannot take `num_bytes`.

    Args:
        folder: Where they will be written.
        num_bytes: How many.
        name: What the user knows the place by, if `folder` is one that we made for the work.

    Raises:
        CapacityError: Less is free.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise CapacityError(
            f"{name or folder}: {num_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free",
            remedy="free space, or choose another disk with --output",
        )


def check_file_size(folder: Path, num_bytes: int) -> None:
    """Raise before any work if this process may not write a file of `num_bytes` (`ulimit -f`).

    Raises:
        CapacityError: The limit is lower.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and num_bytes > limit:
        raise CapacityError(
            f"{folder}: a file of at least {num_bytes / 1e6:.1f} MB is needed, and this process may write files of at "
            f"most {limit / 1e6:.1f} MB (RLIMIT_FSIZE)",
            remedy="raise the limit: ulimit -f unlimited",
        )


def full_disk_in(error: BaseException | None, place: Path | str) -> CapacityError | None:
    """Return `full_disk_error` of an error, or of what is behind it: libraries raise errors of their own."""
    while error is not None:
        full = full_disk_error(error, place) if isinstance(error, OSError) else None
        if full is not None:
            return full
        error = error.__cause__ or error.__context__
    return None


def full_disk_error(error: OSError, place: Path | str) -> CapacityError | None:
    """Return what to raise for an error that only a full disk, a quota or a size limit gives; else None."""
    remedy = f"free space, or {_OTHER_PLACE}"
    match error.errno:
        case errno.ENOSPC:
            return CapacityError(f"{place}: the disk is full", remedy=remedy)
        case errno.EDQUOT:
            return CapacityError(f"{place}: the disk quota is used up", remedy=remedy)
        case errno.EFBIG:
            return CapacityError(
                f"{place}: a file became larger than this process may write (RLIMIT_FSIZE), or the file system takes",
                remedy=f"raise the limit: ulimit -f unlimited; or {_OTHER_PLACE}",
            )
    return None


def disk_error(error: OSError | ValueError, place: Path) -> Qwen3VLError:
    """Return what to raise when `place` cannot be written, or is no name at all (ValueError)."""
    if isinstance(error, Qwen3VLError):
        return error  # some of ours are ValueErrors, too
    if not isinstance(error, OSError):
        return UsageError(f"{str(place)!r}: not a file name ({error})", remedy=_OTHER_PLACE)
    full = full_disk_error(error, place)
    if full is not None:
        return full
    match error.errno:
        case errno.EROFS:
            return UsageError(f"{place}: the file system is read-only", remedy=_OTHER_PLACE)
        case errno.EEXIST | errno.ENOTDIR:
            return UsageError(f"{place}: it, or a folder above it, is a file", remedy=_OTHER_PLACE)
        case errno.EACCES | errno.EPERM:
            return UsageError(
                f"{place}: not writable for this user ({error.strerror})",
                remedy=f"change the permissions of the folder, or {_OTHER_PLACE}",
            )
    return UsageError(f"{place}: cannot be made ({error.strerror})", remedy=_OTHER_PLACE)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk.

    A file system that has no such call for folders (EINVAL) is taken at its word.
    """
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_files(folder: Path) -> None:
    """Wait until the files of a folder, and their names, are on the disk."""
    for path in sorted(folder.iterdir()):
        _sync(path, os.O_RDONLY)
    sync_folder(folder)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def check_file(path: Path) -> None:
    """Raise, before any work, if `path` is no place for a file; the folder is made.

    Raises:
        UsageError: It is a folder, or the folder cannot be written.
        CapacityError: The disk is full.
    """
    with contextlib.suppress(_NothingToWrite), replaced_file(path):
        raise _NothingToWrite


class _NothingToWrite(Exception):
    pass


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Give a name to write to; what was written takes the place of `path` when the block ends without an error.

    Until then, and after an error, an older file stays as it was. A link is followed. Anything but a regular file, such
    as /dev/stdout or a named pipe, is given as it is.

    Raises:
        UsageError: The folder cannot be written.
        CapacityError: The disk is full.
    """
    partial = None
    try:
        path = Path(os.path.realpath(path))
        if path.is_dir():
            raise UsageError(f"{path}: it is a folder, but a file has to be written", remedy="give the name of a file")
        if path.exists() and not path.is_file():
            yield path
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays: libraries choose a format by it.
        descriptor, name = tempfile.mkstemp(prefix=".partial-", suffix=path.suffix, dir=path.parent)
        partial = Path(name)
        os.close(descriptor)
        partial.chmod(_mode_of(path))
        yield partial
        _sync(partial, os.O_RDONLY)
        partial.replace(path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) as `replaced_file` does.

    Raises:
        UsageError: The folder cannot be written.
        CapacityError: The disk is full.
    """
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _mode_of(path: Path) -> int:
    """Return the permissions of a file, or those that a new one gets."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask

"""Temporary folders that no dead process leaves for good: the next run beside them finds and removes them.

A folder `.qwen3vl-XXXXXXXX` holds a file `lock`, locked with `flock` while its process lives. Whoever gets that lock
knows that the process is dead, and removes the folder. On a disk that hosts share, a lock may be seen on its own host
alone, so a folder of another boot of another or this machine is removed only when nothing in it changed for a day.
Folders of other users are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines.disk import disk_error
from engines.interrupts import Interrupts

_PREFIX = ".qwen3vl-"
_NAME = re.compile(re.escape(_PREFIX) + r"[a-z0-9_]{8}")  # the letters of tempfile
_LOCK = "lock"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_ABANDONED_S = 86_400
OLD = "old"
"""First part of the names of engines that were moved out of their place; `remove_leftovers` puts one back."""


def is_work_folder(name: str) -> bool:
    """Tell whether a name is one that `work_folder` gives."""
    return _NAME.fullmatch(name) is not None


@contextlib.contextmanager
def work_folder(parent: Path, output: str = "") -> Iterator[tuple[Path, Interrupts]]:
    """Give a folder in `parent` that is gone when the block ends, however it ends, and what holds signals back.

    Leftovers of processes that died are removed first. SIGTERM and SIGHUP unwind the stack as Ctrl-C does.

    Args:
        parent: Made if it is not there; what was made is removed again if it stays empty.
        output: Name in `parent` of what is being replaced, if anything is: should the process die when an older engine
            is out of its place, the next run puts it back.

    Raises:
        UsageError: The folder cannot be made.
        CapacityError: The disk is full.
    """
    interrupts = Interrupts()
    made: list[Path] = []
    folder: Path | None = None
    descriptor = -1
    with interrupts.installed():
        try:
            with interrupts.held():
                try:
                    made = _make_parents(parent)
                    remove_leftovers(parent)
                    folder, descriptor = _create(parent, output)
                except (OSError, ValueError) as error:
                    raise disk_error(error, parent) from error
            yield folder, interrupts
        finally:
            with interrupts.held():
                if folder is not None:
                    _remove(folder)
                    os.close(descriptor)
                for each in made:
                    with contextlib.suppress(OSError):  # not empty: it holds the output now
                        each.rmdir()


def remove_leftovers(parent: Path) -> None:
    """Remove the folders of dead processes from `parent`; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        for name in sorted(filter(is_work_folder, os.listdir(parent))):
            with contextlib.suppress(OSError):
                _remove_if_dead(parent / name)


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and what is missing above it; return what was made, the innermost first."""
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _create(parent: Path, output: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # another run saw an empty folder without a lock, and removed it
            continue
        try:
            _lock(descriptor, fcntl.LOCK_EX)
            if _is_same(folder / _LOCK, descriptor):
                os.write(descriptor, json.dumps({"boot": _boot_id(), "output": output}).encode())
                return folder, descriptor
        except BaseException:
            os.close(descriptor)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        os.close(descriptor)


def _remove_if_dead(folder: Path) -> None:
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        is_locked = _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        record = _read_record(descriptor)
        is_here = is_locked and record.get("boot") == _boot_id()
        is_empty = is_locked and not record and os.listdir(folder) == [_LOCK]  # died before it wrote anything
        if is_here or is_empty or time.time() - _last_change(folder) > _ABANDONED_S:
            _put_back(folder, record.get("output"))
            _remove(folder)
    except BlockingIOError:
        pass  # its process lives
    finally:
        os.close(descriptor)


def _lock(descriptor: int, operation: int) -> bool:
    """Take the lock; False where the file system has none.

    Raises:
        BlockingIOError: Another process has it, and `operation` says not to wait.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
            return False
        raise
    return True


def _is_same(path: Path, descriptor: int) -> bool:
    """Tell whether the file that is open still has that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read_record(descriptor: int) -> dict[str, Any]:
    try:
        record = json.loads(os.pread(descriptor, 1 << 14, 0))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _last_change(folder: Path) -> float:
    """Return when what is in the folder was changed last.

    An empty lock is one that we made just now, and it changed the folder's own time.
    """
    times = [0.0]
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if path != folder / _LOCK or status.st_size:
                times.append(status.st_mtime)
    return max(times)


def _put_back(folder: Path, output: object) -> None:
    """Put an engine that was moved away, and whose successor never came, back into its place."""
    if not isinstance(output, str) or not output or output != Path(output).name:
        return
    place = folder.parent / output
    for old in sorted(folder.glob(f"{OLD}*"), reverse=True):
        if not os.path.lexists(place):
            old.rename(place)


def _remove(folder: Path) -> None:
    """Remove what is in it, then the lock, then the folder; what cannot be removed is left to the next run."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != _LOCK:
                os.unlink(entry.path)
        os.unlink(folder / _LOCK)
        folder.rmdir()


def _boot_id() -> str:
    """Return what is another for each start of each machine; empty where the system does not tell."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""

"""The folder in which engines are kept: what it holds, who may write an entry, and how one is removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engines.disk import disk_error
from runtime.errors import EngineError, UsageError
from runtime.manifest import MANIFEST_NAME, Manifest
from runtime.settings import user_cache_folder
from runtime.shown import shown

NUM_DIGITS = 12
"""Hexadecimal digits at the end of the name of an entry."""

_ENTRY = re.compile(rf"[\w.-]+-[0-9a-f]{{{NUM_DIGITS}}}", re.ASCII)
_LOCKS = ".locks"
_OTHER_PLACE = "say where engines are to be kept with --cache DIR, or set XDG_CACHE_HOME"


@dataclass(frozen=True)
class Entry:
    """An engine in the cache.

    Attributes:
        path: Its folder.
        num_bytes: What its files take on the disk.
        built: When it was built, in seconds since 1970.
        manifest: What it says of itself; None if that cannot be read.
        problem: What is wrong with it; empty if nothing is.
    """

    path: Path
    num_bytes: int
    built: float
    manifest: Manifest | None
    problem: str

    @classmethod
    def of(cls, path: Path) -> Entry:
        """Look at the folder of an entry: small files are compared by hash, weights by size."""
        manifest, problem = None, ""
        try:
            manifest = Manifest.read(path)
            manifest.check(path)
        except EngineError as error:
            problem = error.message
        return cls(path, _num_bytes(path), path.stat().st_mtime, manifest, problem)


def cache_folder(given: Path | None = None) -> Path:
    """Return the folder of the cache: the given one, or that of this user.

    Raises:
        UsageError: This user has no home.
    """
    if given is not None:
        return given
    user = user_cache_folder()
    if user is None:
        raise UsageError("this user has no home folder, in which engines would be kept", remedy=_OTHER_PLACE)
    return user / "qwen3vl" / "engines"


def make_folder(folder: Path) -> None:
    """Make the folder of a cache, or one in it.

    Raises:
        Qwen3VLError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        failed = disk_error(error, folder)
        raise type(failed)(failed.message, remedy=_OTHER_PLACE) from error


def entries(cache: Path) -> list[Entry]:
    """Return what a cache holds, by name.

    Raises:
        UsageError: The folder cannot be read.
    """
    try:
        paths = sorted(path for path in cache.iterdir() if _ENTRY.fullmatch(path.name) and path.is_dir())
        return [Entry.of(path) for path in paths]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{cache}: cannot be read ({error.strerror})", remedy="give another --cache") from error


def remove_entry(cache: Path, name: str) -> None:
    """Remove an engine from a cache; a process that has it open keeps what it opened.

    Raises:
        UsageError: There is none of that name, it is being built, or it cannot be removed.
    """
    path = cache / name
    if not _ENTRY.fullmatch(name) or path.is_symlink() or not path.is_dir():
        known = ", ".join(entry.path.name for entry in entries(cache)) or "none"
        raise UsageError(f"{shown(name)}: no engine of the cache {cache}", remedy=f"it has: {known}")

    def refuse() -> None:
        raise UsageError(f"{name}: another process builds it just now", remedy="wait until it has ended")

    with locked(cache, name, refuse):
        remove_folder(path)


def remove_folder(path: Path) -> None:
    """Remove the folder of an entry.

    Raises:
        Qwen3VLError: The system does not let this user.
    """
    try:
        # The manifest first: what is left of an interrupted removal is no engine.
        (path / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(path)
    except OSError as error:
        raise disk_error(error, path) from error


@contextlib.contextmanager
def locked(cache: Path, name: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """Let one process at a time write an entry. File systems without locks (NFS) let all.

    Args:
        cache: Folder of the cache.
        name: The entry.
        on_wait: Called before another process is waited for.

    Raises:
        Qwen3VLError: The folder cannot be written.
    """
    make_folder(cache / _LOCKS)
    try:
        descriptor = os.open(cache / _LOCKS / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        failed = disk_error(error, cache)
        raise type(failed)(failed.message, remedy=_OTHER_PLACE) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def _num_bytes(path: Path) -> int:
    return sum(each.stat().st_size for each in (path, *path.glob("*")) if each.is_file())

"""Read the small files of a checkpoint or an engine: regular files alone, up to a size, never waiting.

Whoever made a folder chose what its names lead to. A pipe would let a reader wait for ever, a device such as
`/dev/zero` would fill the memory, and a short text of brackets can become gigabytes of Python objects. So every small
file is read by these functions, which bound the work before they do it.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

from runtime.errors import EngineError, Qwen3VLError

MAX_SMALL_FILE_BYTES = 8 << 20
"""Largest small file, such as `config.json` or a chat template."""

MAX_INDEX_BYTES = 16 << 20
"""Largest `model.safetensors.index.json`; the largest known model with a name for each expert's matrix has 9 MB."""

MAX_TOKENIZER_BYTES = 20 << 20
"""Largest `tokenizer.json`; Qwen's has 11 MB."""

MAX_JSON_OBJECT_BYTES = 192 << 20
"""Most memory that one JSON text may take as decoded text and as objects, by estimate."""

# Measured with CPython 3.11: a list or an object of one key, a string that is a new key, a float in a growing list.
_CONTAINER_BYTES, _STRING_BYTES, _VALUE_BYTES = 200, 120, 40
_BLOCK_BYTES = 1 << 20
_GET_AGAIN = "get the file again from where it came"
_MAY_SEARCH = "let this user read it, and search each folder above it (chmod u+x)"
# Windows has neither.
_WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
# What the system says of a name behind which there is nothing: none, a file above it, a loop of links, too long.
_NOWHERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotRegularError(OSError):
    """A name leads to no regular file; `strerror` says what it is instead."""


def is_folder(path: str | os.PathLike[str], *, error: type[Qwen3VLError] = EngineError) -> bool:
    """Return whether a name leads to a folder; of one that leads nowhere, or that no file can have, False.

    `Path.is_dir` raises PermissionError below a folder that this user may not search, and `os.path.isdir` answers that
    there is nothing. Neither is an answer for whoever gave the name.

    Args:
        path: What was given from outside.
        error: Class of what is raised.

    Raises:
        Qwen3VLError: An `error`: the system does not let this user look.
    """
    mode = _mode_of(path, error)
    return mode is not None and stat.S_ISDIR(mode)


def leads_somewhere(path: str | os.PathLike[str]) -> bool:
    """Return whether a name leads to anything, as `is_folder` does.

    Raises:
        EngineError: The system does not let this user look.
    """
    return _mode_of(path, EngineError) is not None


def _mode_of(path: str | os.PathLike[str], error: type[Qwen3VLError]) -> int | None:
    try:
        return os.stat(path).st_mode
    except ValueError:  # a NUL or a lone surrogate
        return None
    except OSError as failure:
        if failure.errno in _NOWHERE:
            return None
        remedy = _MAY_SEARCH if isinstance(failure, PermissionError) else "check the disk that it lies on"
        raise error(f"{path}: cannot be looked at: {failure.strerror}", remedy=remedy) from failure


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading, without waiting, and return its descriptor.

    Raises:
        NotRegularError: It is a folder, a pipe, a device or a socket.
        OSError: It is missing, or cannot be opened.
        ValueError: The name holds a NUL or a lone surrogate.
    """
    # Before opening, which for some devices is an action; and again after it, where nobody can exchange the file.
    _check_regular(os.stat(path).st_mode, path)
    descriptor = os.open(path, os.O_RDONLY | _WITHOUT_WAITING)
    try:
        _check_regular(os.fstat(descriptor).st_mode, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_small_file(
    path: str | os.PathLike[str],
    *,
    max_bytes: int = MAX_SMALL_FILE_BYTES,
    error: type[Qwen3VLError] = EngineError,
    remedy: str = _GET_AGAIN,
) -> bytes:
    """Return the contents of a small regular file.

    Args:
        path: The file.
        max_bytes: Largest size.
        error: Class of what is raised.
        remedy: What a missing or unreadable file needs.

    Raises:
        Qwen3VLError: An `error`: the file is missing, no regular file, too large, or cannot be read.
    """
    try:
        descriptor = open_regular(path)
        try:
            contents = _read(descriptor, max_bytes)
        finally:
            os.close(descriptor)
    except FileNotFoundError as failure:
        raise error(f"{path}: missing", remedy=remedy) from failure
    except NotRegularError as failure:
        raise error(
            f"{path}: expected a file, found {failure.strerror}", remedy=f"put the file itself there: {Path(path).name}"
        ) from failure
    except (OSError, ValueError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) else failure
        raise error(f"{path}: cannot be read: {reason}", remedy=remedy) from failure
    if len(contents) > max_bytes:
        raise error(
            f"{path}: larger than {max_bytes} bytes, the most that is read of this kind of file",
            remedy=f"check what it holds: the {Path(path).name} of a model is smaller",
        )
    return contents


def parse_json_object(
    contents: bytes, name: str, *, error: type[Qwen3VLError] = EngineError, remedy: str = _GET_AGAIN
) -> dict[str, Any]:
    """Return the object that a JSON text holds.

    Args:
        contents: The text, in UTF-8.
        name: What errors call it.
        error: Class of what is raised.
        remedy: What a text that cannot be read needs.

    Raises:
        Qwen3VLError: An `error`: it is no JSON object, or its objects would take too much memory.
    """
    try:
        text = contents.decode("utf-8")
        num_bytes = sys.getsizeof(text) + (
            _CONTAINER_BYTES * (text.count("[") + text.count("{"))
            + _STRING_BYTES * (text.count('"') // 2)
            + _VALUE_BYTES * text.count(",")
        )
        if num_bytes > MAX_JSON_OBJECT_BYTES:
            raise error(
                f"{name}: its JSON of {len(contents)} bytes would take about {num_bytes >> 20} MiB of memory; expected "
                f"at most {MAX_JSON_OBJECT_BYTES >> 20}",
                remedy=remedy,
            )
        values = json.loads(text)
    except (ValueError, RecursionError) as failure:  # no UTF-8, no JSON, thousands of digits or of brackets
        if isinstance(failure, Qwen3VLError):
            raise
        raise error(f"{name}: not readable as JSON ({failure})", remedy=remedy) from failure
    if not isinstance(values, dict):
        raise error(f"{name}: expected a JSON object, got {type(values).__name__}", remedy=remedy)
    return values


def read_json_object(
    path: str | os.PathLike[str],
    *,
    max_bytes: int = MAX_SMALL_FILE_BYTES,
    error: type[Qwen3VLError] = EngineError,
    remedy: str = _GET_AGAIN,
) -> dict[str, Any]:
    """Return the JSON object in a small regular file; arguments and errors are those of the two functions above."""
    contents = read_small_file(path, max_bytes=max_bytes, error=error, remedy=remedy)
    return parse_json_object(contents, str(path), error=error, remedy=remedy)


def _check_regular(mode: int, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")
        raise NotRegularError(0, kind, os.fspath(path))


def _read(descriptor: int, max_bytes: int) -> bytes:
    """Read at most one byte more than `max_bytes`: files of /proc say that they are empty, and some never end."""
    blocks: list[bytes] = []
    left = max_bytes + 1
    while left > 0 and (block := os.read(descriptor, min(left, _BLOCK_BYTES))):
        blocks.append(block)
        left -= len(block)
    return b"".join(blocks)

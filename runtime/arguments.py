"""Check the arguments of the public interface, so that none ends in an exception of Python's own."""

from __future__ import annotations

import errno
import numbers
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from runtime.errors import Qwen3VLError, UsageError
from runtime.plain_data import plain_data, text_data
from runtime.shown import shown


@contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
    """Turn what a value's own methods raise (`__eq__`, `__getitem__`, `__repr__`) into an error of ours.

    Around code that looks at arguments, and computes nothing.

    Raises:
        UsageError: Something but an error of ours, or want of memory, was raised.
    """
    try:
        yield
    except (Qwen3VLError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(f"{what} cannot be read: {type(error).__name__}: {_text_of(error)}", remedy=remedy) from error


def whole_number(name: str, value: Any, minimum: int, maximum: int | None, expected: str, remedy: str) -> int:
    """Return an integer of Python or numpy that lies in a range.

    Raises:
        UsageError: It is none, or lies outside; the message says what is `expected`.
    """
    with reading(name, remedy):
        is_inside = (
            isinstance(value, numbers.Integral)
            and not isinstance(value, bool)
            and minimum <= int(value)
            and (maximum is None or int(value) <= maximum)
        )
    if not is_inside:
        raise UsageError(f"{name} = {shown(value)}, expected {expected}", remedy=remedy)
    return int(value)


def folder_path(what: str, value: Any) -> str:
    """Return a path as text.

    Raises:
        UsageError: It is no path.
    """
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise UsageError(f"{what}: expected a path, got {type(value).__name__}", remedy="pass a string or a Path")
    with reading(f"the path of the {what}", "pass a string or a Path"):
        text = os.fsdecode(value)
        is_path = "\0" not in text and bool(text) and not _is_too_long(text)
    if not is_path:
        raise UsageError(f"{what} {shown(text)}: expected a path", remedy=f"pass the path of the {what}")
    return text


def _is_too_long(path: str) -> bool:
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


def template_variables(values: Any) -> dict[str, Any] | None:
    """Return `chat_template_kwargs` as plain data.

    Raises:
        UsageError: It is no dict of names and JSON data.
    """
    if values is None:
        return None
    remedy = 'pass a dict such as {"enable_thinking": False}'
    if not isinstance(values, Mapping):
        raise UsageError(f"chat_template_kwargs must be a dict, got {type(values).__name__}", remedy=remedy)
    with reading("chat_template_kwargs", remedy):
        return {
            text_data(name, "a name in chat_template_kwargs"): plain_data(value, f"chat_template_kwargs[{shown(name)}]")
            for name, value in values.items()
        }


def tool_schemas(values: Any) -> list[dict[str, Any]] | None:
    """Return `tools` as plain data; None if there are none, as the clients of other libraries send an empty list.

    Raises:
        UsageError: It is no list of dicts of JSON data.
    """
    if values is None:
        return None
    remedy = 'pass [{"type": "function", "function": {"name": …, "parameters": …}}]'
    if not isinstance(values, (list, tuple)):
        raise UsageError(f"tools must be a list of JSON schemas (dicts), got {type(values).__name__}", remedy=remedy)
    with reading("tools", remedy):
        plain = [plain_data(tool, f"tools[{i}]") for i, tool in enumerate(values)]
    for i, tool in enumerate(plain):
        if not isinstance(tool, dict):
            raise UsageError(f"tools[{i}] must be a dict, got {type(tool).__name__}", remedy=remedy)
    return plain or None


def _text_of(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # of the caller's own
        return "without a message"

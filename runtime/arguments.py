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

AUTO, NO_CALLS = "auto", "none"
"""What `tool_choice` may be: the model decides, or is shown no tools."""

_NOT_IN_NAMES = '<>\n"'  # the formats of calls have them around names


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
    names: set[str] = set()
    for i, tool in enumerate(plain):
        name = _function_name(tool, f"tools[{i}]", remedy)
        if name in names:
            raise UsageError(f"tools[{i}] has the name {shown(name)}, as one before it", remedy="rename one of them")
        names.add(name)
    return plain or None


def _function_name(tool: Any, place: str, remedy: str) -> str:
    """Check the definition of a function, also one that stands there without `{"type": "function"}`."""
    if not isinstance(tool, dict):
        raise UsageError(f"{place} must be a dict, got {type(tool).__name__}", remedy=remedy)
    if tool.get("type", "function") != "function":
        raise UsageError(f"{place}.type must be 'function', got {shown(tool['type'])}", remedy=remedy)
    if "function" in tool:
        tool, place = tool["function"], f"{place}.function"
        if not isinstance(tool, dict):
            raise UsageError(f"{place} must be a dict, got {type(tool).__name__}", remedy=remedy)
    name = tool.get("name")
    if not isinstance(name, str) or not name.strip() or any(mark in name for mark in _NOT_IN_NAMES):
        raise UsageError(f"{place}.name must be the name of a function, got {shown(name)}", remedy=remedy)
    if not isinstance(tool.get("description") or "", str):
        raise UsageError(f"{place}.description must be a string, got {shown(tool['description'])}", remedy=remedy)
    _check_parameters(tool.get("parameters"), f"{place}.parameters")
    return name


def _check_parameters(schema: Any, place: str) -> None:
    """Check as much of the JSON schema of a function's arguments as has to be so for every function."""
    remedy = 'pass {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
    if schema is None:
        return
    if not isinstance(schema, dict):
        raise UsageError(f"{place} must be a JSON schema (a dict), got {shown(schema)}", remedy=remedy)
    if schema.get("type", "object") != "object":
        raise UsageError(f"{place}.type must be 'object', got {shown(schema['type'])}", remedy=remedy)
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise UsageError(f"{place}.properties must be a dict, got {shown(properties)}", remedy=remedy)
    for key, value in properties.items():
        if not isinstance(value, (dict, bool)):
            raise UsageError(
                f"{place}.properties[{shown(key)}] must be a JSON schema, got {shown(value)}", remedy=remedy
            )
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise UsageError(f"{place}.required must be a list of names, got {shown(required)}", remedy=remedy)


def _text_of(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # of the caller's own
        return "without a message"

"""Copies of JSON-like data, built of exact built-in types, for templates that are not trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.errors import UsageError
from runtime.shown import escape_of, shown

MAX_DEPTH = 100
"""Deepest nesting that is taken. jinja2's and json's own limit, some thousand levels, ends in a RecursionError."""

MAX_VALUES = 100_000
"""Most values in one structure; lists that refer to each other can stand for billions in a few lines."""

_MAX_INTEGER_BITS = 1024  # as a float64; Python writes none of more than 4300 digits


class ValueCount:
    """Count the values of data that is looked at part by part.

    Args:
        name: What an error calls all of it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._num_values = 0

    def add(self, num_values: int = 1) -> None:
        """Count further values, before anything is made of them.

        Raises:
            UsageError: There are more than `MAX_VALUES`.
        """
        self._num_values += num_values
        if self._num_values > MAX_VALUES:
            raise UsageError(f"{self._name} holds more than {MAX_VALUES} values", remedy="pass less data")


def plain_data(value: Any, place: str, count: ValueCount | None = None) -> Any:
    """Return a copy of JSON-like data built of exact built-in types, fit for an untrusted template.

    Objects of other types are refused: their methods would be open to the template. Those of pydantic, which client
    libraries hand out, are taken as what their `model_dump` returns.

    Args:
        value: The data. Not written to.
        place: Where it stands, for the message: `messages[0].tool_calls`.
        count: Counts the values of the whole that the data is a part of.

    Raises:
        UsageError: A value is no JSON, a string cannot be written as UTF-8, or the data are deeper than `MAX_DEPTH`
            (such as a list that holds itself) or more than `MAX_VALUES`.
    """
    return _Copier(place, count or ValueCount(place)).copy(value, [])


def text_data(value: Any, place: str) -> str:
    """Return a string as an exact `str`.

    Raises:
        UsageError: It is no string, or holds a lone surrogate.
    """
    if not isinstance(value, str):
        raise UsageError(f"{place} must be a string, got {type(value).__name__}", remedy="pass it as a str")
    text = str.__str__(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{place} holds a lone surrogate, {escape_of(text[error.start])}, at character {error.start}",
            remedy="decode the text from its bytes as UTF-8",
        ) from error
    return text


def dumped(value: Any) -> Any:
    """Return what `model_dump` of a pydantic object returns, anything else as it is."""
    dump = getattr(type(value), "model_dump", None)
    return dump(value) if callable(dump) else value


class _Copier:
    """One copy in progress: the count of its values, and the path to the one it is at, for a message."""

    def __init__(self, place: str, count: ValueCount) -> None:
        self._place = place
        self._count = count

    def copy(self, value: Any, path: list[str]) -> Any:
        self._count.add()
        if len(path) > MAX_DEPTH:
            raise UsageError(
                f"{self._place} is nested deeper than {MAX_DEPTH} levels",
                remedy="see that no list or dict holds itself",
            )
        value = dumped(value)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return text_data(value, self._where(path))
        if isinstance(value, int):
            if int(value).bit_length() > _MAX_INTEGER_BITS:
                raise UsageError(f"{self._where(path)} is {shown(value)}", remedy="pass a number this long as a string")
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, Mapping):
            return {
                text_data(key, f"a key of {self._where(path)}"): self.copy(item, [*path, f".{key}"])
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.copy(item, [*path, f"[{i}]"]) for i, item in enumerate(value)]
        raise UsageError(
            f"{self._where(path)} must be JSON data, got {type(value).__name__}",
            remedy="pass None, a bool, a number, a str, or a list or dict of these",
        )

    def _where(self, path: list[str]) -> str:
        return self._place + "".join(path)

"""Strict JSON in calls: no key twice, no NaN, and the text of each value."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, NoReturn

from runtime.tools.call import MalformedCall


class JsonValue(NamedTuple):
    """A value and its text."""

    value: Any
    text: str


def read_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        MalformedCall: It is not valid, holds a key twice or a number that JSON does not have, or is nested too deeply.
    """
    try:
        value = _DECODER.decode(text)
        if "\\u" in text:  # an escape may be half a character, which no later prompt could hold
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise MalformedCall(str(error)) from error


def read_members(text: str) -> dict[str, JsonValue]:
    """Return the members of a JSON object, each with its text.

    Raises:
        MalformedCall: It is not valid, or no object.
    """
    if not isinstance(read_json(text), dict):
        raise MalformedCall("not an object")
    try:
        return _members(text)
    except RecursionError as error:  # the limit lies a few calls further than above
        raise MalformedCall(str(error)) from error


def _members(text: str) -> dict[str, JsonValue]:
    """Walk over an object whose text is known to be valid."""
    members: dict[str, JsonValue] = {}
    position = text.index("{") + 1
    while (position := _behind_blanks(text, position)) < len(text) and text[position] != "}":
        if text[position] == ",":
            position = _behind_blanks(text, position + 1)
        key, position = _DECODER.raw_decode(text, position)
        start = _behind_blanks(text, text.index(":", position) + 1)
        value, position = _DECODER.raw_decode(text, start)
        members[key] = JsonValue(value, text[start:position])
    return members


def _behind_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse)

"""`ResponseFormat`: what an answer has to look like, in the forms that a caller may give.

The forms are those of OpenAI's API (`text`, `json_object`, `json_schema`), and besides them a schema by itself, a class
with pydantic's `model_json_schema`, and `regex`, `choice` and `grammar`. All checks here need no library and no engine;
`runtime.structured.compiler` compiles what has passed them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import UsageError
from runtime.shown import shown
from runtime.structured.schema_checks import check_schema, check_size

MAX_FORMAT_CHARACTERS = 1 << 18
"""Most characters of a schema, a regex or a grammar, and of all choices together."""

_MOST_CHOICES = 1500  # llguidance follows at most 2000 possibilities at once
_FORMS = "text, json_object, json_schema, regex, choice or grammar"
_SEE = 'pass {"type": "json_schema", "json_schema": {"name": "answer", "schema": {…}}}, or another type'


@dataclass(frozen=True)
class ResponseFormat:
    """What an answer has to look like, checked.

    Attributes:
        kind: "json_schema", "regex", "choice" or "grammar".
        text: The schema as JSON, the regex, the choices as a JSON list, or the grammar.
        option: What asked for it, for messages.
    """

    kind: str
    text: str
    option: str = "response_format"


def response_format(name: str, value: Any) -> ResponseFormat | None:
    """Return a format from any of its forms; None for `{"type": "text"}`, which allows any answer.

    Args:
        name: The option's, for messages.
        value: A mapping, a class with `model_json_schema`, a `ResponseFormat`, or None.

    Raises:
        UsageError: It has none of the forms, or no answer could follow it.
    """
    if value is None or isinstance(value, ResponseFormat):
        return value
    if callable(getattr(value, "model_json_schema", None)):
        return _of_schema(name, value.model_json_schema())
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} must be a dict or a pydantic model class, got {shown(value)}", remedy=_SEE)
    kind = value.get("type")
    if kind == "text" and len(value) == 1:
        return None
    if kind == "json_object" and len(value) == 1:
        return ResponseFormat("json_schema", '{"type":"object"}')
    if isinstance(kind, str) and kind in _READERS:
        key, read = _READERS[kind]
        if value.keys() != {"type", key}:
            given = ", ".join(map(shown, value))
            raise UsageError(f"{name} of type {kind!r} has the keys {given}", remedy=f"give type and {key}")
        return read(f"{name}.{key}", value[key])
    if isinstance(kind, str) and kind not in _JSON_TYPES:
        raise UsageError(f"{name} has the type {shown(kind)}, expected {_FORMS}, or a schema", remedy=_SEE)
    return _of_schema(name, value)


def _of_named_schema(name: str, value: Any) -> ResponseFormat:
    if not isinstance(value, Mapping) or not isinstance(value.get("schema"), (Mapping, bool)):
        raise UsageError(f"{name} must be a dict that holds a schema, got {shown(value)}", remedy=_SEE)
    return _of_schema(f"{name}.schema", value["schema"])


def _of_schema(name: str, schema: Any) -> ResponseFormat:
    check_size(name, schema)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} is no JSON: {error}", remedy="pass what json.loads of a schema gives") from error
    bounded = _bounded(name, text)
    check_schema(name, schema)
    return ResponseFormat("json_schema", bounded)


def _of_text(kind: str) -> Callable[[str, Any], ResponseFormat]:
    def read(name: str, value: Any) -> ResponseFormat:
        if not isinstance(value, str) or not value.strip():
            raise UsageError(f"{name} must be a text that is not empty, got {shown(value)}", remedy=f"pass a {kind}")
        if kind == "grammar" and ("%json" in value or "%llguidance" in value):
            raise UsageError(
                f"{name} holds %json or %llguidance, which are not checked here",
                remedy='write the rules themselves, or pass a schema as {"type": "json_schema", …}',
            )
        return ResponseFormat(kind, _bounded(name, value))

    return read


def _of_choices(name: str, value: Any) -> ResponseFormat:
    remedy = "pass a list of different strings, none of them empty"
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise UsageError(f"{name} must be a list of strings that is not empty, got {shown(value)}", remedy=remedy)
    if len(value) > _MOST_CHOICES:
        raise UsageError(
            f"{name} has {len(value)} choices, expected at most {_MOST_CHOICES}", remedy="ask in two steps"
        )
    seen: set[str] = set()
    for i, choice in enumerate(value):
        if not isinstance(choice, str) or not choice:
            raise UsageError(f"{name}[{i}] must be a string that is not empty, got {shown(choice)}", remedy=remedy)
        if choice in seen:
            raise UsageError(f"{name}[{i}] = {shown(choice)} occurs twice", remedy=remedy)
        seen.add(choice)
    return ResponseFormat("choice", _bounded(name, json.dumps(list(value), ensure_ascii=False)))


def _bounded(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} holds a lone surrogate", remedy="pass text that UTF-8 can express") from error
    if len(text) > MAX_FORMAT_CHARACTERS:
        raise UsageError(
            f"{name} has {len(text)} characters, expected at most {MAX_FORMAT_CHARACTERS}", remedy="make it smaller"
        )
    return text


_READERS: Mapping[str, tuple[str, Callable[[str, Any], ResponseFormat]]] = {
    "json_schema": ("json_schema", _of_named_schema),
    "regex": ("regex", _of_text("regex")),
    "choice": ("choices", _of_choices),
    "grammar": ("grammar", _of_text("grammar")),
}
"""The key that holds what a type needs, and what reads it."""

_JSON_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})

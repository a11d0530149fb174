r"""Calls in tags, which Qwen3-Coder and later models write.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Values are bare text; the type of a parameter says what it means. Its template writes values that are neither mappings
nor sequences as Python does, so `True`, `False` and `None` are taken as well as JSON's words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from runtime.tools.call import CallFormat, Functions, MalformedCall, WrittenCall
from runtime.tools.json_text import read_json

_FUNCTION = re.compile(r"\s*<function=([^<>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_MOST_LEVELS = 8  # of choices in choices
_WORDS = {"True": True, "False": False, "None": None}


class Qwen3CoderFormat(CallFormat):
    """A function and its parameters in tags."""

    def is_asked_by(self, template: str) -> bool:
        """Return whether the template writes such tags."""
        return all(tag in template for tag in (self.opening, self.closing, "<function=", "<parameter="))

    def read(self, body: str, functions: Functions) -> WrittenCall:
        """Read the tags."""
        found = _FUNCTION.fullmatch(body)
        if found is None or found[1] not in functions:
            raise MalformedCall("no function of that name")
        properties = _properties(functions[found[1]])
        arguments: dict[str, Any] = {}
        inside, position = found[2], 0
        while inside[position:].strip():
            parameter = _PARAMETER.match(inside, position)
            if parameter is None or parameter[1] in arguments:
                raise MalformedCall("something that is no parameter, or one twice")
            arguments[parameter[1]] = _value(parameter[2], properties.get(parameter[1]))
            position = parameter.end()
        return WrittenCall(found[1], arguments, json.dumps(arguments, ensure_ascii=False))


def _properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def _value(text: str, schema: Any) -> Any:
    """Return the value of a parameter: text where its schema allows a string or says nothing.

    Raises:
        MalformedCall: The schema asks for something else, and the text is no JSON.
    """
    kinds = _kinds(schema)
    if not kinds or "string" in kinds:
        return text
    if text.strip() in _WORDS:
        return _WORDS[text.strip()]
    return read_json(text.strip())


def _kinds(schema: Any, depth: int = 0) -> set[str]:
    """Return the types that a schema allows, of its choices and listed values as well; none if it says nothing."""
    if not isinstance(schema, Mapping) or depth > _MOST_LEVELS:
        return set()
    kinds = schema.get("type")
    found = {kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str)}
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if not found and isinstance(values, list):
        found |= {"string" if isinstance(value, str) else "other" for value in values}
    for key in ("anyOf", "oneOf"):
        options = schema.get(key)
        for option in options if isinstance(options, list) else []:
            found |= _kinds(option, depth + 1)
    return found


FORMAT = Qwen3CoderFormat()

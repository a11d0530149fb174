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

from runtime.errors import UsageError
from runtime.shown import shown
from runtime.structured.schema_checks import referred
from runtime.tools.call import CallFormat, Functions, MalformedCall, WrittenCall
from runtime.tools.grammar import json_rule, literal
from runtime.tools.json_text import read_json
from runtime.tools.text_values import text_rules

_FUNCTION = re.compile(r"\s*<function=([^<>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_MOST_LEVELS = 8  # of choices in choices
# What a schema of parameters may say besides, without saying that one parameter depends on others.
_UNDERSTOOD = frozenset(
    {"type", "properties", "required", "additionalProperties", "patternProperties", "$defs", "definitions", "$schema"}
    | {"$id", "$comment", "title", "description", "default", "examples", "strict"}
)
_DEFINITIONS = ("$defs", "definitions")
_AFTER = "\n</parameter>\n"
_WORDS = {"True": True, "False": False, "None": None}


class Qwen3CoderFormat(CallFormat):
    """A function and its parameters in tags."""

    def is_asked_by(self, template: str) -> bool:
        """Return whether the template writes such tags."""
        return all(tag in template for tag in (self.opening, self.closing, "<function=", "<parameter="))

    def rules(self, function: Mapping[str, Any], name: str) -> list[str]:
        """Return rules for the tags as templates write them, with the parameters in the order of the schema.

        Parameters that the schema allows without listing them are left out.
        """
        schema = function["parameters"]
        if others := schema.keys() - _UNDERSTOOD:
            raise UsageError(
                f"tool_choice: the parameters of the function {function['name']!r} have {shown(sorted(others)[0])}, "
                "which is not followed where each parameter is written for itself",
                remedy="list them in properties and required alone",
            )
        required = schema.get("required", [])
        listed = {**schema.get("properties", {}), **{key: {} for key in required if key not in _properties(function)}}
        parts, rules = [], []
        for index, (key, value) in enumerate(listed.items()):
            part = f"{name}_{index}"
            rules += _parameter_rules(part, key, value, schema)
            parts.append(part if key in required else f"{part}?")
        opening, closing = literal(f"\n<function={function['name']}>\n"), literal("</function>\n")
        return [" ".join([f"{name}:", opening, *parts, closing]), *rules]

    def read(self, body: str, functions: Functions) -> WrittenCall:
        """Read the tags."""
        found = _FUNCTION.fullmatch(body)
        if found is None or found[1] not in functions:
            raise MalformedCall("no function of that name")
        function = functions[found[1]]
        properties = _properties(function)
        arguments: dict[str, Any] = {}
        inside, position = found[2], 0
        while inside[position:].strip():
            parameter = _PARAMETER.match(inside, position)
            if parameter is None or parameter[1] in arguments:
                raise MalformedCall("something that is no parameter, or one twice")
            arguments[parameter[1]] = _value(parameter[2], properties.get(parameter[1]), function.get("parameters"))
            position = parameter.end()
        return WrittenCall(found[1], arguments, json.dumps(arguments, ensure_ascii=False))


def _properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def _parameter_rules(name: str, key: str, schema: Any, root: Mapping[str, Any]) -> list[str]:
    if any(mark in key for mark in "<>\n"):
        raise UsageError(
            f"tool_choice: a parameter is called {shown(key)}, which cannot be written in a tag",
            remedy="rename it",
        )
    value = f"{name}_value"
    before = literal(f"<parameter={key}>\n")
    if _is_text(_kinds(schema, root)):
        return [f"{name}: {before} {value}", *text_rules(value, schema, root, _AFTER)]
    definitions = {each: root[each] for each in _DEFINITIONS if each in root}
    return [f"{name}: {before} {value} {literal(_AFTER)}", json_rule(value, {**schema, **definitions})]


def _value(text: str, schema: Any, root: Any) -> Any:
    """Return the value of a parameter: text where its schema allows a string or says nothing.

    Raises:
        MalformedCall: The schema asks for something else, and the text is no JSON.
    """
    if _is_text(_kinds(schema, root)):
        return text
    if text.strip() in _WORDS:
        return _WORDS[text.strip()]
    return read_json(text.strip())


def _is_text(kinds: set[str]) -> bool:
    return not kinds or "string" in kinds


def _kinds(schema: Any, root: Any, depth: int = 0) -> set[str]:
    """Return the types that a schema allows, of its choices and listed values as well; none if it says nothing.

    Args:
        schema: The schema.
        root: What its references refer into.
        depth: Levels above it.
    """
    if not isinstance(schema, Mapping) or depth > _MOST_LEVELS:
        return set()
    if isinstance(schema.get("$ref"), str) and isinstance(root, Mapping):
        return _kinds(referred(root, schema["$ref"]), root, depth + 1)
    kinds = schema.get("type")
    found = {kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str)}
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if not found and isinstance(values, list):
        found |= {"string" if isinstance(value, str) else "other" for value in values}
    for key in ("anyOf", "oneOf"):
        options = schema.get(key)
        for option in options if isinstance(options, list) else []:
            found |= _kinds(option, root, depth + 1)
    return found


FORMAT = Qwen3CoderFormat()

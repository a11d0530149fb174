"""The grammar, in llguidance's Lark syntax, of an answer that is nothing but calls.

What a function's schema says is followed but for one thing: an object that lists its properties gets no others, unless
the schema says `additionalProperties` itself. Otherwise a model that is unsure would invent parameters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from runtime.errors import UsageError
from runtime.structured.response_format import MAX_FORMAT_CHARACTERS, ResponseFormat
from runtime.structured.schema_checks import check_schema, check_size
from runtime.tools.call import CallFormat
from runtime.tools.choice import ToolChoice

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""The schema of a function that says nothing of its parameters: it has none, as in OpenAI's interface."""

# JSON as jinja's `tojson` writes it into templates, and no other blanks: models were trained on it, the rows of an
# answer are found again in the next prompt, and a model that is unsure cannot write blanks without end.
_AS_TEMPLATES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Where they stand beside `properties`, closing an object would contradict them.
_COMBINING = ("allOf", "anyOf", "oneOf", "not", "if", "$ref", "dependentSchemas", "patternProperties")
# The values of these are schemas, or hold them.
_SCHEMAS = ("items", "additionalProperties")
_LISTS, _MAPPINGS = ("anyOf", "oneOf", "prefixItems"), ("properties", "$defs", "definitions")


def calls_format(
    choice: ToolChoice,
    tools: Sequence[Mapping[str, Any]],
    call_format: CallFormat | None,
    mark: Callable[[str], int | None],
) -> ResponseFormat:
    """Return what an answer has to look like that a `tool_choice` holds to calls.

    Args:
        choice: Which functions, and how many calls.
        tools: The functions that the prompt shows.
        call_format: How the checkpoint writes calls.
        mark: Returns the id of the token that a mark is, None if it has to be spelled.

    Raises:
        UsageError: The checkpoint writes calls in no known format, or a schema cannot be followed.
    """
    if call_format is None:
        raise UsageError(
            "tool_choice asks for a call, and the chat template of this model asks for no known format of calls",
            remedy="use a checkpoint whose template knows tools, or response_format with a schema of the call",
        )
    bodies: list[str] = []
    names: list[str] = []
    for index, function in enumerate(choice.chosen(tools)):
        schema = parameters_of(function)
        place = f"the parameters of the function {function['name']!r}"
        check_size(place, schema)
        check_schema(place, schema)
        names.append(f"call_{index}")
        bodies += call_format.rules({**function, "parameters": closed(schema)}, names[-1])
    marks = [_mark(text, mark(text)) for text in (call_format.opening, call_format.closing)]
    # Behind a thought, Qwen's models write two line ends before anything else.
    start = r'start: ("\n" | "\n\n")? call' + ("" if choice.is_single else r' ("\n" call)*')
    text = "\n".join([start, f"call: {marks[0]} ({' | '.join(names)}) {marks[1]}", *bodies])
    if len(text) > MAX_FORMAT_CHARACTERS:
        raise UsageError(
            f"tool_choice: the functions that may be called have {len(text)} characters of schemas, expected at most "
            f"{MAX_FORMAT_CHARACTERS}",
            remedy="make them smaller, or name the functions in question with type 'allowed_tools'",
        )
    return ResponseFormat("grammar", text, "tool_choice")


def parameters_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a function's arguments, which is one of an object."""
    schema = function.get("parameters")
    return dict(NO_PARAMETERS) if schema is None else {"type": "object", **schema}


def literal(text: str) -> str:
    """Return a text as a string of the grammar."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(name: str, schema: Mapping[str, Any]) -> str:
    """Return a rule for JSON that follows a schema, whose references are to the schema itself."""
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': _AS_TEMPLATES}, ensure_ascii=False)}"


def closed(schema: Any) -> Any:
    """Return a schema whose objects have none but the listed properties; the same if that might contradict it."""
    is_combined = any("properties" in each and any(key in each for key in _COMBINING) for each in _nodes(schema))
    has_all_of = any("allOf" in each or "not" in each or "if" in each for each in _nodes(schema))
    return schema if is_combined or has_all_of else _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found = {
        **schema,
        **{key: _closed(schema[key]) for key in _SCHEMAS if key in schema},
        **{key: [*map(_closed, schema[key])] for key in _LISTS if isinstance(schema.get(key), list)},
        **{
            key: {name: _closed(each) for name, each in schema[key].items()}
            for key in _MAPPINGS
            if isinstance(schema.get(key), Mapping)
        },
    }
    return {"additionalProperties": False, **found} if "properties" in schema else found


def _nodes(schema: Any) -> Iterator[Mapping[str, Any]]:
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _mark(text: str, token_id: int | None) -> str:
    return literal(text) if token_id is None else f"<[{token_id}]>"

"""Definitions of functions: wrong shapes are refused with their place."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.arguments import tool_schemas
from runtime.errors import UsageError

pytestmark = pytest.mark.portable


def wrapped(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


@pytest.mark.parametrize(
    "tool",
    [
        wrapped(name="f"),
        wrapped(name="größe", description=None, parameters=None, strict=True),
        {"name": "f", "parameters": {}},
        {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"x": True}, "required": []}},
        wrapped(name="f", parameters={"type": "object", "properties": {"x": {"anyOf": [{"type": "null"}]}}}),
    ],
)
def test_definitions_are_taken_as_they_are(tool: dict[str, Any]) -> None:
    assert tool_schemas([tool]) == [tool]


@pytest.mark.parametrize(
    ("tool", "place"),
    [
        ("f", r"tools\[1\] must be a dict, got str"),
        ({}, r"tools\[1\]\.name must be the name"),
        ({"type": "web_search"}, r"tools\[1\]\.type must be 'function', got 'web_search'"),
        ({"type": "function", "function": "f"}, r"tools\[1\]\.function must be a dict, got str"),
        (wrapped(), r"tools\[1\]\.function\.name must be the name of a function, got None"),
        (wrapped(name=" "), r"tools\[1\]\.function\.name"),
        (wrapped(name=5), r"tools\[1\]\.function\.name"),
        (wrapped(name="a>b"), r"tools\[1\]\.function\.name"),
        (wrapped(name="g", description=5), r"tools\[1\]\.function\.description must be a string"),
        (wrapped(name="g", parameters=[]), r"tools\[1\]\.function\.parameters must be a JSON schema"),
        (wrapped(name="g", parameters={"type": "string"}), r"parameters\.type must be 'object', got 'string'"),
        (wrapped(name="g", parameters={"properties": []}), r"parameters\.properties must be a dict"),
        (wrapped(name="g", parameters={"properties": {"x": "int"}}), r"parameters\.properties\['x'\] must be a JSON"),
        (wrapped(name="g", parameters={"required": "x"}), r"parameters\.required must be a list of names"),
        (wrapped(name="g", parameters={"required": [1]}), r"parameters\.required must be a list of names"),
        (wrapped(name="f"), r"tools\[1\] has the name 'f', as one before it"),
    ],
)
def test_wrong_shapes_are_refused_with_their_place(tool: Any, place: str) -> None:
    with pytest.raises(UsageError, match=place) as error:
        tool_schemas([wrapped(name="f"), tool])
    assert error.value.remedy

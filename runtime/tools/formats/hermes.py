r"""Calls as JSON, which Qwen2.5 to Qwen3-VL write: `<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.tools.call import CallFormat, Functions, MalformedCall, WrittenCall
from runtime.tools.grammar import json_rule, literal
from runtime.tools.json_text import read_members

_END = literal("}\n")


class HermesFormat(CallFormat):
    """A JSON object with `name` and `arguments`; a call without `arguments` has none."""

    def is_asked_by(self, template: str) -> bool:
        """Return whether the template writes the marks, and no function in tags between them."""
        return self.opening in template and self.closing in template and "<function=" not in template

    def rules(self, function: Mapping[str, Any], name: str) -> list[str]:
        """Return rules for the object as templates write it."""
        before = f'\n{{"name": {literal(function["name"])}, "arguments": '
        arguments = f"{name}_arguments"
        return [
            f"{name}: {literal(before)} {arguments} {_END}",
            json_rule(arguments, function["parameters"]),
        ]

    def read(self, body: str, functions: Functions) -> WrittenCall:
        """Read the object; other members of it are passed over."""
        members = read_members(body)
        name = members["name"].value if "name" in members else None
        if not isinstance(name, str) or name not in functions:
            raise MalformedCall("no function of that name")
        if "arguments" not in members:
            return WrittenCall(name, {}, "{}")
        arguments = members["arguments"]
        if not isinstance(arguments.value, dict):
            raise MalformedCall("the arguments are no object")
        return WrittenCall(name, arguments.value, arguments.text)


FORMAT = HermesFormat()

"""A call of a function that a model wrote, and what a format of calls has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

Functions = Mapping[str, Mapping[str, Any]]
"""The functions that may be called: name, and definition (`name`, `parameters` …)."""


@dataclass(frozen=True)
class ToolCall:
    """One call.

    Attributes:
        id: Names the call in the message with its result. It is "call_" and 24 hexadecimal digits of a hash of the
            prompt's tokens and the number of the call: no two calls of a conversation share one, and the same answer to
            the same prompt has the same.
        name: Of the function; one of the `tools` that were given.
        arguments: By name. They are not compared with the schema of the function.
        arguments_text: The same as JSON, as the model wrote it where it writes JSON.
        text: The whole call as the model wrote it.
    """

    id: str
    name: str
    arguments: dict[str, Any]
    arguments_text: str
    text: str

    def to_message(self) -> dict[str, Any]:
        """Return the entry of `tool_calls` in the assistant's message, as Hugging Face's templates read it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class WrittenCall(NamedTuple):
    """What a format reads between the marks of a call."""

    name: str
    arguments: dict[str, Any]
    arguments_text: str


class MalformedCall(Exception):
    """What stands between the marks is no call; never leaves the reader."""


class CallFormat(ABC):
    """How checkpoints write calls, one after the other, each between two marks.

    Attributes:
        opening, closing: The marks.
    """

    opening: ClassVar[str] = "<tool_call>"
    closing: ClassVar[str] = "</tool_call>"

    @abstractmethod
    def is_asked_by(self, template: str) -> bool:
        """Return whether a chat template asks the model for this format."""

    @abstractmethod
    def rules(self, function: Mapping[str, Any], name: str) -> list[str]:
        """Return rules of a grammar (`runtime.tools.grammar`) for what stands between the marks of a call.

        Args:
            function: The function; its `parameters` are a JSON schema of an object.
            name: Of the first rule, which is the whole of it; names of the others begin so.

        Raises:
            UsageError: The format cannot hold arguments to the schema.
        """

    @abstractmethod
    def read(self, body: str, functions: Functions) -> WrittenCall:
        """Read what stands between the marks.

        Raises:
            MalformedCall: It is no call of one of the functions.
        """

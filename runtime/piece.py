"""`Piece`: a part of an answer's text as it is streamed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.tools.call import ToolCall

TEXT, REASONING, TOOL_CALL = "text", "reasoning", "tool_call"
"""The kinds of pieces: the answer, the thoughts before it, and calls of functions."""


class Piece(str):
    """A part of an answer, all of it of one kind; a string like any other.

    Joined, the pieces of kind "text" are `Generation.text`, and those of kind "reasoning" are `Generation.reasoning`.

    Args:
        text: The text. That of a call is what the model wrote, with the marks around it.
        kind: "text", "reasoning" or "tool_call".
        call: The call that a piece of kind "tool_call" is; such a piece is always a whole call.
        call_index: Number of the call in its answer, from 0 on.

    Attributes:
        kind, call, call_index: As given; `call` is None and `call_index` -1 in other kinds.
    """

    __slots__ = ("call", "call_index", "kind")

    kind: str
    call: ToolCall | None
    call_index: int

    def __new__(cls, text: str, kind: str = TEXT, call: ToolCall | None = None, call_index: int = -1) -> Piece:
        """Return a piece."""
        piece = super().__new__(cls, text)
        piece.kind, piece.call, piece.call_index = kind, call, call_index
        return piece

"""Find the calls in the text of an answer while it is written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.piece import TEXT, TOOL_CALL, Piece
from runtime.tools.call import CallFormat, Functions, MalformedCall, ToolCall
from runtime.tools.choice import ToolChoice

_ID_DIGITS = 24


@dataclass(frozen=True)
class ExpectedCalls:
    """What calls an answer may hold.

    Attributes:
        format: How they are written.
        functions: What may be called.
        is_single: The answer ends with the first call.
    """

    format: CallFormat
    functions: Functions
    is_single: bool = False

    @classmethod
    def of(
        cls,
        call_format: CallFormat | None,
        tools: Sequence[Mapping[str, Any]] | None,
        choice: ToolChoice | None = None,
    ) -> ExpectedCalls | None:
        """Return what tools, as `runtime.arguments.tool_schemas` returns them, allow; None if nothing is to be read."""
        if call_format is None or not tools:
            return None
        choice = choice or ToolChoice()
        return cls(call_format, {each["name"]: each for each in choice.chosen(tools)}, choice.is_single)


class CallReader:
    r"""Tell the calls of one answer from its text.

    A call is handed on when it is complete, since one that breaks off or turns out to be none is text, and what was
    shown cannot be taken back. Line feeds beside a call belong to it where text begins or ends with them; templates
    write them again.

    Args:
        expected: What calls there may be; None for none, and all is text.
        prompt_ids: Token ids before the answer: the ids of calls come of them.

    Attributes:
        calls: The calls so far.
        malformed: What stands between marks and is no call, with the marks.
    """

    def __init__(self, expected: ExpectedCalls | None, prompt_ids: Sequence[int]) -> None:
        self._expected = expected
        self._prompt_ids = prompt_ids
        self._held = ""  # may begin an opening mark
        self._line_feeds = ""  # may stand before a call
        self._body: list[str] | None = None  # of a call that is not complete
        self._tail = ""  # of it: may begin a closing mark
        self._has_text = self._is_behind_call = False
        self.calls: list[ToolCall] = []
        self.malformed: list[str] = []

    @property
    def is_complete(self) -> bool:
        """Whether the answer is to end with the calls that it holds."""
        return self._expected is not None and self._expected.is_single and bool(self.calls)

    def feed(self, text: str) -> list[Piece]:
        """Take the next text and return what is decided; no piece is empty."""
        if self._expected is None:
            return [Piece(text)] if text else []
        pieces: list[Piece] = []
        while text:
            text = self._outside(text, pieces) if self._body is None else self._inside(text, pieces)
        return pieces

    def flush(self) -> list[Piece]:
        """Return what is left at the end of the answer; a call that is not complete is text."""
        pieces: list[Piece] = []
        if self._expected is not None and self._body is not None:
            self._reject(self._expected.format.opening + "".join(self._body), pieces)
            self._body = None
        held, self._held = self._held, ""
        self._show(held, pieces)
        line_feeds, self._line_feeds = self._line_feeds, ""
        if line_feeds and not self._is_behind_call:
            pieces.append(Piece(line_feeds))
        return pieces

    def _outside(self, text: str, pieces: list[Piece]) -> str:
        """Take text up to the next opening mark, and return what stands behind it."""
        assert self._expected is not None
        opening = self._expected.format.opening
        text, self._held = self._held + text, ""
        place = text.find(opening)
        if place >= 0:
            self._show(text[:place], pieces)
            self._body, self._tail = [], ""
            return text[place + len(opening) :]
        num_held = next(n for n in range(min(len(opening) - 1, len(text)), -1, -1) if text.endswith(opening[:n]))
        self._held = text[len(text) - num_held :]
        self._show(text[: len(text) - num_held], pieces)
        return ""

    def _inside(self, text: str, pieces: list[Piece]) -> str:
        """Take text up to the next closing mark, and return what stands behind it."""
        assert self._expected is not None and self._body is not None
        closing = self._expected.format.closing
        place = (self._tail + text).find(closing)
        if place < 0:
            self._body.append(text)
            self._tail = (self._tail + text)[-(len(closing) - 1) :]
            return ""
        end = place + len(closing) - len(self._tail)
        self._body.append(text[:end])
        body, self._body = "".join(self._body), None
        self._close(body[: -len(closing)], pieces)
        return text[end:]

    def _close(self, body: str, pieces: list[Piece]) -> None:
        assert self._expected is not None
        call_format = self._expected.format
        text = call_format.opening + body + call_format.closing
        try:
            written = call_format.read(body, self._expected.functions)
        except MalformedCall:
            self._reject(text, pieces)
            return
        call = ToolCall(self._new_id(), *written, text)
        pieces.append(Piece(text, TOOL_CALL, call, len(self.calls)))
        self.calls.append(call)
        self._is_behind_call = True

    def _reject(self, text: str, pieces: list[Piece]) -> None:
        self.malformed.append(text)
        self._show(text, pieces)

    def _show(self, text: str, pieces: list[Piece]) -> None:
        text = self._line_feeds + text
        shown = text.rstrip("\n")
        self._line_feeds = text[len(shown) :]
        if self._is_behind_call and not self._has_text:
            shown = shown.lstrip("\n")
        if shown:
            pieces.append(Piece(shown, TEXT))
            self._has_text, self._is_behind_call = True, False

    def _new_id(self) -> str:
        prompt = np.asarray(self._prompt_ids, np.int64).tobytes()
        digest = hashlib.sha256(prompt + str(len(self.calls)).encode()).hexdigest()
        return f"call_{digest[:_ID_DIGITS]}"

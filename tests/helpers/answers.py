"""Answers read from tokens or text alone, without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from helpers.tokenizer_fixture import build_tokenizer_json
from runtime.answer import Answer, Generation, Stats
from runtime.piece import REASONING, TEXT, TOOL_CALL, Piece
from runtime.repetition import LoopGuard
from runtime.stop_text import AnswerText
from runtime.thinking import ThoughtReader, opens_thought, thinking_marks
from runtime.tokenizer import Tokenizer
from runtime.tools.call import CallFormat
from runtime.tools.formats.hermes import FORMAT as HERMES
from runtime.tools.reader import CallReader, ExpectedCalls

TOKENIZER = Tokenizer(build_tokenizer_json())
OPENED = TOKENIZER.encode("<|im_start|>assistant\n<think>\n")
PLAIN = TOKENIZER.encode("<|im_start|>assistant\n")
END = TOKENIZER.token_id("<|im_end|>")
STATS = Stats.of([0.0] * 6, prompt_tokens=1, visual_tokens=0, new_tokens=1, peak_cache_bytes=0)


def function(name: str, **properties: str) -> dict[str, Any]:
    """Return the definition of a function whose parameters have these types."""
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [function("weather", city="string", days="integer"), function("clock")]


def read_answer(
    token_ids: Sequence[int],
    prompt_ids: Sequence[int] = PLAIN,
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    call_format: CallFormat = HERMES,
    stop: Sequence[str] = (),
    max_new_tokens: int = 10_000,
    max_repetitions: int = 0,
) -> tuple[Generation, list[Piece]]:
    """Return the answer that tokens are, and its pieces; they end with the first that ends it."""
    marks = thinking_marks(TOKENIZER)
    answer = Answer(
        AnswerText(TOKENIZER, stop, prompt_ids, marks or ()),
        ThoughtReader(marks, is_open=opens_thought(TOKENIZER, prompt_ids)),
        CallReader(ExpectedCalls.of(call_format, tools), prompt_ids),
        [END],
        max_new_tokens,
        LoopGuard(max_repetitions) if max_repetitions else None,
    )
    pieces: list[Piece] = []
    for token_id in token_ids:
        pieces += answer.push(token_id)
        if answer.finish_reason:
            break
    generation = answer.finished(STATS)
    check_pieces(generation, pieces)
    return generation, pieces


def check_pieces(generation: Generation, pieces: Sequence[Piece]) -> None:
    """Require that the pieces of each kind make the field of that kind."""
    assert all(pieces), "an empty piece"
    assert "".join(piece for piece in pieces if piece.kind == TEXT) == generation.text
    assert "".join(piece for piece in pieces if piece.kind == REASONING) == generation.reasoning
    calls = [piece for piece in pieces if piece.kind == TOOL_CALL]
    assert [piece.call for piece in calls] == list(generation.tool_calls)
    assert [piece.call_index for piece in calls] == list(range(len(calls)))
    assert [str(piece) for piece in calls] == [call.text for call in generation.tool_calls]
    assert all(text in generation.text for text in generation.malformed_tool_calls)

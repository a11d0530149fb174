"""What one call gives back: the answer as it grows, the whole of it, and its timings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from runtime import notebook
from runtime.arguments import whole_number
from runtime.grounding import Box, Point, find_boxes, find_points
from runtime.logprobs import TokenLogprob
from runtime.picture_source import PictureSource
from runtime.piece import REASONING, TEXT, Piece
from runtime.repetition import LoopGuard
from runtime.shown import shown
from runtime.stop_text import AnswerText, Run
from runtime.thinking import ThoughtReader
from runtime.tools.call import ToolCall
from runtime.tools.reader import CallReader


@dataclass(frozen=True)
class Stats:
    """Timings of one answer: seconds, tokens, bytes. `ttft_s` runs from the call to the first token.

    `queue_s` is the wait for a place among the sequences that run. `drafted_tokens` and `accepted_tokens` are those of
    prompt lookup; 0 without it. `cached_tokens` of the prompt had their rows in the KV cache already, and the
    embeddings of `cached_images` were not computed. `peak_cache_bytes` are those of the answer's own rows, before
    `evicted_rows` of the prompt were given up (`kv_budget`). `visual_tokens` of the prompt are of images and videos,
    and `pruned_tokens` of these did not stay in it.
    """

    preprocess_s: float
    queue_s: float
    vision_s: float
    prefill_s: float
    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    peak_cache_bytes: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    cached_tokens: int = 0
    cached_images: int = 0
    pruned_tokens: int = 0
    evicted_rows: int = 0

    @classmethod
    def of(cls, times: Sequence[float], **counts: int) -> Stats:
        """Return the statistics of an answer.

        Args:
            times: On one clock, in seconds: start; prompt ready; place found; images encoded; first token; end.
            **counts: All other fields.
        """
        started, prepared, began, encoded, first, ended = times
        later = counts["new_tokens"] - 1
        tpot = (ended - first) / later if later else 0.0
        return cls(
            preprocess_s=prepared - started,
            queue_s=began - prepared,
            vision_s=encoded - began,
            prefill_s=first - encoded,
            ttft_s=first - started,
            tpot_s=tpot,
            tokens_per_s=1 / tpot if tpot else 0.0,
            **counts,
        )

    def to_dict(self) -> dict[str, float]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: The answer, without thoughts and without the calls in `tool_calls`.
        token_ids: The new tokens, the end token included.
        finish_reason: Why it ended: eos; stop, which is a stop string, the end of a `response_format` that allows
            nothing more, or the only call that there may be; length; or repetition (`max_repetitions`). Calls of
            functions are no reason of their own: an answer that may go on behind its calls ends with eos.
        stats: Its timings.
        reasoning: The thoughts before the answer; "" without. They are all there is of an answer that ended in them.
        tool_calls: The calls that it holds; none unless `tools` were given.
        malformed_tool_calls: What stands between the marks of a call and is none, marks included. It is in `text` too.
        raw_text: All text as the model wrote it, with the marks of thoughts and calls, without special tokens.
        logprobs: How likely each of `token_ids` was, with the option `logprobs`.
        choices: The `n` answers to one prompt, this one first; with `best_of`, the likeliest first. Empty if one was
            asked for.
        image_sizes: Width and height in pixels of each image, and of the frames of each video, of the prompt, in order
            and before they were resized.
        sources: Where they are, for notebooks, which show the last one; not their pixels.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    malformed_tool_calls: tuple[str, ...] = ()
    raw_text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    choices: tuple[Generation, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()
    sources: tuple[PictureSource, ...] = field(default=(), compare=False)

    def __repr__(self) -> str:
        """Say what it is on one line: `Generation('7 1 9', finish_reason='eos', tokens=6)`."""
        more = {"reasoning": len(self.reasoning), "tool_calls": len(self.tool_calls), "choices": len(self.choices)}
        words = [
            shown(self.text),
            f"finish_reason={shown(self.finish_reason)}",
            f"tokens={len(self.token_ids)}",
            *(f"{name}={number}" for name, number in more.items() if number),
        ]
        return f"{type(self).__name__}({', '.join(words)})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the last image with boxes and points, if it is still there, and the text."""
        parts = []
        if self.image_sizes:
            source = self.sources[-1] if self.sources else None
            parts.append(notebook.picture(source, self.image_sizes[-1], self.boxes, self.points))
        if self.reasoning:
            parts.append(notebook.folded("thoughts", notebook.text(self.reasoning)))
        parts.append(notebook.text(self.text))
        parts += [notebook.text(f"{call.name}({call.arguments_text})") for call in self.tool_calls]
        figures = f"{len(self.token_ids)} tokens, {self.finish_reason}; first token after {self.stats.ttft_s:.3f} s, "
        parts.append(notebook.small(f"{figures}{self.stats.tokens_per_s:.1f} tokens/s"))
        if self.choices:
            answers = (notebook.text(each.text) for each in self.choices)
            parts.append(notebook.folded(f"{len(self.choices)} answers", *answers))
        return f"<div>{''.join(parts)}</div>"

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Boxes in the answer, in pixels of the last image of the prompt; none without an image."""
        return self.boxes_on(-1) if self.image_sizes else ()

    @property
    def points(self) -> tuple[Point, ...]:
        """Points in the answer, in pixels of the last image of the prompt; none without an image."""
        return self.points_on(-1) if self.image_sizes else ()

    def boxes_on(self, image: int) -> tuple[Box, ...]:
        """Return the boxes in the answer in pixels of one image or video.

        Args:
            image: Its number in the prompt, videos counted as well; -1 is the last.

        Raises:
            UsageError: There is no such image.
        """
        return find_boxes(self.text, self._size_of(image))

    def points_on(self, image: int) -> tuple[Point, ...]:
        """Return the points in the answer in pixels of one image or video; see `boxes_on`."""
        return find_points(self.text, self._size_of(image))

    def _size_of(self, image: int) -> tuple[int, int]:
        number = len(self.image_sizes)
        remedy = "pass a number from 0 on, or -1 for the last"
        expected = f"the number of one of the {number} images and videos of the prompt"
        return self.image_sizes[whole_number("image", image, -number, number - 1, expected, remedy)]

    def to_message(self) -> dict[str, Any]:
        """Return the assistant's message that the answer is, for the next prompt.

        The template decides which thoughts it shows: Qwen's drop those before the last question of the user.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.to_message() for call in self.tool_calls]
        return message


class Answer:
    """An answer as it grows, token by token.

    Args:
        text: Turns its tokens into text.
        thoughts: Tells its thoughts from the rest.
        calls: Tells its calls from the rest.
        eos_token_ids: Each of them ends it.
        max_new_tokens: As many end it.
        guard: Ends it when it loops, if given.

    Attributes:
        token_ids: The tokens, the end token included.
        finish_reason: Why it has ended: eos, stop, repetition or length; "" while it has not.
    """

    def __init__(
        self,
        text: AnswerText,
        thoughts: ThoughtReader,
        calls: CallReader,
        eos_token_ids: Sequence[int],
        max_new_tokens: int,
        guard: LoopGuard | None = None,
    ) -> None:
        self._text = text
        self._thoughts = thoughts
        self._calls = calls
        self._eos_token_ids = eos_token_ids
        self._max_new_tokens = max_new_tokens
        self._guard = guard
        self._raw: list[str] = []
        self._pieces: list[Piece] = []
        self.token_ids: list[int] = []
        self.finish_reason = ""

    def push(self, token_id: int, *, is_complete: bool = False) -> list[Piece]:
        """Take the next token and return what can be shown now; no piece is empty.

        Args:
            token_id: The token.
            is_complete: With it, the answer has come to the end of its format.
        """
        self.token_ids.append(token_id)
        pieces = self._read(self._text.push(token_id))
        is_loop = self._guard is not None and self._guard.push(token_id)
        if token_id in self._eos_token_ids:
            self.finish_reason = "eos"
        elif self._text.is_stopped or is_complete or self._calls.is_complete:
            self.finish_reason = "stop"
        elif is_loop:
            self.finish_reason = "repetition"
        elif len(self.token_ids) >= self._max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            pieces += self._read(self._text.flush(), is_last=True)
        self._pieces += pieces
        return pieces

    def finished(self, stats: Stats, logprobs: tuple[TokenLogprob, ...] | None = None) -> Generation:
        """Return the whole answer."""
        return Generation(
            self._joined(TEXT),
            self.token_ids,
            self.finish_reason,
            stats,
            reasoning=self._joined(REASONING),
            tool_calls=tuple(self._calls.calls),
            malformed_tool_calls=tuple(self._calls.malformed),
            raw_text="".join(self._raw),
            logprobs=logprobs,
        )

    def _read(self, runs: Sequence[Run], *, is_last: bool = False) -> list[Piece]:
        self._raw += [run.text for run in runs]
        found = self._thoughts.feed(runs)
        if is_last:
            found += self._thoughts.flush()
        pieces: list[Piece] = []
        for piece in found:
            pieces += self._calls.feed(piece) if piece.kind == TEXT else [piece]
        return pieces + self._calls.flush() if is_last else pieces

    def _joined(self, kind: str) -> str:
        return "".join(piece for piece in self._pieces if piece.kind == kind)

"""What one call gives back: the answer as it grows, the whole of it, and its timings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from runtime.logprobs import TokenLogprob
from runtime.stop_text import AnswerText


@dataclass(frozen=True)
class Stats:
    """Timings of one answer: seconds, tokens, bytes. `ttft_s` runs from the call to the first token.

    `queue_s` is the wait for a place among the sequences that run. `drafted_tokens` and `accepted_tokens` are those of
    prompt lookup; 0 without it. `cached_tokens` of the prompt had their rows in the KV cache already, and the
    embeddings of `cached_images` were not computed. `peak_cache_bytes` are those of the answer's own rows.
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
        text: The answer.
        token_ids: The new tokens, the end token included.
        finish_reason: Why it ended: eos; stop, which is a stop string, or a `response_format` that the answer has come
            to the end of; or length.
        stats: Its timings.
        logprobs: How likely each of `token_ids` was, with the option `logprobs`.
        choices: The `n` answers to one prompt, this one first; with `best_of`, the likeliest first. Empty if one was
            asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats
    logprobs: tuple[TokenLogprob, ...] | None = None
    choices: tuple[Generation, ...] = ()


class Answer:
    """An answer as it grows, token by token.

    Args:
        text: Turns its tokens into text.
        eos_token_ids: Each of them ends it.
        max_new_tokens: As many end it.

    Attributes:
        token_ids: The tokens, the end token included.
        finish_reason: Why it has ended: eos, stop or length; "" while it has not.
    """

    def __init__(self, text: AnswerText, eos_token_ids: Sequence[int], max_new_tokens: int) -> None:
        self._text = text
        self._eos_token_ids = eos_token_ids
        self._max_new_tokens = max_new_tokens
        self._pieces: list[str] = []
        self.token_ids: list[int] = []
        self.finish_reason = ""

    def push(self, token_id: int, *, is_complete: bool = False) -> str:
        """Take the next token and return the text that can be shown now; the last one if the format is complete."""
        self.token_ids.append(token_id)
        piece = self._text.push(token_id)
        if token_id in self._eos_token_ids:
            self.finish_reason = "eos"
        elif self._text.is_stopped or is_complete:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self._max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            piece += self._text.flush()
        self._pieces.append(piece)
        return piece

    def finished(self, stats: Stats, logprobs: tuple[TokenLogprob, ...] | None = None) -> Generation:
        """Return the whole answer."""
        return Generation("".join(self._pieces), self.token_ids, self.finish_reason, stats, logprobs)

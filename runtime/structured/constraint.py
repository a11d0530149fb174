"""`Constraint`: which tokens may come next in one answer.

Shape suffixes: V vocabulary, W words of 32 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.errors import EngineError, UsageError
from runtime.panics import is_panic
from runtime.shown import one_line

_LONGEST_REASON = 200


class Matcher(Protocol):
    """What is used of `llguidance.LLMatcher`."""

    def consume_token(self, sampled_token: int) -> bool:
        """Go on by one token."""

    def validate_tokens(self, tokens: list[int]) -> int:
        """Return how many of the tokens may follow, in order."""

    def is_accepting(self) -> bool:
        """Return whether the text so far is complete."""

    def is_stopped(self) -> bool:
        """Return whether nothing may follow."""

    def is_error(self) -> bool:
        """Return whether it has failed."""

    def get_error(self) -> str:
        """Return why it has failed."""

    def deep_copy(self) -> Matcher:
        """Return another one in the same state."""

    def unsafe_compute_mask_ptr(self, trg_pointer: int, trg_byte_size: int) -> None:
        """Write one bit for each token, 1 for those that may follow, the lowest bit first."""


class Constraint:
    """Follow one answer and say which tokens may come next.

    Special tokens are never allowed, and a token that ends the answer only where the format is complete.

    Args:
        matcher: At its start; it belongs to the constraint.
        text_tokens_V: Tokens that are text, bool; not written to.
        eos_token_ids: Tokens that end the answer.
        starts_after: Token ids after which the format begins, such as those of `</think>`; anything may stand before
            them. None begins at once.
        option: What asked for the format, for messages.
    """

    def __init__(
        self,
        matcher: Matcher,
        text_tokens_V: npt.NDArray[np.bool_],
        eos_token_ids: Sequence[int],
        starts_after: Sequence[int] | None = None,
        *,
        option: str = "response_format",
    ) -> None:
        self._option = option
        self._matcher = matcher
        self._text_tokens_V = text_tokens_V
        self._eos_ids = np.array([i for i in eos_token_ids if i < len(text_tokens_V)], np.int64)
        self._starts_after = list(starts_after or ())
        self._newest: list[int] = []
        self.is_active = not self._starts_after
        self._words_W = np.zeros((len(text_tokens_V) + 31) // 32, np.uint32)
        self._masked_V = np.empty(len(text_tokens_V), np.float32)

    @property
    def is_complete(self) -> bool:
        """Whether the answer follows the format and nothing more may come."""
        return self.is_active and self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Return which tokens may come next, bool [V].

        Raises:
            UsageError: None may, or the format has become too costly to follow.
        """
        words_W = self._words_W
        with _no_panic():
            self._matcher.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)
        if self._matcher.is_error():
            raise self._stuck()
        bits = np.unpackbits(words_W.view(np.uint8), count=len(self._text_tokens_V), bitorder="little")
        allowed_V = bits.view(np.bool_)
        allowed_V &= self._text_tokens_V
        if len(self._eos_ids) and self._matcher.is_accepting():
            allowed_V[self._eos_ids] = True
        elif not allowed_V.any():
            raise self._stuck()
        return allowed_V

    def mask(self, logits_V: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the logits with -inf for tokens that may not come next; valid until the next call.

        Raises:
            UsageError: As `allowed`.
        """
        if not self.is_active:
            # A thought may hold any text, but the answer behind it has yet to come.
            np.copyto(self._masked_V, logits_V)
            self._masked_V[self._eos_ids] = -np.inf
            return self._masked_V
        allowed_V = self.allowed()
        self._masked_V.fill(-np.inf)
        np.copyto(self._masked_V, logits_V, where=allowed_V)
        return self._masked_V

    def accept(self, token_id: int) -> None:
        """Take the next token of the answer.

        Raises:
            UsageError: It may not follow.
        """
        if not self.is_active:
            self.skip(token_id)
        elif token_id not in self._eos_ids:
            with _no_panic():
                is_taken = self._matcher.consume_token(token_id)
            if not is_taken:
                raise self._stuck()

    def skip(self, token_id: int) -> None:
        """Take a token that is no part of the format, such as the line feeds that are written behind a thought."""
        if not self.is_active:
            self._newest = [*self._newest, token_id][-len(self._starts_after) :]
            self.is_active = self._newest == self._starts_after

    def num_allowed(self, token_ids: list[int]) -> int:
        """Return how many of these tokens may follow, one after the other."""
        return self._matcher.validate_tokens(token_ids) if self.is_active else len(token_ids)

    def _stuck(self) -> UsageError:
        reason = self._matcher.get_error().partition("<state>")[0]
        why = f": {one_line(reason, _LONGEST_REASON)}" if reason else ""
        return UsageError(
            f"{self._option}: no token can follow what the answer holds so far{why}",
            remedy="allow more in the schema, regex or grammar, or make it simpler",
        )


MakeConstraint = Callable[[Sequence[int] | None], Constraint]
"""Makes the constraint of one answer, given its `starts_after`."""


@contextmanager
def _no_panic() -> Iterator[None]:
    """Turn a panic of the library, which is no `Exception`, into an error that ends this answer alone.

    Raises:
        EngineError: It panicked.
    """
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise EngineError(f"llguidance failed: {error}", remedy="simplify the format") from error

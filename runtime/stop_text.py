"""The text of an answer as it grows, up to the first stop string.

A stop string is looked for where transformers' `StopStringCriteria` (5.24) looks: in the bytes of all tokens, special
ones included, and with the prompt before them. So `<|box_end|>` ends an answer, and a line feed completes a stop of two
after a prompt that ends with one. What is returned is the answer's own text, without prompt and special tokens.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence

from runtime.stopping import StopStringFilter
from runtime.tokenizer import Tokenizer


class AnswerText:
    """Turn the tokens of one answer into text that ends before a stop string; whole characters only.

    Args:
        tokenizer: The model's.
        stops: The stop strings.
        prompt_ids: Token ids before the answer.

    Raises:
        UsageError: A stop string is empty, or they are too long together.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # The filter's characters are bytes here, so that a character may begin in one token and end in the next.
        encoded = [_as_text(stop.encode(errors="surrogatepass")) for stop in stops]
        self._stops = StopStringFilter(encoded)
        self._has_stops = bool(encoded)
        # Parts of what the filter still holds: how many bytes, and whether they are the answer's own text.
        self._parts: deque[tuple[int, bool]] = deque()
        longest = max(map(len, encoded), default=0)
        before = b"".join(map(tokenizer.token_bytes, prompt_ids[max(0, len(prompt_ids) - longest) :]))
        self._stops.skip(_as_text(before))
        self._parts.append((len(self._stops.held), False))

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.matched is not None

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that can be shown now; "" after a stop string."""
        found = self._tokenizer.token_bytes(token_id)
        if not self._has_stops:
            return "" if token_id in self._tokenizer.special_ids else self._decoder.decode(found)
        self._parts.append((len(found), token_id not in self._tokenizer.special_ids))
        return self._decoder.decode(self._own(self._stops.feed(_as_text(found))))

    def flush(self) -> str:
        """Return what is left at the end of the answer; after a stop string no more than an unfinished character."""
        held = b"" if self.is_stopped else self._own(self._stops.flush())
        return self._decoder.decode(held, final=True)

    def _own(self, text: str) -> bytes:
        """Return the bytes of the answer's own text among those that the filter has passed on."""
        kept: list[str] = []
        while text:
            length, is_own = self._parts.popleft()
            part, text = text[:length], text[length:]
            if is_own:
                kept.append(part)
            if length > len(part):
                self._parts.appendleft((length - len(part), is_own))
        return "".join(kept).encode("latin-1")


def _as_text(values: bytes) -> str:
    """Return one character for each byte."""
    return values.decode("latin-1")

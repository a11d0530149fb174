"""Text to token ids and back, over the checkpoint's own `tokenizer.json`.

The work on a text is bounded. A tokenizer may hold no regex but those of `KNOWN_PATTERNS`: another one can take time
that doubles with each character. A long text is encoded in pieces and given up as soon as it has too many tokens; the
library takes about 230 bytes and a microsecond for each byte of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders

from runtime.errors import CapacityError, EngineError, UsageError
from runtime.files import parse_json_object
from runtime.panics import is_panic
from runtime.shown import one_line, shown
from runtime.still_wanted import Check, always
from runtime.text_cuts import GPT2_PATTERN, QWEN_PATTERN, places_to_cut

KNOWN_PATTERNS: Mapping[str, str] = {QWEN_PATTERN: "Qwen", GPT2_PATTERN: "GPT-2"}
"""Regexes that a tokenizer may hold: their time was read to grow with the text alone."""

MAX_WORD_BYTES = 500_000
"""Most bytes of text without a place to cut it, such as one word, or one run of symbols or of spaces."""

_PIECE_CHARACTERS = 1 << 16
_LONGEST_REASON = 200
_EXPORT_AGAIN = "export the checkpoint again"


class Tokenizer:
    """Wrap a byte-level BPE `tokenizers.Tokenizer`, without truncation and padding.

    Args:
        tokenizer_json: The content of a `tokenizer.json`.
        name: How errors call the file.

    Raises:
        EngineError: The content cannot be read, is not a byte-level tokenizer, or holds a regex or a normalizer that is
            not known.
    """

    def __init__(self, tokenizer_json: bytes, *, name: str = "tokenizer.json") -> None:
        settings = parse_json_object(tokenizer_json, name, remedy=_EXPORT_AGAIN)
        _check_work(settings, name)
        if isinstance(settings.get("model"), dict):  # the library reads them itself, and both would be in memory
            settings["model"].pop("vocab", None)
            settings["model"].pop("merges", None)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except BaseException as error:  # the library raises plain Exception and ValueError, and panics
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise EngineError(f"{name} cannot be read as a tokenizer: {error}", remedy=_EXPORT_AGAIN) from error
        if not isinstance(self._tokenizer.decoder, decoders.ByteLevel):
            # Streaming turns each token into bytes on its own; that is only exact for the byte-level decoder.
            raise EngineError(
                f"{name} has the decoder {type(self._tokenizer.decoder).__name__}, expected ByteLevel",
                remedy="use a checkpoint with a byte-level BPE tokenizer, as every Qwen3-VL has",
            )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added_ids = {token.content: token_id for token_id, token in added.items()}
        self._bytes_of_ids: dict[int, bytes] = {}
        self._cuts = places_to_cut(settings, list(added.values()))

    @property
    def num_tokens(self) -> int:
        """Number of token ids, added tokens included; a model's vocabulary may be padded beyond it."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def largest_id(self) -> int:
        """Largest token id, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token, added tokens included; a new dict each time."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that `skip_special_tokens` leaves out."""
        return self._special_ids

    def encode(self, text: str, *, max_tokens: int | None = None, check: Check = always) -> list[int]:
        """Return the token ids of a text.

        Special tokens spelled out in the text become their ids; none is added around it. A long text is encoded piece
        by piece, with the same ids as at once.

        Args:
            text: Any text.
            max_tokens: Give up a long text once it has more than so many.
            check: Asked before each piece; raises where the ids are not wanted any more.

        Raises:
            UsageError: The text holds a lone surrogate, which no UTF-8 can express, or the tokenizer fails on it.
            CapacityError: The text has more than `max_tokens` tokens, or `MAX_WORD_BYTES` without a place to cut it.
        """
        token_ids: list[int] = []
        num_characters = 0
        for piece in self._pieces(text):
            check()
            num_characters += len(piece)
            token_ids += self._encode(piece, num_characters - len(piece))
            if max_tokens is not None and len(token_ids) > max_tokens and num_characters < len(text):
                raise CapacityError(
                    f"the text has {len(text)} characters, and the first {num_characters} are {len(token_ids)} tokens "
                    f"already; expected at most {max_tokens} together",
                    remedy="shorten the text, or raise max_context",
                )
        return token_ids

    def _pieces(self, text: str) -> Iterator[str]:
        """Cut a text where it makes no difference to its tokens; a piece above `MAX_WORD_BYTES` is one word."""
        start = 0
        while len(text) - start > _PIECE_CHARACTERS and self._cuts is not None:
            middle = start + _PIECE_CHARACTERS
            cut = self._cuts.search(text, middle, middle + MAX_WORD_BYTES)
            if cut is None or len(text[start : cut.start()].encode("utf-8", "surrogatepass")) > MAX_WORD_BYTES:
                # A long word, which may yet fit alone.
                before = list(self._cuts.finditer(text, start + 1, middle))
                cut = before[-1] if before else cut
            if cut is None:
                break
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]

    def _encode(self, text: str, position: int) -> list[int]:
        try:
            num_bytes = len(text.encode())  # the library would say "TextInputSequence must be str"
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text holds a lone surrogate, {shown(text[error.start])}, at character {position + error.start}",
                remedy="decode the text from its bytes as UTF-8",
            ) from error
        if num_bytes > MAX_WORD_BYTES:
            where = f"the text from character {position} on has more than {MAX_WORD_BYTES} bytes"
            if self._cuts is None:
                raise CapacityError(
                    f"{where}, the most that this tokenizer.json takes: its rules allow no place to cut a text",
                    remedy="shorten the text, or use a checkpoint with Qwen's own tokenizer.json",
                )
            raise CapacityError(
                f"{where} without a place to cut it, the most that is taken",
                remedy="shorten the text, or break its longest word, or run of symbols or of spaces, by line ends",
            )
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            reason = one_line(str(error), _LONGEST_REASON)
            raise UsageError(
                f"the tokenizer fails on the text from character {position} on: {reason}",
                remedy="shorten the text, or leave out its runs of the same character",
            ) from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD, ids without a token nothing."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def to_json(self) -> str:
        """Return the content of a `tokenizer.json` with the same vocabulary."""
        return self._tokenizer.to_str()

    def token_id(self, token: str) -> int:
        """Return the id of a token by its exact spelling.

        Raises:
            EngineError: The tokenizer has no such token.
        """
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise EngineError(f"the tokenizer has no token {token!r}", remedy="use a Qwen3-VL checkpoint's tokenizer")
        return token_id

    def added_id(self, token: str) -> int | None:
        """Return the id of a token that was added to those of the text, special or not; None if there is none."""
        return self._added_ids.get(token)

    def mark_id(self, mark: str) -> int | None:
        """Return the id of an added token whose text an answer shows; None if a mark has to be spelled otherwise."""
        token_id = self.added_id(mark)
        return None if token_id in self._special_ids else token_id

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token adds to the text; b"" for an id without a token."""
        known = self._bytes_of_ids.get(token_id)
        if known is None:
            token = self._tokenizer.id_to_token(token_id)
            known = b"" if token is None else _bytes_of_token(token)
            self._bytes_of_ids[token_id] = known
        return known


def _check_work(settings: Mapping[str, Any], name: str) -> None:
    """Raise if a tokenizer's settings ask for work on a text that is not known to be bounded."""
    normalizer = settings.get("normalizer")
    kind = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
    if normalizer is not None and not (isinstance(normalizer, dict) and kind == "NFC"):
        raise EngineError(
            f"{name} has the normalizer {shown(kind)}, expected NFC or none",
            remedy="use a checkpoint with Qwen's own tokenizer.json",
        )
    for pattern in _regexes({key: value for key, value in settings.items() if key != "model"}):
        if not isinstance(pattern, str) or pattern not in KNOWN_PATTERNS:
            raise EngineError(
                f"{name} holds the regex {shown(pattern)}, which is not one of those that are known to take bounded "
                "time",
                remedy="use a checkpoint with Qwen's own tokenizer.json; runtime/tokenizer.py lists the known patterns",
            )


def _regexes(value: Any) -> Iterator[Any]:
    """Yield every regex in a tokenizer's settings."""
    if isinstance(value, dict):
        if "Regex" in value:
            yield value["Regex"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _regexes(item)


def _byte_of_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for.

    Printable Latin-1 stands for itself, the other bytes for U+0100 upwards (GPT-2, `bytes_to_unicode`).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _bytes_of_token(token: str) -> bytes:
    """Return a token's bytes; one with a character outside the byte alphabet (an added token) is taken literally."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()

"""Text to token ids and back, over the checkpoint's own `tokenizer.json`.

The work on a text is bounded. A tokenizer may hold no regex but those of `KNOWN_PATTERNS`: another one can take time
that doubles with each character. A long text is encoded in pieces and given up as soon as it has too many tokens; the
library takes about 230 bytes and a microsecond for each byte of a piece.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from runtime.errors import CapacityError, EngineError, UsageError
from runtime.files import MAX_TOKENIZER_BYTES, parse_json_object, read_small_file

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 to Qwen3 cut a text into words (`PRETOKENIZE_REGEX` of transformers' models/qwen2)."""

KNOWN_PATTERNS: Mapping[str, str] = {
    QWEN_PATTERN: "Qwen",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "GPT-2",
}
"""Regexes that a tokenizer may hold: their time was read to grow with the text alone."""

MAX_WORD_BYTES = 500_000
"""Most bytes of text without a place to cut it, such as one word or one run of spaces."""

_PIECE_CHARACTERS = 1 << 16
_LONGEST_SHOWN = 120
_EXPORT_AGAIN = "export the checkpoint again"

# Places where Qwen's pattern always ends a word and NFC joins nothing, whatever stands further away: before a line that
# begins with a letter; before one space or mark between letters, since a word is letters with at most one other
# character before them; and around a digit, which is a word of its own. Letters of few scripts, so that no version of
# Unicode matters, and none that NFC composes with what is behind it.
_LETTER = "[A-Za-z\u4e00-\u9fa5]"
_CUT = re.compile(rf"(?<=\n)(?={_LETTER})|(?<={_LETTER})(?=[ ,.;:!?()，。、；：！？]{_LETTER})|(?<=[0-9])(?=[0-9])")


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
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except BaseException as error:  # the library raises plain Exception and ValueError, and panics
            if not isinstance(error, Exception) and not _is_panic(error):
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
        self._bytes_of_ids: dict[int, bytes] = {}
        self._has_cuts = _is_qwens(settings) and not any(map(_reaches_over_cuts, added.values()))

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`.

        Raises:
            EngineError: The file is missing, larger than `MAX_TOKENIZER_BYTES`, or not a byte-level tokenizer.
        """
        content = read_small_file(path, max_bytes=MAX_TOKENIZER_BYTES, remedy=_EXPORT_AGAIN)
        return cls(content, name=str(path))

    @property
    def num_tokens(self) -> int:
        """Number of token ids, added tokens included; a model's vocabulary may be padded beyond it."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def largest_id(self) -> int:
        """Largest token id, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that `skip_special_tokens` leaves out."""
        return self._special_ids

    def encode(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """Return the token ids of a text.

        Special tokens spelled out in the text become their ids; none is added around it. A long text is encoded piece
        by piece, with the same ids as at once.

        Args:
            text: Any text.
            max_tokens: Give up a long text once it has more than so many.

        Raises:
            UsageError: The text holds a lone surrogate, which no UTF-8 can express, or the tokenizer fails on it.
            CapacityError: The text has more than `max_tokens` tokens, or `MAX_WORD_BYTES` without a place to cut it.
        """
        token_ids: list[int] = []
        num_characters = 0
        for piece in self._pieces(text):
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
        """Cut a text where it makes no difference to its tokens, into pieces of `_PIECE_CHARACTERS` or more."""
        start = 0
        while len(text) - start > _PIECE_CHARACTERS and self._has_cuts:
            # A cut further away would leave a piece that is refused.
            cut = _CUT.search(text, start + _PIECE_CHARACTERS, start + _PIECE_CHARACTERS + MAX_WORD_BYTES)
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
                f"the text holds a lone surrogate, {text[error.start]!r}, at character {position + error.start}",
                remedy="decode the text from its bytes as UTF-8",
            ) from error
        if num_bytes > MAX_WORD_BYTES:
            raise CapacityError(
                f"the text from character {position} on has {num_bytes} bytes without a place to cut it, expected at "
                f"most {MAX_WORD_BYTES}",
                remedy="shorten the text, or break it into lines and words",
            )
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except BaseException as error:
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            raise UsageError(
                f"the tokenizer fails on the text from character {position} on: {str(error)[:200]}",
                remedy="shorten the text, or leave out its runs of the same character",
            ) from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD, ids without a token nothing."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int:
        """Return the id of a token by its exact spelling.

        Raises:
            EngineError: The tokenizer has no such token.
        """
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise EngineError(f"the tokenizer has no token {token!r}", remedy="use a Qwen3-VL checkpoint's tokenizer")
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token adds to the text; b"" for an id without a token."""
        known = self._bytes_of_ids.get(token_id)
        if known is None:
            token = self._tokenizer.id_to_token(token_id)
            known = b"" if token is None else _bytes_of_token(token)
            self._bytes_of_ids[token_id] = known
        return known

    def stream_decoder(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """Return a decoder for one answer that arrives token by token."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)


class StreamDecoder:
    """Turn tokens into text as they come, whole characters only.

    Each token becomes its bytes, and an incremental UTF-8 decoder keeps an unfinished character back: constant work per
    token, no re-decoding. All pieces and `flush()` together equal `Tokenizer.decode` of all ids, for every sequence of
    ids: Python and Rust both write one U+FFFD for each maximal invalid part (Unicode 16, section 3.9, "U+FFFD
    Substitution of Maximal Subparts").
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped_ids = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take the next token and return the characters it completes."""
        if token_id in self._skipped_ids:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Return what is left at the end of the answer: U+FFFD for an unfinished character, else ""."""
        return self._decoder.decode(b"", final=True)


def _check_work(settings: Mapping[str, Any], name: str) -> None:
    """Raise if a tokenizer's settings ask for work on a text that is not known to be bounded."""
    normalizer = settings.get("normalizer")
    if normalizer is not None and not (isinstance(normalizer, dict) and normalizer.get("type") == "NFC"):
        raise EngineError(
            f"{name} has the normalizer {_shown(normalizer)}, expected NFC or none",
            remedy="use a checkpoint with Qwen's own tokenizer.json",
        )
    for pattern in _regexes({key: value for key, value in settings.items() if key != "model"}):
        if not isinstance(pattern, str) or pattern not in KNOWN_PATTERNS:
            raise EngineError(
                f"{name} holds the regex {_shown(pattern)}, which is not one of those that are known to take bounded "
                "time",
                remedy="use a checkpoint with Qwen's own tokenizer.json; known patterns stand in runtime/tokenizer.py",
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


def _is_qwens(settings: Mapping[str, Any]) -> bool:
    """Return whether a text is cut into words by Qwen's pattern alone, each then encoded for itself."""
    steps = (settings.get("pre_tokenizer") or {}).get("pretokenizers")
    if not isinstance(steps, list) or len(steps) != 2 or settings.get("model", {}).get("dropout"):
        return False
    split, byte_level = steps
    return (
        split.get("type") == "Split"
        and split.get("pattern") == {"Regex": QWEN_PATTERN}
        and split.get("behavior") == "Isolated"
        and not split.get("invert", False)
        and byte_level.get("type") == "ByteLevel"
        and byte_level.get("add_prefix_space") is False
        and byte_level.get("use_regex") is False
    )


def _reaches_over_cuts(token: tokenizers.AddedToken) -> bool:
    """Return whether an added token, found before words are, may hold a place to cut, or ask what is beside it."""
    return token.lstrip or token.rstrip or token.single_word or _CUT.search(f"a{token.content}a") is not None


def _is_panic(error: BaseException) -> bool:
    """Return whether this is how Rust's panics arrive: no `Exception`, and of a module that cannot be imported."""
    return type(error).__name__ == "PanicException"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


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

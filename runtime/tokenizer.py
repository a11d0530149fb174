"""Text to token ids and back, over the checkpoint's own `tokenizer.json`."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders

from runtime.errors import EngineError, UsageError


class Tokenizer:
    """Wrap a byte-level BPE `tokenizers.Tokenizer`, without truncation and padding.

    Args:
        tokenizer_json: The content of a `tokenizer.json`.
        name: How errors call the file.

    Raises:
        EngineError: The content cannot be read, or is not a byte-level tokenizer.
    """

    def __init__(self, tokenizer_json: bytes, *, name: str = "tokenizer.json") -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises plain Exception and ValueError
            raise EngineError(
                f"{name} cannot be read as a tokenizer: {error}", remedy="export the checkpoint again"
            ) from error
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

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`.

        Raises:
            EngineError: The file is missing or not a byte-level tokenizer.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise EngineError(f"cannot read {path}: {error.strerror}", remedy="export the checkpoint again") from error
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

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text.

        Special tokens spelled out in the text become their ids; none is added around it.

        Raises:
            UsageError: The text holds a lone surrogate, which no UTF-8 can express.
        """
        try:
            text.encode()  # the library would say "TextInputSequence must be str"
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text holds a lone surrogate, {text[error.start]!r}, at character {error.start}",
                remedy="decode the text from its bytes as UTF-8",
            ) from error
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

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

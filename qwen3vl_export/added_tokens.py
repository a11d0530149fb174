"""A token as a checkpoint's files state it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import CheckpointError
from runtime.shown import shown

_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
SAVE_AGAIN = (
    "load the tokenizer with transformers, see that it encodes the new tokens, and save it again with save_pretrained"
)


@dataclass(frozen=True)
class AddedTokenEntry:
    """A token as a file states it: its id if there is one, and its flags with the library's defaults filled in."""

    content: str
    id: int | None = None
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    @classmethod
    def read(cls, value: Any, where: str, *, token_id: int | None = None) -> AddedTokenEntry:
        """Read an object of a file.

        Raises:
            CheckpointError: It is none, or a value is of the wrong type.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("content"), str) or not value["content"]:
            raise CheckpointError(f"{where}: expected tokens with a content, found {shown(value)}", remedy=SAVE_AGAIN)
        found = {key: value[key] for key in _FLAGS if key in value}
        unknown = value.keys() - {*_FLAGS, "id", "__type"}
        if unknown or not all(type(flag) is bool for key, flag in found.items() if key != "content"):
            raise CheckpointError(f"{where}: expected true or false as flags, found {shown(value)}", remedy=SAVE_AGAIN)
        if token_id is None and "id" in value:
            token_id = value["id"]
            if type(token_id) is not int or token_id < 0:
                raise CheckpointError(f"{where}: {shown(value)} has no valid id", remedy=SAVE_AGAIN)
        # The library: a special token is taken from the text as it stands, unless the file says otherwise.
        found.setdefault("normalized", not found.get("special", False))
        return cls(id=token_id, **found)

    def flags(self) -> dict[str, Any]:
        """Return the arguments of the library's `AddedToken`, its content included."""
        return {key: getattr(self, key) for key in _FLAGS}

    def as_special(self) -> AddedTokenEntry:
        """Return the token with the flag `special` and all other flags as they are."""
        return AddedTokenEntry(**{**self.flags(), "special": True}, id=self.id)


def special_entry(content: str) -> AddedTokenEntry:
    """Return a special token with the library's other flags."""
    return AddedTokenEntry(content, normalized=False, special=True)

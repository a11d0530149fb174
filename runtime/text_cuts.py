r"""Places where a text can be cut without changing its tokens.

The proofs look at how the pattern of a tokenizer makes words, and hold whatever stands further away. Letters,
digits, line ends and blanks are those of the pattern's `\p{L}`, `\p{N}`, `[\r\n]` and `\s`; marks are all the others.

Qwen's pattern:

- *After a line end, if something other than blanks comes before the next line end.* A word that holds a line end ends
  with the last one of its run of white space, or is a mark with the line ends after it.
- *Before a blank, after what is none.* No word holds a blank but as its first character, or among white space.
- *After a letter or a digit, before what is no letter.* A word of letters goes on as long as there are letters and
  ends with the last, and a digit is a word of its own.

GPT-2's pattern has the second and the third, where a run of digits is one word; line ends are blanks to it.

NFC joins nothing across these places: line ends and blanks compose with nothing, and of letters, digits and marks only
those are named that Unicode 3.2 has, that NFC leaves as they are, and that are no second part of a composition. So no
version of Unicode matters. `test_text_cuts.py` compares each of them with the library's own words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 to Qwen3 cut a text into words (`PRETOKENIZE_REGEX` of transformers' models/qwen2)."""

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How GPT-2 does."""

LETTERS = (
    r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01bf"  # Latin
    r"\u0391-\u03a1\u03a3-\u03ce\u0400-\u0481\u0561-\u0586"  # Greek, Cyrillic, Armenian
    r"\u05d0-\u05ea\u0621-\u063a\u0641-\u064a\u0905-\u0939\u0e01-\u0e30\u10d0-\u10f0"  # Hebrew, Arabic, Hindi, Thai, …
    r"\u3041-\u3094\u30a1-\u30fa\u30fc\u3400-\u4db5\u4e00-\u9fa5\uac00-\ud7a3"  # kana, Chinese, Korean
)
"""Letters after which a text may be cut, as the ranges of a regex."""

DIGITS = r"0-9\u0660-\u0669\u0966-\u096f\uff10-\uff19"
"""Digits after which and before which it may be."""

MARKS = (
    r"!-/:-@\[-`{-~\u00a1-\u00a9\u00ab\u00ac\u00ae-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7"
    r"\u060c\u061b\u061f\u06d4\u0964\u0965\u2010-\u2027\u2030-\u2052\u2190-\u22ff\u2500-\u2613\u2619-\u266f"
    r"\u3001-\u3003\u3008-\u3011\u3014-\u301b\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
    r"\U0001f300-\U0001f64f"  # emoji, of Unicode 6, where every library has them
)
"""Punctuation and symbols before which it may be."""

_BLANKS = r" \t\u00a0\u3000"

# For each pattern: what stands before and after a cut.
_PLACES: Mapping[str, Sequence[tuple[str, str]]] = {
    QWEN_PATTERN: ((r"\S", _BLANKS), (f"[{LETTERS}{DIGITS}]", rf"{DIGITS}{MARKS}\r\n")),
    GPT2_PATTERN: ((r"\S", rf"{_BLANKS}\r\n"), (f"[{LETTERS}]", DIGITS + MARKS), (f"[{DIGITS}]", MARKS)),
}
_BEHIND_LINE_END = r"(?<=[\r\n])(?=[^\S\r\n]*\S)"


def places_to_cut(settings: Mapping[str, Any], added_tokens: Sequence[AddedToken]) -> re.Pattern[str] | None:
    """Return what matches, with no character, where a text may be cut; None if no such place is known.

    Args:
        settings: The content of a `tokenizer.json`, with the normalizer NFC or none.
        added_tokens: They are found before words are, so no cut lies where one of them may.
    """
    pattern = _pattern(settings)
    if pattern is None or any(token.lstrip or token.rstrip or token.single_word for token in added_tokens):
        return None  # such a token asks what is beside it
    # A token may be looked for in the text as it is or as NFC makes it.
    contents = [
        text
        for token in added_tokens
        for text in (token.content, *(unicodedata.normalize(form, token.content) for form in ("NFC", "NFD")))
    ]
    places = [_place(before, after, contents) for before, after in _PLACES[pattern]]
    if pattern == QWEN_PATTERN and not any(re.search(r"[\r\n].", text, re.DOTALL) for text in contents):
        places.insert(0, _BEHIND_LINE_END)
    return re.compile("|".join(places))


def _place(before: str, after: str, contents: Sequence[str]) -> str:
    """Return the regex of a cut between two kinds of characters, without those that such a cut has in a token."""
    inside = {match[1] for text in contents for match in re.finditer(f"(?<={before})([{after}])", text)}
    kept_out = f"(?![{''.join(map(re.escape, sorted(inside)))}])" if inside else ""
    return f"(?<={before}){kept_out}(?=[{after}])"


def _pattern(settings: Mapping[str, Any]) -> str | None:
    """Return the pattern that alone cuts a text into words, each then encoded for itself; None if that is not so."""
    model = settings.get("model")
    before_model = settings.get("pre_tokenizer")
    if not isinstance(model, dict) or model.get("dropout") or not isinstance(before_model, dict):
        return None
    if before_model.get("type") == "ByteLevel":
        is_gpt2 = before_model.get("add_prefix_space") is False and before_model.get("use_regex", True) is True
        return GPT2_PATTERN if is_gpt2 else None
    steps = before_model.get("pretokenizers")
    if before_model.get("type") != "Sequence" or not isinstance(steps, list) or len(steps) != 2:
        return None
    split, byte_level = steps
    pattern = next((known for known in _PLACES if split.get("pattern") == {"Regex": known}), None)
    is_alone = (
        split.get("type") == "Split"
        and split.get("behavior") == "Isolated"
        and not split.get("invert", False)
        and byte_level.get("type") == "ByteLevel"
        and byte_level.get("add_prefix_space") is False
        and byte_level.get("use_regex") is False
    )
    return pattern if is_alone else None

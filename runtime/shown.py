"""Values as a message can show them: bounded, on one line, and without characters that command a terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence, Sized

# Characters that move the cursor, ring, start an escape sequence or turn the direction of the text around (the
# "Trojan Source" characters, CVE-2021-42574), line separators of Unicode, and lone surrogates, which no UTF-8 can hold.
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
CONTROL = re.compile(f"[{_CONTROLS}]")
_CONTROL_BUT_LAYOUT = re.compile(f"(?![\\n\\t])[{_CONTROLS}]")
_LINE_BREAK = re.compile(r"\s*[\r\n]\s*")

_GAP = " […] "

# An integer above it is described: Python writes no more than 4300 digits, and slowly.
_MOST_BITS = 1024

_LONGEST, _MOST_NUMBERS = 120, 8


def escape_controls(text: str, *, keeps_layout: bool = False) -> str:
    r"""Write control characters, bidirectional overrides and lone surrogates as `\x1b` or `\u202e`.

    Args:
        text: Any text, from whatever source.
        keeps_layout: Leave line feeds and tabs as they are.
    """
    pattern = _CONTROL_BUT_LAYOUT if keeps_layout else CONTROL
    return pattern.sub(lambda match: escape_of(match[0]), text)


def escape_of(character: str) -> str:
    r"""Return `\x1b` or `\u202e` for a character."""
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def one_line(text: str, limit: int) -> str:
    """Join lines, escape control characters, and cut what is longer than `limit` characters in the middle."""
    if len(text) > 4 * limit:
        text = shorten(text, 4 * limit)  # the rest need not be looked at
    return shorten(escape_controls(_LINE_BREAK.sub(" ", text.strip()).replace("\t", " ")), limit)


def shorten(text: str, limit: int) -> str:
    """Cut the middle out of a text of more than `limit` characters, and mark the place."""
    if len(text) <= limit:
        return text
    kept = max(0, limit - len(_GAP))
    head = (kept + 1) // 2
    return (text[:head] + _GAP + text[len(text) - (kept - head) :])[:limit]


def shown(value: object, limit: int = _LONGEST) -> str:
    """Return a `repr` that never fails, on one line of at most `limit` characters.

    Text is cut before it is quoted. A large integer is described, a container by its type and length when its `repr`
    fails or would be long.
    """
    if isinstance(value, bool) or value is None:
        return repr(value)
    if isinstance(value, (str, bytes, bytearray)):
        return _quoted(value, limit)
    if isinstance(value, int):
        bits = int(value).bit_length()
        return f"an integer of {bits} bits" if bits > _MOST_BITS else shorten(int.__repr__(value), limit)
    if isinstance(value, (list, tuple, dict, set, frozenset, range)):
        # What they hold may be deep, cyclic or endless.
        return _container(value)
    try:
        if isinstance(value, os.PathLike):
            return _quoted(os.fspath(value), limit)
        return one_line(repr(value), limit)
    except Exception:  # a `repr` of the caller's own can fail in any way
        return f"a {type(value).__name__}"


def shown_numbers(value: object) -> str:
    """Show a short list of numbers with what it holds, anything else as `shown` does."""
    values = value if type(value) in (list, tuple) and len(value) <= _MOST_NUMBERS else None  # type: ignore[arg-type]
    if values is None or any(type(each) not in (int, float) for each in values):  # type: ignore[attr-defined]
        return shown(value)
    return shorten(f"[{', '.join(map(shown, values))}]", _LONGEST)  # type: ignore[call-overload]


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align all columns but the last, which may be long."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] if rows else []
    padded = [[cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)] for row in rows]
    return ["  ".join([*cells, row[-1]]) for cells, row in zip(padded, rows, strict=True)]


def _quoted(value: str | bytes | bytearray, limit: int) -> str:
    text = str.__str__(value) if isinstance(value, str) else bytes(value[: 2 * limit]).decode("latin-1")
    if len(text) > limit - 2:
        text = shorten(text, limit - 2)
    quoted = repr(text)
    return shorten(escape_controls(quoted if isinstance(value, str) else f"b{quoted}"), limit)


def _container(value: Sized) -> str:
    try:
        return f"a {type(value).__name__} of {len(value)}"
    except Exception:  # a length beyond sys.maxsize, or a subclass with a `__len__` of its own
        return f"a {type(value).__name__}"

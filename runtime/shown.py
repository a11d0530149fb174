"""Show any value in a message: short, in one line, whatever it holds."""

from __future__ import annotations

import reprlib

_LONGEST = 80
_MOST_BITS = 256


class _Short(reprlib.Repr):
    """`repr` that stops early: of ten thousand nested lists, numbers of thousands of digits and texts of megabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 4, _LONGEST, _LONGEST, _LONGEST

    def repr_int(self, value: int, level: int) -> str:
        """Name the size of a number that Python does not write out: beyond 4300 digits `repr` raises."""
        if value.bit_length() > _MOST_BITS:
            return f"an integer of {value.bit_length()} bits"
        return super().repr_int(value, level)


def shown(value: object) -> str:
    """Return a value as Python writes it, in at most 80 characters; control characters and surrogates are escaped."""
    text = _Short().repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def shown_name(name: str) -> str:
    """Return a name of a file, a tensor or a token without quotes, as `shown` does where it holds unusual characters."""
    if not name.isprintable():
        name = ascii(name)[1:-1]
    return name if len(name) <= 2 * _LONGEST else f"{name[:_LONGEST]}…{name[-_LONGEST:]}"

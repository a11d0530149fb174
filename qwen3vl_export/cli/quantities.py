"""Numbers as people write them on a command line: tokens such as 32k, bytes such as 16GB, pixels such as 1024x768."""

from __future__ import annotations

import re
from fractions import Fraction

from runtime.errors import UsageError
from runtime.shown import shown

_TOKENS = re.compile(r"(?P<number>\d{1,12})(?P<unit>[kKmM]?)", re.ASCII)
_BYTES = re.compile(r"(?P<number>\d{1,12}(\.\d{1,6})?) ?(?P<unit>[kKMGT]i?B)", re.ASCII)
_SIDES = re.compile(r"(?P<width>[1-9]\d{0,5})[xX](?P<height>[1-9]\d{0,5})", re.ASCII)
_PREFIXES = " kMGT"


def parse_tokens(option: str, text: str) -> int:
    """Return a number of tokens: 4096, 32k (of 1024) or 1M (of 1024 k).

    Raises:
        UsageError: It is none, or 0.
    """
    found = _TOKENS.fullmatch(text.strip())
    number = 0 if found is None else int(found["number"]) << {"": 0, "k": 10, "m": 20}[found["unit"].lower()]
    if number < 1:
        raise UsageError(
            f"{option} {shown(text)}: expected a number of tokens, at least 1", remedy="write such as 4096, 32k or 1M"
        )
    return number


def parse_bytes(option: str, text: str) -> int:
    """Return bytes: 16GB (10^9), 16GiB (2^30), 512MB and so on.

    Raises:
        UsageError: It is none, or less than a byte; a number without a unit could be either.
    """
    found = _BYTES.fullmatch(text.strip())
    number = 0
    if found is not None:
        power = _PREFIXES.index(found["unit"][0].replace("K", "k"))
        number = int(Fraction(found["number"]) * (1024 if "i" in found["unit"] else 1000) ** power)
    if number < 1:
        raise UsageError(
            f"{option} {shown(text)}: expected an amount of memory with its unit",
            remedy="write such as 16GB (10^9 bytes), 16GiB (2^30 bytes) or 512MB",
        )
    return number


def parse_sides(option: str, text: str) -> tuple[int, int]:
    """Return width and height in pixels of `WIDTHxHEIGHT`.

    Raises:
        UsageError: It is none.
    """
    found = _SIDES.fullmatch(text.strip())
    if found is None:
        raise UsageError(
            f"{option} {shown(text)}: expected WIDTHxHEIGHT in pixels", remedy="write such as 1024x768, each at least 1"
        )
    return int(found["width"]), int(found["height"])

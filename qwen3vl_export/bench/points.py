"""Points of a sweep: what is asked, and lists and ranges of it, written as llama-bench writes them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runtime.errors import UsageError
from runtime.shown import shown

MAX_POINTS = 1000
"""Of one sweep. A range that has more was mistyped."""

_RANGE = re.compile(r"(?P<first>\d{1,9})(-(?P<last>\d{1,9})((?P<step>[+*])(?P<by>\d{1,9}))?)?", re.ASCII)
_SIZE = re.compile(r"(?P<width>[1-9]\d{0,5})x(?P<height>[1-9]\d{0,5})", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Point:
    """One kind of request.

    Attributes:
        text_tokens: Tokens of the text of each prompt.
        new_tokens: Tokens of each answer.
        batch: Requests that are sent at once.
        image_size: Width and height in pixels of each image; None without images.
        images: Images of each prompt; 0 if it has no size.
    """

    text_tokens: int
    new_tokens: int
    batch: int = 1
    image_size: tuple[int, int] | None = None
    images: int = 0

    @property
    def name(self) -> str:
        """It in words, such as `2 × 448x448 + 128 tokens, 32 new, batch 4`."""
        count = f"{self.images} × " if self.images > 1 else ""
        image = f"{count}{size_text(self.image_size)} + " if self.images else ""
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{image}{self.text_tokens} tokens, {self.new_tokens} new{batch}"


@dataclass(frozen=True)
class Sweep:
    """Every combination of some values, in the order in which they were given.

    Attributes:
        text_tokens: As those of `Point`, as the next three.
        new_tokens: At least 2 each: one token has no time per later token.
        batches: Requests that are sent at once.
        image_sizes: None is a prompt without images.
        images: Images of a prompt that has some.
    """

    text_tokens: Sequence[int]
    new_tokens: Sequence[int]
    batches: Sequence[int] = (1,)
    image_sizes: Sequence[tuple[int, int] | None] = (None,)
    images: Sequence[int] = (1,)

    @property
    def points(self) -> tuple[Point, ...]:
        """The combinations, each once.

        Raises:
            UsageError: There are more than `MAX_POINTS`.
        """
        found = tuple(dict.fromkeys(itertools.islice(self._all(), MAX_POINTS + 1)))
        if len(found) > MAX_POINTS:
            raise UsageError(
                f"the sweep has more than {MAX_POINTS} points", remedy="give fewer values, or larger steps"
            )
        return found

    def _all(self) -> Iterator[Point]:
        seen = itertools.product(self.image_sizes, self.images, self.text_tokens, self.new_tokens, self.batches)
        for size, images, text_tokens, new_tokens, batch in seen:
            yield Point(text_tokens, new_tokens, batch, size, images if size else 0)


def parse_numbers(option: str, text: str, least: int = 1) -> tuple[int, ...]:
    """Return the numbers of a list such as `128,512`, `1-4`, `128-512+128` or `1-16*2`.

    Args:
        option: Its name, for the error.
        text: The list.
        least: Lowest number that it may hold.

    Raises:
        UsageError: It is no such list, or too long.
    """
    remedy = "write numbers and ranges with commas between them, such as 128,512 or 1-4 or 128-512+128 or 1-16*2"
    found: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"{option} {shown(text)}: {shown(part)} is neither a number nor a range", remedy=remedy)
        found += itertools.islice(_range(option, match, remedy), MAX_POINTS + 1)
        if len(found) > MAX_POINTS:
            raise UsageError(f"{option} {shown(text)}: more than {MAX_POINTS} numbers", remedy="give a larger step")
    if min(found) < least:
        raise UsageError(f"{option} {shown(text)}: {min(found)} is below {least}", remedy=f"give {least} or more")
    return tuple(dict.fromkeys(found))


def _range(option: str, match: re.Match[str], remedy: str) -> Iterator[int]:
    value = first = int(match["first"])
    last = int(match["last"] or first)
    by = int(match["by"] or 1)
    if last < first or by < 1 or (match["step"] == "*" and (by < 2 or first < 1)):
        raise UsageError(f"{option} {shown(match[0])}: the range never ends, or is empty", remedy=remedy)
    while value <= last:
        yield value
        value = value * by if match["step"] == "*" else value + by


def parse_sizes(text: str) -> tuple[tuple[int, int] | None, ...]:
    """Return the sizes of a list such as `448x448,1024x768,none`.

    Raises:
        UsageError: It is no such list.
    """
    return tuple(dict.fromkeys(map(parse_size, text.split(","))))


def parse_size(text: str) -> tuple[int, int] | None:
    """Return width and height of `WxH`, or none for `none`.

    Raises:
        UsageError: It is neither.
    """
    if text.strip() == "none":
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"--image-size {shown(text)}: expected WIDTHxHEIGHT in pixels, such as 1024x768, or none",
            remedy="leave it out for 448x448",
        )
    return int(match["width"]), int(match["height"])


def size_text(size: tuple[int, int] | None) -> str | None:
    """Return `WxH`; None for None."""
    return None if size is None else f"{size[0]}x{size[1]}"

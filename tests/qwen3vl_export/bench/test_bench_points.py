"""Lists, ranges and sizes as they are written, and the points that they make."""

from __future__ import annotations

import pytest

from qwen3vl_export.bench.points import MAX_POINTS, Point, Sweep, parse_numbers, parse_size, parse_sizes
from runtime.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("128", (128,)),
        ("128,512", (128, 512)),
        ("512, 128,512", (512, 128)),
        ("1-4", (1, 2, 3, 4)),
        ("128-512+128", (128, 256, 384, 512)),
        ("1-10+4", (1, 5, 9)),
        ("1-16*2", (1, 2, 4, 8, 16)),
        ("7,1-4*3", (7, 1, 3)),
        ("5-5", (5,)),
    ],
)
def test_lists_and_ranges(text: str, expected: tuple[int, ...]) -> None:
    assert parse_numbers("--batch", text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is neither a number nor a range"),
        ("1,", "'' is neither"),
        ("a", "'a' is neither"),
        ("-1", "'-1' is neither"),
        ("1-2-3", "'1-2-3' is neither"),
        ("1-4+", "neither"),
        ("٣", "neither"),
        ("4-1", "the range never ends, or is empty"),
        ("1-4+0", "the range never ends"),
        ("1-4*1", "the range never ends"),
        ("0-4*2", "the range never ends"),
        ("0", "0 is below 1"),
        ("1-999999999", f"more than {MAX_POINTS} numbers"),
    ],
)
def test_what_is_no_list(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_numbers("--batch", text)
    assert caught.value.message.startswith("--batch ") and said in caught.value.message and caught.value.remedy


def test_sizes() -> None:
    assert parse_size("1024x768") == (1024, 768)
    assert parse_size("none") is None
    assert parse_sizes("448x448,none, 64X32,448x448") == ((448, 448), None, (64, 32))


@pytest.mark.parametrize("text", ["1024", "0x5", "axb", "5x", "-4x4", "1x2x3", "٣x٣", "", f"{'9' * 5000}x1"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="WIDTHxHEIGHT"):
        parse_size(text)
    with pytest.raises(UsageError, match="WIDTHxHEIGHT"):
        parse_sizes(f"none,{text}")


def test_a_sweep_has_every_combination_once() -> None:
    sweep = Sweep((128, 512), (2,), (1, 4), ((64, 32), None), (1, 2))
    names = [point.name for point in sweep.points]
    assert names == [
        *("64x32 + 128 tokens, 2 new", "64x32 + 128 tokens, 2 new, batch 4"),
        *("64x32 + 512 tokens, 2 new", "64x32 + 512 tokens, 2 new, batch 4"),
        *("2 × 64x32 + 128 tokens, 2 new", "2 × 64x32 + 128 tokens, 2 new, batch 4"),
        *("2 × 64x32 + 512 tokens, 2 new", "2 × 64x32 + 512 tokens, 2 new, batch 4"),
        *("128 tokens, 2 new", "128 tokens, 2 new, batch 4", "512 tokens, 2 new", "512 tokens, 2 new, batch 4"),
    ]
    assert Point(128, 2, 4, None, 0) in sweep.points, "without an image, their number says nothing"


def test_a_sweep_has_an_end() -> None:
    many = tuple(range(1, 101))
    assert len(Sweep(many, many[1:11]).points) == MAX_POINTS
    with pytest.raises(UsageError, match=f"more than {MAX_POINTS} points"):
        _ = Sweep(many, many[1:12]).points

"""What a message shows: bounded, on one line, without control characters, whoever wrote it and whatever it quotes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from runtime import errors
from runtime.shown import escape_controls, one_line, shorten, shown

pytestmark = pytest.mark.portable


class BadRepr:
    def __repr__(self) -> str:
        raise RuntimeError


class BadLength(list):  # type: ignore[type-arg]
    def __len__(self) -> int:
        raise RuntimeError


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("a\r\x7f\x85\x9b", "a\\x0d\\x7f\\x85\\x9b"),
        ("\u202a\u202e\u2066\u2069\u200e\u061c", "\\u202a\\u202e\\u2066\\u2069\\u200e\\u061c"),
        ("\u2028\ud800", "\\u2028\\ud800"),
        ("Grüße 字 👩‍💻", "Grüße 字 👩‍💻"),  # the joiner of an emoji is no control
        ("\n\t", "\\x0a\\x09"),
    ],
)
def test_control_characters_are_escaped(text: str, expected: str) -> None:
    assert escape_controls(text) == expected
    assert escape_controls("a\n\tb\x1b", keeps_layout=True) == "a\n\tb\\x1b"


def test_the_middle_of_a_long_text_is_cut() -> None:
    assert shorten("a" * 50, 50) == "a" * 50
    cut = shorten("a" * 500 + "b" * 500, 100)
    assert len(cut) == 100 and cut.startswith("aaaa") and cut.endswith("bbbb")
    assert " […] " in cut
    assert all(len(shorten("x" * 1000, limit)) <= limit for limit in range(60))


def test_lines_are_joined() -> None:
    assert one_line("  a \r\n\n  b\tc\x1b \n", 99) == "a b c\\x1b"
    assert len(one_line("\x1b" * 10**6, 99)) == 99


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a\nb", "'a\\nb'"),
        (b"\x00x", "b'\\x00x'"),
        (7, "7"),
        (True, "True"),
        (None, "None"),
        (0.5, "0.5"),
        (Path("a b"), "'a b'"),
        (10**5000, "an integer of 16610 bits"),
        (deep(100_000), "a list of 1"),
        ({"a": 1}, "a dict of 1"),
        (range(10**30), "a range"),
        (BadLength(), "a BadLength"),
        (BadRepr(), "a BadRepr"),
        ("\ud800\u202e", "'\\ud800\\u202e'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_can_be_shown(value: Any, expected: str) -> None:
    assert shown(value) == expected


@pytest.mark.parametrize(
    "value", ["x" * 10**6, b"x" * 10**6, Path("x" * 10**6), "\x1b" * 10**6], ids=lambda value: type(value).__name__
)
def test_what_is_shown_is_bounded(value: Any) -> None:
    assert len(shown(value)) <= 120


CLASSES = [errors.Qwen3VLError, *errors.Qwen3VLError.__subclasses__()]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("message", "remedy"), [(10**5, 10**5), (10**5, 9), (9, 10**5), (300, 300), (10**5, None)])
def test_an_error_is_bounded_whatever_it_quotes(
    kind: type[errors.Qwen3VLError], message: int, remedy: int | None
) -> None:
    error = kind("m\x1b\n" * message, remedy=None if remedy is None else "r\u202e" * remedy)
    lines = str(error).split("\n")
    assert len(str(error)) <= errors.MAX_CHARACTERS == 500
    assert len(lines) == (1 if remedy is None else 2)
    assert all(line.isprintable() for line in lines)
    assert lines[0] == error.message == error.args[0] and lines[0].startswith("m\\x1b m\\x1b")
    if remedy is not None:
        # Neither takes more than half while the other has need of it.
        assert lines[1] == f"  remedy: {error.remedy}" and error.remedy is not None
        assert len(error.remedy) >= min(2 * remedy, 200) and len(error.message) >= min(2 * message, 200)


def test_a_short_error_stays_as_it_is() -> None:
    error = errors.ImageError("a.png: no such file", remedy="check the path")
    assert str(error) == "a.png: no such file\n  remedy: check the path"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (errors.ImageError, str(error))

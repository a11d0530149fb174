"""Stop strings against a character-by-character oracle, whatever the cuts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import UsageError
from runtime.generation_config import GenerationOptions
from runtime.stopping import MAX_STOP_CHARACTERS, StopStringFilter


def oracle(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Return the text before the first complete stop string, the longest at that character, and that string."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


# Two letters and short strings, so that matches, overlaps and near misses are frequent.
letters = st.text(alphabet="ab", max_size=24)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


@pytest.mark.portable
@given(pieces=st.lists(st.text(alphabet="ab", max_size=4), max_size=12), stops=stop_lists)
def test_equals_the_oracle_for_every_cut(pieces: list[str], stops: list[str]) -> None:
    text_filter = StopStringFilter(stops)
    emitted = "".join(text_filter.feed(piece) for piece in pieces) + text_filter.flush()
    assert (emitted, text_filter.matched) == oracle("".join(pieces), stops)


@pytest.mark.portable
@given(text=letters, stops=stop_lists)
def test_holds_back_no_more_than_it_must(text: str, stops: list[str]) -> None:
    text_filter = StopStringFilter(stops)
    emitted = text_filter.feed(text)
    if text_filter.matched is None:
        held = text[len(emitted) :]
        assert text.startswith(emitted)
        undecided = [n for n in range(len(text) + 1) if any(stop.startswith(text[len(text) - n :]) for stop in stops)]
        assert len(held) == max(undecided, default=0)
        assert text_filter.flush() == held


@pytest.mark.portable
def test_text_after_a_match_is_discarded() -> None:
    text_filter = StopStringFilter(["<end>"])
    assert [text_filter.feed(piece) for piece in ("ab<e", "nd>cd", "ef")] == ["ab", "", ""]
    assert text_filter.flush() == ""
    assert text_filter.matched == "<end>"


@pytest.mark.portable
def test_a_near_miss_is_released() -> None:
    text_filter = StopStringFilter(["\n\nUser:"])
    assert [text_filter.feed(piece) for piece in ("a\n", "\nUse", "ful", "\n")] == ["a", "", "\n\nUseful", ""]
    assert text_filter.flush() == "\n"
    assert text_filter.flush() == ""
    assert text_filter.matched is None


@pytest.mark.portable
def test_the_stop_string_complete_first_wins_and_then_the_longest() -> None:
    early = StopStringFilter(["abcd", "bc"])
    assert (early.feed("xabcd"), early.matched) == ("xa", "bc")
    longest = StopStringFilter(["bc", "abc"])
    assert (longest.feed("xabc"), longest.matched) == ("x", "abc")


@pytest.mark.portable
def test_without_stop_strings_nothing_is_held() -> None:
    text_filter = StopStringFilter([])
    assert (text_filter.feed("abc"), text_filter.flush()) == ("abc", "")


@pytest.mark.portable
def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopStringFilter(["a", ""])


@pytest.mark.portable
def test_many_and_long_stop_strings_cost_no_more_than_few() -> None:
    text = "ab" * 2000
    many = [f"{i:05}" for i in range(13_000)]
    long = ["ab" * 15_000 + "c", "ba" * 15_000 + "c"]
    for stops in (many, long):
        text_filter = StopStringFilter(stops)
        emitted = [text_filter.feed(character) for character in text]
        assert "".join(emitted) + text_filter.flush() == text
        assert ("".join(emitted) == text) == (stops is many)
    text_filter = StopStringFilter(many)
    assert (text_filter.feed("9x0420099"), text_filter.matched) == ("9x", "04200")


@pytest.mark.portable
def test_the_characters_of_all_stop_strings_are_limited() -> None:
    fitting = ["a" * 32, *["b" * 32] * (MAX_STOP_CHARACTERS // 32 - 1)]
    assert StopStringFilter(fitting).feed("x") == "x"
    for stops in ([*fitting, "c"], ["a" * (MAX_STOP_CHARACTERS + 1)], [f"{i:05}" for i in range(20_000)]):
        with pytest.raises(UsageError, match=f"expected at most {MAX_STOP_CHARACTERS}"):
            StopStringFilter(stops)
    with pytest.raises(UsageError, match="stop strings hold"):
        GenerationOptions(stop=("a" * (MAX_STOP_CHARACTERS + 1),))
    with pytest.raises(UsageError, match="at most 1024 strings, got a list of 20000"):
        GenerationOptions(stop=stops)

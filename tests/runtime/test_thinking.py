"""Thoughts are told from the answer by their tokens, and end when their budget is used up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.answers import END, OPENED, PLAIN, TOKENIZER, read_answer
from qwen3vl_export.demo import CHECKPOINT
from runtime.errors import UsageError
from runtime.piece import REASONING
from runtime.thinking import ThinkingBudget, opens_thought, thinking_marks
from runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.portable

MARKS = thinking_marks(TOKENIZER)
assert MARKS is not None
OPENING, CLOSING = MARKS
LAST = "Considering the limited time by the user, I have to give the solution based on the thinking directly now."


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def letters(text: str) -> list[int]:
    """The same characters with other tokens, so that no mark is a token of its own."""
    return [token for letter in text for token in encode(letter)]


@pytest.mark.parametrize(
    ("prompt", "answer", "reasoning", "text"),
    [
        (OPENED, "two and two\n</think>\n\n4", "two and two", "4"),
        (OPENED, "\n\na\n\nb\n\n</think>4\n", "a\n\nb", "4\n"),
        (OPENED, "</think>\n\n4", "", "4"),
        (OPENED, "never ends\n", "never ends", ""),
        (OPENED, "a <think> b</think>c</think>d<think>", "a <think> b", "c</think>d<think>"),
        (PLAIN, "<think>\nhm\n</think>\n\n4", "hm", "4"),
        (PLAIN, "\n<think>hm</think>4", "hm", "4"),
        (PLAIN, "4 <think>5</think>", "", "4 <think>5</think>"),
        (PLAIN, "</think>4", "", "</think>4"),
        (PLAIN, "\n\n4\n", "", "\n\n4\n"),
        (PLAIN, "\n", "", "\n"),
        (PLAIN, "", "", ""),
    ],
)
def test_the_thought_and_the_answer(prompt: list[int], answer: str, reasoning: str, text: str) -> None:
    generation, _ = read_answer([*encode(answer), END], prompt)
    assert (generation.reasoning, generation.text, generation.raw_text) == (reasoning, text, answer)
    assert generation.finish_reason == "eos"


def test_the_same_characters_in_other_tokens_are_text() -> None:
    talk = "<think>no</think>yes"
    assert read_answer([*letters(talk), END])[0].text == talk
    inside, _ = read_answer([*letters("a</think>b"), CLOSING, *encode("c"), END], OPENED)
    assert (inside.reasoning, inside.text) == ("a</think>b", "c")


def test_a_tokenizer_without_marks_has_no_thoughts() -> None:
    demo = Tokenizer((CHECKPOINT / "tokenizer.json").read_bytes())
    assert thinking_marks(demo) is None
    assert not opens_thought(demo, demo.encode("<think>\n"))
    with pytest.raises(UsageError, match=r"does not think(.|\n)*leave max_thinking_tokens out"):
        ThinkingBudget(demo, [1], 5)


@pytest.mark.parametrize(
    ("end", "is_open"),
    [("<think>\n", True), ("<think>", True), ("<think>\n\n</think>\n\n", False), ("<think>\nso", False), ("", False)],
)
def test_a_prompt_opens_a_thought_with_its_last_token(end: str, is_open: bool) -> None:
    assert opens_thought(TOKENIZER, encode("<think>\n?<|im_start|>assistant\n" + end)) is is_open


def test_an_answer_that_ends_in_its_thought_is_all_thought() -> None:
    generation, _ = read_answer(encode("I wonder\nwhether"), OPENED, max_new_tokens=len(encode("I wonder\n")))
    assert (generation.reasoning, generation.text, generation.finish_reason) == ("I wonder", "", "length")


def test_stop_strings_count_in_thoughts_and_may_cut_a_mark() -> None:
    generation, _ = read_answer(encode("one two three</think>four"), OPENED, stop=["two"])
    assert (generation.reasoning, generation.text, generation.finish_reason) == ("one ", "", "stop")
    cut, _ = read_answer([*encode("one"), CLOSING, *encode("4x")], OPENED, stop=["k>4x"])
    assert (cut.reasoning, cut.text) == ("one</thin", "")
    held, _ = read_answer([*encode("one"), CLOSING, *encode("45"), END], OPENED, stop=["k>4x"])
    assert (held.reasoning, held.text) == ("one", "45")


def test_a_mark_after_half_a_character() -> None:
    half = encode("é")[:1]
    assert TOKENIZER.token_bytes(half[0]) == b"\xc3"
    for stop in ([], ["never"]):
        generation, _ = read_answer([*half, CLOSING, *encode("a"), END], OPENED, stop=stop)
        assert (generation.reasoning, generation.text) == ("\ufffd", "a")


WORDS = ["<think>", "</think>", "\n", "\n\n", "a", " the", "é", "你", "<", "/think>", "<|im_start|>"]


@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(st.sampled_from(WORDS), max_size=12),
    is_open=st.booleans(),
    stops=st.lists(st.sampled_from(["a\n", "think>", ">\n", "k>a"]), max_size=2),
    data=st.data(),
)
def test_no_cut_between_tokens_changes_an_answer(
    words: list[str], is_open: bool, stops: list[str], data: st.DataObject
) -> None:
    """Any text, its words as whole tokens or as bytes; the marks, which are tokens, are what counts."""
    prompt = OPENED if is_open else PLAIN
    ids = [token for word in words for token in encode(word)]
    cut = [
        token
        for word in words
        for token in (
            encode(word) if word.startswith(("<think", "</", "<|")) or data.draw(st.booleans()) else split(word)
        )
    ]
    whole, _ = read_answer([*ids, END], prompt, stop=stops)
    other, _ = read_answer([*cut, END], prompt, stop=stops)
    fields = ("text", "reasoning", "raw_text", "finish_reason")
    assert [getattr(whole, name) for name in fields] == [getattr(other, name) for name in fields]


BYTES = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.num_tokens) if len(TOKENIZER.token_bytes(i)) == 1}


def split(word: str) -> list[int]:
    return [BYTES[bytes([value])] for value in word.encode()]


def test_pieces_come_as_soon_as_they_are_decided() -> None:
    _, pieces = read_answer([*encode("one two"), CLOSING, *encode("4"), END], OPENED)
    assert [piece.kind for piece in pieces].count(REASONING) == len(encode("one two"))


class Chooser:
    """Writes a thought that never ends, but for what the budget forces."""

    def __init__(self, prompt: Sequence[int], max_tokens: int) -> None:
        self.budget = ThinkingBudget(TOKENIZER, prompt, max_tokens)
        self.ids: list[int] = []

    def write(self, wanted: Sequence[int]) -> list[int]:
        """Write tokens, with those that are forced before them; then all that is forced."""
        waiting = list(wanted)
        while True:
            forced = self.budget.forced(self.ids)
            if forced is None and not waiting:
                return self.ids
            self.ids.append(waiting.pop(0) if forced is None else forced)


def test_a_thought_ends_when_its_budget_is_used_up() -> None:
    thought = encode("a b c d e f g h")[:6]
    ids = Chooser(OPENED, 6).write(thought)
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(thought) + f"\n\n{LAST}\n</think>\n\n"
    generation, _ = read_answer([*ids, *encode("4"), END], OPENED)
    assert generation.text == "4" and generation.reasoning == TOKENIZER.decode(thought) + f"\n\n{LAST}"


def test_line_feeds_before_the_end_are_not_doubled() -> None:
    for feeds, gap in (("", "\n\n"), ("\n", "\n"), ("\n\n", "")):
        thought = [*encode("a"), *encode(feeds)]
        ids = Chooser(OPENED, len(thought)).write(thought)
        assert TOKENIZER.decode(ids) == f"a{feeds}{gap}{LAST}\n</think>\n\n"


def test_no_budget_is_the_empty_thought_of_the_templates() -> None:
    assert TOKENIZER.decode(OPENED + Chooser(OPENED, 0).write([])).endswith("<think>\n\n</think>\n\n")
    opened = Chooser(PLAIN, 0).write([OPENING])
    assert TOKENIZER.decode(opened) == "<think>\n\n</think>\n\n"
    assert read_answer([*opened, *encode("4"), END])[0].text == "4"


def test_a_thought_that_ends_by_itself_or_never_begins_is_left_alone() -> None:
    thought = [*encode("a"), CLOSING, *encode("b c d e f g")]
    assert Chooser(OPENED, 3).write(thought) == thought
    answer = encode("b c d e <think> f g")
    assert Chooser(PLAIN, 2).write(answer) == answer


def test_a_character_that_is_begun_is_completed_first() -> None:
    ids = split("a你b")
    written = Chooser(OPENED, 2).write(ids[:4])
    assert TOKENIZER.decode(written).startswith(f"a你\n\n{LAST}")


def test_the_budget_counts_a_thought_that_the_model_opens() -> None:
    ids = Chooser(PLAIN, 2).write([*encode("\n"), OPENING, *split("ab")])
    assert TOKENIZER.decode(ids) == f"\n<think>ab\n\n{LAST}\n</think>\n\n"

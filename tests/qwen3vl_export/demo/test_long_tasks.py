"""The prompts of demo-long: their answers, their tokens as the runtime counts them, and that held-out ones stay put."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import numpy as np
import pytest

from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.demo import CHECKPOINT, data
from qwen3vl_export.demo.long_tasks import (
    CONVERSATION,
    LONG_TASKS,
    MAX_NEW_TOKENS,
    MAX_SEVERAL,
    MAX_TOKENS,
    PAGE,
    QUESTIONS,
    SEVERAL,
    ask,
    draw_canvas,
    held_out_dialogues,
    held_out_prompts,
    num_visual_tokens,
)
from qwen3vl_export.demo.pages import Page, make_page
from runtime.preparation import Preparation

POOL = "held_out"
LIMITS = (512, MAX_TOKENS)


def canvases(*counts: int) -> list[data.Canvas]:
    pool = data.load_half(POOL)
    return [data.make_canvas(np.random.default_rng(i), pool, 160, 128, count=n) for i, n in enumerate(counts)]


def pages(number: int) -> Iterator[Page]:
    return (make_page(np.random.default_rng(seed), data.load_half(POOL)) for seed in range(number))


def test_lines_of_a_page_stand_apart_and_in_reading_order() -> None:
    for page in pages(60):
        width, height = page.image.size
        assert min(width, height) >= 64 and max(width, height) <= 512
        assert 2 <= len(page.lines) <= 6 and all(2 <= len(line) <= 6 for line in page.lines)
        for line in page.lines:
            for left, right in itertools.pairwise(line):
                assert right.box[0] - left.box[2] >= data.GAP
        for upper, lower in itertools.pairwise(page.lines):
            assert min(d.box[1] for d in lower) - max(d.box[3] for d in upper) >= data.GAP - 2 * 2
        for left, top, right, bottom in (digit.box for digit in page.digits):
            assert min(left, top) >= 0 and right <= width and bottom <= height
            assert right - left == bottom - top >= data.MIN_DIGIT


def test_a_page_fills_its_visual_tokens() -> None:
    shares = [len(page.digits) / num_visual_tokens(page) for page in pages(60)]
    assert max(len(page.digits) for page in pages(60)) >= 30
    assert np.mean(shares) > 0.25  # a canvas of the demo has one to four digits on 4 to 256 tokens


@pytest.fixture(scope="module")
def preparation() -> Preparation:
    return Preparation.from_folder(CHECKPOINT, Checkpoint.open("demo").config)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("task", LONG_TASKS)
def test_prompts_have_the_tokens_that_they_say(task: str, limit: int, preparation: Preparation) -> None:
    for prompt in held_out_prompts(task, 2, max_tokens=limit):
        prepared = preparation.prepare(prompt.messages)
        assert len(prepared.prompt.input_ids) == prompt.num_tokens <= limit - MAX_NEW_TOKENS
        assert len(prepared.images) == prompt.num_pictures
        answer_tokens = len(preparation.tokenizer.encode(prompt.answer))
        assert 0 < answer_tokens < MAX_NEW_TOKENS
        if task in CONVERSATION:
            assert prompt.num_tokens > 0.85 * limit - MAX_NEW_TOKENS


def test_prompts_depend_on_task_limit_and_index_only() -> None:
    def key(prompt: object) -> object:
        return prompt.answer, prompt.num_tokens, [m["content"] for m in prompt.messages if m["role"] == "assistant"]

    whole = list(held_out_prompts("earlier", 4, max_tokens=512))
    assert [p.index for p in whole] == [0, 1, 2, 3]
    assert key(whole[2]) == key(next(held_out_prompts("earlier", 1, max_tokens=512, start=2)))
    image, again = (next(held_out_prompts("lines", 1, start=1)).messages[0]["content"][0]["image"] for _ in range(2))
    assert image.tobytes() == again.tobytes()


def test_first_prompts_are_those_that_were_measured() -> None:
    # A change of the generator would silently make the accuracy table one of other prompts.
    found = {task: [(p.answer, p.num_tokens) for p in held_out_prompts(task, 2)] for task in LONG_TASKS}
    assert found == FROZEN


def test_held_out_prompts_hold_held_out_digits_only() -> None:
    held_out = set(json.loads(data.SPLIT_FILE.read_text())["held_out"])
    for task in LONG_TASKS:
        for dialogue in held_out_dialogues(task, 2, max_tokens=512):
            assert {digit.source for picture in dialogue.pictures for digit in picture.digits} <= held_out


def test_the_answers() -> None:
    rng = np.random.default_rng(0)
    first, second, third = seen = canvases(2, 1, 3)
    text = ["".join(map(str, each.labels)) for each in seen]
    for _ in range(10):
        turn = ask(rng, "picture", seen)
        assert turn is not None
        number = int(turn.question.removeprefix("Read picture ").removesuffix("."))
        assert turn.answer == text[number - 1]
        turn = ask(rng, "which", seen)
        assert turn is not None
        digit = turn.question.removeprefix("Which picture has the ").removesuffix("?")
        assert [str(i + 1) for i in range(3) if digit in text[i]] == [turn.answer]
    each = ask(rng, "each", seen)
    assert each is not None and each.answer == "2 1 3"
    latest = ask(rng, "read", [first, third, second])
    assert latest is not None and latest.answer == text[1]
    page = make_page(rng, data.load_half(POOL))
    lines = ask(rng, "lines", [page])
    assert lines is not None and lines.answer.replace(" ", "") == "".join(map(str, page.labels))
    assert [len(line) for line in lines.answer.split(" ")] == [len(line) for line in page.lines]
    line = ask(rng, "line", [first, page])
    assert line is not None
    assert line.answer == page.line(int(line.question.removeprefix("Read line ").removesuffix(".")))


def test_what_the_pictures_do_not_allow_is_not_asked() -> None:
    rng = np.random.default_rng(0)
    few = canvases(1, 1)
    assert ask(rng, "picture", few[:1]) is None
    assert ask(rng, "lines", few) is None
    page = make_page(rng, data.load_half(POOL))
    assert ask(rng, "count", [few[0], page]) is None
    assert ask(rng, "which", [few[0], few[0]]) is None


def test_no_answer_before_the_last_tells_what_is_to_be_read() -> None:
    for task in CONVERSATION:
        for dialogue in held_out_dialogues(task, 6, max_tokens=1024):
            *before, last = dialogue.turns
            assert {turn.task for turn in before} <= {"count", "where"}
            assert last.task == ("read" if task == "latest" else "picture")
            assert all(len(turn.pictures) == 1 for turn in before)
            assert len(last.pictures) == (1 if task == "latest" else 0)


def test_earlier_pictures_are_asked_for_all_over_the_conversation() -> None:
    asked = []
    for dialogue in held_out_dialogues("earlier", 30, max_tokens=1024):
        number = int(dialogue.turns[-1].question.removeprefix("Read picture ").removesuffix("."))
        asked.append(number / len(dialogue.pictures))
    assert min(asked) < 0.25 and max(asked) > 0.75


def test_several_pictures_are_two_to_sixteen() -> None:
    for task in SEVERAL:
        counts = [p.num_pictures for p in held_out_prompts(task, 20, max_tokens=1024)]
        assert min(counts) >= 2 and max(counts) <= MAX_SEVERAL
    assert max(p.num_pictures for p in held_out_prompts("picture", 40)) == MAX_SEVERAL


def test_an_only_picture_has_no_number() -> None:
    (prompt,) = held_out_prompts("line", 1)
    assert [part["type"] for part in prompt.messages[0]["content"]] == ["image", "text"]
    (prompt,) = held_out_prompts("which", 1, max_tokens=512)
    texts = [part["text"] for part in prompt.messages[0]["content"] if part["type"] == "text"]
    assert texts[:-1] == [f"Picture {i + 1}: " for i in range(prompt.num_pictures)]


def test_canvases_have_about_the_tokens_that_are_wanted() -> None:
    rng = np.random.default_rng(0)
    for wanted in (9, 60, 150):
        found = [num_visual_tokens(draw_canvas(rng, data.load_half(POOL), wanted)) for _ in range(40)]
        assert 0.8 * wanted < np.mean(found) < 1.2 * wanted


def test_questions_are_encoded_by_the_demos_tokenizer(preparation: Preparation) -> None:
    tokenizer = preparation.tokenizer
    for text in QUESTIONS.values():
        asked = text.format(number=3, digit=7)
        assert tokenizer.decode(tokenizer.encode(asked)) == asked


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="known: picture, which, each, lines, line, latest, earlier"):
        next(held_out_prompts("read", 1))
    for limit in (255, MAX_TOKENS + 1):
        with pytest.raises(ValueError, match="expected 256 to 4096"):
            next(held_out_prompts("line", 1, max_tokens=limit))
    assert set(PAGE) < set(LONG_TASKS)


FROZEN: dict[str, list[tuple[str, int]]] = {
    "picture": [("6", 731), ("39", 794)],
    "which": [("3", 822), ("3", 575)],
    "each": [("3 2 2 4", 667), ("3 4 1 1 4 1 2 1 2", 783)],
    "lines": [("3869 39", 36), ("25 89847 64 448117 517 475", 100)],
    "line": [("65353", 43), ("992003", 52)],
    "latest": [("7", 929), ("1", 930)],
    "earlier": [("1851", 943), ("756", 954)],
}

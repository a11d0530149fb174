"""Raw prompts: text and token ids without a chat template."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import CapacityError, UsageError
from runtime.model import Qwen3VLModel
from runtime.raw_prompt import RawPrompt

pytestmark = pytest.mark.portable

QUESTION = "How many digits are there?"


@pytest.fixture(scope="module")
def model(demo_engine: Path) -> Iterator[Qwen3VLModel]:
    with Qwen3VLModel.from_engine(demo_engine, threads=1, max_context=512, max_sequences=3) as opened:
        yield opened


def test_the_rendered_chat_as_a_raw_prompt_is_the_same_prompt(model: Qwen3VLModel) -> None:
    chat = model.prepare(QUESTION)
    assert "<|im_start|>" in chat.prompt.text
    for content in (chat.prompt.text, chat.prompt.input_ids, np.array(chat.prompt.input_ids)):
        raw = model.prepare(RawPrompt(content))
        assert raw.prompt == chat.prompt
        assert np.array_equal(raw.positions.position_ids, chat.positions.position_ids)
        assert (raw.images, raw.inputs, raw.num_read) == ((), (), 0)
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": []}
    expected = model.generate(QUESTION, **options).token_ids
    assert model.generate(RawPrompt(chat.prompt.text), **options).token_ids == expected
    assert (
        "".join(model.stream(RawPrompt(chat.prompt.input_ids), **options)) == model.generate(QUESTION, **options).text
    )
    assert np.array_equal(model.logits(RawPrompt(chat.prompt.text)), model.logits(QUESTION))


def test_a_text_gets_nothing_around_it(model: Qwen3VLModel) -> None:
    text = "one two <|im_end|> three"
    raw = model.prepare(RawPrompt(text)).prompt
    assert raw.input_ids == model.tokenizer.encode(text) and raw.text == text
    assert model.tokenizer.token_id("<|im_end|>") in raw.input_ids
    # The text of ids is what they spell, special tokens included.
    assert model.prepare(RawPrompt(raw.input_ids)).prompt.text == text


def test_a_token_of_images_is_text(model: Qwen3VLModel) -> None:
    raw = model.prepare(RawPrompt("a <|vision_start|><|image_pad|><|vision_end|> b"))
    assert raw.prompt.input_ids.count(model.tokenizer.token_id("<|image_pad|>")) == 1
    assert raw.prompt.spans == () and raw.num_visual_tokens == 0
    assert model.generate(RawPrompt("a <|image_pad|> b"), max_new_tokens=2, eos_token_id=[]).stats.visual_tokens == 0


def picture(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def asked() -> list[dict[str, Any]]:
    """Messages with two images and a video between them."""
    frames = [picture(seed) for seed in range(3, 7)]
    parts = [{"type": "image", "image": picture(1)}, {"type": "video", "video": frames, "sample_fps": 2}]
    parts += [{"type": "text", "text": QUESTION}, {"type": "image", "image": picture(2)}]
    return [{"role": "user", "content": parts}]


def segments_of(model: Qwen3VLModel, messages: Any) -> tuple[list[int], list[tuple[int, Any]]]:
    prepared = model.prepare(messages)
    spans = prepared.prompt.spans
    return prepared.prompt.input_ids, [(span.start, image) for span, image in zip(spans, prepared.images, strict=True)]


def test_segments_stand_behind_their_tokens(model: Qwen3VLModel, asked: Any) -> None:
    chat = model.prepare(asked)
    ids, segments = segments_of(model, chat.messages)
    assert len(segments) == 4
    prompt = RawPrompt(ids, segments)
    raw = model.prepare(prompt)
    assert raw.prompt.input_ids == ids and raw.prompt.spans == chat.prompt.spans and raw.images == chat.images
    assert np.array_equal(raw.positions.position_ids, chat.positions.position_ids)
    assert (raw.inputs, raw.num_read) == (raw.images, 0) and repr(prompt).endswith("4 segments)")
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": []}
    answer = model.generate(prompt, **options)
    assert answer.token_ids == model.generate(asked, **options).token_ids and len(answer.image_sizes) == 4
    assert answer.token_ids != model.generate(RawPrompt(ids), **options).token_ids, "the images are looked at"
    with pytest.raises(CapacityError, match="or shorten the prompt, or cut smaller images into patches"):
        model.generate(RawPrompt(ids + [5] * 600, segments))


def test_segments_that_are_refused(model: Qwen3VLModel, asked: Any) -> None:
    ids, segments = segments_of(model, asked)
    (start, image), *others = segments
    for wrong in (
        [(start + 1, image), *others],
        [(start, image), *others[::-1]],
        [(start, image), (start, image)],
        [(-1, image)],
        [(len(ids), image)],
        [(0, image)],
    ):
        with pytest.raises(UsageError, match=r"segment \d of the raw prompt takes tokens"):
            model.prepare(RawPrompt(ids, wrong))
    with pytest.raises(UsageError, match="a raw prompt of text holds no segments"):
        RawPrompt("text", segments)
    for kind in ([(start, picture(1))], [(start, None)], [("0", image)], [image], 5, [(True, image)]):
        with pytest.raises(UsageError, match="segments"):
            RawPrompt(ids, kind)
    other = dataclasses.replace(image, merge_size=1)
    with pytest.raises(UsageError, match="a processed input does not fit this model"):
        model.prepare(RawPrompt(ids, [(start, other), *others]))


def test_a_stream_tells_tokens(model: Qwen3VLModel) -> None:
    with model.stream(RawPrompt("one two"), max_new_tokens=12, eos_token_id=[]) as stream:
        assert stream.token_ids == []
        seen = []
        for _ in stream:
            seen.append(stream.token_ids)
        assert stream.result is not None
        assert stream.token_ids == stream.result.token_ids and len(stream.token_ids) == 12
    assert all(stream.token_ids[: len(each)] == each for each in seen) and seen[0]


def test_a_batch_may_mix_them_with_chats(model: Qwen3VLModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": []}
    prompts = [RawPrompt("one two three"), QUESTION, RawPrompt([5, 6, 7])]
    alone = [model.generate(each, **options).token_ids for each in prompts]
    beside = model.generate_batch([*prompts, RawPrompt([10**6])], **options)
    assert [each.token_ids for each in beside[:3]] == alone  # type: ignore[union-attr]
    assert isinstance(beside[3], UsageError) and "token 0 of the raw prompt is 1000000" in str(beside[3])


def test_several_answers_share_the_prompt(model: Qwen3VLModel) -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 6, "eos_token_id": []}
    answer = model.generate(RawPrompt("one two three four five"), n=3, seed=1, **options)
    assert len(answer.choices) == 3
    assert all(each.stats.cached_tokens for each in answer.choices[1:])
    single = [model.generate(RawPrompt("one two three four five"), seed=1 + i, **options).token_ids for i in range(3)]
    assert [each.token_ids for each in answer.choices] == single
    assert len({tuple(each) for each in single}) > 1


def test_rows_are_found_by_ids_whatever_wrote_them(model: Qwen3VLModel) -> None:
    text = model.prepare("nine eight seven six five four three").prompt.text
    model.generate("nine eight seven six five four three", max_new_tokens=1)
    stats = model.generate(RawPrompt(text), max_new_tokens=1).stats
    assert stats.cached_tokens == stats.prompt_tokens - 1


def test_what_was_given_may_change_later(model: Qwen3VLModel) -> None:
    ids = [5, 6, 7]
    prompt = RawPrompt(ids)
    ids[0] = 9
    assert prompt.content == (5, 6, 7) and prompt == RawPrompt((5, 6, 7)) and hash(prompt) == hash(RawPrompt((5, 6, 7)))
    assert model.prepare(prompt).prompt.input_ids == [5, 6, 7]
    assert repr(prompt) == "RawPrompt(a tuple of 3)" and repr(RawPrompt("a\x1b")) == r"RawPrompt('a\x1b')"


class Endless:
    """Claims to be a list, and is none that ends by iteration."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a raw prompt is empty"),
        ([], "a raw prompt is empty"),
        (None, "must be text or a list of token ids, got NoneType"),
        (b"text", "must be text or a list of token ids, got bytes"),
        (5, "must be text or a list of token ids, got int"),
        ({1, 2}, "must be text or a list of token ids, got set"),
        ({1: 2}, "must be text or a list of token ids, got dict"),
        (Endless(), "must be text or a list of token ids, got Endless"),
        (RawPrompt("a"), "must be text or a list of token ids, got RawPrompt"),
        ([1, -1], "token 1 of a raw prompt = -1, expected a token id, from 0 on"),
        ([1, True], "token 1 of a raw prompt = True, expected a token id"),
        ([1.0], "token 0 of a raw prompt = 1.0, expected a token id"),
        (["one"], "token 0 of a raw prompt = 'one', expected a token id"),
        (np.array([[1, 2]]), r"token 0 of a raw prompt = a list of 2, expected"),
        (np.int64(3), "must be text or a list of token ids, got int64"),
    ],
)
def test_what_is_no_raw_prompt_is_refused(content: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        RawPrompt(content)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda model: model.generate(RawPrompt("\ud800")), UsageError, "lone surrogate"),
        (lambda model: model.generate(RawPrompt([3, 10**40])), UsageError, "token 1 of the raw prompt is"),
        (lambda model: model.generate(RawPrompt([3] * 600)), CapacityError, "the prompt has 600 tokens"),
        (lambda model: model.generate(RawPrompt("a b " * 100_000)), CapacityError, "at most 512"),
        (
            lambda model: model.generate(RawPrompt("a"), tools=[{"name": "f"}]),
            UsageError,
            "a raw prompt was given with tools",
        ),
        (
            lambda model: model.stream(RawPrompt("a"), chat_template_kwargs={"x": 1}).wait(),
            UsageError,
            "a raw prompt was given with chat_template_kwargs",
        ),
        (lambda model: model.chat().ask(RawPrompt("a")), UsageError, "a raw prompt is no turn of a conversation"),
        (lambda model: model.generate([RawPrompt("a")]), UsageError, re.escape("messages[0] must be a dict")),
        (lambda model: model.generate_batch(RawPrompt("a")), UsageError, "prompts cannot be read"),
    ],
)
def test_where_one_does_not_fit_is_said(
    model: Qwen3VLModel, ask: Callable[[Qwen3VLModel], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        ask(model)
    assert caught.value.remedy  # type: ignore[attr-defined]


def test_no_tools_at_all_are_no_tools(model: Qwen3VLModel) -> None:
    assert model.generate(RawPrompt("a"), tools=[], chat_template_kwargs={}, max_new_tokens=1).stats.new_tokens == 1
    tools = [{"name": "f"}]
    answer = model.generate(RawPrompt("a"), tools=tools, tool_choice="none", max_new_tokens=1)
    assert answer.stats.new_tokens == 1

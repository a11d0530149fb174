"""`generate` with a processor's tensors gives the tokens of transformers' model, on the demo and on random weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import judge
from helpers.processed import inputs_of, open_processor, picture, text_of, video_inputs_of
from qwen3_vl.integrations.optimum import QwenVLForImageTextToText
from qwen3vl_export.integrations.optimum.answers import joined
from qwen3vl_export.sources import shipped_folder
from runtime.errors import CapacityError, UsageError

pytestmark = pytest.mark.judge

NUM_TOKENS = 64


class Pair:
    """A checkpoint's processor, transformers' model of it, and ours."""

    def __init__(self, checkpoint: Path, engine: Path) -> None:
        self.processor = open_processor(checkpoint)
        self.judge = judge.load(checkpoint)
        self.model = QwenVLForImageTextToText.from_pretrained(
            engine, threads=1, max_context=1024, max_sequences=4, processor=self.processor
        )

    def expected(self, inputs: Any, **options: Any) -> torch.Tensor:
        self.judge.model.rope_deltas = None
        return self.judge.generate(**inputs, do_sample=False, **options)


@pytest.fixture(scope="module")
def demo(demo_engine: Path) -> Iterator[Pair]:
    pair = Pair(shipped_folder("demo"), demo_engine)
    with pair.model:
        yield pair


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path, tiny_engine: Path) -> Iterator[Pair]:
    pair = Pair(tiny_checkpoint, tiny_engine)
    with pair.model:
        yield pair


@pytest.fixture(scope="module")
def moe(demo_moe_engine: Path) -> Iterator[Pair]:
    pair = Pair(shipped_folder("demo-moe"), demo_moe_engine)
    with pair.model:
        yield pair


@pytest.fixture(params=["demo", "tiny", pytest.param("moe", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest) -> Pair:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Pair)
    return found


BATCH = (("Read the digits.", 1), ("How many digits are there?", 0), ("Answer as JSON.", 2))
CASES: dict[str, Callable[[Any], Any]] = {
    "text": lambda processor: inputs_of(processor, ("How many digits are there?", 0)),
    "image": lambda processor: inputs_of(processor, ("Read the digits.", 1)),
    "two images": lambda processor: inputs_of(processor, ("Where is the 7?", 2), seed=7),
    "video": lambda processor: video_inputs_of(processor, "Answer as JSON."),
    "padded batch of 3": lambda processor: inputs_of(processor, *BATCH),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers(pair: Pair, case: str) -> None:
    inputs = CASES[case](pair.processor)
    # Beyond the tokens that end an answer, so that all of them are compared.
    options = {"max_new_tokens": NUM_TOKENS, "eos_token_id": None}
    found = pair.model.generate(**inputs, do_sample=False, **options)
    assert found.dtype == torch.int64 and found.shape[1] == inputs["input_ids"].shape[1] + NUM_TOKENS
    assert torch.equal(found, pair.expected(inputs, **options))


def test_a_padded_batch_ends_row_by_row(demo: Pair) -> None:
    inputs = inputs_of(demo.processor, *BATCH)
    assert not inputs["attention_mask"].all() and len({*inputs["attention_mask"].sum(1).tolist()}) == 3
    found = demo.model.generate(**inputs, max_new_tokens=NUM_TOKENS)
    assert torch.equal(found, demo.expected(inputs, max_new_tokens=NUM_TOKENS))
    new = found[:, inputs["input_ids"].shape[1] :]
    padding = demo.model.generation_config.pad_token_id
    assert {int((row != padding).sum()) for row in new} != {new.shape[1]}, "no row was padded"
    for row, answer in zip(range(3), new, strict=True):
        alone = {name: inputs[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        if row == 1:  # the one without images
            only = demo.model.generate(**alone, max_new_tokens=NUM_TOKENS)[0, inputs["input_ids"].shape[1] :]
            assert torch.equal(answer[: len(only)], only)


def test_the_batch_runs_side_by_side(demo: Pair) -> None:
    before = demo.model.engine.statistics()["decode_steps"]
    inputs = inputs_of(demo.processor, *BATCH)
    demo.model.generate(**inputs, max_new_tokens=NUM_TOKENS, eos_token_id=None)
    steps = demo.model.engine.statistics()["decode_steps"] - before
    assert NUM_TOKENS - 1 <= steps < 2 * NUM_TOKENS


def test_padding_on_the_right_is_answered_as_on_the_left(demo: Pair) -> None:
    left = inputs_of(demo.processor, *BATCH)
    demo.processor.tokenizer.padding_side = "right"
    try:
        right = inputs_of(demo.processor, *BATCH)
    finally:
        demo.processor.tokenizer.padding_side = "left"
    assert not torch.equal(left["input_ids"], right["input_ids"])
    length = left["input_ids"].shape[1]
    answers = [demo.model.generate(**each, max_new_tokens=8)[:, length:] for each in (left, right)]
    assert torch.equal(answers[0], answers[1])


def test_a_mask_is_found_where_a_token_pads_alone(demo: Pair) -> None:
    """As in transformers: without a mask, a padding token that ends no answer tells the padding."""
    inputs = inputs_of(demo.processor, ("How many digits are there?", 0), ("Read", 0))
    padding = int(inputs["input_ids"][1, 0])
    assert inputs["attention_mask"][1, 0] == 0
    options: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": padding, "eos_token_id": 387}
    found = demo.model.generate(inputs["input_ids"], **options)
    assert torch.equal(found, demo.model.generate(**inputs, **options))
    # A token that ends answers too is taken for one of the prompt.
    options["eos_token_id"] = [387, padding]
    assert torch.equal(
        demo.model.generate(inputs["input_ids"], **options),
        demo.expected({"input_ids": inputs["input_ids"]}, **options),
    )


def test_pixels_are_not_processed_again(demo: Pair) -> None:
    """Values that no image has go through as they are: bfloat16 keeps 8 bits of each."""
    inputs = inputs_of(demo.processor, ("Read the digits.", 1))
    rounded = {**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
    assert not torch.equal(rounded["pixel_values"].float(), inputs["pixel_values"])
    options = {"max_new_tokens": 16, "eos_token_id": None}
    expected = demo.expected({**rounded, "pixel_values": rounded["pixel_values"].float()}, **options)
    assert torch.equal(demo.model.generate(**rounded, **options), expected)


def test_arrays_and_lists_are_taken_too(demo: Pair) -> None:
    inputs = inputs_of(demo.processor, ("Read the digits.", 1))
    arrays = {name: value.numpy() for name, value in inputs.items()}
    arrays["input_ids"] = arrays["input_ids"].tolist()
    expected = demo.model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(demo.model.generate(**arrays, max_new_tokens=4), expected)
    assert torch.equal(demo.model.generate(inputs.pop("input_ids"), **inputs, max_new_tokens=4), expected)


def test_stop_strings_and_lengths(demo: Pair) -> None:
    inputs = inputs_of(demo.processor, ("Answer as JSON.", 1))
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 32, "stop_strings": ["count"], "tokenizer": demo.processor.tokenizer}
    found = demo.model.generate(**inputs, **options)
    assert torch.equal(found, demo.expected(inputs, **options)) and found.shape[1] < length + 32
    assert demo.model.generate(**inputs, max_length=length + 3, max_new_tokens=None).shape[1] == length + 3
    found = demo.model.generate(**inputs, repetition_penalty=1.5, max_new_tokens=16)
    assert torch.equal(found, demo.expected(inputs, repetition_penalty=1.5, max_new_tokens=16))


def test_a_dict_is_returned_where_it_is_asked_for(demo: Pair) -> None:
    inputs = inputs_of(demo.processor, ("Read the digits.", 1))
    found = demo.model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    assert torch.equal(found.sequences, demo.model.generate(**inputs, max_new_tokens=4))
    assert found["sequences"] is found.sequences


def test_several_answers_to_each_prompt(tiny: Pair) -> None:
    inputs = inputs_of(tiny.processor, ("One", 1), ("Two and three", 0))
    drawn: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8, "temperature": 3.0}
    torch.manual_seed(5)
    first, second = (tiny.model.generate(**inputs, **drawn) for _ in range(2))
    torch.manual_seed(5)
    again = tiny.model.generate(**inputs, **drawn)
    assert torch.equal(first, again) and not torch.equal(first, second)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(first[:, :length], inputs["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row) for row in first[:, length:].tolist()}) > 2
    seeded = [tiny.model.generate(**inputs, **drawn, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1]) and torch.equal(seeded[0][1, length:], seeded[2][0, length:])


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.num_ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.num_ends += 1


def test_a_streamer_is_given_prompt_and_tokens_one_by_one(demo: Pair) -> None:
    inputs = inputs_of(demo.processor, ("Answer as JSON.", 1))
    ours, theirs = Recorder(), Recorder()
    found = demo.model.generate(**inputs, streamer=ours, max_new_tokens=24)
    demo.expected(inputs, streamer=theirs, max_new_tokens=24)
    assert [value.tolist() for value in ours.values] == [value.tolist() for value in theirs.values]
    assert ours.num_ends == theirs.num_ends == 1 and len(ours.values) > 4
    assert found[0].tolist() == [*ours.values[0][0].tolist(), *(int(value) for value in ours.values[1:])]


def test_tokens_come_before_the_answer_is_complete(tiny: Pair) -> None:
    inputs = inputs_of(tiny.processor, ("One", 0))
    alive: list[int] = []

    class Watching(Recorder):
        def put(self, value: torch.Tensor) -> None:
            alive.append(tiny.model.engine.statistics()["running"])
            super().put(value)

    tiny.model.generate(**inputs, streamer=Watching(), max_new_tokens=400, eos_token_id=[])
    assert any(alive[1:]), "nothing ran while tokens were given"


def test_transformers_streamers(demo: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextIteratorStreamer, TextStreamer

    tokenizer = demo.processor.tokenizer
    inputs = inputs_of(demo.processor, ("Answer as JSON.", 1))
    found = demo.model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    text = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out == f"{text}\n" and text.startswith("{")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
    thread = threading.Thread(target=demo.model.generate, kwargs={**inputs, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == text
    thread.join()


def test_a_streamer_ends_with_an_error(demo: Pair) -> None:
    """Whoever reads it in another thread would wait for ever."""
    inputs = inputs_of(demo.processor, ("one " * 2000, 0))
    streamer = Recorder()
    with pytest.raises(CapacityError, match="which leaves no room for an answer: max_context is 1024"):
        demo.model.generate(**inputs, streamer=streamer)
    assert streamer.num_ends == 1
    with pytest.raises(UsageError, match="a streamer takes one answer, not 3"):
        demo.model.generate(**inputs_of(demo.processor, *BATCH), streamer=streamer)
    assert streamer.num_ends == 2
    with pytest.raises(UsageError, match="engines do not do num_beams=2"):
        demo.model.generate(**inputs, streamer=streamer, num_beams=2)
    assert streamer.num_ends == 3
    with pytest.raises(UsageError, match="a streamer has put and end, int has not"):
        demo.model.generate(**inputs, streamer=5)


def test_an_error_names_the_answer_of_a_batch(demo: Pair) -> None:
    inputs = inputs_of(demo.processor, ("one", 0), ("one " * 2000, 0))
    with pytest.raises(CapacityError, match=r"^answer 1 of the batch: the prompt has 8\d\d\d tokens, 0 of them visual"):
        demo.model.generate(**inputs)


def test_an_answer_that_fills_the_context_is_said(demo: Pair, caplog: pytest.LogCaptureFixture) -> None:
    inputs = inputs_of(demo.processor, ("Read the digits.", 0))
    length = inputs["input_ids"].shape[1]
    found = demo.model.generate(**inputs, max_new_tokens=1024 - length, eos_token_id=[])
    assert found.shape[1] == 1024 and caplog.messages == []
    found = demo.model.generate(**inputs, max_new_tokens=1024, eos_token_id=[])
    assert found.shape[1] == 1024
    assert caplog.messages == [
        "note: 1 of 1 answers ended before max_new_tokens = 1024, since the context of 1024 tokens is full: open the "
        "engine with a larger max_context"
    ]


def test_images_that_do_not_fit_are_told_how_to(demo: Pair, demo_engine: Path) -> None:
    inputs = inputs_of(demo.processor, ("Read the digits.", 1))
    with (
        QwenVLForImageTextToText.from_pretrained(demo_engine, threads=1, max_context=12) as model,
        pytest.raises(CapacityError, match="raise max_context above") as caught,
    ):
        model.generate(**inputs)
    assert "cut smaller images into patches" in str(caught.value) and "max_visual_tokens" not in str(caught.value)


def test_many_threads_generate_at_once(demo: Pair) -> None:
    batches = [inputs_of(demo.processor, ("Read the digits.", 1), seed=seed) for seed in range(4)]
    expected = [demo.model.generate(**each, max_new_tokens=12).tolist() for each in batches]
    found: dict[int, Any] = {}

    def ask(index: int) -> None:
        found[index] = demo.model.generate(**batches[index], max_new_tokens=12).tolist()

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(4)] == expected


def test_pipeline(demo: Pair, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import pipeline
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        # Before release 5, it asks for the library where a class is not transformers' own.
        library: dict[str, Any] = {"framework": "pt"} if judge.release() < (5, 0) else {}
        asked = pipeline("image-text-to-text", model=demo.model, processor=demo.processor, **library)
    finally:
        logging.disable_propagation()
    assert "is not supported" not in caplog.text
    parts = [{"type": "image", "image": picture(0)}, {"type": "text", "text": "Read the digits."}]
    messages = [{"role": "user", "content": parts}]
    inputs = demo.processor(
        text=[text_of(demo.processor, "Read the digits.", 1)], images=[picture(0)], return_tensors="pt"
    )
    expected = demo.model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    text = demo.processor.tokenizer.decode(expected, skip_special_tokens=True)
    from PIL import Image

    parts[0]["image"] = Image.fromarray(picture(0))
    found = asked(text=messages, max_new_tokens=16, return_full_text=False)
    assert text and found[0]["generated_text"] == text
    found = asked(text=messages, generate_kwargs={"max_new_tokens": 16}, return_full_text=False)
    assert found[0]["generated_text"] == text
    with pytest.raises(UsageError, match="engines do not do num_beams=4"):
        asked(text=messages, generate_kwargs={"num_beams": 4})


def test_tensors_stay_where_the_caller_wants_them(demo: Pair) -> None:
    meta = torch.device("meta")
    assert demo.model.can_generate() and demo.model.eval() is demo.model and demo.model.device.type == "cpu"
    ids = inputs_of(demo.processor, ("One", 0))["input_ids"].tolist()
    try:
        assert demo.model.to(meta).generate(ids, max_new_tokens=2).device == meta
    finally:
        demo.model.to("cpu")
    assert demo.model.generate(np.array(ids), max_new_tokens=2).device.type == "cpu"
    assert demo.model.config.model_type == "qwen3_vl" and demo.model.main_input_name == "input_ids"
    assert repr(demo.model).startswith("QwenVLForImageTextToText(Qwen3VLModel(")


def test_answers_are_padded_only_by_a_known_token() -> None:
    rows = np.array([[1, 2], [0, 3]])
    assert joined(rows, [[4], [5, 6]], 9).tolist() == [[1, 2, 4, 9], [0, 3, 5, 6]]
    assert joined(rows, [[4, 7], [5, 6]], None).tolist() == [[1, 2, 4, 7], [0, 3, 5, 6]]
    with pytest.raises(UsageError, match="the answers have different lengths, and no token is known that pads them"):
        joined(rows, [[4], [5, 6]], None)

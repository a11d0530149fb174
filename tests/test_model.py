"""The model's face: streaming, closing, turns of threads, limits, bad messages."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from qwen3vl_export.demo import IMAGES
from runtime.errors import CapacityError, ImageError, UsageError
from runtime.messages import user_message
from runtime.model import Qwen3VLModel


@pytest.fixture(scope="module")
def model(demo_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(demo_engine, check=True, threads=2)


def question(index: int = 3) -> tuple[list, str]:
    entry = json.loads((IMAGES / "truth.json").read_text())[index]
    return user_message(entry["question"], [IMAGES / entry["file"]]), entry["answer"]


@pytest.mark.parametrize("index", range(8))
def test_held_out_pictures_are_answered(model: Qwen3VLModel, index: int) -> None:
    messages, answer = question(index)
    result = model.generate(messages)
    assert result.text == answer
    assert result.finish_reason == "eos"
    assert result.stats.new_tokens == len(result.token_ids)
    assert result.stats.visual_tokens > 0 and result.stats.peak_cache_bytes > 0


def test_stream_joins_to_the_text(model: Qwen3VLModel) -> None:
    messages, answer = question()
    stream = model.stream(messages)
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == answer == stream.result.text


def test_closing_a_stream_leaves_the_model_usable(model: Qwen3VLModel) -> None:
    messages, answer = question()
    stream = model.stream(messages)
    next(stream)
    stream.close()
    assert stream.result is None and list(stream) == []
    assert model.generate(messages).text == answer


def test_a_second_thread_waits_its_turn(model: Qwen3VLModel) -> None:
    messages, answer = question()
    stream = model.stream(messages)
    first = next(stream)
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(model.generate(messages).text))
    thread.start()
    thread.join(timeout=0.2)
    assert thread.is_alive() and not answers
    assert first + "".join(stream) == answer
    thread.join(timeout=60)
    assert answers == [answer]


def test_stop_strings_and_length(model: Qwen3VLModel) -> None:
    messages, answer = question()
    stopped = model.generate(messages, stop=['],"count'])
    assert stopped.finish_reason == "stop"
    assert stopped.text == answer.split('],"count')[0]
    short = model.generate(messages, max_new_tokens=2)
    assert (short.finish_reason, len(short.token_ids)) == ("length", 2)


def test_sampling_is_reproducible(model: Qwen3VLModel) -> None:
    messages, _ = question()
    hot = {"do_sample": True, "temperature": 5.0, "seed": 7, "top_k": 0, "max_new_tokens": 12}
    assert model.generate(messages, **hot).token_ids == model.generate(messages, **hot).token_ids
    assert model.generate(messages, **hot).token_ids != model.generate(messages, **hot | {"seed": 8}).token_ids


def test_text_only_and_typed_image_tokens(model: Qwen3VLModel) -> None:
    typed = "Count <|image_pad|><|vision_start|><|image_pad|>."
    prepared = model.prepare(user_message(typed))
    assert (prepared.positions.visual_rows == -1).all()
    logits = model.logits(user_message(typed))
    assert logits.shape == (len(prepared.prompt.input_ids), model.config.text.vocab_size)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("messages", "options", "error"),
    [
        (user_message("Hi", ["https://example.org/cat.png"]), {}, UsageError),
        (user_message("Hi", ["missing.png"]), {}, ImageError),
        (user_message("Hi", [np.zeros((0, 4, 3), np.uint8)]), {}, ImageError),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], {}, UsageError),
        (user_message("Hi"), {"max_tokens": 3}, UsageError),
        (user_message("Hi " * 5000), {}, CapacityError),
    ],
)
def test_bad_calls(model: Qwen3VLModel, messages: list, options: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        model.generate(messages, **options)
    assert model.generate(question()[0]).text == question()[1]


def test_options_of_the_engine(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="max_context"):
        Qwen3VLModel.from_engine(demo_engine, max_context=0)
    with pytest.raises(UsageError, match="threads"):
        Qwen3VLModel.from_engine(demo_engine, threads=0)
    small = Qwen3VLModel.from_engine(demo_engine, max_pixels=4096, max_context=40)
    picture = np.zeros((300, 300, 3), np.uint8)
    assert small.prepare(user_message("Hi", [picture])).images[0].num_visual_tokens <= 4
    monkeypatch.setattr("runtime.model.physical_bytes", lambda: 1_000_000)
    with pytest.raises(CapacityError, match="max_context"):
        Qwen3VLModel.from_engine(demo_engine)

"""Images share calls of the vision tower, each is encoded once, and each token of an answer is counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers.serving import WrappedSession, asked, serving
from runtime.answer import Generation
from runtime.contract import FloatArray, VisionInputs
from runtime.model import Qwen3VLModel
from runtime.session import Session

FIRST, SECOND = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8)


class CountingSession(WrappedSession):
    """Counts the images that go through the vision tower, which may be told to wait."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.num_images = self.num_calls = 0
        self.may_begin: Callable[[], bool] = lambda: True

    def vision(self, inputs: VisionInputs) -> FloatArray:
        self.num_images += len(inputs.pixel_values)
        self.num_calls += 1
        deadline = time.monotonic() + 60
        while not self.may_begin():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return self.wrapped.vision(inputs)


@pytest.fixture(scope="module")
def opened(tiny_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(tiny_engine, threads=1)


@pytest.fixture
def session(opened: Qwen3VLModel) -> CountingSession:
    return CountingSession(opened.session)


@pytest.fixture(params=[0, 1 << 24], ids=["no cache", "cache"])
def model(request: pytest.FixtureRequest, opened: Qwen3VLModel, session: CountingSession) -> Iterator[Qwen3VLModel]:
    # No row of the KV cache spares an image.
    model = serving(opened, session=session, prefix_cache=False, vision_cache_bytes=request.param)
    yield model
    model.close(drain=False)


def test_prompts_at_once_share_an_image(model: Qwen3VLModel, session: CountingSession) -> None:
    session.may_begin = lambda: model.statistics()["prompts"] == 4
    answers = model.generate_batch([asked(f"Read {i}", FIRST) for i in range(4)], max_new_tokens=2)
    assert session.num_images == 1
    found = [answer.stats.cached_images for answer in answers if isinstance(answer, Generation)]
    assert sorted(found) == [0, 1, 1, 1]


def test_images_of_one_size_share_a_call(model: Qwen3VLModel, session: CountingSession) -> None:
    answer = model.generate(asked("Read", FIRST, SECOND), max_new_tokens=8, eos_token_ids=())
    assert (session.num_images, session.num_calls) == (2, 1)
    assert answer.stats.cached_images == 0


def test_an_image_is_shown_twice(model: Qwen3VLModel, session: CountingSession) -> None:
    answer = model.generate(asked("Read", FIRST, SECOND, FIRST), max_new_tokens=2)
    assert session.num_images == 2 and answer.stats.cached_images == 1


def test_a_known_image_behind_a_new_one_of_its_size(opened: Qwen3VLModel, session: CountingSession) -> None:
    model = serving(opened, session=session, prefix_cache=False)
    model.generate(asked("Read", FIRST), max_new_tokens=2)
    answer = model.generate(asked("Read", SECOND, FIRST), max_new_tokens=2)
    assert session.num_images == 2 and answer.stats.cached_images == 1
    found = model.statistics()["vision_cache"]
    assert (found["hits"], found["misses"]) == (1, 2)
    model.close(drain=False)


def test_all_tokens_of_answers_are_counted(model: Qwen3VLModel) -> None:
    answers = [model.generate("Read", max_new_tokens=number, eos_token_ids=()) for number in (1, 2, 5)]
    model.logits("Read")
    assert model.statistics()["generated_tokens"] == sum(len(answer.token_ids) for answer in answers)

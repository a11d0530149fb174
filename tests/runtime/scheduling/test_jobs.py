"""What runs on the session for no request: images that a caller encodes, beside requests and at the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.serving import WrappedSession, asked, serving
from runtime.contract import FloatArray, VisionInputs
from runtime.errors import UsageError
from runtime.model import Qwen3VLModel

pytestmark = pytest.mark.portable
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


class HeldVision(WrappedSession):
    """Lets the vision tower wait for `leave`, and notes how many calls were in it at once."""

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        self.entered, self.leave = threading.Event(), threading.Event()
        self.num_inside = self.most_inside = 0

    def vision(self, inputs: VisionInputs) -> FloatArray:
        self.num_inside += 1
        self.most_inside = max(self.most_inside, self.num_inside)
        self.entered.set()
        assert self.leave.wait(60)
        embeds: FloatArray = self.wrapped.vision(inputs)
        self.num_inside -= 1
        return embeds


@pytest.fixture(scope="module")
def opened(tiny_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(tiny_engine, threads=1)


@pytest.fixture
def held(opened: Qwen3VLModel) -> HeldVision:
    return HeldVision(opened.session)


@pytest.fixture
def model(opened: Qwen3VLModel, held: HeldVision) -> Iterator[Qwen3VLModel]:
    model = serving(opened, session=held)
    yield model
    held.leave.set()
    model.close(drain=False)


def in_thread(work: Any, *arguments: Any) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work(*arguments))
        except UsageError as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def test_requests_go_on_while_a_caller_encodes_images(
    opened: Qwen3VLModel, model: Qwen3VLModel, held: HeldVision
) -> None:
    images = opened.prepare(asked("Hi", PICTURE, PICTURE[::-1].copy())).images
    encoding, embeds = in_thread(model.encode_images, images)
    assert held.entered.wait(60)
    answering, answers = in_thread(lambda: model.generate("Hi", max_new_tokens=4, eos_token_ids=()))
    answering.join(300)
    assert len(answers[0].token_ids) == 4 and encoding.is_alive()
    looking, seen = in_thread(lambda: model.generate(asked("Hi", PICTURE), max_new_tokens=4, eos_token_ids=()))
    held.leave.set()
    for thread in (encoding, looking):
        thread.join(60)
    np.testing.assert_array_equal(embeds[0], opened.encode_images(images))
    assert len(seen[0].token_ids) == 4
    assert held.most_inside == 1, "one thread at a time may call the vision tower"


def test_images_that_wait_when_the_model_closes_are_refused(
    opened: Qwen3VLModel, model: Qwen3VLModel, held: HeldVision
) -> None:
    images = opened.prepare(asked("Hi", PICTURE)).images
    first, embeds = in_thread(model.encode_images, images)
    assert held.entered.wait(60)
    second, refused = in_thread(model.encode_images, images)
    second.join(0.2)
    closing, _ = in_thread(lambda: model.close(drain=False))
    closing.join(0.2)
    held.leave.set()
    for thread in (first, second, closing):
        thread.join(60)
        assert not thread.is_alive()
    assert embeds[0].shape == opened.encode_images(images).shape
    assert isinstance(refused[0], UsageError) and "was closed" in refused[0].message

"""The vision tower begins with a video while its file is decoded; what it gives is what it would give afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.serving import WrappedSession, alone, serving
from runtime.contract import FloatArray, VisionInputs
from runtime.errors import EngineError, ImageError, Qwen3VLError
from runtime.model import Qwen3VLModel

SIDE = 256  # 256 patches a segment: 16 of them fill a call
ASK = {"type": "text", "text": "Read."}


@pytest.fixture(scope="module")
def opened(demo_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(demo_engine)


def frames(number: int, *, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for _ in range(number)]


def asked(*videos: Any, **options: Any) -> list[dict[str, Any]]:
    parts = [{"type": "video", "video": each, "sample_fps": 2, "max_pixels": SIDE**2, **options} for each in videos]
    return [{"role": "user", "content": [*parts, ASK]}]


class Watched(WrappedSession):
    """Notes the segments of each call of the vision tower, and may fail some calls."""

    def __init__(self, session: Any, num_failures: int = 0) -> None:
        super().__init__(session)
        self.calls: list[int] = []
        self.num_failures = num_failures
        self.is_busy = threading.Event()

    def vision(self, inputs: VisionInputs) -> FloatArray:
        self.is_busy.set()
        self.calls.append(len(inputs.pixel_values))
        if len(self.calls) <= self.num_failures:
            raise EngineError("out of order", remedy="none")
        embeds: FloatArray = self.wrapped.vision(inputs)
        return embeds


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let frames be as large as the test wants: the demo's own budget for all of them is one frame of 512 x 512."""
    import runtime.video.config

    limits = runtime.video.config.VideoProcessorConfig.limits
    monkeypatch.setattr(
        runtime.video.config.VideoProcessorConfig,
        "limits",
        lambda config, number: (1, SIDE**2 * number) if config.max_frame_pixels else limits(config, number),
    )


def test_the_tower_works_before_the_video_is_read(opened: Qwen3VLModel, roomy: None) -> None:
    """The first group is in the tower before the iterator of the last frames goes on; the answer is the same."""
    video = frames(70)
    expected = alone(opened, max_context=4096).generate(asked(video), max_new_tokens=4)
    session = Watched(opened.session)
    model = serving(opened, session=session, max_context=4096)

    class Slow(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            if index == 69:
                assert session.is_busy.wait(60), "the vision tower waits for the last frame"
            return super().__getitem__(index)

    answer = model.generate(asked(Slow(video)), max_new_tokens=4)
    assert answer.token_ids == expected.token_ids
    assert sum(session.calls) == 35 and session.calls[0] == 16


def test_a_group_that_fails_ahead_is_encoded_again(opened: Qwen3VLModel, roomy: None) -> None:
    video = frames(70)
    expected = alone(opened, max_context=4096).generate(asked(video), max_new_tokens=4)
    session = Watched(opened.session, num_failures=1)
    answer = serving(opened, session=session, max_context=4096).generate(asked(video), max_new_tokens=4)
    assert answer.token_ids == expected.token_ids
    assert sum(session.calls) == 35 + 16


def test_a_tower_that_always_fails_ends_the_request_with_its_error(opened: Qwen3VLModel, roomy: None) -> None:
    model = serving(opened, session=Watched(opened.session, num_failures=99), max_context=4096)
    with pytest.raises(Qwen3VLError, match="out of order"):
        model.generate(asked(frames(70)), max_new_tokens=4)


def test_a_video_that_breaks_off_leaves_nothing_behind(opened: Qwen3VLModel, roomy: None) -> None:
    model = serving(opened, session=Watched(opened.session), max_context=4096)
    broken = [*frames(40), np.zeros((8, 8, 3), np.uint8)]
    with pytest.raises(ImageError, match="frame 40: 8 x 8 pixels"):
        model.generate(asked(broken), max_new_tokens=4)
    stats = model.statistics()
    assert stats["waiting"] == stats["running"] == 0
    assert model.generate("Hi", max_new_tokens=2).token_ids == alone(opened).generate("Hi", max_new_tokens=2).token_ids


def test_segments_are_kept_and_shared_like_images(opened: Qwen3VLModel, roomy: None) -> None:
    """A second request on the same video runs neither the vision tower nor the shared part of the prompt."""
    video = frames(40)
    session = Watched(opened.session)
    model = serving(opened, session=session, max_context=4096)
    first = model.generate(asked(video), max_new_tokens=4)
    num_calls = len(session.calls)
    again = model.generate(asked(video), max_new_tokens=4)
    assert again.token_ids == first.token_ids and len(session.calls) == num_calls
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1
    # Another video that ends as this one does shares what comes before, and the segments of its end.
    other = [*frames(20, seed=1), *video[20:]]
    fresh = alone(opened, max_context=4096).generate(asked(other), max_new_tokens=4)
    assert model.generate(asked(other), max_new_tokens=4).token_ids == fresh.token_ids
    assert sum(session.calls) == 30


def test_videos_beside_each_other_answer_as_alone(opened: Qwen3VLModel, roomy: None) -> None:
    prompts = [asked(frames(number, seed=number)) for number in (34, 5, 1, 40)]
    prompts.append(asked(frames(36, seed=7), frames(3, seed=8)))
    single = alone(opened, max_context=4096)
    expected = [single.generate(each, max_new_tokens=6).token_ids for each in prompts]
    model = serving(opened, max_context=4096)
    threads, found = [], {}

    def run(number: int) -> None:
        found[number] = model.generate(prompts[number], max_new_tokens=6).token_ids

    for number in range(len(prompts)):
        threads.append(threading.Thread(target=run, args=(number,)))
        threads[-1].start()
    for each in threads:
        each.join(120)
    assert [found[number] for number in range(len(prompts))] == expected


def test_an_iterator_is_read_once(opened: Qwen3VLModel) -> None:
    def stream() -> Iterator[np.ndarray]:
        yield from frames(6)

    messages = [{"role": "user", "content": [{"type": "video", "video": stream(), "raw_fps": 3}, ASK]}]
    chat = opened.chat(max_new_tokens=2)
    chat.ask(messages[0]["content"])
    assert chat.ask("And now?").stats.cached_tokens > 0

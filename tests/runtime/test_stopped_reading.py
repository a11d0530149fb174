"""Reading of prompts that nobody wants any more: streams closed, tasks cancelled, deadlines over, models closed."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import clips
from runtime.errors import DeadlineError, Qwen3VLError, UsageError
from runtime.image_config import ImageProcessorConfig
from runtime.image_processor import process_image
from runtime.machine import default_threads
from runtime.model import Qwen3VLModel
from runtime.still_wanted import NotWanted, StillWanted
from runtime.stream import Stream
from runtime.video.config import VideoProcessorConfig
from runtime.video.opening import open_video
from runtime.video.processor import process_video
from runtime.video.source import VideoOptions, VideoSource

pytestmark = pytest.mark.portable

LONGEST_S = 60  # after which a test that hangs fails
MOST_PIXELS = 1_000_000
IMAGE = ImageProcessorConfig(patch_size=16, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
CONFIG = VideoProcessorConfig(IMAGE, min_pixels=4096, max_pixels=4096 * 700)
FRAME = np.full((64, 64, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def model(demo_engine: Path) -> Iterator[Qwen3VLModel]:
    with Qwen3VLModel.from_engine(demo_engine, threads=2, max_context=2048, max_sequences=2) as opened:
        yield opened


class Frames:
    """An iterator of frames that stops at one of them until it may go on, and counts those that were asked for."""

    def __init__(self, waits_at: int, num_frames: int = 100) -> None:
        self.num_asked = 0
        self.is_there, self.may_go_on = threading.Event(), threading.Event()
        self._waits_at, self._num_frames = waits_at, num_frames

    def __iter__(self) -> Frames:
        return self

    def __next__(self) -> np.ndarray:
        self.num_asked += 1
        if self.num_asked == self._waits_at:
            self.is_there.set()
            assert self.may_go_on.wait(LONGEST_S)
        if self.num_asked > self._num_frames:
            raise StopIteration
        return FRAME


def video(frames: Any, **options: Any) -> list[dict[str, Any]]:
    parts = [{"type": "video", "video": frames, "raw_fps": 2, **options}, {"type": "text", "text": "What is seen?"}]
    return [{"role": "user", "content": parts}]


class Counted:
    """A check that counts, and raises from its `limit`-th call on."""

    def __init__(self, limit: int, error: Qwen3VLError | None = None) -> None:
        self.count, self._limit = 0, limit
        self._error = NotWanted("nobody") if error is None else error

    def __call__(self) -> None:
        self.count += 1
        if self.count >= self._limit:
            raise self._error


def test_what_is_asked() -> None:
    now = [1.0]
    is_cancelled, asked = [False], []
    check = StillWanted(lambda: is_cancelled[0], 2.0, also=lambda: asked.append(1), clock=lambda: now[0])
    check()
    assert asked == [1]
    now[0] = 2.0
    with pytest.raises(DeadlineError, match=r"over before it was queued\n.*timeout_s"):
        check()
    is_cancelled[0] = True
    with pytest.raises(NotWanted):
        check()
    assert asked == [1]
    StillWanted(lambda: False, None, clock=lambda: 1e9)()


def read_in_thread(pool: ThreadPoolExecutor, stream: Stream) -> Any:
    return pool.submit(lambda: list(stream))


@pytest.mark.parametrize("form", ["one video", "beside another", "within a budget"])
def test_closing_a_stream_stops_its_iterator_of_frames(model: Qwen3VLModel, form: str) -> None:
    frames = Frames(waits_at=5)
    messages = video(frames)
    if form == "beside another":
        messages[0]["content"].append({"type": "image", "image": FRAME})
    stream = model.stream(messages, **({"max_visual_tokens": 500} if form == "within a budget" else {}))
    with ThreadPoolExecutor(1) as pool:
        reader = read_in_thread(pool, stream)
        assert frames.is_there.wait(LONGEST_S)
        assert model.statistics()["waiting"] == 1
        stream.close()
        frames.may_go_on.set()
        assert reader.result(LONGEST_S) == []
    assert frames.num_asked == 5, "the frame that was waited for is the last"
    assert not stream.is_open and stream.result is None and list(stream) == []
    assert stream.wait() is None
    assert model.statistics()["waiting"] == 0, "its place in the queue is free"
    assert model.generate("How many digits are there?", max_new_tokens=1).token_ids


def test_a_stream_that_nobody_closes_reads_to_the_end(model: Qwen3VLModel) -> None:
    frames = Frames(waits_at=5, num_frames=8)
    frames.may_go_on.set()
    answer = model.generate(video(frames), max_new_tokens=1)
    assert frames.num_asked == 9 and answer.stats.visual_tokens > 0


def test_a_cancelled_task_frees_its_thread(model: Qwen3VLModel) -> None:
    async def ask(**options: Any) -> Frames:
        frames = Frames(waits_at=3)
        task = asyncio.create_task(model.agenerate(video(frames), **options))
        assert await asyncio.to_thread(frames.is_there.wait, LONGEST_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        frames.may_go_on.set()
        return frames

    async def ask_all() -> list[Frames]:
        return [await ask(), await ask(n=2, do_sample=True)]

    # The loop's end waits for the threads of its executor: it would not come if one went on reading.
    assert [each.num_asked for each in asyncio.run(ask_all())] == [3, 3]
    assert model.statistics()["waiting"] == 0


def test_a_deadline_ends_the_reading(model: Qwen3VLModel) -> None:
    deadline_s = 0.05
    started: list[float] = []

    def frames() -> Iterator[np.ndarray]:
        for index in range(100):
            started.append(time.perf_counter())
            while index == 3 and time.perf_counter() <= started[0] + deadline_s:
                pass  # until the time is over, however fast the machine
            yield FRAME

    with pytest.raises(DeadlineError, match=r"^the time for this answer was over before it was queued"):
        model.generate(video(frames()), timeout_s=deadline_s)
    assert len(started) <= 4
    assert model.statistics()["waiting"] == 0
    outcomes = model.generate_batch([video(frames()), "Read"], timeout_s=-1, max_new_tokens=1)
    assert [type(each) for each in outcomes] == [DeadlineError] * 2


def test_closing_the_model_stops_what_is_read(demo_engine: Path) -> None:
    model = Qwen3VLModel.from_engine(demo_engine, threads=1, max_context=512, max_sequences=1)
    frames = Frames(waits_at=2)
    with ThreadPoolExecutor(1) as pool:
        reader = read_in_thread(pool, model.stream(video(frames)))
        assert frames.is_there.wait(LONGEST_S)
        model.close(drain=False)
        frames.may_go_on.set()
        with pytest.raises(UsageError, match="the model was closed"):
            reader.result(LONGEST_S)
    assert frames.num_asked == 2


def test_a_model_that_answers_what_it_accepted_reads_on(demo_engine: Path) -> None:
    model = Qwen3VLModel.from_engine(demo_engine, threads=1, max_context=512, max_sequences=1)
    frames = Frames(waits_at=2, num_frames=4)
    with ThreadPoolExecutor(2) as pool:
        reader = pool.submit(model.generate, video(frames), max_new_tokens=2)
        assert frames.is_there.wait(LONGEST_S)
        closing = pool.submit(model.close)
        with pytest.raises(UsageError, match="the model was closed"):
            while not closing.done():
                model.check_open()
        frames.may_go_on.set()
        assert reader.result(LONGEST_S).token_ids
        closing.result(LONGEST_S)
    assert frames.num_asked == 5


def test_a_conversation_goes_on_behind_a_turn_that_was_stopped(model: Qwen3VLModel) -> None:
    chat = model.chat(max_new_tokens=2)
    frames = Frames(waits_at=2)
    stream = chat.stream("What is seen?", videos=[frames])
    with ThreadPoolExecutor(1) as pool:
        reader = read_in_thread(pool, stream)
        assert frames.is_there.wait(LONGEST_S)
        stream.close()
        frames.may_go_on.set()
        assert reader.result(LONGEST_S) == []
    assert chat.turns == () and chat.ask("How many digits are there?").token_ids and len(chat.turns) == 1


class Lazy(list):  # type: ignore[type-arg]
    """A list of frames that counts those that are read, and calls something at one of them."""

    num_read = 0
    calls: Callable[[], object] = staticmethod(lambda: None)
    calls_at = 0

    def __getitem__(self, index: Any) -> Any:
        self.num_read += 1
        if self.num_read == self.calls_at:
            self.calls()
        return super().__getitem__(index)


@pytest.mark.parametrize("num_before", [1, 30])
def test_a_video_of_600_frames_is_left_in_the_middle(model: Qwen3VLModel, num_before: int) -> None:
    frames = Lazy([FRAME] * 600)
    stream = model.stream(video(frames, do_sample_frames=False, max_pixels=1024))
    frames.calls, frames.calls_at = stream.close, num_before
    assert list(stream) == []
    assert frames.num_read == num_before


class Opened:
    """A path that calls something with its number when it is opened."""

    def __init__(self, number: int, calls: Callable[[int], object], path: Path) -> None:
        self._number, self._calls, self._path = number, calls, path

    def __fspath__(self) -> str:
        self._calls(self._number)
        return str(self._path)


def test_images_that_have_not_begun_are_not_read(model: Qwen3VLModel, tmp_path: Path) -> None:
    Image.fromarray(FRAME).save(tmp_path / "frame.png")
    read: set[int] = set()

    def note(number: int) -> None:
        read.add(number)
        if number == 2:
            stream.close()

    content = [{"type": "image", "image": Opened(i, note, tmp_path / "frame.png")} for i in range(40)]
    stream = model.stream([{"role": "user", "content": content}])
    assert list(stream) == []
    assert 2 in read and max(read) <= 2 + default_threads(), "those that other threads had begun, and no more"


def image_bytes(num_frames: int = 1) -> bytes:
    target = io.BytesIO()
    frames = [Image.fromarray(frame) for frame in clips.moving(num_frames)]
    frames[0].save(target, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return target.getvalue()


def test_an_image_is_left_between_its_steps() -> None:
    whole = Counted(10**6)
    expected = process_image(FRAME[:, :50], IMAGE, check=whole)
    assert whole.count == 3 and expected.digest == process_image(FRAME[:, :50], IMAGE).digest
    for limit in range(1, whole.count + 1):
        with pytest.raises(NotWanted):
            process_image(FRAME[:, :50], IMAGE, check=Counted(limit))


@pytest.mark.parametrize("form", ["frames", "iterator", "animation", "PIL animation", "mp4", "webm", "file object"])
def test_every_form_of_a_video_is_left_as_it_says(form: str) -> None:
    if form in ("mp4", "webm", "file object"):
        pytest.importorskip("av")
    images = clips.moving(24)
    gif = image_bytes(24)
    error = DeadlineError("late") if form in ("iterator", "mp4") else NotWanted("nobody")
    make: dict[str, Callable[[], Any]] = {
        "frames": lambda: list(images),
        "iterator": lambda: iter(images),
        "animation": lambda: gif,
        "PIL animation": lambda: Image.open(io.BytesIO(gif)),
        "mp4": lambda: clips.encode(images),
        "webm": lambda: clips.encode(images, "webm", "libvpx"),
        "file object": lambda: io.BytesIO(clips.encode(images)),
    }

    def process(check: Counted, source: Any) -> Any:
        options = VideoOptions(settings={"num_frames": 10})
        return process_video(VideoSource(source, options), CONFIG, max_image_pixels=MOST_PIXELS, check=check)

    whole = Counted(10**6)
    expected = process(whole, make[form]())
    assert expected.num_frames == 10
    assert whole.count >= (11 if form == "frames" else 24), "before each frame that is taken, or read for others"
    for limit in (1, 2, whole.count // 2, whole.count):
        check, source = Counted(limit, error), make[form]()
        if form == "PIL animation":
            source.seek(7)
        with pytest.raises(type(error)) as caught:
            process(check, source)
        assert caught.value is error and check.count == limit, "raised as it is, and asked no more"
        if form == "PIL animation":
            assert source.tell() == 7


def test_a_long_file_is_left_where_its_frames_are_decoded() -> None:
    pytest.importorskip("av")
    contents = clips.encode(clips.moving(600, 32, 32))
    check = Counted(50)
    reader = open_video(contents, MOST_PIXELS, check)
    taken = []
    with pytest.raises(NotWanted):
        for frame in reader.frames(np.arange(0, 600, 10)):
            taken.append(frame)
    reader.close()
    assert len(taken) == 5, "of every tenth frame, before the fiftieth"


def test_a_long_text_is_left_between_its_pieces(model: Qwen3VLModel) -> None:
    text = "nine eight seven " * 20_000  # 340 000 characters: six pieces
    check = Counted(10**6)
    ids = model.tokenizer.encode(text, check=check)
    assert check.count == 6 and ids == model.tokenizer.encode(text)
    for limit in range(1, 7):
        with pytest.raises(NotWanted):
            model.tokenizer.encode(text, check=Counted(limit))
    whole = Counted(10**6)
    model.preparation.prepare(text, check=whole)
    assert whole.count >= 3 + 6
    for limit in range(1, whole.count + 1):
        with pytest.raises(DeadlineError):
            model.preparation.prepare(text, check=Counted(limit, DeadlineError("late")))

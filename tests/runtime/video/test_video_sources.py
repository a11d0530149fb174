"""What a part of a message may hold as a video, and what it may say of it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import clips
from runtime.errors import CapacityError, ImageError, Qwen3VLError, UsageError
from runtime.image_config import ImageProcessorConfig
from runtime.input_kinds.video import KIND
from runtime.video.config import VideoProcessorConfig
from runtime.video.opening import open_video
from runtime.video.processor import ProcessedVideo, process_video
from runtime.video.source import VideoSource

MOST_PIXELS = 1_000_000
IMAGE = ImageProcessorConfig(patch_size=16, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
CONFIG = VideoProcessorConfig(IMAGE, min_pixels=4096, max_pixels=262_144)
PLACE = "messages[0].content[0]"


def source_of(part: dict[str, Any]) -> VideoSource:
    found = KIND.source({"type": "video", **part}, PLACE)
    assert isinstance(found, VideoSource)
    return found


def processed(video: Any, config: VideoProcessorConfig = CONFIG, **part: Any) -> ProcessedVideo:
    return process_video(source_of({"video": video, **part}), config, max_image_pixels=MOST_PIXELS)


def digests(video: ProcessedVideo) -> list[bytes]:
    return [segment.digest for segment in video.segments]


FRAMES = clips.moving(6, 48, 64)


def folder_of(frames: np.ndarray, folder: Path) -> Path:
    folder.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame_{index + 7}.png")  # 7, 8, 9, 10, 11, 12
    (folder / "notes.txt").write_text("no frame")
    (folder / ".frame_1.png").write_text("left by an editor")
    return folder


FORMS: dict[str, Callable[[Path], Any]] = {
    "array": lambda _: FRAMES,
    "arrays": lambda _: list(FRAMES),
    "PIL images": lambda _: tuple(Image.fromarray(frame) for frame in FRAMES),
    "paths": lambda folder: (
        [str(path) for path in sorted(folder_of(FRAMES, folder / "f").glob("frame_?.png"))]
        + [folder / "f" / f"frame_{number}.png" for number in (10, 11, 12)]
    ),
    "folder": lambda folder: folder_of(FRAMES, folder / "f"),
    "folder's URL": lambda folder: folder_of(FRAMES, folder / "f").as_uri(),
    "generator": lambda _: (frame for frame in FRAMES),
    "iterator": lambda _: iter(list(FRAMES)),
    "opaque": lambda _: np.concatenate([FRAMES, np.full_like(FRAMES[..., :1], 255)], axis=3),
}


@pytest.mark.portable
@pytest.mark.parametrize("name", FORMS)
def test_frames_of_any_form_are_one_video(name: str, tmp_path: Path) -> None:
    expected = processed(FRAMES, sample_fps=2)
    found = processed(FORMS[name](tmp_path), sample_fps=2)
    assert digests(found) == digests(expected) and len(found.segments) == 3
    assert found.timestamps == expected.timestamps == (0.25, 1.25, 2.25)


@pytest.mark.portable
def test_grey_frames_with_and_without_a_channel_are_one_video() -> None:
    grey = FRAMES[..., 0]
    expected = processed(np.repeat(grey[..., None], 3, axis=3), sample_fps=2)
    assert digests(processed(grey, sample_fps=2)) == digests(expected)
    assert digests(processed(grey[..., None], sample_fps=2)) == digests(expected)


def parts(contents: bytes, path: Path) -> list[dict[str, Any]]:
    text = base64.b64encode(contents).decode()
    url = f"data:video/mp4;base64,{text}"
    return [
        *({"type": "video", "video": video} for video in (str(path), path, contents, url, text, path.as_uri())),
        {"type": "video", "path": str(path)},
        {"type": "video", "url": path.as_uri()},
        {"type": "video", "base64": text},
        {"type": "video", "data": text},
        {"type": "video", "data": contents},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "video_url", "video_url": url},
        {"type": "input_video", "input_video": url},
        {"type": "input_video", "video_url": {"url": path.as_uri()}},
    ]


def test_a_file_is_taken_under_the_keys_of_all_clients(tmp_path: Path) -> None:
    pytest.importorskip("av")
    contents = clips.encode(clips.moving(20))
    path = clips.write(tmp_path, "clip.mp4", contents)
    expected = digests(processed(contents))
    for part in parts(contents, path):
        source = KIND.source(part, PLACE)
        assert digests(process_video(source, CONFIG, max_image_pixels=MOST_PIXELS)) == expected, part["type"]
    for file in (path.open("rb"), io.BytesIO(contents), Pipe(contents)):
        assert digests(processed(file)) == expected


class Pipe:
    """A file that can be read, and nothing else."""

    def __init__(self, contents: bytes) -> None:
        self._file = io.BytesIO(contents)

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, 1000))


@pytest.mark.portable
def test_what_can_be_read_once_may_be_processed_twice() -> None:
    """Inputs that share a budget of tokens are read once to see what they take, and once more smaller."""
    source = source_of({"video": iter(FRAMES), "sample_fps": 2})
    first, second = (process_video(source, CONFIG, max_image_pixels=MOST_PIXELS) for _ in range(2))
    assert digests(first) == digests(second) and len(first.segments) == 3
    gif = source_of({"video": Pipe(animation("GIF"))})
    first, second = (process_video(gif, CONFIG, max_image_pixels=MOST_PIXELS) for _ in range(2))
    assert digests(first) == digests(second)


def animation(kind: str, durations: tuple[int, ...] = (100, 100, 300, 100)) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.fromarray(np.full((40, 60, 3), 60 * index, np.uint8)) for index in range(len(durations))]
    # What is the same in two frames is not stored twice, so that frames have to be composed.
    for index, frame in enumerate(frames):
        frame.paste((250, 0, 0), (0, 0, 10 + index, 40))
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=list(durations), **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_a_video_of_its_composed_frames(kind: str, tmp_path: Path) -> None:
    contents = animation(kind)
    reader = open_video(contents, MOST_PIXELS)
    assert (reader.num_frames, reader.fps) == (4, pytest.approx(4 / 0.6))
    frames = list(reader.frames(np.arange(4)))
    for index, frame in enumerate(frames):
        assert frame.shape == (40, 60, 3)
        np.testing.assert_allclose(frame[:, : 10 + index], np.broadcast_to([250, 0, 0], (40, 10 + index, 3)), atol=4)
        np.testing.assert_allclose(frame[:, 12 + index :], 60 * index, atol=4)
    path = clips.write(tmp_path, "moving", contents)
    with Image.open(path) as image:
        image.seek(2)
        opened = processed(image, num_frames=4)
        assert image.tell() == 2
    assert digests(opened) == digests(processed(path, num_frames=4)) and len(opened.segments) == 2


@pytest.mark.portable
def test_a_still_image_is_a_video_of_one_frame() -> None:
    buffer = io.BytesIO()
    Image.fromarray(FRAMES[0]).save(buffer, "PNG")
    found = processed(buffer.getvalue())
    assert (found.num_frames, found.timestamps) == (1, (0.0,))


OPTIONS: dict[str, tuple[dict[str, Any], list[int]]] = {
    # Of 40 frames, 10 for each second.
    "rate": ({"fps": 1}, [0, 13, 26, 39]),
    "a number": ({"num_frames": 3}, [0, 20, 39]),
    "a number as qwen-vl-utils has it": ({"nframes": 5}, [0, 13, 26, 39]),
    "most frames": ({"fps": 5, "max_frames": 4}, [0, 13, 26, 39]),
    "least frames": ({"fps": 0.1, "min_frames": 2}, [0, 39]),
    "a part": ({"fps": 2, "video_start": 1.05, "video_end": 3}, [11, 17, 24, 30]),
    "from its middle": ({"num_frames": 2, "video_start": 3}, [30, 39]),
    "all of the start": ({"do_sample_frames": False, "video_end": 0.35}, [0, 1, 2, 3]),
    "parts of qwen-vl-utils": ({"num_frames": 3, "video_start": 0.1, "video_end": 0.4}, [1, 2, 4]),
}


@pytest.mark.portable
@pytest.mark.parametrize("name", OPTIONS)
def test_the_frames_that_a_part_asks_for(name: str) -> None:
    part, numbers = OPTIONS[name]
    frames = clips.moving(40, 48, 64)
    found = processed(frames, raw_fps=10, **part)
    expected = processed(frames[numbers], sample_fps=2)
    assert found.num_frames == len(numbers) and digests(found) == digests(expected)
    times = [number / 10 for number in numbers + numbers[-1:] * (len(numbers) % 2)]
    assert found.timestamps == pytest.approx([(a + b) / 2 for a, b in zip(times[::2], times[1::2], strict=True)])


@pytest.mark.portable
def test_limits_of_a_part_beat_those_of_the_request() -> None:
    frames = clips.moving(8, 256, 256)
    request = CONFIG.changed({"max_frame_pixels": 64 * 64, "fps": 1.0})
    assert processed(frames, request, sample_fps=2).grid_thw == (4, 4, 4)
    assert processed(frames, request, sample_fps=2, max_pixels=128 * 128).grid_thw == (4, 8, 8)
    assert processed(frames, request, sample_fps=2, min_pixels=96 * 96, max_pixels=96 * 96).grid_thw == (4, 6, 6)
    assert processed(frames, request, sample_fps=2, total_pixels=4 * 32 * 64).grid_thw == (4, 2, 2)
    assert processed(frames, request, sample_fps=2, resized_height=60, resized_width=30).grid_thw == (4, 4, 2)
    assert processed(frames, request, raw_fps=2, fps=2).num_frames == 8
    assert processed(frames, request, raw_fps=2).num_frames == 4


@pytest.mark.portable
def test_times_are_those_that_were_given() -> None:
    found = processed(FRAMES, timestamps=[0, 0.5, 7, 7, 100, 100.5])
    assert found.timestamps == (0.25, 7.0, 100.25)
    assert [each.before for each in KIND.expansion(found)] == [
        f"<{time} seconds><|vision_start|>" for time in ("0.2", "7.0", "100.2")
    ]
    numbered = processed(FRAMES, video_metadata={"fps": 4, "frames_indices": [0, 4, 8, 12, 16, 20]})
    assert numbered.timestamps == (0.5, 2.5, 4.5)


@pytest.mark.portable
def test_frames_without_a_rate_are_said_to_be_assumed(caplog: pytest.LogCaptureFixture) -> None:
    found = processed(clips.moving(48, 32, 32))
    assert found.num_frames == 4 and found.timestamps == pytest.approx((8 / 24, 39 / 24), abs=0.02)
    assert "24 is assumed, as transformers does" in caplog.text


@pytest.mark.portable
def test_segments_are_told_of_in_groups_before_the_end() -> None:
    told: list[int] = []
    config = CONFIG.changed({"min_frame_pixels": 512 * 512, "max_frame_pixels": 512 * 512})
    config = config.changed({"do_sample_frames": False})
    source = source_of({"video": clips.moving(20, 64, 64), "raw_fps": 2})
    wide = VideoProcessorConfig(config.image, 1, 1 << 30, 512 * 512, 512 * 512, do_sample_frames=False)
    found = process_video(source, wide, max_image_pixels=MOST_PIXELS, on_images=lambda images: told.append(len(images)))
    # 1024 patches each, so four fill a call; the rest is told of by the result.
    assert len(found.segments) == 10 and told == [4, 4]


PROBLEMS: dict[str, tuple[dict[str, Any], type[Qwen3VLError], str]] = {
    "no rate": ({"fps": 0}, UsageError, r"fps must be in \[1e-06, 1000\], got 0"),
    "negative rate": ({"fps": -2}, UsageError, "fps must be in"),
    "rate is no number": ({"fps": float("nan")}, UsageError, "fps must be in .* got nan"),
    "huge rate": ({"fps": 1e9}, UsageError, "fps must be in"),
    "rate as text": ({"fps": "2"}, UsageError, "fps must be a number"),
    "rate and number": ({"fps": 2, "num_frames": 4}, UsageError, "fps and num_frames both say"),
    "no frames at all": ({"num_frames": 0}, UsageError, "num_frames must be at least 1"),
    "very many frames": ({"num_frames": 10**9}, CapacityError, "expected at most 65536"),
    "limits of frames": ({"min_frames": 9, "max_frames": 2}, UsageError, "min_frames 9 is above max_frames 2"),
    "limits of pixels": ({"min_pixels": 9, "max_pixels": 2}, UsageError, "min_pixels 9 is above max_pixels 2"),
    "one side": ({"resized_height": 64}, UsageError, "resized_height and resized_width go together"),
    "negative time": ({"timestamps": [-1, 0, 1, 2, 3, 4]}, UsageError, r"timestamps\[0\] must be .* from 0 to"),
    "times out of order": ({"timestamps": [0, 2, 1, 3, 4, 5]}, UsageError, r"timestamps\[2\] is 1 s, after 2 s"),
    "time is no number": ({"timestamps": [0, float("nan"), 1, 2, 3, 4]}, UsageError, r"timestamps\[1\] must be"),
    "endless time": ({"timestamps": [0, 1, 2, 3, 4, float("inf")]}, UsageError, r"timestamps\[5\] must be"),
    "times as text": ({"timestamps": "0 1 2"}, UsageError, "timestamps must be a list of numbers"),
    "too few times": ({"timestamps": [0, 1]}, UsageError, "6 frames, but 2 timestamps"),
    "too few numbers": ({"video_metadata": {"frames_indices": [1]}}, UsageError, "6 frames, but 1 video_metadata"),
    "metadata of no dict": ({"video_metadata": 3}, UsageError, "video_metadata must be a dict"),
    "metadata without a rate": ({"video_metadata": {"fps": 0}}, UsageError, "video_metadata.fps must be in"),
    "end before start": ({"video_start": 2, "video_end": 1}, UsageError, "video_start 2 is after video_end 1"),
    "start after the end": ({"video_start": 99, "raw_fps": 2}, UsageError, "no frame lies from 99 s"),
    "mistyped": ({"max_frame": 4}, UsageError, "unknown key 'max_frame'"),
    "two sources": ({"path": "a.mp4"}, UsageError, "under one key, found video, path"),
}


@pytest.mark.portable
@pytest.mark.parametrize("name", PROBLEMS)
def test_what_a_part_may_not_say(name: str) -> None:
    part, error, words = PROBLEMS[name]
    with pytest.raises(error, match=words):
        processed(FRAMES, **part)


@pytest.mark.portable
@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "video"}, "under one key, found none"),
        ({"type": "video", "path": 3}, "path must be a path, got int"),
        ({"type": "video", "base64": "%%%"}, "base64 is not base64"),
        ({"type": "video_url", "video_url": {"url": 3}}, "video_url.url must be a string, got int"),
        ({"type": "video_url", "video_url": {}}, "video_url.url must be a string"),
    ],
)
def test_parts_without_a_video(part: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        KIND.source(part, PLACE)


@pytest.mark.portable
def test_a_processed_video_may_be_given_again() -> None:
    found = processed(FRAMES, sample_fps=2)
    assert KIND.source(KIND.part(found), PLACE) is found


@pytest.mark.portable
def test_errors_name_the_frame() -> None:
    with pytest.raises(ImageError, match=r"video of 2 frames, frame 1: 41 x 40 pixels, where the first has 40 x 40"):
        processed([np.zeros((40, 40, 3), np.uint8), np.zeros((40, 41, 3), np.uint8)], sample_fps=2)
    with pytest.raises(ImageError, match=r"frame 1: image 'no\.png': no such file"):
        processed([FRAMES[0], "no.png"], sample_fps=2)

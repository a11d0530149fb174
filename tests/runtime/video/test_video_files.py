"""Video files: every container, frames by their numbers, turned and uneven ones, and how much memory they take."""

from __future__ import annotations

import gc
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import clips
from runtime.errors import CapacityError, ImageError, UsageError
from runtime.video.file_reader import FileReader
from runtime.video.opening import open_video

pytest.importorskip("av")

MOST_PIXELS = 1_000_000
FILES = {
    "mp4": ("mp4", "libx264", {}),
    "mp4 of MPEG-4": ("mp4", "mpeg4", {}),
    "mov of HEVC": ("mov", "libx265", {"x265-params": "log-level=none"}),
    "mkv": ("matroska", "libx264", {"bf": "3"}),
    "webm of VP9": ("webm", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "webm of VP8": ("webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "transport stream": ("mpegts", "libx264", {"bf": "3"}),
    "MPEG-2 transport stream": ("mpegts", "mpeg2video", {"bf": "2"}),
    "MPEG-1 programme stream": ("mpeg", "mpeg2video", {}),
    "avi": ("avi", "mpeg4", {}),
    "flv": ("flv", "libx264", {}),
    "raw H.264": ("h264", "libx264", {}),
    "raw HEVC": ("hevc", "libx265", {"x265-params": "log-level=none"}),
    "ogg": ("ogg", "libvpx", {}),
    "motion JPEG": ("mjpeg", "mjpeg", {}),
}


def file_of(name: str, frames: np.ndarray) -> bytes:
    container, codec, options = FILES[name]
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    return clips.encode(frames, container, codec, 25, pixel_format=pixel_format, **options)


@pytest.mark.parametrize("name", FILES)
def test_chosen_frames_are_those_of_a_full_decode(name: str) -> None:
    contents = file_of(name, clips.moving(31))
    every = clips.decoded(contents)
    reader = open_video(contents, MOST_PIXELS)
    assert reader.num_frames == len(every) == 31
    assert reader.fps == 25
    chosen = np.array([0, 3, 3, 17, 30])
    np.testing.assert_array_equal(np.stack(list(reader.frames(chosen))), every[chosen])
    # Once more, from the start.
    np.testing.assert_array_equal(np.stack(list(reader.frames(np.array([5])))), every[[5]])
    reader.close()


def test_a_file_with_sound_is_read_by_its_pictures() -> None:
    contents = clips.encode(clips.moving(12), "matroska", with_sound=True)
    reader = open_video(contents, MOST_PIXELS)
    assert reader.num_frames == 12


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_a_phones_video_is_turned_upright(quarters: int) -> None:
    contents = clips.encode(clips.moving(3, 48, 64))
    reader = open_video(clips.turned(contents, quarters), MOST_PIXELS)
    expected = np.rot90(clips.decoded(contents), -quarters, axes=(1, 2))
    assert expected.shape[1:3] == ((64, 48) if quarters % 2 else (48, 64))
    np.testing.assert_array_equal(np.stack(list(reader.frames(np.arange(3)))), expected)


def test_frames_of_an_uneven_rate_are_counted_and_timed_by_the_mean_rate() -> None:
    contents = clips.encode(clips.moving(20), "mp4", fps=100, times=[index**2 for index in range(20)])
    reader = open_video(contents, MOST_PIXELS)
    import av

    with av.open(io.BytesIO(contents)) as container:
        mean = float(container.streams.video[0].average_rate)
    assert (reader.num_frames, reader.fps) == (20, mean)
    np.testing.assert_array_equal(np.stack(list(reader.frames(np.array([19])))), clips.decoded(contents)[[19]])


def test_a_file_whose_frames_grow_is_checked_frame_by_frame() -> None:
    small, large = (clips.encode(clips.moving(4, *size), "mpegts") for size in ((48, 64), (720, 1280)))
    reader = open_video(small + large, 500_000)
    with pytest.raises((CapacityError, ImageError)):
        list(reader.frames(np.arange(reader.num_frames)))


def test_memory_does_not_grow_with_the_length_of_a_file() -> None:
    """Of a long file, few decoded frames are alive at any time, and none is converted that is not taken."""
    import av

    contents = clips.encode(clips.moving(600, 32, 32), "matroska", preset="ultrafast")
    conversions = 0
    most = 0

    class Counted(FileReader):
        def to_rgb(self, frame: Any) -> np.ndarray:
            nonlocal conversions
            conversions += 1
            return super().to_rgb(frame)

    reader = Counted(io.BytesIO(contents), "clip", MOST_PIXELS)
    for _ in reader.frames(np.arange(0, 600, 60)):
        gc.collect()
        most = max(most, sum(isinstance(each, av.VideoFrame) for each in gc.get_objects()))
    assert conversions == 10
    assert most <= 64
    assert reader.num_frames == 600


def test_without_pyav_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = clips.encode(clips.moving(2))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match="PyAV, which is not installed") as caught:
        open_video(contents, MOST_PIXELS)
    assert "install the extra `video`" in str(caught.value.remedy)


def test_a_path_and_bytes_and_a_file_object_are_one_video(tmp_path: Path) -> None:
    contents = clips.encode(clips.moving(6))
    path = clips.write(tmp_path, "clip.mp4", contents)
    every = clips.decoded(contents)
    for source in (
        path,
        str(path),
        path.as_uri(),
        contents,
        bytearray(contents),
        memoryview(contents),
        path.open("rb"),
    ):
        reader = open_video(source, MOST_PIXELS)
        np.testing.assert_array_equal(np.stack(list(reader.frames(np.arange(6)))), every)
        reader.close()

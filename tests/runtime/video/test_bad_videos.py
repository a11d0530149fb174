"""Videos that cannot be read, or must not be: one clear error each, soon, and nothing else is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import clips
from runtime.errors import CapacityError, ImageError, Qwen3VLError, UsageError
from runtime.image_config import ImageProcessorConfig
from runtime.input_kinds.video import KIND
from runtime.video.config import VideoProcessorConfig
from runtime.video.frame_readers import MAX_STREAM_FRAMES
from runtime.video.opening import open_video
from runtime.video.processor import ProcessedVideo, process_video

MOST_PIXELS = 1_000_000
CONFIG = VideoProcessorConfig(
    ImageProcessorConfig(patch_size=16, image_mean=(0.5,) * 3, image_std=(0.5,) * 3),
    min_pixels=4096,
    max_pixels=262_144,
)


def processed(video: Any, **part: Any) -> ProcessedVideo:
    source = KIND.source({"type": "video", "video": video, **part}, "messages[0].content[0]")
    return process_video(source, CONFIG, max_image_pixels=MOST_PIXELS)


def refuse(video: Any, error: type[Qwen3VLError], words: str, **part: Any) -> None:
    with pytest.raises(error, match=words) as caught:
        processed(video, **part)
    assert caught.value.remedy


@pytest.fixture(scope="module")
def clip() -> bytes:
    pytest.importorskip("av")
    return clips.encode(clips.moving(60), container_options={"movflags": "faststart"})


NOT_VIDEOS: dict[str, bytes] = {
    "text": b"To be, or not to be\n" * 40,
    "zeros": bytes(5000),
    "a header alone": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41",
    "Matroska's mark alone": b"\x1aE\xdf\xa3" + bytes(200),
    "half a PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "half a GIF": b"GIF89a\x10\0\x10\0",
}


@pytest.mark.parametrize("name", NOT_VIDEOS)
def test_what_is_no_video(name: str, tmp_path: Path) -> None:
    pytest.importorskip("av")
    path = clips.write(tmp_path, "clip.mp4", NOT_VIDEOS[name])
    for source in (path, NOT_VIDEOS[name]):
        refuse(source, ImageError, "^video .*(not a video|damaged|not an image|holds no)")


def test_an_empty_file(tmp_path: Path) -> None:
    refuse(clips.write(tmp_path, "clip.mp4", b""), ImageError, "clip.mp4': an empty file")
    refuse(b"", ImageError, "video of 0 bytes: an empty file")


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_file_that_was_cut_is_no_shorter_video(clip: bytes, share: float) -> None:
    refuse(clip[: int(len(clip) * share)], ImageError, "cut short|damaged")
    matroska = clips.encode(clips.moving(60), "matroska")
    refuse(matroska[: int(len(matroska) * share)], ImageError, "cut short")


def test_a_part_before_the_cut_can_be_taken(clip: bytes) -> None:
    cut = clip[: int(len(clip) * 0.6)]
    assert processed(cut, video_end=1.0).num_frames == 4


def test_damage_in_the_middle_is_an_error_or_a_picture(clip: bytes) -> None:
    start = clip.index(b"mdat") + 4
    random = np.random.default_rng(5)
    outcomes = set()
    for _ in range(30):
        damaged = bytearray(clip)
        for place in random.integers(start, len(clip), 20):
            damaged[place] ^= 0xFF
        try:
            outcomes.add(len(processed(bytes(damaged)).segments))
        except ImageError as error:
            outcomes.add(type(error))
    assert ImageError in outcomes and outcomes <= {ImageError, 6}


def test_a_damaged_header_is_an_error_or_a_video(clip: bytes) -> None:
    end = clip.index(b"mdat")
    random = np.random.default_rng(6)
    for _ in range(60):
        damaged = bytearray(clip)
        for place in random.integers(0, end, 4):
            damaged[place] = int(random.integers(256))
        try:
            processed(bytes(damaged))
        except Qwen3VLError as error:
            assert error.remedy


def test_sound_alone() -> None:
    pytest.importorskip("av")
    refuse(clips.sound_only(), ImageError, "holds no video, only audio")


def patched(contents: bytes, box: bytes, offset: int, value: int) -> bytes:
    place = contents.index(box) + 4 + offset
    return contents[:place] + value.to_bytes(4, "big") + contents[place + 4 :]


def test_a_header_that_promises_a_thousand_million_frames(clip: bytes) -> None:
    # The number of samples of one length, in the box that holds their times.
    refuse(patched(clip, b"stts", 8, 1 << 30), ImageError, "cut short|damaged|not a video")


def test_frames_that_a_header_says_to_be_huge() -> None:
    pytest.importorskip("av")
    wide = clips.encode(clips.moving(2, 1024, 1024), preset="ultrafast")
    refuse(wide, CapacityError, "expected at most 1000000 pixels, found 1024 x 1024")


def test_very_many_frames_of_one_pixel() -> None:
    frames = np.zeros((10_000, 1, 1, 3), np.uint8)
    assert processed(frames, raw_fps=24).grid_thw == (384, 2, 2)
    refuse(np.zeros((70_000, 1, 1, 3), np.uint8), CapacityError, "70000 frames of a video", do_sample_frames=False)


def playlist(target: Path) -> dict[str, bytes]:
    return {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:6,\n{target}\n#EXT-X-ENDLIST\n".encode(),
        "concat": f"ffconcat version 1.0\nfile '{target}'\n".encode(),
        "concat by address": f"ffconcat version 1.0\nfile 'file:{target}'\n".encode(),
        "dash": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><BaseURL>'
        + str(target).encode()
        + b"</BaseURL></Period></MPD>",
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "sequence": f"{target.parent}/%d.png".encode(),
    }


@pytest.mark.parametrize("name", playlist(Path("x")))
@pytest.mark.parametrize("ending", ["mp4", "m3u8", "ffconcat", "mpd", "sdp"])
def test_files_that_name_other_files_are_refused(name: str, ending: str, clip: bytes, tmp_path: Path) -> None:
    target = clips.write(tmp_path, "secret.mp4", clip)
    path = clips.write(tmp_path, f"list.{ending}", playlist(target)[name])
    refuse(path, ImageError, "not a video that can be read|refers to another file")


def test_a_movie_that_says_its_data_lie_elsewhere_is_read_from_itself(clip: bytes) -> None:
    """QuickTime files may name a file for their data; the name is not followed."""
    place = clip.index(b"url \0\0\0\1")  # the flag says: in this file
    found = processed(clip[:place] + b"url \0\0\0\0" + clip[place + 8 :])
    assert [each.digest for each in found.segments] == [each.digest for each in processed(clip).segments]


def test_ffmpegs_own_addresses_are_refused(clip: bytes, tmp_path: Path) -> None:
    target = clips.write(tmp_path, "clip.mp4", clip)
    refuse(f"concat:{target}|{target}", UsageError, "found a URL of scheme 'concat'")


@pytest.mark.parametrize(
    "url", ["http://host/a.mp4", "https://host/a.mp4", "rtsp://host/a", "tcp://host:1", "s3://b/a"]
)
def test_addresses_are_not_fetched(url: str) -> None:
    refuse(url, UsageError, "nothing is fetched")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_devices_and_folders_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", ImageError, "expected a video file, found a named pipe")
    refuse("/dev/zero", ImageError, "expected a video file, found a device")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", ImageError, "a folder without images")
    refuse(tmp_path / "none.mp4", ImageError, "no such file")


def test_no_frames() -> None:
    refuse([], ImageError, "video of 0 frames: holds no frames")
    refuse(np.zeros((0, 9, 9, 3), np.uint8), ImageError, "holds no frames")
    refuse(iter([]), ImageError, "holds no frames")


def endless(size: int) -> Iterator[np.ndarray]:
    frame = np.zeros((size, size, 3), np.uint8)
    while True:
        yield frame


def failing() -> Iterator[np.ndarray]:
    yield np.zeros((32, 32, 3), np.uint8)
    raise OSError("the camera is gone")


class Endless:
    """A file object without an end."""

    def read(self, size: int) -> bytes:
        return bytes(size)


def test_streams_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_STREAM_FRAMES == 65536
    refuse(endless(1), CapacityError, "without an end")
    monkeypatch.setattr("runtime.video.frame_readers.MAX_STREAM_BYTES", 1 << 20)
    refuse(endless(400), CapacityError, "0.00 GB of frames without an end|GB of frames without an end")
    monkeypatch.setattr("runtime.video.opening.MAX_PIPE_BYTES", 3 << 20)
    refuse(Endless(), CapacityError, "video of a file object: more than 0.00 GB, without an end")


def test_streams_that_fail() -> None:
    refuse(failing(), ImageError, "ended with an error after 1 frames: OSError: the camera is gone")
    refuse(iter([1, 2]), UsageError, "video of an iterator, frame 0: image: expected a path")


def test_a_stream_may_use_one_array_for_all_frames() -> None:
    frames = clips.moving(4, 32, 32)

    def reused() -> Iterator[np.ndarray]:
        buffer = np.empty_like(frames[0])
        for frame in frames:
            buffer[:] = frame
            yield buffer

    found, expected = processed(reused(), sample_fps=2), processed(frames, sample_fps=2)
    assert [each.digest for each in found.segments] == [each.digest for each in expected.segments]


WRONG: dict[str, tuple[Callable[[], Any], type[Qwen3VLError], str]] = {
    "channels first": (lambda: np.zeros((4, 3, 40, 40), np.uint8), ImageError, "expected the channels last"),
    "floats": (lambda: np.zeros((4, 40, 40, 3)), ImageError, "expected uint8 values of 0 to 255, found float64"),
    "a batch": (lambda: np.zeros((1, 4, 40, 40, 3), np.uint8), ImageError, r"expected \[T, H, W\]"),
    "a number": (lambda: 3, UsageError, "expected a path, bytes, a file object"),
    "a dict": (lambda: {"frames": []}, UsageError, "expected a path, bytes, a file object"),
    "text file object": (lambda: open(__file__), UsageError, "cannot be read|opened for reading bytes"),  # noqa: SIM115
}


@pytest.mark.parametrize("name", WRONG)
def test_sources_of_the_wrong_kind(name: str) -> None:
    source, error, words = WRONG[name]
    refuse(source(), error, words, raw_fps=2)


def test_a_transpose_is_advised_for_channels_first() -> None:
    with pytest.raises(ImageError) as caught:
        open_video(np.zeros((4, 3, 40, 40), np.uint8), MOST_PIXELS)
    assert "array.transpose(0, 2, 3, 1)" in str(caught.value.remedy)

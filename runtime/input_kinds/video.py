"""Videos: parts of Hugging Face, of qwen-vl-utils and of vLLM's OpenAI interface, and the segments of their frames.

What a part may say beside its video, and how that differs from qwen-vl-utils 0.0.14, which has the same keys:

| key | meaning |
|---|---|
| `fps`, `num_frames`, `min_frames`, `max_frames` | as transformers counts; qwen-vl-utils rounds to even ones |
| `nframes` | `num_frames`, rounded to an even number, as there |
| `min_pixels`, `max_pixels` | of one frame, as there; the checkpoint's limit on all frames holds, too |
| `total_pixels` | most pixels of all segments, as there, but without its least 1.05 · `min_pixels` for a frame |
| `resized_height`, `resized_width` | size of a frame before rounding, as there, within the limits above |
| `video_start`, `video_end` | seconds; frames are counted inwards from both, as there |
| `raw_fps` | rate of the frames that are given, to choose from |
| `sample_fps` | rate of frames that were chosen already: all are taken; `raw_fps` beside it gives their times |
| `video_metadata` | transformers': `fps`, and with `frames_indices` all frames are taken, and timed by these numbers |
| `timestamps` | seconds, one for each frame: all frames are taken |
| `do_sample_frames` | false: all frames are taken |

Frames are chosen as transformers chooses them: frames without any of these have 24 in a second, except for lists and
folders of files, which transformers never samples.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.arguments import reading
from runtime.base64_text import decode_base64
from runtime.errors import UsageError
from runtime.input_kinds.kind import InputKind, InputSettings, Insertion
from runtime.message_keys import REFUSED_PART_KEYS, check_keys, exact
from runtime.option_checks import any_number, between, integer, true_or_false
from runtime.shown import shown
from runtime.video.opening import Replayed, is_one_time
from runtime.video.processor import ProcessedVideo, process_video
from runtime.video.source import VideoOptions, VideoSource

if TYPE_CHECKING:
    from runtime.image_processor import OnImages

VIDEO_TOKEN = "<|video_pad|>"
_START, _END = "<|vision_start|>", "<|vision_end|>"
# The names under which transformers' `apply_chat_template` takes a video, and "data", bytes or base64.
_SOURCE_KEYS = ("video", "url", "path", "base64", "data")
_OPENAI_KEYS = ("video_url", "input_video")
_COUNT, _SIDE = integer(1), integer(1, most=1 << 20)
_FPS = between(1e-6, 1000, "pass {name} in frames per second, such as 2")
# Keys of a part, as qwen-vl-utils and transformers' video processor have them, and the setting that each is.
_SETTINGS = {
    "fps": ("fps", _FPS),
    "num_frames": ("num_frames", _COUNT),
    "min_frames": ("min_frames", _COUNT),
    "max_frames": ("max_frames", _COUNT),
    "min_pixels": ("min_frame_pixels", _COUNT),
    "max_pixels": ("max_frame_pixels", _COUNT),
    "do_sample_frames": ("do_sample_frames", true_or_false),
}
_OPTION_KEYS = (
    *_SETTINGS,
    *("nframes", "total_pixels", "resized_height", "resized_width", "video_start", "video_end"),
    *("sample_fps", "raw_fps", "timestamps", "video_metadata"),
)
_METADATA_KEYS = ("fps", "frames_indices", "total_num_frames", "duration", "width", "height", "video_backend")
_MOST_FRAMES = 1 << 20
_MOST_SECONDS = 1e7  # four months


class Video(InputKind):
    """One video: a file, frames, an array, with a rate or times."""

    name = "video"
    token = VIDEO_TOKEN
    part_types = ("video", "video_url", "input_video")
    placeholder = {"type": "video", "video": "<video>"}  # noqa: RUF012 (a template only asks whether the key is there)
    path_keys = ("video", "path", "url")
    markers = (_START, _END)

    def source(self, part: Mapping[Any, Any], place: str) -> VideoSource | ProcessedVideo:
        """Return the video as given, with what the part says of it."""
        keys = _OPENAI_KEYS if exact(part["type"]) != "video" else (*_SOURCE_KEYS, *_OPENAI_KEYS)
        check_keys(part, ("type", *keys, *_OPTION_KEYS), REFUSED_PART_KEYS, place)
        found = [key for key in keys if part.get(key) is not None]
        if len(found) != 1:
            raise UsageError(
                f"{place} must hold its video under one key, found {', '.join(found) or 'none'}",
                remedy=f"the keys are {', '.join(keys)}",
            )
        video = _video(part[found[0]], found[0], f"{place}.{found[0]}")
        if isinstance(video, ProcessedVideo):
            return video
        with reading(place, "pass plain numbers and lists"):
            options = _options(part, place)
            return VideoSource(Replayed(video) if is_one_time(video) else video, options)

    def content(self, source: Any) -> object:
        """Return the video as it was given."""
        video = source.video if isinstance(source, VideoSource) else source
        return video.source if isinstance(video, Replayed) else video

    def sharing(self, source: Any, first: Any) -> Any:
        """Return a source that reads a file object or an iterator as the first one of it does: once."""
        return replace(source, video=first.video) if isinstance(source, VideoSource) else source

    def process(self, source: Any, settings: InputSettings, on_images: OnImages | None = None) -> ProcessedVideo:
        """Decode, choose, resize and cut frames; see `runtime.video.processor.process_video`."""
        if isinstance(source, ProcessedVideo):
            return source
        return process_video(
            source,
            settings.video,
            max_image_pixels=settings.max_image_pixels,
            max_tokens=settings.max_tokens,
            context=settings.context,
            on_images=on_images,
            check=settings.check,
            visual_token_share=settings.visual_token_share,
        )

    def expansion(self, processed: ProcessedVideo) -> tuple[Insertion, ...]:
        """Return each segment between markers of its own, with its time before it."""
        return tuple(
            Insertion(f"<{time:.1f} seconds>{_START}", each, _END)
            for time, each in zip(processed.timestamps, processed.segments, strict=True)
        )


KIND = Video()


def _video(value: Any, key: str, place: str) -> Any:
    if key in _OPENAI_KEYS:
        if isinstance(value, Mapping):
            check_keys(value, ("url", "detail"), REFUSED_PART_KEYS, place)
            value, place = value.get("url"), f"{place}.url"
        if not isinstance(value, str):
            raise UsageError(f"{place} must be a string, got {type(value).__name__}", remedy="pass a data URL")
        return str.__str__(value)
    if key == "path":
        if not isinstance(value, (str, os.PathLike)):
            raise UsageError(
                f"{place} must be a path, got {type(value).__name__}", remedy="pass frames and bytes under 'video'"
            )
        return Path(os.fsdecode(value))
    if key == "base64" or (key == "data" and isinstance(value, str)):
        if not isinstance(value, (str, bytes, bytearray)):
            raise UsageError(f"{place} is not base64: expected text, got {type(value).__name__}", remedy="pass text")
        try:
            return decode_base64(value)
        except ValueError as error:
            raise UsageError(
                f"{place} is not base64: {error}", remedy="pass base64.b64encode(data).decode()"
            ) from error
    return value


def _options(part: Mapping[Any, Any], place: str) -> VideoOptions:
    given = {key: part[key] for key in _OPTION_KEYS if part.get(key) is not None}
    settings = {name: check(f"{place}.{key}", given[key]) for key, (name, check) in _SETTINGS.items() if key in given}
    if "nframes" in given and "num_frames" in given:
        raise UsageError(f"{place}: nframes and num_frames both say how many frames to take", remedy="pass one of them")
    if "nframes" in given:
        # `round_by_factor(…, 2)` of qwen-vl-utils.
        settings.setdefault("num_frames", max(2, round(_COUNT(f"{place}.nframes", given["nframes"]) / 2) * 2))
    if "fps" in settings and "num_frames" in settings:
        raise UsageError(f"{place}: fps and num_frames both say how many frames to take", remedy="pass one of them")
    _check_order(settings, place)
    metadata = _metadata(given.get("video_metadata"), f"{place}.video_metadata")
    timestamps = _timestamps(given["timestamps"], f"{place}.timestamps") if "timestamps" in given else None
    rates = {key: _FPS(f"{place}.{key}", given[key]) for key in ("sample_fps", "raw_fps") if key in given}
    if "sample_fps" in rates:  # of frames that were chosen already
        settings.setdefault("do_sample_frames", False)
    sides = [given.get(key) for key in ("resized_height", "resized_width")]
    if (sides[0] is None) != (sides[1] is None):
        raise UsageError(f"{place}: resized_height and resized_width go together", remedy="pass both, or max_pixels")
    start, end = (_seconds(given.get(key), f"{place}.{key}") for key in ("video_start", "video_end"))
    if start is not None and end is not None and start > end:
        raise UsageError(f"{place}: video_start {start:g} is after video_end {end:g}", remedy="exchange them")
    return VideoOptions(
        settings,
        _COUNT(f"{place}.total_pixels", given["total_pixels"]) if "total_pixels" in given else None,
        None
        if sides[0] is None
        else (_SIDE(f"{place}.resized_height", sides[0]), _SIDE(f"{place}.resized_width", sides[1])),
        rates.get("raw_fps", rates.get("sample_fps", metadata.get("fps"))),
        metadata.get("indices"),
        timestamps,
        start,
        end,
    )


def _check_order(settings: Mapping[str, Any], place: str) -> None:
    for low, high in (("min_frames", "max_frames"), ("min_frame_pixels", "max_frame_pixels")):
        if low in settings and high in settings and settings[low] > settings[high]:
            names = [name.replace("frame_pixels", "pixels") for name in (low, high)]
            raise UsageError(
                f"{place}: {names[0]} {settings[low]} is above {names[1]} {settings[high]}", remedy="exchange them"
            )


def _metadata(value: Any, place: str) -> dict[str, Any]:
    """Return rate and numbers of frames of transformers' `VideoMetadata`."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UsageError(f"{place} must be a dict, got {type(value).__name__}", remedy="pass {'fps': …}")
    given = {key: value[key] for key in value if value[key] is not None}
    check_keys(given, _METADATA_KEYS, {}, place)
    found: dict[str, Any] = {}
    if "fps" in given:
        found["fps"] = _FPS(f"{place}.fps", given["fps"])
    if "frames_indices" in given:
        values = _listed(given["frames_indices"], f"{place}.frames_indices")
        if any(later < earlier for earlier, later in itertools.pairwise(values)):
            raise UsageError(f"{place}.frames_indices are not in order", remedy="pass the frames in their order")
        check = integer(0)
        found["indices"] = tuple(check(f"{place}.frames_indices[{i}]", each) for i, each in enumerate(values))
    return found


def _timestamps(value: Any, place: str) -> tuple[float, ...]:
    given = _listed(value, place)
    if any(each is None for each in given):
        raise UsageError(f"{place} must be numbers of seconds, got null", remedy="leave timestamps out, or give all")
    times = tuple(_seconds(each, f"{place}[{i}]") or 0.0 for i, each in enumerate(given))
    for index in range(1, len(times)):
        if times[index] < times[index - 1]:
            raise UsageError(
                f"{place}[{index}] is {times[index]:g} s, after {times[index - 1]:g} s before it",
                remedy="pass the frames in the order of their times",
            )
    return times


def _listed(value: Any, place: str) -> Sequence[Any]:
    values = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(values, (list, tuple)) or len(values) > _MOST_FRAMES:
        raise UsageError(
            f"{place} must be a list of numbers, one for each frame, got {shown(value)}",
            remedy=f"pass a list of at most {_MOST_FRAMES} numbers",
        )
    return values


def _seconds(value: Any, place: str) -> float | None:
    if value is None:
        return None
    seconds = float(any_number(place, value))
    if not 0 <= seconds <= _MOST_SECONDS:
        raise UsageError(
            f"{place} must be a number of seconds from 0 to {_MOST_SECONDS:g}, got {shown(value)}",
            remedy="count from the start of the video",
        )
    return seconds

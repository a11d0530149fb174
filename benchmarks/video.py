"""`python -m benchmarks video`: time from a video file to the patches of its frames, on one core."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import measure, options
from benchmarks.result_files import RESULTS, markdown, write
from runtime.image_config import FILTERS, ImageProcessorConfig
from runtime.image_processor import segment
from runtime.model import Qwen3VLModel
from runtime.resize import resize
from runtime.video.config import VideoProcessorConfig
from runtime.video.opening import open_video
from runtime.video.processor import process_video
from runtime.video.source import VideoSource
from runtime.vision_inputs import VISION_PATCHES, inputs_of_segments, takes_grey_levels

STAGES = ("decode", "resize", "patchify")
# As published with Qwen3-VL.
_FRAME = ImageProcessorConfig(patch_size=16, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
_CONFIG = VideoProcessorConfig(_FRAME, min_pixels=4096, max_pixels=25_165_824)
_MOST_PIXELS = 50_000_000


def video(
    seconds: Annotated[int, typer.Option(min=1, help="Length of the clip.")] = 60,
    width: Annotated[int, typer.Option(min=32, help="Of a frame, in pixels.")] = 1280,
    height: Annotated[int, typer.Option(min=32, help="Of a frame, in pixels.")] = 720,
    source_fps: Annotated[int, typer.Option(min=1, help="Frames in a second of the clip.")] = 30,
    fps: Annotated[float, typer.Option(help="Frames that are taken of a second.")] = 2.0,
    engine: Annotated[
        Path | None,
        typer.Option(help="Compare with this engine's vision tower, on all cores.", show_default=False),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs that are timed, after one of warm-up.")] = 3,
    results: options.Results = RESULTS,
) -> None:
    """Measure what reading a video takes: decoding H.264, resizing and cutting its frames, on one core."""
    environment = measure.environment()
    model = None if engine is None else Qwen3VLModel.from_engine(engine, tuned=False)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    if hasattr(os, "sched_setaffinity"):  # then decoders and kernels take one thread as well
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path, seconds, width, height, source_fps)
        config = replace(_CONFIG, fps=fps)
        result = times(path, config, repeats) | {"file_bytes": path.stat().st_size}
        if model is not None:
            if cores is not None:
                os.sched_setaffinity(0, cores)
            result["vision"] = vision_time(model, path, config, repeats)
    shape = {"seconds": seconds, "width": width, "height": height, "source_fps": source_fps, "fps": fps}
    result |= {"clip": shape, "environment": environment}
    write("video", result, table(result), results)


def write_clip(path: Path, seconds: int, width: int, height: int, fps: int) -> None:
    """Write a clip in H.264 of a texture that moves, with a little noise, at about 5 Mbit/s for 1280 x 720."""
    import av

    random = np.random.default_rng(0)
    texture = random.integers(0, 256, (height // 8 + 40, width // 8 + 40, 3), dtype=np.uint8)
    texture = resize(texture, height + 320, width + 320)
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "28"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * fps):
            top, left = (int(160 + 150 * np.sin(number / period)) for period in (37, 53))
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(texture[top : top + height, left : left + width]), format="rgb24"
            )
            frame.pts, frame.time_base = number, Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def times(path: Path, config: VideoProcessorConfig, repeats: int) -> dict[str, Any]:
    """Return the seconds of each stage, and of all together as a prompt takes them."""
    taken: dict[str, list[float]] = {name: [] for name in (*STAGES, "together")}
    for run in range(1 + repeats):
        found = _once(path, config)
        for name, value in found.items():
            if run:  # the first one warms up
                taken[name].append(value)
    video = process_video(VideoSource(path), config, max_image_pixels=_MOST_PIXELS)
    return {
        "num_frames": video.num_frames,
        "grid_thw": video.grid_thw,
        "num_visual_tokens": video.num_visual_tokens,
        "stages": {name: measure.summarise(values) for name, values in taken.items()},
    }


def vision_time(model: Qwen3VLModel, path: Path, config: VideoProcessorConfig, repeats: int) -> dict[str, Any]:
    """Return the seconds that an engine's vision tower takes for the whole video, from those of a full call."""
    found = process_video(VideoSource(path), config, max_image_pixels=_MOST_PIXELS)
    num_patches = len(found.segments[0].patches)
    group = found.segments[: max(1, VISION_PATCHES // num_patches)]
    takes_levels = takes_grey_levels(model.manifest.capabilities)
    inputs = inputs_of_segments(group, model.config.vision, takes_levels=takes_levels)
    model.session.vision(inputs)
    values = [measure.seconds(lambda: model.session.vision(inputs)) for _ in range(repeats)]
    num_calls = len(found.segments) / len(group)
    return {
        "target": model.manifest.target,
        "segments_of_a_call": len(group),
        "call": measure.summarise(values),
        "all_s": num_calls * statistics.median(values),
    }


def _once(path: Path, config: VideoProcessorConfig) -> dict[str, float]:
    reader = open_video(path, _MOST_PIXELS)
    indices = config.sample_indices(reader.num_frames, reader.fps or 1.0)
    frames: list[Any] = []
    small: list[Any] = []
    step = config.temporal_patch_size

    def resize_all() -> None:
        size = config.target_size(len(frames), *frames[0].shape[:2])
        small.extend(resize(frame_HWC, *size, FILTERS[config.image.resample]) for frame_HWC in frames)

    work: dict[str, Callable[[], object]] = {
        "decode": lambda: frames.extend(reader.frames(indices)),
        "resize": resize_all,
        "patchify": lambda: [segment(small[at : at + step], config.image) for at in range(0, len(small), step)],
        "together": lambda: process_video(VideoSource(path), config, max_image_pixels=_MOST_PIXELS),
    }
    found = {name: measure.seconds(call) for name, call in work.items()}
    reader.close()
    return found


def table(result: dict[str, Any]) -> str:
    """Return one row for each stage."""
    clip, stages = result["clip"], result["stages"]
    rows = [("stage", "median, s", "ms for each frame taken")]
    for name, values in stages.items():
        rows.append((name, f"{values['median_s']:.3f}", f"{1000 * values['median_s'] / result['num_frames']:.2f}"))
    compared = ""
    if vision := result.get("vision"):
        share = stages["together"]["median_s"] / vision["all_s"]
        compared = (
            f" The vision tower of {vision['target']} takes {vision['all_s']:.1f} s for it on all cores, from calls of "
            f"{vision['segments_of_a_call']} segments: reading the video is {share:.1%} of that."
        )
    total = statistics.fsum(stages[name]["median_s"] for name in STAGES)
    return (
        f"{clip['seconds']} s of H.264, {clip['width']} x {clip['height']}, {clip['source_fps']} frames a second, "
        f"{result['file_bytes'] / 1e6:.1f} MB; {clip['fps']:g} frames of a second are taken, {result['num_frames']} in "
        f"all, {result['num_visual_tokens']} visual tokens. One core, median of "
        f"{len(stages['together']['all_s'])}; the stages add up to {total:.3f} s.{compared}\n\n{markdown(rows)}"
    )

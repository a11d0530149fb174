"""The prompts that engines are compared on: text, images of different sizes, videos of different lengths, chunks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from runtime.generation import PREFILL_CHUNK

# Width and height in pixels. No side is a multiple of 32, the side of a visual token, so each picture is resized.
_SIZES = ((170, 100), (90, 120), (250, 72))
_LARGE_SIZE = (330, 250)  # 80 visual tokens
# Fewer than the visual tokens of each picture (15, 12 and 16, or more where a checkpoint enlarges small pictures), so
# that every picture straddles a border of two chunks.
_SMALL_CHUNK = 8
# Frames, their rate, and width and height of a video. At the 2 frames a second of every checkpoint, an odd number of
# frames is taken of the first, every second one of the other.
_CLIPS = ((5, 2.0, 100, 60), (12, 4.0, 70, 110))


@dataclass(frozen=True, eq=False)
class Clip:
    """A video: uint8 [frames, height, width, 3], and its frames in a second."""

    frames: np.ndarray
    fps: float

    @property
    def part(self) -> dict[str, Any]:
        """The video as a part of a message."""
        return {"type": "video", "video": self.frames, "raw_fps": self.fps}


@dataclass(frozen=True)
class Case:
    """One prompt.

    Attributes:
        name: In reports.
        prompt: Its text, after all else.
        images: Files; in the prompt, they and the videos take turns, a video first.
        videos: Videos.
        chunk: Most tokens of one prefill call.
    """

    name: str
    prompt: str
    images: tuple[Path, ...] = ()
    videos: tuple[Clip, ...] = ()
    chunk: int = PREFILL_CHUNK

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt in the Hugging Face chat format."""
        parts: list[dict[str, Any]] = []
        for video, image in zip_longest(self.videos, self.images):
            parts += [video.part] if video is not None else []
            parts += [{"type": "image", "image": str(image)}] if image is not None else []
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.prompt}]}]


def make_cases(folder: Path, *, with_large: bool = False) -> list[Case]:
    """Write the pictures into `folder` as PNG and return the cases.

    Args:
        folder: Where.
        with_large: Add a case whose pictures have enough visual tokens to be pruned.
    """
    from PIL import Image

    paths = []
    for seed, (width, height) in enumerate(_SIZES):
        paths.append(folder / f"picture_{seed}.png")
        Image.fromarray(picture(width, height, seed)).save(paths[-1])
    clips = tuple(clip(*each) for each in _CLIPS)
    large = []
    if with_large:
        path = folder / "large_picture.png"
        Image.fromarray(picture(*_LARGE_SIZE, len(_SIZES))).save(path)
        large = [Case("large images", "Read the digits of both pictures.", (path, paths[0], path), chunk=_SMALL_CHUNK)]
    return [
        *large,
        Case("text", "Count the digits and say where each of them is."),
        Case("one image", "Read the digits in order.", (paths[0],)),
        Case("three images", "Read the digits of all pictures.", tuple(paths)),
        Case("small chunks", "Count the digits of both pictures.", tuple(paths[:2]), chunk=_SMALL_CHUNK),
        Case("video", "What happens, and when?", videos=(clips[0],)),
        Case("videos and image", "Compare the videos with the picture.", (paths[1],), clips, _SMALL_CHUNK),
    ]


def clip(num_frames: int, fps: float, width: int, height: int) -> Clip:
    """Draw a video whose every frame is another picture; the same for the same arguments."""
    frames = [picture(width, height, 100 * num_frames + number) for number in range(num_frames)]
    return Clip(np.stack(frames), fps)


def picture(width: int, height: int, seed: int) -> np.ndarray:
    """Draw smooth colours, discs and grain, uint8 [height, width, 3]; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    values = np.empty((height, width, 3))
    for channel in range(3):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        values[:, :, channel] = 128 + 80 * np.sin((x * np.cos(angle) + y * np.sin(angle)) / 17 + phase)
    for _ in range(5):
        centre_x, centre_y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(8, 24)
        values[np.hypot(x - centre_x, y - centre_y) < radius] = rng.uniform(0, 255, 3)
    values += rng.normal(0, 6, values.shape)
    return values.clip(0, 255).astype(np.uint8)

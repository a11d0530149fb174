"""Read videos that come as frames: arrays, lists of images, folders, iterators and animated images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.contract import IntArray
from runtime.errors import CapacityError, DeadlineError, ImageError, Qwen3VLError
from runtime.images import load_image
from runtime.still_wanted import Check, always
from runtime.video.reader import VideoReader, repeats_of

if TYPE_CHECKING:
    from runtime.images import RgbImage

MAX_STREAM_FRAMES = 1 << 16
"""Most frames of an iterator, whose end nobody knows."""

MAX_STREAM_BYTES = 1 << 30
"""Most bytes that its frames may take: they are held until it ends, since only then it is known which are taken."""


class FramesReader(VideoReader):
    """A list of frames, each of any form that an image may have.

    Args:
        frames: At least one.
        name: In messages.
        max_image_pixels: Frames of more pixels are refused before they are decoded.
        is_sampled: All are taken where nobody says otherwise, as files of frames are.

    Raises:
        ImageError: There is none.
    """

    def __init__(self, frames: Sequence[Any], name: str, max_image_pixels: int, *, is_sampled: bool) -> None:
        if len(frames) == 0:
            raise ImageError(f"{name}: holds no frames", remedy="pass at least one frame")
        self.name = name
        self.num_frames = len(frames)
        self.fps: float | None = None
        self.is_sampled = is_sampled  # type: ignore[misc]
        self._frames = frames
        self._max_image_pixels = max_image_pixels

    def frames(self, indices: IntArray) -> Iterator[RgbImage]:
        """Load frames; see `VideoReader.frames`."""
        size: tuple[int, ...] | None = None
        for number, count in repeats_of(indices).items():
            try:
                frame_HWC = load_image(self._frames[number], max_image_pixels=self._max_image_pixels)
            except (ImageError, CapacityError) as error:
                raise type(error)(f"{self.name}, frame {number}: {error.message}", remedy=error.remedy) from error
            size = size or frame_HWC.shape
            if frame_HWC.shape != size:
                raise ImageError(
                    f"{self.name}, frame {number}: {frame_HWC.shape[1]} x {frame_HWC.shape[0]} pixels, where the first "
                    f"has {size[1]} x {size[0]}",
                    remedy="bring all frames of a video to one size, or pass them as images",
                )
            for _ in range(count):
                yield frame_HWC


def taken_frames(frames: Iterator[Any], name: str, max_image_pixels: int, check: Check = always) -> list[RgbImage]:
    """Read an iterator of frames to its end, uint8 [H, W, 3] each, and ask `check` before each of them.

    Raises:
        CapacityError: It has more frames or bytes than are held.
        ImageError: It raises an error, or gives what is no image.
        UsageError: It gives what cannot be an image.
    """
    taken: list[RgbImage] = []
    num_bytes = 0
    try:
        check()
        for frame in frames:
            check()
            taken.append(load_image(frame, max_image_pixels=max_image_pixels))
            if np.shares_memory(taken[-1], frame) if isinstance(frame, np.ndarray) else False:
                taken[-1] = taken[-1].copy()  # whoever gives frames may use one array for all
            num_bytes += taken[-1].nbytes
            if len(taken) > MAX_STREAM_FRAMES or num_bytes > MAX_STREAM_BYTES:
                raise CapacityError(
                    f"{num_bytes / 1e9:.2f} GB of frames without an end; at most "
                    f"{MAX_STREAM_FRAMES} frames and {MAX_STREAM_BYTES / 1e9:.2f} GB are held",
                    remedy="pass a file, or a part of the stream: itertools.islice(frames, 600)",
                )
    except DeadlineError:
        raise
    except Qwen3VLError as error:
        raise type(error)(f"{name}, frame {len(taken)}: {error.message}", remedy=error.remedy) from error
    except Exception as error:
        raise ImageError(
            f"{name}: ended with an error after {len(taken)} frames: {type(error).__name__}: {error}",
            remedy="pass an iterator of frames that ends by itself",
        ) from error
    return taken

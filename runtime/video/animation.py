"""Read animated images (GIF, PNG, WebP) as videos, with Pillow, which lays each frame over those before it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from runtime.contract import IntArray
from runtime.errors import CapacityError, ImageError, Qwen3VLError
from runtime.image_bounds import CountedReader, check_decoding, check_size, check_webp
from runtime.still_wanted import Check, always
from runtime.video.reader import VideoReader, repeats_of

if TYPE_CHECKING:
    from PIL import Image

    from runtime.images import RgbImage

_FORMATS = ("AVIF", "GIF", "PNG", "WEBP")
_DEFAULT_MS = 100  # of a frame that says nothing, or 0, as browsers show it
MAX_ANIMATION_FRAMES = 1 << 16


def is_animation(start: bytes) -> bool:
    """Return whether a file that begins so is of a format that animations have."""
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    return is_webp or start.startswith((b"GIF8", b"\x89PNG")) or start[4:12] in (b"ftypavif", b"ftypavis")


class AnimationReader(VideoReader):
    """An animated image; one that is still is a video of one frame.

    Args:
        source: A file, or an image that Pillow has opened.
        name: In messages.
        max_image_pixels: Images of more pixels are refused before they are decoded.
        check: Asked before each frame whose time is read; raises where the video is not wanted any more.

    Raises:
        ImageError: It cannot be read.
        CapacityError: It has too many pixels or frames.
    """

    def __init__(
        self, source: IO[bytes] | Image.Image, name: str, max_image_pixels: int, check: Check = always
    ) -> None:
        self.name = name
        self._check = check
        self._image = self._opened(source, max_image_pixels)
        self._place: int = self._guarded(self._image.tell)
        self.num_frames = self._guarded(lambda: int(getattr(self._image, "n_frames", 1)))
        if self.num_frames > MAX_ANIMATION_FRAMES:
            raise CapacityError(
                f"{name}: {self.num_frames} frames, expected at most {MAX_ANIMATION_FRAMES}",
                remedy="convert it to a video file",
            )
        self.fps: float | None = self._guarded(self._mean_rate)

    def frames(self, indices: IntArray) -> Iterator[RgbImage]:
        """Compose frames; see `VideoReader.frames`."""
        for number, count in repeats_of(indices).items():
            frame_HWC = self._guarded(lambda number=number: self._frame(number))
            for _ in range(count):
                yield frame_HWC

    def close(self) -> None:
        """Close what was opened for this reader; an image of the caller's shows the frame again that it showed."""
        if self.owned_file is None:
            self._guarded(lambda: self._image.seek(self._place))
        super().close()

    def _frame(self, number: int) -> RgbImage:
        self._image.seek(number)
        frame = self._image.convert("RGBA") if self._has_alpha() else self._image.convert("RGB")
        if frame.mode == "RGB":
            return np.asarray(frame)
        from PIL import Image

        over = Image.alpha_composite(Image.new("RGBA", frame.size, (255, 255, 255, 255)), frame)
        return np.asarray(over.convert("RGB"))

    def _has_alpha(self) -> bool:
        image = self._image
        return image.mode in ("RGBA", "LA", "PA") or image.info.get("transparency") is not None

    def _mean_rate(self) -> float | None:
        if self.num_frames < 2:
            return None
        total_ms = 0.0
        try:
            for number in range(self.num_frames):
                self._check()
                self._image.seek(number)
                self._image.load()  # of WebP, the duration is known only then
                total_ms += float(self._image.info.get("duration", 0)) or _DEFAULT_MS
        finally:
            self._image.seek(self._place)  # an image of the caller's shows what it showed, also if this is stopped
        return 1000 * self.num_frames / total_ms

    def _opened(self, source: IO[bytes] | Image.Image, limit: int) -> Image.Image:
        from PIL import Image

        if isinstance(source, Image.Image):
            self._guarded(lambda: check_size(source.width, source.height, self.name, limit))
            return source
        reader = CountedReader(source, self.name)
        reader.allow(MAX_ANIMATION_FRAMES * 16)

        def open_image() -> Image.Image:
            check_webp(source, self.name, limit)
            Image.init()
            image = Image.open(cast(IO[bytes], reader), formats=[name for name in _FORMATS if name in Image.OPEN])
            check_size(image.width, image.height, self.name, limit)
            check_decoding(image, reader, self.name, limit)
            return image

        image: Image.Image = self._guarded(open_image)
        return image

    def _guarded(self, work: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return work()
        except Qwen3VLError:
            raise
        except MemoryError as error:
            raise CapacityError(f"{self.name}: not enough memory to decode it", remedy="make it smaller") from error
        except Exception as error:  # decoders fail in many ways
            raise ImageError(
                f"{self.name}: damaged or cut short: {type(error).__name__}: {error}", remedy="fetch or save it again"
            ) from error

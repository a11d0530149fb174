"""What a video is read through: how many frames it has, and those that are asked for, one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, ClassVar

import numpy as np

from runtime.contract import IntArray

if TYPE_CHECKING:
    from runtime.images import RgbImage


class VideoReader(ABC):
    """Frames of one video.

    Attributes:
        name: In messages to users.
        num_frames: How many there are.
        fps: How many of them in a second; None if nobody says.
        is_sampled: They were chosen already: all are taken where nobody asks for others.
        owned_file: What `close` closes.
    """

    name: str
    num_frames: int
    fps: float | None
    is_sampled: ClassVar[bool] = False
    owned_file: IO[bytes] | None = None

    @abstractmethod
    def frames(self, indices: IntArray) -> Iterator[RgbImage]:
        """Decode frames, uint8 [H, W, 3], holding no more than one.

        Args:
            indices: Their numbers, ascending; one may come several times.

        Raises:
            ImageError: One of them cannot be read.
            CapacityError: One has too many pixels.
        """

    def close(self) -> None:
        """Close what was opened for this reader."""
        if self.owned_file is not None:
            self.owned_file.close()


def repeats_of(indices: IntArray) -> dict[int, int]:
    """Return how often each frame is wanted, by its number."""
    numbers, counts = np.unique(indices, return_counts=True)
    return {int(number): int(count) for number, count in zip(numbers, counts, strict=True)}

"""Where the image of a prompt is, for an answer that is shown with it: a path, or the caller's own picture.

An answer must not keep the memory of its images, of which a program may have thousands. So a picture that the caller
holds is referred to weakly, and bytes and data URLs, which cannot be, are not kept at all.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.images import load_image
from runtime.urls import scheme_of

if TYPE_CHECKING:
    from runtime.images import RgbImage

_LONGEST_PATH = 4096


class PictureSource:
    """Refers to the source of an image without keeping its pixels.

    Args:
        source: As `load_image` takes it, or anything else, of which nothing is kept.
    """

    __slots__ = ("_held", "_path")

    def __init__(self, source: Any) -> None:
        self._path: str | None = None
        self._held: Callable[[], Any] | None = None
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        if isinstance(source, str):
            is_path = len(source) <= _LONGEST_PATH and scheme_of(source) in (None, "file")
            self._path = source if is_path else None
        elif isinstance(source, np.ndarray) or _is_pillow(source):
            self._held = weakref.ref(source)

    def __reduce__(self) -> tuple[type[PictureSource], tuple[str | None]]:
        """Keep the path alone in a pickle: a weak reference cannot be in one."""
        return type(self), (self._path,)

    def load(self) -> RgbImage | None:
        """Return the image, uint8 [H, W, 3]; None if it is not there any more.

        Raises:
            ImageError, CapacityError: It cannot be read.
        """
        source = self._held() if self._held is not None else self._path
        return None if source is None else load_image(source)


def _is_pillow(source: Any) -> bool:
    pillow = sys.modules.get("PIL.Image")  # without it, nothing is one of its images
    return pillow is not None and isinstance(source, pillow.Image)

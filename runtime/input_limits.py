"""Limits on what images and videos of one prompt may take, given with a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from runtime.errors import UsageError
from runtime.option_checks import between, integer

_MOST_FPS = 1000.0


class InputKeywords(TypedDict, total=False):
    """The fields of `InputLimits`; None means "not given"."""

    min_pixels: int | None
    max_pixels: int | None
    fps: float | None
    num_frames: int | None
    min_frames: int | None
    max_frames: int | None
    max_visual_tokens: int | None


@dataclass(frozen=True)
class InputLimits:
    """Limits of one request, in place of the engine's; a part of a message may have others of its own.

    Attributes:
        min_pixels: Smaller images and frames are enlarged to this area.
        max_pixels: Larger images and frames are reduced to this area.
        fps: Frames of a video for each of its seconds.
        num_frames: Frames of a video, in place of `fps`.
        min_frames, max_frames: Least and most frames that `fps` leads to.
        max_visual_tokens: Most visual tokens of all images and videos together, whatever their parts say: the largest
            are reduced to one size until the sum fits.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    max_visual_tokens: int | None = None

    def with_keywords(self, keywords: Mapping[str, Any]) -> InputLimits:
        """Return these with others laid over them; other keywords are passed over.

        Raises:
            UsageError: As `of`.
        """
        given = {name: value for name, value in keywords.items() if name in INPUT_KEYWORDS and value is not None}
        kept = {name: getattr(self, name) for name in INPUT_KEYWORDS}
        if given.keys() & {"fps", "num_frames"}:
            kept |= {"fps": None, "num_frames": None}
        return InputLimits.of({**kept, **given}) if given else self

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> InputLimits:
        """Check keywords of `InputKeywords`.

        Raises:
            UsageError: A value is of the wrong kind, or two contradict each other.
        """
        count, rate = integer(1), between(1e-6, _MOST_FPS, "pass frames per second, such as {name}=2")
        limits = cls(
            **{
                name: (rate if name == "fps" else count)(name, value)
                for name, value in keywords.items()
                if value is not None
            }
        )
        for low, high in (("min_pixels", "max_pixels"), ("min_frames", "max_frames")):
            least, most = getattr(limits, low), getattr(limits, high)
            if least is not None and most is not None and least > most:
                raise UsageError(f"{low} {least} is above {high} {most}", remedy="exchange them")
        if limits.fps is not None and limits.num_frames is not None:
            raise UsageError("fps and num_frames both say how many frames to take", remedy="pass one of them")
        return limits


def answer_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a request that are no limits on its inputs."""
    return {name: value for name, value in keywords.items() if name not in INPUT_KEYWORDS}


INPUT_KEYWORDS = frozenset(field.name for field in fields(InputLimits))
"""Names that belong to `InputLimits`, among the keywords of a request."""


def common_limit(counts: Sequence[int], budget: int) -> int:
    """Return the largest limit on each count with which their sum is at most `budget`; 0 if there is none.

    Counts below the limit stay as they are, so what they leave is for the larger ones.
    """
    left, limit = budget, 0
    for position, count in enumerate(sorted(counts)):
        limit = left // (len(counts) - position)
        if count > limit:
            return limit
        left -= count
    return max([limit, *counts])

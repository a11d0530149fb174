"""Limits on what images and videos of one prompt may take, and how much of them is kept, given with a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from runtime.arguments import reading
from runtime.errors import UsageError
from runtime.option_checks import any_number, between, integer
from runtime.shown import shown

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
    visual_token_share: float | None


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
        visual_token_share: Of the visual tokens of each image and video, how many stay in the prompt
            (`runtime.visual_pruning`): an approximation. 1 for all.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    max_visual_tokens: int | None = None
    visual_token_share: float | None = None

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
        rate = between(1e-6, _MOST_FPS, "pass frames per second, such as {name}=2")
        checks = {"fps": rate, "visual_token_share": token_share}
        count = integer(1)
        limits = cls(
            **{name: checks.get(name, count)(name, value) for name, value in keywords.items() if value is not None}
        )
        for low, high in (("min_pixels", "max_pixels"), ("min_frames", "max_frames")):
            least, most = getattr(limits, low), getattr(limits, high)
            if least is not None and most is not None and least > most:
                raise UsageError(f"{low} {least} is above {high} {most}", remedy="exchange them")
        if limits.fps is not None and limits.num_frames is not None:
            raise UsageError("fps and num_frames both say how many frames to take", remedy="pass one of them")
        return limits


def token_share(name: str, value: Any) -> float:
    """Return a share of visual tokens, above 0 and up to 1.

    Raises:
        UsageError: It is no such number.
    """
    remedy = f"pass {name}=0.5 to keep half of the visual tokens, or leave it out to keep all"
    with reading(name, remedy):  # a fraction may be too large for a float
        share = float(any_number(name, value))
    if not 0 < share <= 1:
        raise UsageError(f"{name} must be above 0 and at most 1, got {shown(value)}", remedy=remedy)
    return share


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

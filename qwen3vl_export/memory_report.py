"""A plan of memory with what it is of, what fits at most, and how it is shown: a table, JSON, a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from runtime.fitting import biggest
from runtime.memory import CACHE, LIBRARIES, VISION, WEIGHTS
from runtime.memory_plan import MemoryPlan, Planner, Work

if TYPE_CHECKING:
    from qwen3vl_export.reports.page import Page

_MOST_SEQUENCES = 1024
_MOST_SIDE = 4096
"""Pixels of a side of the largest square image that is tried: the usual `max_pixels`."""


@dataclass(frozen=True)
class Largest:
    """The most of each that fits while all else stays as it was asked for; None if not even the least does.

    Attributes:
        context: Tokens.
        sequences: That run at once.
        image_side: Pixels of a side of a square image, in as many images as were asked for, or one.
    """

    context: int | None
    sequences: int | None
    image_side: int | None


@dataclass(frozen=True)
class MemoryReport:
    """A plan of an engine.

    Attributes:
        subject: Engine or model, as it was given.
        target: Its target.
        device: `cpu` or `gpu`.
        threads: Threads of a CPU engine.
        work: What it was planned for.
        plan: The plan.
        limit_bytes: What it may take; None if nobody knows.
        largest: What fits at most; None without a limit.
    """

    subject: str
    target: str
    device: str
    threads: int
    work: Work
    plan: MemoryPlan
    limit_bytes: int | None
    largest: Largest | None

    @property
    def fits(self) -> bool | None:
        """Whether it does; None if nobody knows the limit."""
        return None if self.limit_bytes is None else self.plan.total_bytes <= self.limit_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            **{name: getattr(self, name) for name in ("subject", "target", "device", "threads")},
            "context": self.work.context,
            "sequences": self.work.sequences,
            "kept_sequences": self.work.kept,
            "patches": list(self.work.images),
            "parts": dict(self.plan.parts),
            "total_bytes": self.plan.total_bytes,
            "mapped_bytes": self.plan.mapped_bytes,
            "limit_bytes": self.limit_bytes,
            "fits": self.fits,
            "largest": None if self.largest is None else asdict(self.largest),
        }

    @property
    def title(self) -> str:
        """What was planned, in words."""
        work = self.work
        images = f", {len(work.images)} × {max(work.images)} patches in each prompt" if work.images else ""
        sequences = f"{work.sequences} sequence{'s' if work.sequences > 1 else ''}"
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.device == "cpu" else ""
        return f"{self.subject}: {self.target}{threads}, {sequences} of {work.context} tokens{images}"

    @property
    def summary(self) -> str:
        """What it comes to."""
        total = megabytes(self.plan.total_bytes)
        if self.limit_bytes is None:
            return f"{total} of the GPU's memory"
        left = self.limit_bytes - self.plan.total_bytes
        verdict = f"fits, {megabytes(left)} left" if left >= 0 else f"too large by {megabytes(-left)}"
        return f"{total} of {megabytes(self.limit_bytes)}: {verdict}"

    @property
    def notes(self) -> list[str]:
        """What else there is to say."""
        found = []
        if self.plan.mapped_bytes:
            found.append(f"of it, {megabytes(self.plan.mapped_bytes)} are mapped from files, which the system may drop")
        if self.device == "gpu":
            found.append("on a GPU, workspaces are an upper bound and libraries are assumed; neither was measured")
        if self.largest is not None:
            side = self.largest.image_side
            most = (
                ("context", self.largest.context and f"{self.largest.context} tokens"),
                ("sequences", self.largest.sequences),
                ("image", side and f"{side}x{side}"),
            )
            found.append(
                "the most of each that fits, all else as it is: "
                + ", ".join(f"{name} {value or 'none'}" for name, value in most)
            )
        return found

    def page(self) -> Page:
        """Return a page with the picture."""
        from qwen3vl_export.reports.drawing import Axis, Bar, Segment, drawing, legend
        from qwen3vl_export.reports.page import Page, Section, Tone, figure, paragraph, table

        names, start, segments = [name for name, size in self.plan.parts.items() if size], 0, []
        for index, name in enumerate(names):
            segments.append(Segment(name, start, start + self.plan.parts[name], index))
            start += self.plan.parts[name]
        axis = Axis.of([start, *([] if self.limit_bytes is None else [self.limit_bytes])], megabytes, from_zero=True)
        picture = drawing([Bar(self.summary, segments)], axis, "Memory by part", mark=self.limit_bytes)
        rows = [[name, megabytes(self.plan.parts[name])] for name in names]
        parts = [legend(names), figure(picture, "The plan"), *map(paragraph, self.notes)]
        sections = [
            Section("Memory", parts),
            Section("Parts", [table(["part", "size"], rows, caption="Bytes by part")]),
        ]
        tone = Tone.PLAIN if self.fits is None else Tone.GOOD if self.fits else Tone.BAD
        return Page("Memory plan", f"{self.title}. {self.summary}.", [], sections, tone)


def report_of(
    subject: str, target: str, planner: Planner, threads: int, work: Work, limit_bytes: int | None
) -> MemoryReport:
    """Return the plan of some work, and what fits at most."""
    facts = planner.facts
    largest = None if limit_bytes is None else _largest(planner, work, limit_bytes)
    device = "gpu" if facts.is_on_gpu else "cpu"
    return MemoryReport(subject, target, device, threads, work, planner.plan(work), limit_bytes, largest)


def patches_of(planner: Planner, width: int, height: int) -> int:
    """Return the patches of an image of so many pixels, whose sides become multiples of a visual token's."""
    vision = planner.facts.model.vision
    merge = vision.spatial_merge_size
    return math.prod(max(1, round(side / (vision.patch_size * merge))) * merge for side in (width, height))


def visual_tokens(planner: Planner, images: Sequence[int]) -> int:
    """Return the tokens that images of so many patches take in a prompt."""
    return sum(images) // planner.facts.model.vision.patches_per_token


def _largest(planner: Planner, work: Work, limit_bytes: int) -> Largest:
    facts = planner.facts

    def fitting(change: Callable[[int], Mapping[str, Any]], least: int, most: int) -> int | None:
        return biggest(
            lambda value: planner.plan(replace(work, **change(value))).total_bytes <= limit_bytes, least, most
        )

    vision = facts.model.vision
    unit = vision.patch_size * vision.spatial_merge_size
    images = max(1, len(work.images))
    # All images of a prompt have to be in its context.
    most_side = min(_MOST_SIDE // unit, math.isqrt(work.context // images))
    side = fitting(lambda tokens: {"images": (tokens**2 * vision.patches_per_token,) * images}, 1, most_side)
    least_context = max(1, visual_tokens(planner, work.images))
    trained = facts.model.text.max_positions
    most_context = min(int(facts.capabilities.get("capacity", trained)), trained)
    most_sequences = _MOST_SEQUENCES if facts.max_batch is None else facts.max_batch - work.kept
    return Largest(
        context=fitting(lambda tokens: {"context": tokens}, least_context, most_context),
        sequences=fitting(lambda number: {"sequences": number}, 1, most_sequences),
        image_side=None if side is None else side * unit,
    )


def remedy_of(report: MemoryReport) -> str:
    """Return what to do where it does not fit."""
    assert report.largest is not None
    parts, limit = report.plan.parts, report.limit_bytes
    if limit is not None and parts[WEIGHTS] + parts[LIBRARIES] > limit:
        return "choose a target of fewer bits, or a smaller model"
    options = {CACHE: "a lower --context or --batch", VISION: "a smaller --image or fewer of them"}
    largest = max(options, key=lambda part: parts[part])
    return f"give {options[largest]}, choose a target of fewer bits, or open the engine with --fit"


def megabytes(num_bytes: float) -> str:
    """Return bytes in MB of 10^6."""
    return f"{num_bytes / 1e6:,.1f} MB"

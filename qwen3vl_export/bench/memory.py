"""What memory engines take: by their plan, and by what the system says of this process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3vl_export.bench.measure import messages
from qwen3vl_export.bench.points import Point
from runtime.memory import LOGITS
from runtime.memory_plan import Planner
from runtime.scheduling.plan import work_of

if TYPE_CHECKING:
    from runtime.model import Qwen3VLModel

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class ProcessMemory:
    """Resident memory of this process in bytes.

    Attributes:
        anonymous: What it computes with, and copies of weights.
        mapped: Pages of files that are mapped, weights among them; the system may drop them.
        peak: The most of both that there was.
    """

    anonymous: int
    mapped: int
    peak: int

    @classmethod
    def now(cls, status: Path = _STATUS) -> ProcessMemory | None:
        """Return that of now, or None where the system has no `/proc` (proc_pid_status(5))."""
        if not status.is_file():
            return None
        lines = (line.split() for line in status.read_text(encoding="ascii", errors="replace").splitlines())
        values = {line[0]: int(line[1]) << 10 for line in lines if line[2:] == ["kB"]}
        mapped = values.get("RssFile:", 0) + values.get("RssShmem:", 0)
        return cls(values.get("RssAnon:", 0), mapped, values.get("VmHWM:", 0))


def estimate(model: Qwen3VLModel, points: Sequence[Point]) -> dict[str, int]:
    """Return the most bytes of each part of an opened engine, that of the images of the largest point included."""
    largest = max(points, key=lambda point: point.batch * point.images * math.prod(point.image_size or (0,)))
    images = model.prepare(messages(largest, 0)).images
    patches = tuple(math.prod(image.grid_thw) for image in images)
    work = replace(work_of(model.limits), images=patches, prompts_with_images=largest.batch)
    return {part: size for part, size in Planner.of(model.manifest).plan(work).parts.items() if part != LOGITS}

"""Results of a sweep as plain data: what `--output` writes, and what `--compare` reads again."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from qwen3vl_export.bench.measure import PHASES, Measured
from qwen3vl_export.bench.points import Point, parse_size, size_text
from qwen3vl_export.reports.environment import Environment
from runtime.errors import UsageError
from runtime.files import parse_json_object, read_small_file
from runtime.manifest import Manifest
from runtime.shown import shown

METRICS = {"ttft_s": "TTFT", "tpot_s": "TPOT"}
"""What is compared, and its name: times, of which more is worse."""

MAX_FILE_BYTES = 64 << 20
_LEAST_S, _MOST_S = 1e-9, 1e9
"""Others were not measured, and their ratios are no numbers."""
_POINT = ("image_size", "images", "text_tokens", "new_tokens", "batch")
_REMEDY = "give a file that `qwen3vl bench --output json` or `--output jsonl` wrote"


@dataclass(frozen=True)
class Times:
    """Seconds of the repetitions of one point, in their order."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, interpolated."""
        low, high = np.percentile(self.samples, [25, 75])
        return float(low), float(high)

    @property
    def p90(self) -> float:
        """The time that nine of ten do not exceed, interpolated."""
        return float(np.percentile(self.samples, 90))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        first, third = self.quartiles
        return {"median": self.median, "q1": first, "q3": third, "p90": self.p90, "samples": list(self.samples)}


@dataclass(frozen=True)
class EngineFacts:
    """What an engine is, and how it was opened.

    Attributes:
        engine: Its name in the results.
        target: What it was built for.
        model: The checkpoint that it was built from, as it was named then.
        files_sha256: Of the hashes of all its files, so that another build is seen.
        device: Where it runs.
        threads: That compute.
        load_s: Seconds to open it.
        decode_recorded: Whether decode steps ran as a CUDA graph; None on a CPU.
        decode_kernels: Whose kernels decode; None but on a GPU with ONNX Runtime.
        memory_bytes: Most bytes of each part, by estimate.
        tuning: Settings of `qwen3vl tune` that it was opened with.
    """

    engine: str
    target: str
    model: str
    files_sha256: str
    device: str
    threads: int
    load_s: float
    decode_recorded: bool | None
    decode_kernels: str | None
    memory_bytes: Mapping[str, int]
    tuning: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A point on one engine; the median of what a field of `Repetition` is, unless it says more.

    Attributes:
        engine: The engine.
        point: What was asked.
        prompt_tokens: Of a prompt.
        visual_tokens: How many of them come from images.
        cached_tokens: How many were found in a cache; as in `Repetition`.
        warmup_s: Latency of the repetition that does not count.
        ttft_s, tpot_s, latency_s: Of all repetitions.
        phases_s: What the time to the first token consists of.
        rss_peak_bytes: Most resident memory of the process so far, which all engines share; None if it is not known.
        environment: Machine, libraries, and the load before.
    """

    engine: EngineFacts
    point: Point
    prompt_tokens: int
    visual_tokens: int
    cached_tokens: int
    warmup_s: float
    ttft_s: Times
    tpot_s: Times
    latency_s: Times
    phases_s: Mapping[str, float]
    rss_peak_bytes: int | None
    environment: Environment

    @classmethod
    def of(
        cls,
        engine: EngineFacts,
        point: Point,
        measured: Measured,
        environment: Environment,
        rss_peak_bytes: int | None = None,
    ) -> Result:
        """Return the result of a point."""
        repetitions = measured.repetitions

        def middle(name: str) -> int:
            return int(statistics.median(getattr(each, name) for each in repetitions))

        return cls(
            engine=engine,
            point=point,
            prompt_tokens=middle("prompt_tokens"),
            visual_tokens=middle("visual_tokens"),
            cached_tokens=middle("cached_tokens"),
            warmup_s=measured.warmup.latency_s,
            **{
                name: Times(tuple(getattr(each, name) for each in repetitions))
                for name in ("ttft_s", "tpot_s", "latency_s")
            },
            phases_s={name: statistics.median(each.phases_s[name] for each in repetitions) for name in PHASES},
            rss_peak_bytes=rss_peak_bytes,
            environment=environment,
        )

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of all answers of a batch together, while they decode."""
        return self.point.batch / self.tpot_s.median

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        point = self.point
        return {
            **asdict(self.engine),
            "image_size": size_text(point.image_size),
            **{name: getattr(point, name) for name in _POINT[1:]},
            **{name: getattr(self, name) for name in ("prompt_tokens", "visual_tokens", "cached_tokens")},
            "runs": len(self.ttft_s.samples),
            "warmup_s": self.warmup_s,
            **{name: getattr(self, name).to_dict() for name in ("ttft_s", "tpot_s", "latency_s")},
            "tokens_per_s": self.tokens_per_s,
            "phases_s": dict(self.phases_s),
            "rss_peak_bytes": self.rss_peak_bytes,
            "environment": self.environment.to_dict(),
        }


def files_sha256(manifest: Manifest) -> str:
    """Return a hash of the names and hashes of an engine's files."""
    records = "".join(f"{name} {record.sha256}\n" for name, record in sorted(manifest.files.items()))
    return hashlib.sha256(records.encode()).hexdigest()


@dataclass(frozen=True)
class Earlier:
    """A point of an earlier file.

    Attributes:
        engine: Name of the engine.
        point: What was asked.
        samples: Seconds of the repetitions, by the names of `METRICS`.
        values: All that the file says of it.
    """

    engine: str
    point: Point
    samples: Mapping[str, tuple[float, ...]]
    values: Mapping[str, Any]

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Earlier:
        """Return a point of what `Result.to_dict` returned.

        Args:
            values: Of JSON.
            where: What errors call it.

        Raises:
            UsageError: It is of another form.
        """
        if not (isinstance(values.get("engine"), str) and isinstance(values.get("environment"), dict)):
            _refuse(where, "no point of a sweep: `engine` or `environment` is missing")
        numbers = {name: values.get(name) for name in _POINT[1:]}
        if not all(type(value) is int and value >= 0 for value in numbers.values()):
            _refuse(where, f"no point of a sweep: {', '.join(numbers)} are not all whole numbers")
        size = values.get("image_size")
        samples = {name: _samples(values.get(name), f"{where}.{name}") for name in METRICS}
        point = Point(image_size=_size(size, numbers["images"], where), **numbers)  # type: ignore[arg-type]
        return cls(values["engine"], point, samples, values)


def read_earlier(file: Path) -> list[Earlier]:
    """Return the points of a file that `--output json` or `jsonl` wrote.

    Raises:
        UsageError: It cannot be read, is of another form, or holds a point twice.
    """
    contents = read_small_file(file, max_bytes=MAX_FILE_BYTES, error=UsageError, remedy=_REMEDY)
    lines = [line for line in contents.splitlines() if line.strip()]
    try:
        is_lines = all(isinstance(json.loads(line), dict) for line in lines[:2])
    except (ValueError, RecursionError):
        is_lines = False  # one value over several lines
    texts = dict(enumerate(lines, start=1)) if is_lines else {1: contents}
    found: list[Earlier] = []
    for number, text in texts.items():
        where = f"{file}:{number}"
        values = parse_json_object(text, where, error=UsageError, remedy=_REMEDY)
        points = values.get("points", [values])
        if not isinstance(points, list):
            _refuse(where, "`points` is no list")
        for index, each in enumerate(points):
            place = f"{where}: points[{index}]" if "points" in values else where
            if not isinstance(each, dict):
                _refuse(place, "no object")
            found.append(Earlier.parse(each, place))
    if not found:
        _refuse(str(file), "it holds no point")
    _check_once(file, found)
    return found


def _check_once(file: Path, found: Sequence[Earlier]) -> None:
    seen: set[tuple[str, Point]] = set()
    for each in found:
        if (each.engine, each.point) in seen:
            raise UsageError(
                f"{file} holds {shown(each.engine)} at {each.point.name} twice",
                remedy="compare with one run: cut the lines of the other out",
            )
        seen.add((each.engine, each.point))


def _size(value: Any, images: Any, where: str) -> tuple[int, int] | None:
    try:
        size = parse_size(value) if isinstance(value, str) else None
    except UsageError:
        size = None
    if (size is None) != (value is None):
        _refuse(where, f"image_size is {shown(value)}, expected WIDTHxHEIGHT or null")
    if (size is None) != (images == 0):
        _refuse(where, f"images is {shown(images)}, and image_size is {shown(value)}")
    return size


def _samples(value: Any, where: str) -> tuple[float, ...]:
    samples = value.get("samples") if isinstance(value, dict) else None
    if not isinstance(samples, list) or not samples:
        _refuse(where, "it holds no samples")
    if not all(type(each) in (int, float) and _LEAST_S <= each <= _MOST_S for each in samples):
        _refuse(where, f"samples are not all numbers of seconds from {_LEAST_S:g} to {_MOST_S:g}")
    return tuple(map(float, samples))


def _refuse(where: str, reason: str) -> NoReturn:
    raise UsageError(f"{where}: {reason}", remedy=_REMEDY)

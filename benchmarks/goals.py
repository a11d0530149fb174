"""Figures that were asked for, beside those reached; from the result files alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import export, imports, run
from benchmarks.compare.tables import bytes_per_s
from benchmarks.compare.workloads import DECODE, Point
from benchmarks.result_files import Results, markdown


@dataclass(frozen=True)
class Goal:
    """A figure that was asked for.

    Attributes:
        what: What is measured.
        limit: The figure asked, in `unit`.
        unit: The unit, with its space.
        value: The figure reached, of all results by name; KeyError where a result or a side is not there.
        is_minimum: More is better.
        on_huge_pages: The same figure of the same engine on huge pages; it is shown, and not judged.
    """

    what: str
    limit: float
    unit: str
    value: Callable[[Results], float]
    is_minimum: bool = False
    on_huge_pages: Callable[[Results], float] | None = None

    def row(self, results: Results) -> tuple[str, str, str, str]:
        """Return the cells what, asked, reached, verdict."""
        asked = f"{'≥' if self.is_minimum else '≤'} {self.limit:g}{self.unit}"
        value, other = (_found(function, results) for function in (self.value, self.on_huge_pages))
        reached = "not measured" if value is None else self._text(value)
        if other is not None:
            reached += f"; huge pages {self._text(other)}"
        if value is None:
            return self.what, asked, reached, ""
        is_reached = value >= self.limit if self.is_minimum else value <= self.limit
        return self.what, asked, reached, "yes" if is_reached else "**no**"

    def _text(self, value: float) -> str:
        is_near = abs(value - self.limit) < 0.02 * self.limit  # where two decimals could hide the verdict
        return f"{value:.{4 if is_near else 3}g}{self.unit}"


def _found(value: Callable[[Results], float] | None, results: Results) -> float | None:
    try:
        return None if value is None else value(results)
    except KeyError:
        return None


_FP32 = "ort-cpu-fp32"
_GRAPHS_2B, _GRAPHS_32B = (f"export-qwen3-vl-{size}-{_FP32}-no-weights" for size in ("2b", "32b"))
_EXPORT_2B, _RUN_2B = (f"{what}-qwen3-vl-2b-{_FP32}" for what in ("export", "run"))
_IMPORT = "from qwen3_vl import Qwen3VLModel"  # more than the lazy `import qwen3_vl`

GOALS = (
    Goal("2B, graphs without weights: wall time", 25, " s", lambda r: export.median(r[_GRAPHS_2B], "wall_s")),
    Goal(
        "32B, graphs without weights: wall time beyond that of 2B",
        3,
        " s",
        lambda r: export.median(r[_GRAPHS_32B], "wall_s") - export.median(r[_GRAPHS_2B], "wall_s"),
    ),
    Goal("2B, graphs without weights: peak RSS", 2, " GB", lambda r: export.peak_bytes(r[_GRAPHS_2B]) / 1e9),
    Goal("2B, export in fp32: CPU time", 75, " s", lambda r: export.median(r[_EXPORT_2B], "cpu_s")),
    Goal("2B, export in fp32: peak RSS", 2, " GB", lambda r: export.peak_bytes(r[_EXPORT_2B]) / 1e9),
    Goal("2B, engine in fp32: prefill", 1, " × PyTorch", lambda r: run.speed(r[_RUN_2B], "prefill"), True),
    Goal("2B, engine in fp32: decode", 1, " × PyTorch", lambda r: run.speed(r[_RUN_2B], "decode"), True),
    Goal("Import of `Qwen3VLModel`", 0.3, " s", lambda r: imports.added_s(r["import"], _IMPORT)),
    Goal(
        "Import of `Qwen3VLModel`: torch, transformers, ONNX libraries",
        0,
        " loaded",
        lambda r: len(r["import"]["imports"][_IMPORT]["heavy_modules"]),
    ),
)

_COMPARE = "compare-qwen3-vl-2b"
# A run of fewer sides, ours on default pages among them; the other one has more peers, and ours on huge pages alone.
_PAGES = "compare-qwen3-vl-2b-pages"
_INT4, _INT4P8 = "ort-cpu-int4", "ort-cpu-int4p8"
_BLOCK_32, _BLOCK_128 = ("genai-int4-b32",), ("genai-int4-b128", "genai-int4-b128-pruned")
_OPENVINO = ("openvino-int4",)


def _goal(
    what: str,
    limit: float,
    unit: str,
    target: str,
    value: Callable[..., float],
    *more: Any,
    is_minimum: bool = False,
    depends_on_pages: bool = True,
) -> Goal:
    """Return a goal of the first comparison that has its sides.

    `value` takes the result, the name of one of our sides, and `more`.
    """

    def of(side: str) -> Callable[[Results], float]:
        def first(results: Results) -> float:
            for name in (_PAGES, _COMPARE):
                with contextlib.suppress(KeyError):
                    return value(results[name], side, *more)
            raise KeyError(side)

        return first

    on_huge_pages = of(f"{target}-huge-pages") if depends_on_pages else None
    return Goal(f"2B, `{target}`: {what}", limit, unit, of(target), is_minimum, on_huge_pages)


def _times_as_fast(result: Mapping[str, Any], side: str, peers: tuple[str, ...], point: str) -> float:
    """Return how many times as fast as the fastest of some peers one of our sides is."""
    measured = [peer for peer in peers if peer in result["sides"]]
    if not measured:
        raise KeyError(f"none of {peers} was measured")
    return min(_median(result, peer, point) for peer in measured) / _median(result, side, point)


def _time_over(result: Mapping[str, Any], side: str, peers: tuple[str, ...], point: str) -> float:
    return 1 / _times_as_fast(result, side, peers, point)


def _median(result: Mapping[str, Any], side: str, point: str) -> float:
    return float(result["sides"][side]["points"][point]["median_s"])


def _divergence_ratio(result: Mapping[str, Any], side: str, peer: str) -> float:
    ours, theirs = (result["sides"][name]["divergence"]["mean_kl"] for name in (side, peer))
    return float(ours / theirs)


def _memory_share(result: Mapping[str, Any], side: str, point: Point) -> float:
    ceiling = float(result["ceilings"]["memory_bytes_per_s"])
    return 100 * bytes_per_s(point, result["sides"][side]) / ceiling


def _first_token(result: Mapping[str, Any], side: str) -> float:
    """Return our time from an image to the first token over that of the fastest peer that sees the same image.

    Raises:
        KeyError: No such peer was measured, or not PyTorch in bfloat16, which was the fastest wherever it took part.
    """
    result["sides"]["pytorch-bf16"]
    peers = [each for each in result["sides"].values() if not each["is_ours"] and each["has_vision"]]
    # The image has 3072 patches: a side that is done before its own vision tower could be has shrunk it.
    same = [each for each in peers if each["image"]["median_s"] > each["points"]["vision-3072-b1"]["median_s"]]
    if not same:
        raise KeyError("no peer sees the same image")
    ours = float(result["sides"][side]["image"]["median_s"])
    return ours / min(float(each["image"]["median_s"]) for each in same)


def _load(result: Mapping[str, Any], side: str) -> float:
    return float(result["sides"][side]["load_s"])


def _rss_without_cache(result: Mapping[str, Any], side: str) -> float:
    values = result["sides"][side]
    return float(values["peak_rss_bytes"] - values["cache_bytes"]) / 1e9


def _export(result: Mapping[str, Any], side: str, value: str, unit: float) -> float:
    return float(result["sides"][side]["export"][value]) / unit


QUANTISED_GOALS = (
    *(
        _goal(
            f"{what} against onnxruntime-genai {build}",
            least,
            " ×",
            target,
            _times_as_fast,
            peers,
            point,
            is_minimum=True,
        )
        for target in (_INT4, _INT4P8)
        for build, peers, what, point, least in (
            ("block 128", _BLOCK_128, "decode behind 512 tokens", "decode-512-b1", 1.1),
            ("block 128", _BLOCK_128, "prefill of 512 tokens", "prefill-512-b1", 1.25),
            ("block 32", _BLOCK_32, "decode behind 512 tokens", "decode-512-b1", 1.3),
            ("block 32", _BLOCK_32, "prefill of 512 tokens", "prefill-512-b1", 1.8),
        )
    ),
    *(
        _goal(
            f"decode behind {size} tokens, share of the memory ceiling",
            80,
            " %",
            _INT4,
            _memory_share,
            Point(DECODE, size),
            is_minimum=True,
        )
        for size in (0, 512)
    ),
    _goal(
        "mean KL to float32, over that of onnxruntime-genai block 32",
        1,
        " ×",
        _INT4,
        _divergence_ratio,
        *_BLOCK_32,
        depends_on_pages=False,
    ),
    _goal("vision, 3072 patches, over OpenVINO", 1.2, " ×", _INT4, _time_over, _OPENVINO, "vision-3072-b1"),
    *(
        goal
        for target in (_INT4, _INT4P8)
        for goal in (
            _goal("image to first token, over the fastest peer on the same image", 1, " ×", target, _first_token),
            _goal("ready, files in the page cache", 3, " s", target, _load),
            _goal("peak RSS but the KV cache", 1.8, " GB", target, _rss_without_cache),
            _goal("wall time of the export", 60, " s", target, _export, "wall_s", 1, depends_on_pages=False),
            _goal("peak RSS of the export", 2, " GB", target, _export, "peak_rss_bytes", 1e9, depends_on_pages=False),
        )
    ),
)


def _rss_beyond_weights(result: Mapping[str, Any]) -> float:
    """Return the GB of the peak beyond the files of the engine and the cache."""
    values = result["sides"][_INT4]
    return float(values["peak_rss_bytes"] - values["export"]["size_bytes"] - values["cache_bytes"]) / 1e9


_GRAPHS_INT4 = "export-qwen3-vl-{}-ort-cpu-int4-no-weights"
_EXPORT_30B, _COMPARE_30B = "export-qwen3-vl-30b-a3b-ort-cpu-int4", "compare-qwen3-vl-30b-a3b"
EXPERTS_GOALS = (
    Goal(
        "30B-A3B, `ort-cpu-int4`: peak RSS of the export", 4, " GB", lambda r: export.peak_bytes(r[_EXPORT_30B]) / 1e9
    ),
    Goal(
        "235B-A22B, `ort-cpu-int4`, graphs without weights: wall time beyond that of 2B",
        5,
        " s",
        lambda r: (
            export.median(r[_GRAPHS_INT4.format("235b-a22b")], "wall_s")
            - export.median(r[_GRAPHS_INT4.format("2b")], "wall_s")
        ),
    ),
    Goal(
        "4 layers of 30B-A3B, `ort-cpu-int4`: peak RSS but weights on disk and KV cache",
        1,
        " GB",
        lambda r: _rss_beyond_weights(r[f"{_COMPARE_30B}-4-layers"]),
    ),
    Goal(
        "30B-A3B, `ort-cpu-int4`: peak RSS but weights on disk and KV cache",
        1,
        " GB",
        lambda r: _rss_beyond_weights(r[_COMPARE_30B]),
    ),
)


def table(results: Results) -> str:
    """Return figure asked against figure reached."""
    asked = (*GOALS, *QUANTISED_GOALS, *EXPERTS_GOALS)
    return markdown([("figure", "asked", "reached", "met"), *(goal.row(results) for goal in asked)])

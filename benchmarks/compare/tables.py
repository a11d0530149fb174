"""The comparison as Markdown; made from the JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.compare.workloads import DECODE, PREFILL, VISION, Point, operations
from benchmarks.result_files import markdown
from benchmarks.synthetic import holes_note

_EMPTY = "–"
_COSTS = (
    "side",
    "export, s",
    "export peak, GB",
    "size, GB",
    "load, s",
    "image to first token, s (n)",
    "peak RSS less KV cache, GB",
    "KV cache, GB",
    "mean KL",
    "top-1, %",
)


def render(result: Mapping[str, Any]) -> str:
    """Return the body of the report."""
    parts = [
        _intro(result),
        "## Cost and accuracy\n",
        costs_table(result),
        _versions(result),
        "## Speed\n\nVision in seconds; prefill and decode in tokens a second, of all sequences together.\n",
        points_table(result, _speed),
        "## Share of the measured ceilings, %\n\n"
        "Decode: bytes of weights and cache that a step must read, a second, over the memory ceiling. Vision and "
        "prefill: operations that the result needs, a second, over the ceiling of int8 products.\n",
        points_table(result, _share),
    ]
    if result["missing"]:
        parts += ["## Not measured\n", *(f"- {name}: {reason}" for name, reason in result["missing"].items()), ""]
    return "\n".join(parts)


def costs_table(result: Mapping[str, Any]) -> str:
    """Return one row for each side: export, load, image to first token, memory, divergence."""
    rows: list[tuple[str, ...]] = [_COSTS]
    for name, side in result["sides"].items():
        export, divergence = side["export"], side.get("divergence")
        without_cache = side["peak_rss_bytes"] - side["cache_bytes"]
        star = "" if export is None or export["is_of_this_run"] else " (earlier)"
        rows.append(
            (
                name,
                _EMPTY if export is None else f"{export['wall_s']:.0f}{star}",
                _EMPTY if export is None else f"{export['peak_rss_bytes'] / 1e9:.1f}",
                _EMPTY if export is None else f"{export['size_bytes'] / 1e9:.2f}",
                f"{side['load_s']:.1f}",
                f"{side['image']['median_s']:.2f} ({len(side['image']['all_s'])})" if side["has_vision"] else _EMPTY,
                f"{without_cache / 1e9:.2f}",
                f"{side['cache_bytes'] / 1e9:.2f}",
                f"{divergence['mean_kl']:.2g}" if divergence else _EMPTY,
                f"{100 * divergence['top1']:.1f}" if divergence else _EMPTY,
            )
        )
    return markdown(rows)


def points_table(result: Mapping[str, Any], cell: Callable[[Point, Mapping[str, Any], Mapping[str, Any]], str]) -> str:
    """Return one row for each point and one column for each side; `cell` takes point, side and result.

    The second column, n, has the least and the greatest number of timed calls of a side.
    """
    rows = [("", "n", *result["sides"])]
    for values in result["points"]:
        point = Point(**values)
        cells = (
            cell(point, side, result) if point.name in side["points"] else _EMPTY for side in result["sides"].values()
        )
        rows.append((title(point), _calls(point, result), *cells))
    return markdown(rows)


def title(point: Point) -> str:
    """Return how a point is called in tables and plots."""
    names = {VISION: f"vision, {point.size} patches", PREFILL: f"prefill {point.size}"}
    text = names.get(point.phase, f"decode, cache {point.size}")
    return text if point.batch == 1 else f"{text}, batch {point.batch}"


def tokens_per_s(point: Point, side: Mapping[str, Any]) -> float:
    """Return the tokens a second of a prefill or a decode step, of all sequences together."""
    new = point.size if point.phase == PREFILL else 1
    return float(point.batch * new / side["points"][point.name]["median_s"])


def operations_per_s(point: Point, side: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """Return the needed operations a second at a point."""
    return float(operations(point, config) / side["points"][point.name]["median_s"])


def bytes_per_s(point: Point, side: Mapping[str, Any]) -> float:
    """Return the bytes of weights and of cached keys and values a second at a decode step."""
    read = side["decoder_bytes"] + point.batch * point.size * side["cache_token_bytes"]
    return float(read / side["points"][point.name]["median_s"])


def _calls(point: Point, result: Mapping[str, Any]) -> str:
    sides = [side["points"] for side in result["sides"].values()]
    counts = {len(points[point.name]["all_s"]) for points in sides if point.name in points}
    return "–".join(str(count) for count in sorted({min(counts), max(counts)})) if counts else _EMPTY


def _speed(point: Point, side: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if point.phase == VISION:
        return f"{side['points'][point.name]['median_s']:.2f}"
    return f"{tokens_per_s(point, side):.1f}"


def _share(point: Point, side: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    ceilings, config = result["ceilings"], result["config"]
    if point.phase == DECODE:
        return f"{100 * bytes_per_s(point, side) / ceilings['memory_bytes_per_s']:.0f}"
    return f"{100 * operations_per_s(point, side, config) / ceilings['int8_operations_per_s']:.0f}"


def _intro(result: Mapping[str, Any]) -> str:
    ceilings, settings = result["ceilings"], result["settings"]
    return (
        f"One synthetic checkpoint ({result['model']}), {settings['threads']} threads, each side in a process of its "
        f"own, one after the other. Times are medians of n calls after one of warm-up: at least "
        f"{settings['min_repeats']}, and up to {settings['max_repeats']} while they take less than "
        f"{settings['budget_s']:g} s; prompts of 2048 tokens or of several sequences once.{holes_note(result)}\n\n"
        f"{result.get('note', '')}"
        "All sides run on the pages that the system gives them; only those called huge-pages open the same engine "
        "with `huge_pages`, whose seconds count as load time. The load time is that of a process that follows another "
        "one that read the same files.\n\n"
        f"Measured ceilings: memory {ceilings['memory_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"products {ceilings['fp32_operations_per_s'] / 1e9:.0f} (fp32) and "
        f"{ceilings['int8_operations_per_s'] / 1e9:.0f} (int8) giga-operations a second.\n\n"
        "KL is in nats, from the next-token distributions of PyTorch fp32 on a few texts; weights are random, so it "
        "compares roundings and says nothing about tasks. Peak memory is that of a process that loads, and answers one "
        "image of 1024 × 768 pixels; pages of mapped files count. onnxruntime-genai's builder writes no vision tower: "
        "there, a text of as many tokens takes the place of the image.\n"
    )


def _versions(result: Mapping[str, Any]) -> str:
    sides = result["sides"].items()
    listed = {", ".join(f"{name} {version}" for name, version in side["versions"].items()): None for _, side in sides}
    return f"Libraries of the sides: {'; '.join(listed)}.\n"

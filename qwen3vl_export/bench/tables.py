"""A sweep as text: Markdown, CSV, JSON and JSON Lines; one point as a few lines, or as one flat object."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen3vl_export.bench.compare import Comparison
from qwen3vl_export.bench.points import Point, size_text
from qwen3vl_export.bench.results import METRICS, Result, Times
from runtime.shown import columns, escape_controls

_FLAT = (
    *("engine", "target", "model", "device", "threads", "load_s", "image_size", "images", "text_tokens"),
    *("prompt_tokens", "visual_tokens", "new_tokens", "batch", "runs", "warmup_s"),
)
_TIMES = ("ttft_s", "tpot_s", "latency_s")
_PARTS = ("median", "q1", "q3", "p90")
_OF_ENVIRONMENT = ("cpu", "isa", "cores", "system", "load_average")
HEADERS = (
    *("engine", "target", "images", "text tokens", "prompt tokens", "new tokens", "batch"),
    *("TTFT ms", "TPOT ms", "tokens/s"),
)
NUMBERS = HEADERS[3:]
_GRAPH = {True: ", as a CUDA graph", False: ", without a CUDA graph", None: ""}


def milliseconds(times: Times) -> str:
    """Return the median, and in brackets the quartiles."""
    first, third = times.quartiles
    return f"{1e3 * times.median:.4g} [{1e3 * first:.4g}–{1e3 * third:.4g}]"


def images_of(point: Point) -> str:
    """Return the images of a prompt in words."""
    size = size_text(point.image_size)
    return "none" if size is None else f"{point.images} × {size}"


def rows(results: Sequence[Result]) -> list[list[str]]:
    """Return the cells of a table under `HEADERS`."""
    return [
        [
            each.engine.engine,
            each.engine.target,
            images_of(each.point),
            str(each.point.text_tokens),
            str(each.prompt_tokens),
            str(each.point.new_tokens),
            str(each.point.batch),
            milliseconds(each.ttft_s),
            milliseconds(each.tpot_s),
            f"{each.tokens_per_s:.4g}",
        ]
        for each in results
    ]


COMPARED_HEADERS = ("engine", "point", "time", "baseline ms", "ms", "ratio", "95 % interval", "verdict")
COMPARED_NUMBERS = COMPARED_HEADERS[3:7]


def compared_rows(comparison: Comparison) -> list[list[str]]:
    """Return the cells of a table under `COMPARED_HEADERS`."""
    return [
        [
            each.engine,
            each.point.name,
            METRICS[each.metric],
            f"{1e3 * each.baseline_s:.4g}",
            f"{1e3 * each.median_s:.4g}",
            f"{each.shift.ratio:.3f}",
            "-" if each.shift.low is None else f"{each.shift.low:.3f}–{each.shift.high:.3f}",
            each.shift.verdict.value,
        ]
        for each in comparison.rows
    ]


def notes_of(comparison: Comparison) -> list[str]:
    """Return what is not as it was, and what cannot be compared, a line each."""
    return [
        *comparison.changes,
        *(f"only in the earlier file: {engine}: {point.name}" for engine, point in comparison.only_earlier),
        *(f"not in the earlier file: {engine}: {point.name}" for engine, point in comparison.only_now),
    ]


def as_markdown(results: Sequence[Result], comparison: Comparison | None) -> str:
    """Return tables, with the environment below; medians with their quartiles."""
    parts = [_markdown_table(HEADERS, rows(results), NUMBERS)]
    runs = len(results[0].ttft_s.samples)
    parts.append(f"Medians of {runs} repetitions after one of warm-up, in brackets the quartiles.")
    if comparison is not None:
        parts += [_markdown_table(COMPARED_HEADERS, compared_rows(comparison), COMPARED_NUMBERS), comparison.summary]
        if notes := notes_of(comparison):
            parts.append("\n".join(f"- {_markdown_text(each)}" for each in notes))
    facts = results[0].environment.rows()
    parts.append("\n".join(f"- {name}: {_markdown_text(value)}" for name, value in facts))
    return "\n\n".join(parts)


def as_csv(results: Sequence[Result], comparison: Comparison | None) -> str:
    """Return a line for each point under one of names; without the single repetitions."""
    text = io.StringIO()
    lines = [_flat(each, comparison) for each in results]
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().rstrip("\n")


def as_json(results: Sequence[Result], comparison: Comparison | None) -> str:
    """Return one object with the points, and what the comparison says beside them."""
    values: dict[str, Any] = {"points": _points(results, comparison)}
    if comparison is not None:
        values["comparison"] = {
            "baseline": comparison.baseline,
            "summary": comparison.summary,
            "changes": list(comparison.changes),
            "only_earlier": [f"{engine}: {point.name}" for engine, point in comparison.only_earlier],
            "only_now": [f"{engine}: {point.name}" for engine, point in comparison.only_now],
        }
    return _dump(values)


def as_json_lines(results: Sequence[Result], comparison: Comparison | None) -> str:
    """Return an object on a line for each point."""
    return "\n".join(map(_dump, _points(results, comparison)))


def as_lines(result: Result) -> str:
    """Return what people want to see of one point."""
    engine = result.engine

    def spread(times: Times) -> str:
        first, third = (1e3 * each for each in times.quartiles)
        return f"quartiles {first:.4g} to {third:.4g} ms"

    batch = f", {result.point.batch} at once" if result.point.batch > 1 else ""
    ttft, runs = result.ttft_s, len(result.ttft_s.samples)
    facts = [
        ("device", f"{engine.device}, threads: {engine.threads}"),
        ("engine", f"{engine.target}, loaded in {engine.load_s:.2f} s"),
        ("prompt", f"{result.prompt_tokens} tokens, {result.visual_tokens} of them visual{batch}"),
        ("TTFT", f"p50 {1e3 * ttft.median:.1f} ms, p90 {1e3 * ttft.p90:.1f} ms, {spread(ttft)} ({runs} runs)"),
        ("TPOT", f"{1e3 * result.tpot_s.median:.2f} ms, {spread(result.tpot_s)}"),
        ("decode", f"{result.tokens_per_s:.1f} tokens/s{_GRAPH[engine.decode_recorded]}"),
    ]
    return "\n".join(columns(facts + ([("kernels", engine.decode_kernels)] if engine.decode_kernels else [])))


def flat_values(result: Result) -> dict[str, Any]:
    """Return what `--json` prints of one point."""
    engine = result.engine
    return {
        **{name: getattr(engine, name) for name in ("device", "threads", "target", "load_s")},
        **{name: getattr(engine, name) for name in ("decode_recorded", "decode_kernels")},
        **{name: getattr(result, name) for name in ("prompt_tokens", "visual_tokens")},
        "new_tokens": result.point.new_tokens,
        "runs": len(result.ttft_s.samples),
        "ttft_p50_s": result.ttft_s.median,
        "ttft_p90_s": result.ttft_s.p90,
        "tpot_s": result.tpot_s.median,
        "tokens_per_s": result.tokens_per_s,
    }


FORMATS: Mapping[str, Callable[[Sequence[Result], Comparison | None], str]] = {
    "md": as_markdown,
    "csv": as_csv,
    "json": as_json,
    "jsonl": as_json_lines,
}
"""What `--output` takes."""


def _points(results: Sequence[Result], comparison: Comparison | None) -> list[dict[str, Any]]:
    points = [each.to_dict() for each in results]
    if comparison is not None:
        for each, values in zip(results, points, strict=True):
            values["compared"] = comparison.of(each.engine.engine, each.point)
    return points


def _dump(value: Any) -> str:
    return json.dumps(value)  # of ASCII: names may hold control characters, and a surrogate that no UTF-8 can


def _flat(result: Result, comparison: Comparison | None) -> dict[str, Any]:
    values = result.to_dict()
    flat = {name: values[name] for name in _FLAT}
    flat |= {f"{part}_{name}" if part != "median" else name: values[name][part] for name in _TIMES for part in _PARTS}
    flat |= {"tokens_per_s": values["tokens_per_s"]}
    if comparison is not None:
        found = comparison.of(result.engine.engine, result.point) or {}
        for name in METRICS:
            for part in ("ratio", "low", "high", "verdict"):
                flat[f"{part}_{name}"] = found.get(name, {}).get(part)
    environment = values["environment"]
    flat |= {name: environment[name] for name in _OF_ENVIRONMENT}
    return flat | {f"version_{name}": version for name, version in environment["versions"].items()}


def _markdown_table(headers: Sequence[str], body: Sequence[Sequence[str]], numbers: Sequence[str]) -> str:
    marks = ["---:" if header in numbers else "---" for header in headers]
    lines = [headers, marks, *([_markdown_text(cell) for cell in row] for row in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_text(text: str) -> str:
    return escape_controls(text).replace("|", "\\|")

"""Tables of docs/mixture_of_experts.md, from the result files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import export, synthetic
from benchmarks.compare.tables import bytes_per_s, tokens_per_s
from benchmarks.compare.workloads import DECODE, PREFILL, Point
from benchmarks.result_files import Results, kind, markdown

_COMPARED = ("compare-qwen3-vl-30b-a3b-4-layers", "compare-qwen3-vl-30b-a3b")
_STEPS = (Point(DECODE, 0), Point(DECODE, 512))
_PROMPT = Point(PREFILL, 512)
_HEAD = [
    "layers of 30B-A3B",
    "target",
    "decode, cache 0, tokens/s (share of memory's)",
    "decode, cache 512",
    "prefill 512, tokens/s",
    "MB a token",
    "load, s",
    "on disk, GB",
    "KV cache, GB",
    "peak RSS, GB",
    "beyond both, GB",
]


def tables(results: Results) -> str:
    """Return the tables of whole models and of exports, of those results that are there."""
    parts = []
    compared = [results[name] for name in _COMPARED if name in results]
    if compared:
        parts.append(model_table(compared))
    exports = [result for name, result in results.items() if kind(name) == "export" and "checkpoint_bytes" in result]
    exports = [result for result in exports if result["target"] == "ort-cpu-int4"]
    if exports:
        parts.append(export_rows(exports))
    return "\n".join(parts)


def model_table(compared: Sequence[Mapping[str, Any]]) -> str:
    """Return one row for each side of each run: speeds, share of the memory's bandwidth, memory."""
    rows: list[list[str]] = [_HEAD]
    notes = []
    for result in compared:
        ceiling = result["ceilings"]["memory_bytes_per_s"]
        layers = str(result["config"]["text_config"]["num_hidden_layers"])
        for name, side in result["sides"].items():
            steps = [
                f"{tokens_per_s(step, side):.1f} ({100 * bytes_per_s(step, side) / ceiling:.0f} %)" for step in _STEPS
            ]
            prompt = f"{tokens_per_s(_PROMPT, side):.0f}"
            read = f"{side['decoder_bytes'] / 1e6:.0f}"
            sizes = side["export"]["size_bytes"], side["cache_bytes"], side["peak_rss_bytes"]
            memory = [f"{size / 1e9:.2f}" for size in (*sizes, sizes[2] - sizes[1] - sizes[0])]
            rows.append([layers, name, *steps, prompt, read, f"{side['load_s']:.1f}", *memory])
        reached = f"{layers} layers: reading memory reached {ceiling / 1e9:.1f} GB/s in the same run."
        notes.append(reached + synthetic.holes_note(result))
    return (
        f"{compared[0]['settings']['threads']} threads. {' '.join(notes)} "
        "Each step is another token. The peak is that of an answer to an image of 1024 × 768 pixels.\n\n"
        f"{markdown(rows)}"
    )


def export_rows(exports: list[Mapping[str, Any]]) -> str:
    """Return one row for each export."""
    rows = [("export", "target", "weights", "checkpoint, GB", "wall, s", "CPU, s", "GB/s", "peak RSS, GB")]
    for result in exports:
        wall, size = export.median(result, "wall_s"), result["checkpoint_bytes"]
        rate = "" if result["no_weights"] else f"{size / wall / 1e9:.3f}"
        rows.append(
            (
                result["model"],
                result["target"],
                _weights(result),
                f"{size / 1e9:.1f}",
                f"{wall:.1f}",
                f"{export.median(result, 'cpu_s'):.1f}",
                rate,
                f"{export.peak_bytes(result) / 1e9:.2f}",
            )
        )
    return markdown(rows)


def _weights(result: Mapping[str, Any]) -> str:
    if synthetic.has_holes(result):
        return f"{synthetic.written(result)}, else zeros in holes"
    return "no" if result["no_weights"] else "yes"

"""Write results as JSON and as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


def write(name: str, result: Mapping[str, Any], table: str, folder: Path = RESULTS) -> Path:
    """Write `name.json` and `name.md` and return the path of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    path = folder / f"{name}.md"
    path.write_text(f"# {name}\n\n{table}\n{_environment_line(result['environment'])}\n", encoding="utf-8")
    return path


def export_table(result: Mapping[str, Any]) -> str:
    """Return one row for each run of an export."""
    lines = ["| model | weights | wall, s | CPU, s | peak RSS, GB | output, MB |", "|---|---|---|---|---|---|"]
    for run in result["runs"]:
        cells = (
            result["model"],
            "no" if result["no_weights"] else "yes",
            f"{run['wall_s']:.1f}",
            f"{run['cpu_s']:.1f}",
            f"{run['peak_rss_bytes'] / 1e9:.2f}",
            f"{run['output_bytes'] / 1e6:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def inference_table(result: Mapping[str, Any]) -> str:
    """Return one row for each phase, engine against PyTorch."""
    engine, torch = result["engine"], result["torch"]
    lines = [
        f"{engine['prompt_tokens']} prompt tokens, {engine['visual_tokens']} of them visual; "
        f"{result['workload']['threads']} threads; median of {result['workload']['repeats']} repeats "
        f"({result['workload']['decode_steps']} decode steps).",
        "",
        f"| {result['model']} | engine, s | PyTorch fp32, s | PyTorch / engine |",
        "|---|---|---|---|",
    ]
    for phase in ("vision", "prefill", "decode"):
        ours, theirs = engine[phase]["median_s"], torch[phase]["median_s"]
        lines.append(f"| {phase} | {ours:.4f} | {theirs:.4f} | {theirs / ours:.2f} |")
    lines.append(
        f"| load | {engine['load_s']:.1f} | {torch['load_s']:.1f} | {torch['load_s'] / engine['load_s']:.2f} |"
    )
    rss = [side["peak_rss_bytes"] / 1e9 for side in (engine, torch)]
    lines.append(f"| peak RSS, GB | {rss[0]:.2f} | {rss[1]:.2f} | {rss[1] / rss[0]:.2f} |")
    return "\n".join(lines) + "\n"


def _environment_line(environment: Mapping[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in environment["libraries"].items())
    return (
        f"{environment['cpu']}, {environment['cores']} cores, {environment['memory_bytes'] / 2**30:.0f} GiB, "
        f"{environment['system']}, Python {environment['python']}, {libraries}; "
        f"load average before the run {environment['load_average_1min']:.1f}."
    )

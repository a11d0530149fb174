"""Write what was measured into README.md and docs/benchmarks.md, from the result files alone.

A new result file, of a new target too, shows up without a change here. Each generated block stands between two
comments, `<!-- NAME: written by python -m benchmarks report -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configs
from benchmarks import plot, report
from benchmarks.compare import chart

ROOT = Path(__file__).resolve().parent.parent
DEMO = "demo checkpoint"
TASKS = ("read", "count", "where", "json")
_ACCURACY = "demo_accuracy"
_NOT_SHOWN = "tiny"  # a shape of the tests

Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Goal:
    """A figure that was asked for.

    Attributes:
        what: What is measured.
        limit: The figure asked, in `unit`.
        unit: The unit, with its space.
        inputs: Names of the results that `value` takes.
        value: The figure reached.
        is_minimum: More is better.
    """

    what: str
    limit: float
    unit: str
    inputs: tuple[str, ...]
    value: Callable[..., float]
    is_minimum: bool = False

    def row(self, results: Results) -> tuple[str, str, str, str]:
        """Return the cells what, asked, reached, verdict."""
        asked = f"{'≥' if self.is_minimum else '≤'} {self.limit:g}{self.unit}"
        if not results.keys() >= set(self.inputs):
            return self.what, asked, "not measured", ""
        value = self.value(*(results[name] for name in self.inputs))
        is_reached = value >= self.limit if self.is_minimum else value <= self.limit
        return self.what, asked, f"{value:.3g}{self.unit}", "yes" if is_reached else "**no**"


_FP32 = "ort-cpu-fp32"
_GRAPHS_2B, _GRAPHS_32B = (f"export-qwen3-vl-{size}-{_FP32}-no-weights" for size in ("2b", "32b"))
_EXPORT_2B, _RUN_2B = (f"{what}-qwen3-vl-2b-{_FP32}" for what in ("export", "run"))
_IMPORT = "from qwen3_vl import Qwen3VLModel"  # more than the lazy `import qwen3_vl`

GOALS = (
    Goal("2B, graphs without weights: wall time", 25, " s", (_GRAPHS_2B,), lambda r: report.export_median(r, "wall_s")),
    Goal(
        "32B, graphs without weights: wall time beyond that of 2B",
        3,
        " s",
        (_GRAPHS_2B, _GRAPHS_32B),
        lambda small, large: report.export_median(large, "wall_s") - report.export_median(small, "wall_s"),
    ),
    Goal("2B, graphs without weights: peak RSS", 2, " GB", (_GRAPHS_2B,), lambda r: report.export_peak_bytes(r) / 1e9),
    Goal("2B, export in fp32: CPU time", 75, " s", (_EXPORT_2B,), lambda r: report.export_median(r, "cpu_s")),
    Goal("2B, export in fp32: peak RSS", 2, " GB", (_EXPORT_2B,), lambda r: report.export_peak_bytes(r) / 1e9),
    Goal("2B, engine in fp32: prefill", 1, " × PyTorch", (_RUN_2B,), lambda r: report.speed(r, "prefill"), True),
    Goal("2B, engine in fp32: decode", 1, " × PyTorch", (_RUN_2B,), lambda r: report.speed(r, "decode"), True),
    Goal("Import of `Qwen3VLModel`", 0.3, " s", ("import",), lambda r: report.added_s(r, _IMPORT)),
    Goal(
        "Import of `Qwen3VLModel`: torch, transformers, ONNX libraries",
        0,
        " loaded",
        ("import",),
        lambda r: len(r["imports"][_IMPORT]["heavy_modules"]),
    ),
)


def goals_table(results: Results) -> str:
    """Return figure asked against figure reached."""
    return report.table([("figure", "asked", "reached", "met"), *(goal.row(results) for goal in GOALS)])


def works_table(results: Results, accuracies: Mapping[str, Mapping[str, float]]) -> str:
    """Return model shapes against targets; a cell says what was shown.

    Args:
        results: What `report.load` returns.
        accuracies: Shares of right answers by target; those of PyTorch under the empty name.
    """
    exports = [result for name, result in results.items() if report.kind(name) == "export"]
    runs = [result for name, result in results.items() if report.kind(name) == "run"]
    measured = [*exports, *runs]
    targets = sorted({result["target"] for result in measured} | set(accuracies) - {""})
    models = {result["model"] for result in measured} | set(configs.names("models"))
    rows = [("model", *(f"`{target}`" for target in targets))]
    rows.append((DEMO, *(_accuracy(accuracies.get(target), accuracies.get("")) for target in targets)))
    for model in sorted(models - {_NOT_SHOWN}, key=_natural):
        cells = []
        for target in targets:
            here = [r for r in measured if (r["model"], r["target"]) == (model, target)]
            cells.append("<br>".join(map(_shown, here)) or "not measured")
        rows.append((f"`{model}`", *cells))
    return report.table(rows)


def read_accuracies(folder: Path) -> dict[str, dict[str, float]]:
    """Return the shares of right answers on the held-out canvases by target; those of PyTorch under the empty name."""
    return {
        path.stem.removeprefix(_ACCURACY).removeprefix("_"): json.loads(path.read_text(encoding="utf-8"))["all"]
        for path in sorted(folder.glob(f"{_ACCURACY}*.json"))
    }


def generated(root: Path = ROOT) -> dict[Path, str]:
    """Return the contents that all files with generated parts should have."""
    folder = root / "benchmarks" / "results"
    results = report.load(folder)
    files = {folder / f"{name}.md": report.render(name, result) for name, result in results.items()}
    files[folder / "speed.svg"] = plot.speeds([r for name, r in results.items() if report.kind(name) == "run"])
    files |= {folder / f"{name}.svg": chart.draw(r) for name, r in results.items() if report.kind(name) == "compare"}
    blocks = {
        root / "README.md": ("what works", works_table(results, read_accuracies(root / "docs"))),
        root / "docs" / "benchmarks.md": ("figures", goals_table(results)),
    }
    for path, (name, body) in blocks.items():
        files[path] = replace_block(path.read_text(encoding="utf-8"), name, body)
    return files


def replace_block(text: str, name: str, body: str) -> str:
    """Return `text` with `body` between the two comments of a block.

    Raises:
        ValueError: The comments do not occur exactly once.
    """
    start, end = f"<!-- {name}: written by python -m benchmarks report -->", f"<!-- end of {name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"expected each once: {start} and {end}")
    before, rest = text.split(start)
    return f"{before}{start}\n\n{body}\n{end}{rest.split(end)[1]}"


def _accuracy(shares: Mapping[str, float] | None, reference: Mapping[str, float] | None) -> str:
    if shares is None:
        return "not measured"
    parts = []
    for task in TASKS:
        beside = f" ({100 * reference[task]:.1f})" if reference else ""
        parts.append(f"{task} {100 * shares[task]:.1f} %{beside}")
    return "<br>".join(parts)


def _shown(result: Mapping[str, Any]) -> str:
    if "engine" in result:
        return "speed: " + ", ".join(f"{phase} {report.speed(result, phase):.2f} ×" for phase in report.PHASES)
    wall = f"{report.export_median(result, 'wall_s'):.0f} s"
    if result["no_weights"]:
        return f"graphs: {wall}"
    return f"export: {wall}, {report.export_peak_bytes(result) / 1e9:.1f} GB peak"


def _natural(name: str) -> list[str | int]:
    """Return a sort key that takes numbers as numbers: 2b before 30b."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

"""The largest magnitudes of a checkpoint's tensors beside the end of float16: table, plain values and plot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.disk import replaced_file

FLOAT16_MAX = 65504.0
_SHOWN_GROUPS = 24


@dataclass(frozen=True)
class TensorRange:
    """One tensor.

    Attributes:
        graph: `vision` or `decoder`.
        scope: Part of the model: `layers.3`, `blocks.3`, a module's name, or nothing for what belongs to no weight.
        op: Type of the node that computes it, or `weight`.
        name: Its name in the graph.
        max_abs: Its largest magnitude, over all prompts.
    """

    graph: str
    scope: str
    op: str
    name: str
    max_abs: float

    @property
    def is_weight(self) -> bool:
        """Whether it is a weight of the checkpoint."""
        return self.op == "weight"

    @property
    def headroom(self) -> float:
        """65504 over its largest magnitude: below 1, float16 does not hold it."""
        return FLOAT16_MAX / self.max_abs if self.max_abs else math.inf

    @property
    def fits(self) -> bool:
        """Whether float16 holds it; it does not hold a NaN."""
        return self.max_abs <= FLOAT16_MAX


@dataclass(frozen=True)
class RangeReport:
    """All tensors of a checkpoint, the largest first."""

    checkpoint: str
    tensors: tuple[TensorRange, ...]

    @property
    def passed(self) -> bool:
        """Whether there are tensors and float16 holds them all."""
        return bool(self.tensors) and all(each.fits for each in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; what is not finite becomes null."""
        return {
            "passed": self.passed,
            "checkpoint": self.checkpoint,
            "float16_max": FLOAT16_MAX,
            "tensors": [
                {
                    "graph": each.graph,
                    "scope": each.scope,
                    "op": each.op,
                    "name": each.name,
                    "max_abs": _finite(each.max_abs),
                    "headroom": _finite(each.headroom),
                    "fits": each.fits,
                }
                for each in self.tensors
            ],
        }

    def render(self) -> str:
        """Return a table in plain text: the largest tensor of each operator in each layer, and all beyond float16."""
        groups = list(self._groups())
        shown = [each for i, each in enumerate(groups) if i < _SHOWN_GROUPS or not each.fits]
        rows = [("graph", "part", "operator", "max |x|", "headroom", "", "tensor")]
        rows += [
            (
                each.graph,
                each.scope or "-",
                each.op,
                f"{each.max_abs:.4g}",
                f"{each.headroom:.3g}",
                "" if each.fits else "BEYOND",
                each.name,
            )
            for each in shown
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[6]]).rstrip() for row in rows]
        if hidden := len(groups) - len(shown):
            lines.append(f"{hidden} smaller rows are not shown; --json lists all {len(self.tensors)} tensors")
        return "\n".join([*lines, self._verdict()])

    def _groups(self) -> Iterator[TensorRange]:
        seen = set()
        for each in self.tensors:
            key = each.graph, each.scope, each.op
            if key not in seen or not each.fits:
                seen.add(key)
                yield each

    def _verdict(self) -> str:
        beyond = sum(not each.fits for each in self.tensors)
        what = "float16 holds every tensor" if not beyond else f"{beyond} tensors are BEYOND float16: take bfloat16"
        return f"{self.checkpoint}, {len(self.tensors)} tensors against {FLOAT16_MAX:.0f}: {what}"


def plot_ranges(report: RangeReport, file: Path) -> None:
    """Draw the largest magnitude of each layer's tensors and of its weights, as the suffix of `file` says.

    Raises:
        UsageError: matplotlib is not installed, or the suffix is not one it draws.
    """
    from qwen3vl_export.parity.layers import check_plot

    check_plot(file)
    import matplotlib
    from matplotlib.figure import Figure

    # The same ranges give the same file: no date, and names that do not depend on a random salt.
    with matplotlib.rc_context({"svg.hashsalt": "ranges", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for panel, graph, label in zip(panels, ("vision", "decoder"), ("block", "layer"), strict=True):
            for is_weight, name in ((False, "tensors"), (True, "weights")):
                series = _by_layer(report, graph, is_weight)
                panel.plot(series.keys(), series.values(), marker="o", label=name)
            panel.axhline(FLOAT16_MAX, color="black", linestyle="--", label="float16")
            panel.set_title(graph)
            panel.set_xlabel(label)
            panel.set_yscale("log")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.3, which="both")
        panels[0].set_ylabel("max |x|")
        panels[-1].legend()
        with replaced_file(file) as partial:
            figure.savefig(partial, metadata={"Date": None} if file.suffix == ".svg" else {})


def _by_layer(report: RangeReport, graph: str, is_weight: bool) -> dict[int, float]:
    found: dict[int, float] = {}
    for each in report.tensors:
        number = each.scope.rpartition(".")[2]
        if each.graph == graph and each.is_weight == is_weight and number.isdigit():
            found[int(number)] = max(each.max_abs, found.get(int(number), 0.0))
    return dict(sorted(found.items()))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

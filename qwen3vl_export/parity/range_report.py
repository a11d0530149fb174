"""The largest magnitudes of a checkpoint's tensors beside the end of float16: table, plain values and plot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen3vl_export.parity.plots import drawn_panels
from qwen3vl_export.parity.report import finite
from runtime.shown import columns

FLOAT16_MAX = 65504.0
_SHOWN_GROUPS = 24


@dataclass(frozen=True)
class TensorRange:
    """One tensor.

    Attributes:
        graph: `vision` or `decoder`.
        scope: Part of the model: `layers.3`, `blocks.3`, a module's name, or nothing for what belongs to no weight.
        op: Type of the node that computes it, or `weight`.
        name: Name in the graph.
        max_abs: Largest magnitude over all prompts.
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
            "tensors": [finite(asdict(each) | {"headroom": each.headroom, "fits": each.fits}) for each in self.tensors],
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
        lines = [line.rstrip() for line in columns(rows)]
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
    titles = {"vision": "block", "decoder": "layer"}
    with drawn_panels(file, titles, "max |x|", width=8, salt="ranges") as panels:
        for panel, graph in zip(panels, titles, strict=True):
            for is_weight, name in ((False, "tensors"), (True, "weights")):
                series = _by_layer(report, graph, is_weight)
                panel.plot(series.keys(), series.values(), marker="o", label=name)
            panel.axhline(FLOAT16_MAX, color="black", linestyle="--", label="float16")


def _by_layer(report: RangeReport, graph: str, is_weight: bool) -> dict[int, float]:
    found: dict[int, float] = {}
    for each in report.tensors:
        number = each.scope.rpartition(".")[2]
        if each.graph == graph and each.is_weight == is_weight and number.isdigit():
            found[int(number)] = max(each.max_abs, found.get(int(number), 0.0))
    return dict(sorted(found.items()))

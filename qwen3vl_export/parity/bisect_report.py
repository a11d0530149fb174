"""What `verify --bisect` found: the error of each section of the graphs, and the first that is beyond its limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen3vl_export.parity.plots import drawn_panels
from qwen3vl_export.parity.report import finite
from runtime.shown import columns


@dataclass(frozen=True)
class Finding:
    """The error of one section.

    Attributes:
        graph: Name of the graph: `vision`, `decoder`, or `prefill`, the decoder's copy for prompts.
        call: `prompt`, or `step` for a decode step after it.
        layer: The layer, as in the checkpoint's keys, such as `layers.3`.
        part: Which part of it; nothing if the section is all of it.
        value: Norm of the difference to the reference over the norm of what the reference adds there.
        limit: What it may be at most.
        num_tokens: Tokens, patches or rows that were compared.
        expert: The expert that it is the error of, the worst of the layer; None where there are none.
    """

    graph: str
    call: str
    layer: str
    part: str
    value: float
    limit: float
    num_tokens: int
    expert: int | None = None

    @property
    def passed(self) -> bool:
        """Whether the value is within its limit; NaN is not."""
        return self.value <= self.limit

    @property
    def name(self) -> str:
        """Layer and part, for people."""
        name = f"{self.layer}, {self.part}" if self.part else self.layer
        return name if self.expert is None or self.passed else f"{name}, expert {self.expert}"


@dataclass(frozen=True)
class BisectReport:
    """The sections of one engine in the order of computation; see `Report` for the other fields."""

    target: str
    checkpoint: str
    reference: str
    precision: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> Finding | None:
        """The first section that is beyond its limit."""
        return next((each for each in self.findings if not each.passed), None)

    @property
    def passed(self) -> bool:
        """Whether there are sections and all are within their limits."""
        return bool(self.findings) and self.first is None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; what is not finite becomes null."""
        return {
            "passed": self.passed,
            "target": self.target,
            "checkpoint": self.checkpoint,
            "reference": self.reference,
            "precision": self.precision,
            "notes": list(self.notes),
            "first": None if self.first is None else _plain(self.first),
            "sections": [_plain(each) for each in self.findings],
        }

    def render(self) -> str:
        """Return a table in plain text: all sections beyond their limits, and of each graph and part the worst."""
        rows = [("graph", "call", "layer and part", "error", "limit", "")]
        rows += [
            (
                each.graph,
                each.call,
                each.name,
                f"{each.value:.3g}",
                f"≤ {each.limit:g}",
                "ok" if each.passed else "FAILED",
            )
            for each in self._shown()
        ]
        lines = [line.rstrip() for line in columns(rows)]
        return "\n".join([*lines, *self.notes, self._verdict()])

    def _shown(self) -> Iterator[Finding]:
        worst: dict[tuple[str, str, str], Finding] = {}
        for each in self.findings:
            key = each.graph, each.call, each.part or each.layer
            if key not in worst or each.value > worst[key].value:
                worst[key] = each
        for each in self.findings:
            if not each.passed or each is worst[each.graph, each.call, each.part or each.layer]:
                yield each

    def _verdict(self) -> str:
        subject = f"{self.target} against {self.checkpoint} ({self.precision}), {len(self.findings)} sections"
        if self.first is None:
            return f"{subject}: every section is within its limit"
        where = f"{self.first.name} of {self.first.graph}.onnx ({self.first.call})"
        num_failed = sum(not each.passed for each in self.findings)
        others = f"; {num_failed - 1} later ones are, too" if num_failed > 1 else "; no other is"
        return f"{subject}: the first beyond its limit is {where}{others}"


def plot_sections(report: BisectReport, file: Path) -> None:
    """Draw the error of each part over the layers, a panel for each graph, as the suffix of `file` says (.svg, .png).

    Raises:
        UsageError: matplotlib is not installed, or the suffix is not one it draws.
    """
    graphs = list(dict.fromkeys(each.graph for each in report.findings))
    titles = {graph: "block" if graph == "vision" else "layer" for graph in graphs}
    with drawn_panels(file, titles, "relative error of one section", width=10, salt="sections") as panels:
        for panel, graph in zip(panels, graphs, strict=True):
            series: dict[str, dict[int, Finding]] = {}
            for each in report.findings:
                number = each.layer.rpartition(".")[2]
                if each.graph == graph and each.call == "prompt" and number.isdigit():
                    series.setdefault(each.part or each.layer.rpartition(".")[0], {})[int(number)] = each
            for part, of_part in series.items():
                panel.plot(of_part.keys(), [each.value for each in of_part.values()], marker="o", label=part)
            limit = max(each.limit for each in report.findings if each.graph == graph)
            panel.axhline(limit, color="black", linestyle="--", label="limit")
            panel.legend()  # the parts of each graph are others


def _plain(finding: Finding) -> dict[str, Any]:
    values: dict[str, Any] = finite(asdict(finding) | {"passed": finding.passed})
    return values

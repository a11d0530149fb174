"""The accuracy of an engine on the demo's tasks, beside float32: counts, intervals, the gate, and the tables.

    python -m qwen3vl_export.parity.task_report docs/accuracy.md docs/accuracy/*.json

writes the sections of docs/accuracy.md, and the plot beside the JSON files, from what `qwen3vl verify --tasks --json`
printed. A section stands between the markers of its title, and text around them stays.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.disk import replace_text
from qwen3vl_export.parity.layers import LayerErrors, plot_layers
from qwen3vl_export.parity.report import finite
from runtime.cache_types import cache_name

if TYPE_CHECKING:
    from runtime.manifest import Manifest

_Z_95 = 1.959964
_HEADER = (
    "task", "fp32", "engine", "points", "95 % interval", "lost", "gained", "mean KL, nats", "top-1",
    "perplexity fp32", "engine",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One question, what both engines answered, and how they predicted the tokens of the true answer.

    Attributes:
        index: The canvas.
        expected: Answer of the float32 engine.
        answer: Answer of the engine.
        kl: Sum over the true tokens of KL(float32 ‖ engine), in nats.
        same_top1: True tokens where both engines hold the same token most likely.
        expected_nll: Sum over the true tokens of the float32 engine's negative log-likelihood, in nats.
        nll: The same of the engine.
        tokens: True tokens, the end included.
    """

    index: int
    task: str
    question: str
    truth: str
    expected: str
    answer: str
    kl: float
    same_top1: int
    expected_nll: float
    nll: float
    tokens: int

    @property
    def was_right(self) -> bool:
        """Whether float32 answers with the truth."""
        return self.expected.strip() == self.truth

    @property
    def is_right(self) -> bool:
        """Whether the engine answers with the truth."""
        return self.answer.strip() == self.truth


@dataclass(frozen=True)
class TaskRow:
    """One task.

    Attributes:
        questions: Number asked.
        expected_right: Questions that float32 answers right.
        right: Questions that the engine answers right.
        lost: Questions that only float32 answers right.
        gained: Questions that only the engine answers right.
        tokens: Tokens of the true answers, over which the other figures are means.
        kl: KL(float32 ‖ engine) of a token, in nats.
        top1: Share of tokens where both hold the same token most likely.
        expected_perplexity: exp of float32's mean negative log-likelihood.
        perplexity: The same of the engine.
    """

    task: str
    questions: int
    expected_right: int
    right: int
    lost: int
    gained: int
    tokens: int
    kl: float
    top1: float
    expected_perplexity: float
    perplexity: float

    @classmethod
    def of(cls, task: str, questions: Sequence[Question]) -> TaskRow:
        """Sum up the questions of one task."""
        tokens = sum(q.tokens for q in questions)
        return cls(
            task=task,
            questions=len(questions),
            expected_right=sum(q.was_right for q in questions),
            right=sum(q.is_right for q in questions),
            lost=sum(q.was_right and not q.is_right for q in questions),
            gained=sum(q.is_right and not q.was_right for q in questions),
            tokens=tokens,
            kl=sum(q.kl for q in questions) / tokens,
            top1=sum(q.same_top1 for q in questions) / tokens,
            expected_perplexity=_exp(sum(q.expected_nll for q in questions) / tokens),
            perplexity=_exp(sum(q.nll for q in questions) / tokens),
        )

    @property
    def points(self) -> float:
        """The engine's share of right answers minus that of float32, in percentage points."""
        return 100 * (self.gained - self.lost) / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `points`."""
        return paired_interval(self.gained, self.lost, self.questions)


@dataclass(frozen=True)
class TaskReport:
    """All tasks of one engine.

    Attributes:
        target: Name of the target; calibration and a cache in few bits are added to it.
        canvases: Held-out canvases, each with one question of every task.
        limit_points: Points that a task may lose.
        differing: Questions of which one engine answers right and the other wrong.
        notes: What the comparison does not prove.
    """

    target: str
    checkpoint: str
    canvases: int
    limit_points: float
    rows: tuple[TaskRow, ...]
    layers: LayerErrors
    differing: tuple[Mapping[str, Any], ...]
    weight_bytes: int
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        checkpoint: str,
        questions: Sequence[Question],
        limit_points: float,
        layers: LayerErrors,
        notes: tuple[str, ...] = (),
    ) -> TaskReport:
        """Sum up all questions."""
        tasks = dict.fromkeys(q.task for q in questions)
        shown = ("index", "task", "question", "truth", "expected", "answer")
        return cls(
            target=_variant(manifest),
            checkpoint=checkpoint,
            canvases=len({q.index for q in questions}),
            limit_points=limit_points,
            rows=tuple(TaskRow.of(task, [q for q in questions if q.task == task]) for task in tasks),
            layers=layers,
            differing=tuple({name: getattr(q, name) for name in shown} for q in questions if q.was_right != q.is_right),
            weight_bytes=manifest.weight_bytes,
            versions=manifest.versions,
            notes=notes,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskReport:
        """Read what `to_dict` returned."""
        values = {"notes": (), **values}  # older files have none
        fields = {name: values[name] for name in cls.__dataclass_fields__}
        nan = {name: math.nan for name in ("kl", "perplexity", "expected_perplexity")}
        rows = [{name: row[name] for name in TaskRow.__dataclass_fields__} for row in values["rows"]]
        fields["rows"] = tuple(TaskRow(**{k: nan.get(k) if v is None else v for k, v in row.items()}) for row in rows)
        layers = {k: tuple(math.inf if x is None else x for x in v) for k, v in values["layers"].items()}
        fields["layers"] = LayerErrors(**layers)
        fields["differing"], fields["notes"] = tuple(values["differing"]), tuple(values["notes"])
        return cls(**fields)

    @property
    def allowed_points(self) -> float:
        """Points that a task may lose here: the limit, but one question where that is more, on few canvases."""
        return max(self.limit_points, 100 / self.canvases)

    @property
    def passed(self) -> bool:
        """Whether no task loses more than it may."""
        return bool(self.rows) and all(-row.points <= self.allowed_points for row in self.rows)

    @property
    def title(self) -> str:
        """Name the target, and the checkpoint if it is another than the dense demo."""
        return self.target if self.checkpoint == "demo" else f"{self.checkpoint}, {self.target}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; what is not finite becomes null."""
        values = asdict(self) | {"passed": self.passed, "allowed_points": self.allowed_points}
        for row, shown in zip(self.rows, values["rows"], strict=True):
            shown |= {"points": row.points, "interval": row.interval}
        plain: dict[str, Any] = finite(values)
        return plain

    def render(self) -> str:
        """Return the table in plain text."""
        rows = [_HEADER, *map(_cells, self.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, *self.notes, self._verdict()])

    def markdown(self) -> str:
        """Return the table and a sentence in Markdown."""
        rule = "|".join(["---", *["---:"] * (len(_HEADER) - 1)])
        rows = (_HEADER, *map(_cells, self.rows))
        head, *body = ("| " + " | ".join(row) + " |" for row in rows)
        built = ", ".join(
            f"{name} {self.versions[name]}" for name in ("torch", "transformers") if name in self.versions
        )
        note = " ".join(
            [
                f"{self._verdict()}. Weights {self.weight_bytes / 1e6:.1f} MB; exported with {built}.",
                *(f"{note[0].upper()}{note[1:]}." for note in self.notes),
            ]
        )
        return "\n".join([head, f"|{rule}|", *body, "", note])

    def _verdict(self) -> str:
        limit = f"at most {self.allowed_points:.3g} points lost on a task"
        verdict = "passed" if self.passed else "FAILED"
        return f"{self.target} against fp32 of {self.checkpoint}, {self.canvases} canvases: {verdict} ({limit})"


def paired_interval(gained: int, lost: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval, in points, of a difference of paired proportions.

    Wald's interval with the adjustment of Bonett and Price (2012, "Adjusted Wald confidence interval for a difference
    of binomial proportions based on paired data", J. Educ. Behav. Stat. 37): one question is added to each of the two
    discordant counts. Fagerland, Lydersen and Laake (2014, Stat. Med. 33) recommend it; unlike Wald's own it has a
    width where no answer differs.
    """
    share_gained, share_lost = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    middle = share_gained - share_lost
    half = _Z_95 * math.sqrt((share_gained + share_lost - middle**2) / (total + 2))
    return 100 * max(-1.0, middle - half), 100 * min(1.0, middle + half)


def write_sections(file: Path, reports: Sequence[TaskReport]) -> None:
    """Replace the section of each report in a Markdown file, or add it at the end."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    for report in reports:
        begin, end = (f"<!-- {word} {report.title} -->" for word in ("begin", "end"))
        section = f"{begin}\n## {report.title}\n\n{report.markdown()}\n{end}"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if pattern.search(text):
            text = pattern.sub(lambda _, new=section: new, text)  # type: ignore[misc]
        else:
            text += f"\n{section}\n" if text else f"{section}\n"
    replace_text(file, text)


def main() -> None:
    """Write the document and the plot."""
    parser = argparse.ArgumentParser(description="Write the accuracy tables of targets into a document.")
    parser.add_argument("document", type=Path, help="Markdown file")
    parser.add_argument("reports", type=Path, nargs="+", help="JSON of `qwen3vl verify --tasks --json`")
    options = parser.parse_args()
    reports = [TaskReport.from_dict(json.loads(path.read_text(encoding="utf-8"))) for path in options.reports]
    write_sections(options.document, reports)
    plot_layers({report.title: report.layers for report in reports}, options.reports[0].parent / "layers.svg")


def _variant(manifest: Manifest) -> str:
    """Return the target and what else was chosen, so that nobody takes the figures for those of the plain target."""
    cache = cache_name(manifest.capabilities)
    parts = [manifest.target, *(["calibrated"] if "calibration" in manifest.source else [])]
    return ", ".join([*parts, *([f"{cache.removeprefix('cache_')} cache"] if cache else [])])


def _cells(row: TaskRow) -> tuple[str, ...]:
    low, high = row.interval
    return (
        row.task,
        f"{100 * row.expected_right / row.questions:.2f} %",
        f"{100 * row.right / row.questions:.2f} %",
        f"{row.points:+.2f}",
        f"{low:+.2f} to {high:+.2f}",
        str(row.lost),
        str(row.gained),
        f"{row.kl:.2g}",
        f"{100 * row.top1:.2f} %",
        f"{row.expected_perplexity:.4f}",
        f"{row.perplexity:.4f}",
    )


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


if __name__ == "__main__":
    main()

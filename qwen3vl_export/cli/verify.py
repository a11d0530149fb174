"""`qwen3vl verify`: compare an engine with PyTorch, its answers with the truth, a checkpoint with float16's range."""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3vl_export.cli.options import AsJson, Quiet, given, grouped
from qwen3vl_export.cli.output import note, print_json, print_text
from runtime.errors import ParityError, UsageError

if TYPE_CHECKING:
    from qwen3vl_export.parity.bisect_report import BisectReport
    from qwen3vl_export.parity.range_report import RangeReport
    from qwen3vl_export.parity.report import Report
    from qwen3vl_export.parity.task_report import TaskReport


_PLAIN_OPTIONS = ("max_new_tokens", "reference", "visual_token_share")


@dataclass(frozen=True)
class Comparison:
    """What is compared, and with what.

    Attributes:
        checkpoint: Checkpoint that the engine was built from: a folder, a Hub id (owner/name[@revision]), demo, or
            demo-moe.
        engine: Engine folder, or lowered graphs that --no-compile wrote; not with --ranges.
        max_new_tokens: Number of greedy tokens to compare for each prompt. [default: 64]
        reference: What to compare with: transformers, or own, which is this package's PyTorch definition of the model
            and needs no transformers. [default: transformers]
        visual_token_share: With --reference own: keep this share, above 0 and up to 1, of the visual tokens of the
            prompts. [default: 1, all of them]
        tasks: Compare answers to the demo's held-out questions with those of a float32 engine.
        bisect: Compare layer by layer, each with the reference's input, and name the first that is beyond its limit.
        ranges: Compare the largest magnitude of every tensor of the checkpoint with the largest float16, 65504.
        limit: With --tasks: ask about the first N of 2000 canvases only.
        plot: Plot the error of each layer (with --tasks or --bisect) or its range (with --ranges) into this .svg or
            .png file.
        html: Write a page with the verdict, errors by layer and kind of token, the worst tokens and the pictures into
            this file.
        vision_engine: Run the vision tower on this engine of the same checkpoint, as of `run`.
        prefill_engine: Run prompts on this engine of the same checkpoint, as of `run`.

    Raises:
        UsageError: Two of them exclude each other.
    """

    checkpoint: Annotated[str, typer.Option(metavar="CKPT")]
    engine: Annotated[Path | None, typer.Argument(metavar="ENGINE", show_default=False)] = None
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None
    reference: Annotated[str | None, typer.Option(metavar="KIND")] = None
    visual_token_share: float | None = None
    tasks: bool = False
    bisect: bool = False
    ranges: bool = False
    limit: Annotated[int | None, typer.Option(min=1)] = None
    plot: Annotated[Path | None, typer.Option(metavar="FILE")] = None
    html: Annotated[Path | None, typer.Option(metavar="FILE.html")] = None
    vision_engine: Annotated[Path | None, typer.Option(metavar="DIR")] = None
    prefill_engine: Annotated[Path | None, typer.Option(metavar="DIR")] = None

    def __post_init__(self) -> None:
        """Check what excludes what."""
        if self.ranges and (self.engine is not None or self.tasks or self.bisect):
            raise UsageError("--ranges looks at the checkpoint alone", remedy="leave ENGINE, --tasks and --bisect out")
        if self.tasks and self.bisect:
            raise UsageError("--tasks and --bisect are two comparisons", remedy="leave one of them out")
        if (self.tasks or self.bisect) and self.max_new_tokens is not None:
            option = "--tasks" if self.tasks else "--bisect"
            raise UsageError(f"{option} takes no --max-new-tokens", remedy="leave one of them out")
        if self.reference is not None and (self.tasks or self.bisect or self.ranges):
            raise UsageError("--reference has no use with --tasks, --bisect and --ranges", remedy="leave it out")
        if self.visual_token_share is not None and (self.tasks or self.bisect or self.ranges):
            raise UsageError(
                "--visual-token-share has no use with --tasks, --bisect and --ranges", remedy="leave it out"
            )
        if self.limit is not None and not self.tasks:
            raise UsageError("--limit belongs to --tasks", remedy="add --tasks")
        if self.plot is not None and not (self.tasks or self.bisect or self.ranges):
            raise UsageError("--plot belongs to --tasks, --bisect or --ranges", remedy="add one of them")
        if self.html is not None and (self.tasks or self.bisect or self.ranges):
            raise UsageError("--html is of the plain comparison", remedy="leave --tasks, --bisect and --ranges out")
        if self.route and (self.ranges or self.bisect):
            raise UsageError(
                "--ranges and --bisect look at one checkpoint, or one engine",
                remedy="leave --vision-engine and --prefill-engine out, or bisect each engine alone",
            )
        if self.engine is None and not self.ranges:
            raise UsageError("ENGINE is missing", remedy="give an engine folder, or --ranges for the checkpoint alone")

    @property
    def route(self) -> dict[str, Path]:
        """Engines that run a part in place of ENGINE, by the options of `from_engine`."""
        engines = {"vision_engine": self.vision_engine, "prefill_engine": self.prefill_engine}
        return {name: folder for name, folder in engines.items() if folder is not None}


@grouped
def verify(comparison: Comparison, *, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Compare an engine with PyTorch in float32 on the same pixels. The exit code is 9 if a tolerance is exceeded.

    ENGINE may be the lowered graphs that --no-compile writes for a target whose device this machine lacks. ONNX
    Runtime's CPU provider runs them: that tests the graphs, but not how the device rounds.

    --tasks asks the demo's questions instead: four about each held-out canvas, to the engine and to a float32 engine
    that it builds from the checkpoint. It prints exact matches, their paired difference in points with a 95 % interval,
    KL divergence, agreement and perplexity on the true answers, and fails if a task loses more points than it may.

    --bisect cuts the graphs between the layers and gives each layer the input that PyTorch has there, so that its error
    is its own. It prints the first layer beyond its limit, which part of it, and which expert.

    --ranges takes no engine: it runs the checkpoint in float32 and lists the largest magnitude of each tensor, and how
    many times that fits below 65504. The exit code is 9 if one does not fit: float16 cannot hold this checkpoint.

    --visual-token-share runs the prompts as an engine that is opened with it does. The reference runs the same tokens,
    with their positions in the whole prompt: that tests how they are run, and not what is lost with the others.

    The command needs the packages of the extras [export] and [verify] (transformers, torchvision); with --reference
    own, --tasks, --bisect or --ranges those of [export] are enough. --tasks also needs scikit-learn, --plot also
    matplotlib.

    \b
    Examples:
      qwen3vl verify demo-engine --checkpoint demo
      qwen3vl verify demo-engine --checkpoint demo --reference own
      qwen3vl verify demo-engine --checkpoint demo --reference own --visual-token-share 0.5
      qwen3vl verify ENGINE --checkpoint Qwen/Qwen3-VL-2B-Instruct --json > parity.json
      qwen3vl verify demo-engine --checkpoint demo --html report.html
      qwen3vl verify demo-engine --checkpoint demo --tasks --limit 300 --plot layers.svg
      qwen3vl verify demo-engine --checkpoint demo --bisect
      qwen3vl verify ENGINE --checkpoint CKPT --prefill-engine OTHER
      qwen3vl verify --checkpoint demo --ranges
    """
    report = _report(comparison, is_quiet=quiet, is_json=as_json)
    if as_json:
        print_json(report.to_dict())
    else:
        print_text(report.render())
    if comparison.ranges and not report.passed:
        raise ParityError(
            f"float16 does not hold every tensor of {comparison.checkpoint}",
            remedy="choose a target that computes in bfloat16",
        )
    if not report.passed:
        raise ParityError(
            f"{comparison.engine} does not agree with {comparison.checkpoint} within the tolerances",
            remedy="see the failed rows; check that the engine was built from this checkpoint, or build it again",
        )


def _report(
    comparison: Comparison, *, is_quiet: bool, is_json: bool
) -> Report | TaskReport | BisectReport | RangeReport:
    """Compare, and draw the plot."""
    if comparison.plot is not None:
        from qwen3vl_export.parity.plots import check_plot

        check_plot(comparison.plot)  # before the minutes of work
    if comparison.html is not None:
        from qwen3vl_export.reports.page import check_page

        check_page(comparison.html)
    options = {name: value for name, value in given(comparison).items() if name in _PLAIN_OPTIONS}
    if comparison.engine is None:
        return _measure_ranges(comparison, **options)
    if comparison.tasks:
        return _compare_tasks(comparison.engine, comparison, is_quiet=is_quiet)

    def say(case: str) -> None:
        if not (is_quiet or is_json):
            note(f"comparing: {case}")

    if comparison.bisect:
        return _bisect(comparison.engine, comparison, on_case=say)
    return _compare(comparison.engine, comparison, on_case=say, route=comparison.route, **options)


def _compare(engine: Path, comparison: Comparison, *, on_case: Callable[[str], None], **options: Any) -> Report:
    """Compare layer by layer, and write the page."""
    from qwen3vl_export.parity.verify import verify as compare

    if comparison.html is None:
        return compare(engine, comparison.checkpoint, on_case=on_case, **options)
    from qwen3vl_export.parity.details import CaseDetails
    from qwen3vl_export.parity.page import page_of
    from qwen3vl_export.reports.environment import Environment

    details: list[CaseDetails] = []
    environment = Environment.of_this_machine()  # before the work, whose load is not to count
    report = compare(engine, comparison.checkpoint, on_case=on_case, on_details=details.append, **options)
    page_of(report, details, environment).write(comparison.html)
    return report


def _compare_tasks(engine: Path, comparison: Comparison, *, is_quiet: bool) -> TaskReport:
    """Ask the held-out questions, with a bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from qwen3vl_export.parity.layers import plot_layers
    from qwen3vl_export.parity.tasks import run_tasks

    shown = TextColumn("canvases"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*shown, console=Console(stderr=True), transient=True, disable=is_quiet) as progress:
        bar = progress.add_task("canvases", total=None)
        report = run_tasks(
            engine,
            comparison.checkpoint,
            limit=comparison.limit,
            route=comparison.route,
            on_canvas=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    if comparison.plot is not None:
        plot_layers({report.target: report.layers}, comparison.plot)
    return report


def _bisect(engine: Path, comparison: Comparison, on_case: Callable[[str], None]) -> BisectReport:
    from qwen3vl_export.parity.bisect import bisect
    from qwen3vl_export.parity.bisect_report import plot_sections

    report = bisect(engine, comparison.checkpoint, on_case=on_case)
    if comparison.plot is not None:
        plot_sections(report, comparison.plot)
    return report


def _measure_ranges(comparison: Comparison, **options: Any) -> RangeReport:
    from qwen3vl_export.parity.range_report import plot_ranges
    from qwen3vl_export.parity.ranges import measure_ranges

    report = measure_ranges(comparison.checkpoint, **options)
    if comparison.plot is not None:
        plot_ranges(report, comparison.plot)
    return report

"""`qwen3vl plan`: what an engine takes of the memory, before it is opened or even built."""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3vl_export.cli.options import AsJson, grouped
from qwen3vl_export.cli.output import note, print_json, print_text
from qwen3vl_export.cli.quantities import parse_bytes, parse_sides, parse_tokens
from runtime.errors import CapacityError, UsageError

if TYPE_CHECKING:
    from qwen3vl_export.memory_report import MemoryReport
    from runtime.memory_plan import Planner, Work

_BAR_WIDTH = 40
_COLOURS = ("blue", "cyan", "green", "yellow", "magenta", "red", "white")


@dataclass(frozen=True)
class Planned:
    """What is planned for.

    Attributes:
        target: Of a model that was not built: its target. [default: auto]
        kernels: Of a model that was not built: own or ort. [default: the best that this machine can use]
        context: Tokens of each sequence, prompt and answer together, such as 32k. [default: 4096, or the engine's]
        batch: Sequences that run at once.
        kept: Sequences whose rows are kept beside those.
        image: Pixels of the image of each prompt. [default: no image]
        images: Images of each prompt.
        video: Frames of a video of that size in each prompt, in place of images.
        memory: What it may take, such as 16GB or 16GiB. [default: the machine's, or the GPU's]
        threads: Number of CPU threads. [default: OMP_NUM_THREADS, or the number of cores]
    """

    target: Annotated[str | None, typer.Option(metavar="NAME")] = None
    kernels: Annotated[str | None, typer.Option(metavar="own|ort")] = None
    context: Annotated[str | None, typer.Option(metavar="TOKENS")] = None
    batch: Annotated[int, typer.Option(min=1, max=1024)] = 1
    kept: Annotated[int, typer.Option(min=0, max=1024)] = 0
    image: Annotated[str | None, typer.Option(metavar="WxH")] = None
    images: Annotated[int, typer.Option(min=1, max=1024)] = 1
    video: Annotated[int | None, typer.Option(metavar="FRAMES", min=1, max=4096)] = None
    memory: Annotated[str | None, typer.Option(metavar="SIZE")] = None
    threads: Annotated[int | None, typer.Option(min=1, max=1024)] = None


@grouped
def plan(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="ENGINE|MODEL",
            help="An engine folder; or a model as `qwen3vl targets --model` takes it, of which no weights are read.",
        ),
    ],
    *,
    planned: Planned,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write the plan with a picture as a page.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what an engine takes of the memory, part by part, and the most that fits. Nothing is opened.

    The exit code is 8 if what was asked for does not fit. docs/memory.md says what the parts are, and how far plans are
    from what was measured.

    --json prints one object: subject, target, device, threads, context, sequences, kept_sequences, patches (of each
    image of a prompt), parts (bytes by part), total_bytes, mapped_bytes (of them, pages of files), limit_bytes, fits,
    largest (context, sequences, image_side: the most of each, all else as it was asked for).

    \b
    Examples:
      qwen3vl plan out/demo-ort-cpu-int4
      qwen3vl plan qwen3-vl-8b --target ort-cpu-int4 --context 32k --batch 8
      qwen3vl plan Qwen/Qwen3-VL-4B-Instruct --image 1024x1024 --memory 16GB
    """
    if html is not None:
        from qwen3vl_export.reports.page import check_page

        check_page(html)
    report = _report(subject, planned, is_quiet=as_json)
    if html is not None:
        report.page().write(html)
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)
    if report.fits is False:
        from qwen3vl_export.memory_report import remedy_of

        raise CapacityError(f"it does not fit: {report.summary}", remedy=remedy_of(report))


def _report(subject: str, planned: Planned, *, is_quiet: bool) -> MemoryReport:
    from engines.choose import limit_bytes
    from engines.hardware import probe
    from qwen3vl_export.memory_report import report_of
    from runtime.machine import default_threads

    memory = None if planned.memory is None else parse_bytes("--memory", planned.memory)
    size = None if planned.image is None else parse_sides("--image", planned.image)
    context = None if planned.context is None else parse_tokens("--context", planned.context)
    if size is None and (planned.video is not None or planned.images != 1):
        raise UsageError("--images and --video are of images: their size is missing", remedy="give --image WxH")
    threads = planned.threads or default_threads()
    target, planner = _planner(subject, planned, context, threads, is_quiet=is_quiet)
    work = _work(planner, planned, context, size)
    if memory is None:
        memory = limit_bytes(probe(), "gpu" if planner.facts.is_on_gpu else "cpu") or None
    return report_of(subject, target, planner, threads, work, memory)


def _planner(
    subject: str, planned: Planned, context: int | None, threads: int, *, is_quiet: bool
) -> tuple[str, Planner]:
    """Return the target, and what plans an engine folder, or an engine that could be built of a model."""
    from runtime.manifest import MANIFEST_NAME, Manifest
    from runtime.memory_plan import Planner

    if os.path.lexists(Path(subject) / MANIFEST_NAME):
        if planned.target is not None or planned.kernels is not None:
            raise UsageError(
                "--target and --kernels are of a model that was not built; an engine has its own",
                remedy="leave them out",
            )
        manifest = Manifest.read(Path(subject))
        return manifest.target, Planner.of(manifest, threads)
    from engines.build_options import BuildOptions
    from engines.choose import AUTO, facts_of, resolve_target
    from engines.kernel_sets import with_kernels
    from qwen3vl_export.cli.targets import model_shape
    from runtime.engine_options import DEFAULT_MAX_CONTEXT

    config = model_shape(subject, name="ENGINE|MODEL")
    most = config.text.max_positions
    options = BuildOptions(
        max_context=min(context or DEFAULT_MAX_CONTEXT, most), max_batch=planned.batch + planned.kept
    )
    say = (lambda text: None) if is_quiet else note
    target = resolve_target(planned.target or AUTO, lambda: config, say, options=options)
    target = with_kernels(target, planned.kernels, config, say)
    facts = facts_of(target, config, options)
    # Of an engine that is built for a size, nothing else fits; of one that is not built, the size is still open.
    free = {name: value for name, value in facts.capabilities.items() if name not in ("capacity", "max_batch")}
    return target.name, Planner(replace(facts, capabilities=free), threads)


def _work(planner: Planner, planned: Planned, context: int | None, size: tuple[int, int] | None) -> Work:
    from qwen3vl_export.memory_report import patches_of, visual_tokens
    from runtime.engine_options import checked_max_context
    from runtime.memory_plan import Work

    facts = planner.facts
    capacity = facts.capabilities.get("capacity")
    context = checked_max_context(context, facts.model.text.max_positions, capacity, option="--context")
    slots = planned.batch + planned.kept
    if facts.max_batch is not None and slots > facts.max_batch:
        raise UsageError(
            f"--batch {planned.batch} with --kept {planned.kept}: the engine was built for {facts.max_batch} sequences",
            remedy="lower them, or build the engine again with a larger --max-batch",
        )
    images: tuple[int, ...] = ()
    if size is not None:
        frames = facts.model.vision.temporal_patch_size
        count = planned.images if planned.video is None else -(-planned.video // frames)
        images = (patches_of(planner, *size),) * count
    if (tokens := visual_tokens(planner, images)) > context:
        raise UsageError(
            f"{len(images)} × {size and 'x'.join(map(str, size))} pixels are {tokens} tokens, more than the context of "
            f"{context}",
            remedy="raise --context, or give a smaller --image or fewer of them",
        )
    return Work(context, planned.batch, planned.kept, images, chunk=facts.chunk)


def _show(report: MemoryReport) -> None:
    """Print the table, with a bar for each part and one for the whole."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from qwen3vl_export.memory_report import megabytes

    whole = report.plan.total_bytes
    rows = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        rows.add_column(no_wrap=True)
    done = 0
    for colour, (part, size) in zip(cycle(_COLOURS), report.plan.parts.items(), strict=False):
        if size:
            first, last = (round(_BAR_WIDTH * end / whole) for end in (done, done + size))
            bar = Text(" " * first).append("█" * max(1, last - first), style=colour)
            rows.add_row(part, Text(f"{megabytes(size):>14}"), bar)
            done += size
    print_text(f"{report.title}\n\n")
    Console(highlight=False, markup=False).print(rows)
    print_text(f"\n{report.summary}\n" + "".join(f"{each}\n" for each in report.notes))

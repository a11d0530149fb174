"""The `qwen3vl` command: run, chat with, inspect and verify engines.

Answers, tables and JSON go to stdout; statistics, notes and errors to stderr. An option that is not given is not
passed on, so that the defaults are those of the checkpoint and of the runtime.
"""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3vl_export.cli.bench import bench
from qwen3vl_export.cli.conversation import Conversation
from qwen3vl_export.cli.errors import DEBUG_HELP, run_app
from qwen3vl_export.cli.output import (
    is_terminal,
    manifest_text,
    note,
    print_json,
    print_stats,
    print_stream,
    print_text,
    read_stdin,
)
from qwen3vl_export.cli.targets import targets
from runtime.errors import ParityError, UsageError

if TYPE_CHECKING:
    from qwen3vl_export.parity.range_report import RangeReport
    from qwen3vl_export.parity.report import Report
    from qwen3vl_export.parity.task_report import TaskReport
    from runtime.model import Qwen3VLModel

HASH_NOTE = "hashes catch damage and mix-ups, not malice"

app = typer.Typer(
    name="qwen3vl",
    help="Run Qwen3-VL engines. Build one first: qwen3vl-export demo --output demo-engine",
    epilog=DEBUG_HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Engine = Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder that qwen3vl-export wrote.")]
CheckAll = Annotated[bool, typer.Option("--check", help="Hash the weight files too, not only the small ones.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")]
Images = Annotated[
    # Text, not Path: a path would fold the "//" of a URL, and the refusal of URLs would not see one.
    list[str] | None,
    typer.Option("--image", metavar="PATH", help="Image file shown before the prompt; repeat for several, in order."),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="System message: how the model is to answer.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no progress and no notes on stderr, but errors.")]
ShowStats = Annotated[bool, typer.Option("--stats", help="Print times, speed and cache size on stderr.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens.", show_default=False)]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Longest prompt and answer together, in tokens; --max-new-tokens takes its place."),
]
DoSample = Annotated[
    bool | None,
    typer.Option("--do-sample/--greedy", help="Draw tokens, or take the likeliest. [default: the checkpoint's]"),
]
Temperature = Annotated[float | None, typer.Option(help="Below 1 sharper, above 1 flatter; needs sampling.")]
TopK = Annotated[int | None, typer.Option(help="Keep the K likeliest tokens; 0 keeps all; needs sampling.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest that sum to P; 1 keeps all; needs sampling.")]
MinP = Annotated[
    float | None, typer.Option(help="Drop those below P times the likeliest; 0 keeps all; needs sampling.")
]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 repeats prompt and answer less; 1 is off.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Taken from each token already in the answer; 0 is off.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="The same, for each time it occurred; 0 is off.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same answer.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text; repeat for several.")]
PromptLookupNumTokens = Annotated[
    int | None,
    typer.Option(
        "--prompt-lookup-num-tokens",
        "--prompt-lookup",
        metavar="N",
        help="Draft up to N tokens by looking up the last ones in prompt and answer: faster where the answer copies.",
    ),
]
MinPixels = Annotated[int | None, typer.Option(help="Enlarge images below this many pixels.")]
MaxPixels = Annotated[int | None, typer.Option(help="Shrink images above this many pixels: faster, less detail.")]
MaxImagePixels = Annotated[
    int | None,
    typer.Option(help="Refuse images of more pixels before they are decoded. [default: 50000000]", show_default=False),
]
MaxContext = Annotated[int | None, typer.Option(help="Room of the KV cache: prompt, images and answer, in tokens.")]
MaxMemory = Annotated[
    float | None,
    typer.Option(
        metavar="GB",
        help="Most memory that weights, cache and workspace may take, in units of 10^9 bytes. [default: the machine's]",
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads of the engine. [default: OMP_NUM_THREADS, or the cores]")]
NoCudaGraphs = Annotated[
    bool, typer.Option("--no-cuda-graphs", help="On a GPU, do not record the decode step as a CUDA graph.")
]
HugePages = Annotated[
    bool, typer.Option("--huge-pages", help="Move the weights to huge pages first: seconds to open, faster tokens.")
]


@app.command()
def run(
    engine: Engine,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="What to ask. - reads stdin, and so does no prompt, unless stdin is a terminal."
        ),
    ] = None,
    image: Images = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    max_length: MaxLength = None,
    do_sample: DoSample = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    prompt_lookup_num_tokens: PromptLookupNumTokens = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    max_image_pixels: MaxImagePixels = None,
    max_context: MaxContext = None,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    huge_pages: HugePages = False,
    no_cuda_graphs: NoCudaGraphs = False,
    as_json: AsJson = False,
    stats: ShowStats = False,
    quiet: Quiet = False,
    check: CheckAll = False,
) -> None:
    """Answer one prompt; the text, and nothing else, appears on stdout as it is generated.

    --json prints one object at the end: text, token_ids (of the answer), finish_reason (eos, stop or length), and
    stats with preprocess_s, vision_s, prefill_s, ttft_s (time to first token), tpot_s (time per later token),
    tokens_per_s, prompt_tokens, visual_tokens, new_tokens, peak_cache_bytes, drafted_tokens and accepted_tokens (of
    prompt lookup).

    \b
    Examples:
      qwen3vl run demo-engine "Which digits are there?" --image note.png
      qwen3vl run ENGINE "What changed?" --image before.jpg --image after.jpg
      qwen3vl run ENGINE "Write a haiku" --do-sample --temperature 0.8 --seed 1
      qwen3vl run ENGINE "Describe it" --image photo.jpg --max-pixels 500000 --stats
      qwen3vl run ENGINE "Describe it" --image photo.jpg --system "Answer in one sentence." --quiet
      qwen3vl run ENGINE --json -- "--a prompt that begins with dashes"
      qwen3vl run ENGINE < question.txt
    """
    from runtime.messages import system_message, user_message

    question = read_stdin() if prompt == "-" or (prompt is None and not is_terminal(sys.stdin)) else prompt
    if question is None:
        raise UsageError(
            "PROMPT is missing", remedy='give one, such as "Describe the image.", or - to read it from stdin'
        )
    options = _given(
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop) if stop else None,
        prompt_lookup_num_tokens=prompt_lookup_num_tokens,
    )
    model = _open(
        engine,
        check=check,
        threads=threads,
        huge_pages=huge_pages or None,
        cuda_graphs=False if no_cuda_graphs else None,
        max_context=max_context,
        max_memory=_bytes(max_memory),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        max_image_pixels=max_image_pixels,
    )
    messages = [*system_message(system), *user_message(question, image or [])]
    if as_json:
        generation = model.generate(messages, **options)
        print_json(
            {
                "text": generation.text,
                "token_ids": generation.token_ids,
                "finish_reason": generation.finish_reason,
                "stats": dataclasses.asdict(generation.stats),
            }
        )
    else:
        generation = print_stream(model, messages, options)
    if stats:
        print_stats(generation.stats)


@app.command()
def chat(
    engine: Engine,
    image: Images = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = None,
    do_sample: DoSample = None,
    temperature: Temperature = None,
    seed: Seed = None,
    prompt_lookup_num_tokens: PromptLookupNumTokens = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    max_image_pixels: MaxImagePixels = None,
    max_context: MaxContext = None,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    huge_pages: HugePages = False,
    no_cuda_graphs: NoCudaGraphs = False,
    stats: ShowStats = False,
    check: CheckAll = False,
) -> None:
    """Talk with an engine, turn by turn. Each turn reads the whole conversation again.

    \b
    At the prompt:
      /image PATH   show this image with the next turn
      /reset        forget the conversation
      /quit         leave (so does the end of the input, Ctrl-D)
    Ctrl-C stops an answer and drops its turn; at the prompt it leaves.

    \b
    Example:
      qwen3vl chat demo-engine --image note.png
    """
    options = _given(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        seed=seed,
        prompt_lookup_num_tokens=prompt_lookup_num_tokens,
    )
    model = _open(
        engine,
        check=check,
        threads=threads,
        huge_pages=huge_pages or None,
        cuda_graphs=False if no_cuda_graphs else None,
        max_context=max_context,
        max_memory=_bytes(max_memory),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        max_image_pixels=max_image_pixels,
    )
    Conversation(model, options, image or [], system=system, has_stats=stats).loop()


@app.command()
def inspect(engine: Engine, check: CheckAll = False, as_json: AsJson = False) -> None:
    """Show what an engine is and what built it, and compare its files with its manifest.

    Graphs and small files are compared by SHA-256, weight files by size; --check hashes the weights as well.
    Hashes catch damage and mix-ups, not malice: whoever can write the folder can write its manifest.

    --json prints one object: target, session, capabilities, model, versions, source, files (num_bytes, sha256,
    is_weights), format_version, weight_bytes, check (passed, compared, note).

    \b
    Examples:
      qwen3vl inspect demo-engine
      qwen3vl inspect demo-engine --check --json
    """
    from runtime.manifest import Manifest
    from runtime.urls import check_local

    check_local(engine, "engine")
    manifest = Manifest.read(engine)
    if not as_json:
        # Before the check: what the folder says it is helps to understand what is wrong with it.
        print_text(manifest_text(manifest))
    manifest.check(engine, full=check)
    compared = "SHA-256 of every file" if check else "SHA-256 of small files, size of weight files"
    if as_json:
        values = {**dataclasses.asdict(manifest), "model": manifest.model.to_dict()}
        values["weight_bytes"] = manifest.weight_bytes
        print_json({**values, "check": {"passed": True, "compared": compared, "note": HASH_NOTE}})
    else:
        print(f"check      passed: {compared} ({HASH_NOTE})")
        if any(name.endswith(".plan") for name in manifest.files):
            print("note       a plan is code that the library runs: open only engines that you trust")


@app.command()
def verify(
    checkpoint: Annotated[
        str,
        typer.Option(metavar="CKPT", help="What the engine was built from: folder, Hub id[@revision], demo, demo-moe."),
    ],
    engine: Annotated[
        Path | None,
        typer.Argument(
            metavar="ENGINE",
            help="Engine folder, or lowered graphs of --no-compile; not with --ranges.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Greedy tokens to compare for each prompt. [default: 64]")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="What to compare with: transformers, or own, this package's PyTorch definition of the model, where "
            "transformers is not installed. [default: transformers]",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        bool, typer.Option("--tasks", help="Compare answers to the demo's held-out questions, with float32.")
    ] = False,
    ranges: Annotated[
        bool, typer.Option("--ranges", help="Compare every tensor of the checkpoint with the end of float16, 65504.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="With --tasks: only the first N canvases of 2000.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --tasks: each layer's error, with --ranges its range, as .svg or .png."
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare an engine with PyTorch in float32 on the same pixels; exit code 9 if a tolerance fails.

    ENGINE may be the lowered graphs that --no-compile writes for a target whose device is not here: ONNX Runtime's CPU
    provider runs them, which proves the graphs and not how the device rounds.

    --tasks asks the demo's questions instead: four of each held-out canvas, of the engine and of a float32 engine that
    it builds from the checkpoint. It prints exact matches, their paired difference in points with a 95 % interval,
    divergence, agreement and perplexity on the true answers, and fails if a task loses more points than it may.

    --ranges takes no engine: it runs the checkpoint in float32 and lists the largest magnitude of each tensor, and how
    many times that fits below 65504. Exit code 9 if one does not: then float16 does not hold this checkpoint.

    Needs the packages of the extra [verify] (transformers, torchvision) beside those of [export]; with --reference own,
    --tasks or --ranges those of [export] alone. --tasks needs scikit-learn, too, and --plot matplotlib.

    \b
    Examples:
      qwen3vl verify demo-engine --checkpoint demo
      qwen3vl verify demo-engine --checkpoint demo --reference own
      qwen3vl verify ENGINE --checkpoint Qwen/Qwen3-VL-2B-Instruct --json > parity.json
      qwen3vl verify demo-engine --checkpoint demo --tasks --limit 300 --plot layers.svg
      qwen3vl verify --checkpoint demo --ranges
    """
    if ranges and (engine is not None or tasks):
        raise UsageError("--ranges looks at the checkpoint alone", remedy="leave ENGINE and --tasks out")
    if tasks and max_new_tokens is not None:
        raise UsageError("--tasks takes no --max-new-tokens", remedy="leave one of them out")
    if reference is not None and (tasks or ranges):
        raise UsageError("--reference has no use with --tasks and --ranges", remedy="leave it out")
    if limit is not None and not tasks:
        raise UsageError("--limit belongs to --tasks", remedy="add --tasks")
    if plot is not None and not (tasks or ranges):
        raise UsageError("--plot belongs to --tasks or --ranges", remedy="add one of them")
    if engine is None and not ranges:
        raise UsageError("ENGINE is missing", remedy="give an engine folder, or --ranges for the checkpoint alone")
    report: Report | TaskReport | RangeReport
    if engine is None:
        report = _measure_ranges(checkpoint, plot, **_given(max_new_tokens=max_new_tokens))
    elif tasks:
        report = _compare_tasks(engine, checkpoint, limit, plot, is_quiet=quiet)
    else:
        from qwen3vl_export.parity.verify import verify as compare

        def say(case: str) -> None:
            if not (quiet or as_json):
                note(f"comparing: {case}")

        report = compare(engine, checkpoint, on_case=say, **_given(max_new_tokens=max_new_tokens, reference=reference))
    if as_json:
        print_json(report.to_dict())
    else:
        print_text(report.render())
    if ranges and not report.passed:
        raise ParityError(
            f"float16 does not hold every tensor of {checkpoint}", remedy="take a target that computes in bfloat16"
        )
    if not report.passed:
        raise ParityError(
            f"{engine} does not agree with {checkpoint} within the tolerances",
            remedy="see the failed rows; check that the engine was built from this checkpoint, or build it again",
        )


app.command()(bench)
app.command()(targets)


def main() -> None:
    """Run the `qwen3vl` command line; the entry point of the distribution."""
    run_app(app)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _bytes(gigabytes: float | None) -> int | None:
    """Return the value of --max-memory in bytes."""
    if gigabytes is None:
        return None
    if not math.isfinite(gigabytes):
        raise UsageError(f"--max-memory {gigabytes}: expected a number of GB", remedy="leave it out for the machine's")
    return round(gigabytes * 1e9)


def _compare_tasks(
    engine: Path, checkpoint: str, limit: int | None, plot: Path | None, *, is_quiet: bool
) -> TaskReport:
    """Ask the held-out questions, with a bar on stderr, and draw the plot."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from qwen3vl_export.parity.layers import plot_layers
    from qwen3vl_export.parity.plots import check_plot
    from qwen3vl_export.parity.tasks import run_tasks

    if plot is not None:
        check_plot(plot)  # before the minutes of work
    shown = TextColumn("canvases"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*shown, console=Console(stderr=True), transient=True, disable=is_quiet) as progress:
        bar = progress.add_task("canvases", total=None)
        report = run_tasks(
            engine,
            checkpoint,
            limit=limit,
            on_canvas=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    if plot is not None:
        plot_layers({report.target: report.layers}, plot)
    return report


def _measure_ranges(checkpoint: str, plot: Path | None, **options: int) -> RangeReport:
    """Measure, and draw the plot."""
    from qwen3vl_export.parity.plots import check_plot
    from qwen3vl_export.parity.range_report import plot_ranges
    from qwen3vl_export.parity.ranges import measure_ranges

    if plot is not None:
        check_plot(plot)  # before the minutes of work
    report = measure_ranges(checkpoint, **options)
    if plot is not None:
        plot_ranges(report, plot)
    return report


def _open(engine: Path, *, check: bool, **options: Any) -> Qwen3VLModel:
    from runtime.model import Qwen3VLModel

    return Qwen3VLModel.from_engine(engine, check=check, **_given(**options))


if __name__ == "__main__":
    main()

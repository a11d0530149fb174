"""The `qwen3vl` command: run, chat with, inspect and verify engines.

Answers, tables and JSON go to stdout; statistics, notes and errors to stderr.
"""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3vl_export.cli.batch import batch
from qwen3vl_export.cli.bench import bench
from qwen3vl_export.cli.cache import app as cache
from qwen3vl_export.cli.conversation import LineChat
from qwen3vl_export.cli.errors import DEBUG_HELP, run_app
from qwen3vl_export.cli.options import (
    Answering,
    AsJson,
    CheckAll,
    Engine,
    HideThinking,
    Images,
    Opening,
    Quiet,
    Seeing,
    ShowStats,
    System,
    Tools,
    Videos,
    given,
    grouped,
)
from qwen3vl_export.cli.output import (
    answer_details,
    answer_json,
    decode_text,
    is_terminal,
    manifest_text,
    print_json,
    print_stats,
    print_stream,
    print_text,
    read_stdin,
    read_tools,
    route_text,
)
from qwen3vl_export.cli.package import package
from qwen3vl_export.cli.picture_options import Pictures
from qwen3vl_export.cli.plan import plan
from qwen3vl_export.cli.serve import serve
from qwen3vl_export.cli.targets import targets
from qwen3vl_export.cli.tune import tune
from qwen3vl_export.cli.verify import verify
from runtime.errors import UsageError

OF_CHAT = (
    *("max_new_tokens", "do_sample", "temperature", "seed", "prompt_lookup_num_tokens"),
    *("max_thinking_tokens", "max_repetitions"),
)
Graph = Annotated[
    Path | None,
    typer.Option(metavar="FILE.svg", help="Draw the graph by pieces into this .svg or .html file.", show_default=False),
]
HASH_NOTE = "hashes catch damage and mix-ups, not malice"

app = typer.Typer(
    name="qwen3vl",
    help="Run Qwen3-VL engines. Build one first: qwen3vl-export demo --output demo-engine",
    epilog=DEBUG_HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
@grouped
def run(
    engine: Engine,
    *,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="What to ask. Read from stdin if it is -, or left out where stdin is no terminal."
        ),
    ] = None,
    image: Images = None,
    video: Videos = None,
    system: System = None,
    answering: Answering,
    seeing: Seeing,
    pictures: Pictures,
    opening: Opening,
    tools: Tools = None,
    hide_thinking: HideThinking = False,
    as_json: AsJson = False,
    stats: ShowStats = False,
    quiet: Quiet = False,
    check: CheckAll = False,
) -> None:
    """Answer one prompt. Its answer, and nothing else, appears on stdout while it is generated.

    --json prints one object at the end: text, token_ids (of the answer), finish_reason (eos, stop, length or
    repetition), reasoning (thoughts before the answer), tool_calls (of --tools; id, type, and function with name and
    arguments), malformed_tool_calls (those that are text), and stats with preprocess_s, queue_s, vision_s, prefill_s,
    ttft_s (time to first token), tpot_s (time per later token), tokens_per_s, prompt_tokens, visual_tokens, new_tokens,
    peak_cache_bytes, drafted_tokens and accepted_tokens (of prompt lookup), cached_tokens and cached_images (found in
    the cache), pruned_tokens (of --visual-token-share), evicted_rows (of the prompt, --kv-budget); also logprobs and
    choices, if --logprobs and --n ask for them.

    \b
    Examples:
      qwen3vl run demo-engine "Which digits are there?" --image note.png
      qwen3vl run ENGINE "What changed?" --image before.jpg --image after.jpg
      qwen3vl run ENGINE "What happens, and when?" --video clip.mp4 --fps 1 --max-visual-tokens 4000
      qwen3vl run ENGINE "Write a haiku" --do-sample --temperature 0.8 --seed 1
      qwen3vl run ENGINE "Describe it" --image photo.jpg --max-pixels 500000 --stats
      qwen3vl run ENGINE "Is it a cat?" --image photo.jpg --choice yes --choice no
      qwen3vl run ENGINE "Is it raining?" --image window.jpg --tools tools.json --max-thinking-tokens 500
      qwen3vl run ENGINE "Locate every cup, in JSON with bbox_2d and label" --image desk.jpg --draw found.png
      qwen3vl run ENGINE --json -- "--a prompt that begins with dashes"
      qwen3vl run ENGINE < question.txt
    """
    from runtime.messages import system_message, user_message

    question = _question(prompt)
    pictures.check(image or [])
    model = opening.open(engine, check=check)
    messages: Any = [*system_message(system), *user_message(question, image or [], video or [])]
    messages = pictures.before(model, messages, given(seeing), is_quiet=quiet)
    options = {**answering.arguments(), **given(seeing)}
    if tools is not None:
        options["tools"] = read_tools(tools)
    generation = _answer(model, messages, options, as_json=as_json, hides_thinking=hide_thinking)
    pictures.after(model, generation.text, image or [], is_quiet=quiet)
    if stats:
        print_stats(generation.stats)


def _answer(model: Any, messages: Any, options: dict[str, Any], *, as_json: bool, hides_thinking: bool) -> Any:
    """Generate and print an answer, or several."""
    if as_json:
        generation = model.generate(messages, **options)
        print_json({**answer_json(generation), **answer_details(generation)})
    elif options.get("n", 1) > 1:
        generation = model.generate(messages, **options)
        for each in generation.choices:
            print_text(each.text)
    else:
        generation = print_stream(model.stream(messages, **options), hides_thinking=hides_thinking)
    return generation


def _question(prompt: str | None) -> str:
    question = read_stdin() if prompt == "-" or (prompt is None and not is_terminal(sys.stdin)) else prompt
    if question is None:
        raise UsageError(
            "PROMPT is missing", remedy='give one, such as "Describe the image.", or - to read it from stdin'
        )
    return question


@app.command()
@grouped
def chat(
    engine: Engine,
    *,
    image: Images = None,
    video: Videos = None,
    system: System = None,
    answering: Annotated[Answering, OF_CHAT],
    seeing: Seeing,
    opening: Opening,
    hide_thinking: HideThinking = False,
    stats: ShowStats = False,
    quiet: Quiet = False,
    check: CheckAll = False,
) -> None:
    """Talk with an engine, turn by turn. A turn runs what is new since the last one; a note says what it found.

    \b
    At the prompt:
      /image PATH   show this image with the next turn
      /video PATH   show this video with the next turn
      /rewind [N]   drop the last turn, or the last N
      /reset        forget the conversation
      /quit         end the chat, as the end of the input (Ctrl-D) does
    Ctrl-C stops an answer and drops its turn; at the prompt it ends the chat.

    \b
    Example:
      qwen3vl chat demo-engine --image note.png
    """
    model = opening.open(engine, check=check)
    conversation = model.chat(system, **given(answering), **given(seeing))
    shows = {"has_stats": stats, "is_quiet": quiet, "hides_thinking": hide_thinking}
    LineChat(conversation, model, image or [], video or [], **shows).loop()


@app.command()
@grouped
def inspect(
    engine: Engine,
    *,
    check: CheckAll = False,
    graph: Graph = None,
    route: Annotated[Opening, ("vision_engine", "prefill_engine")],
    as_json: AsJson = False,
) -> None:
    """Show what an engine is and what built it, and compare its files with its manifest.

    Graphs and small files are compared by SHA-256, weight files by size; --check hashes the weights as well.
    Hashes catch damage and mix-ups, not malice: whoever can write the folder can write its manifest.

    --json prints one object: target, session, capabilities, model, versions, source, files (num_bytes, sha256,
    is_weights), format_version, weight_bytes, check (passed, compared, note); of ort-cuda engines decode_kernels, which
    says for which GPUs there are own kernels, and whose run on this machine (compute_capabilities, batches, here,
    reason); with other engines for a part, which are checked as well, route (engine and target of each part); tuning
    (what `qwen3vl tune` found here, or null).

    --graph draws vision tower and decoder by pieces, with formats and bytes of their weights, into a .svg file or, with
    a table, into a .html file. It reads the engine's ONNX graphs, and needs the package of that name (extra [export]).

    \b
    Examples:
      qwen3vl inspect demo-engine
      qwen3vl inspect demo-engine --check --json
      qwen3vl inspect demo-engine --graph graph.svg
    """
    from runtime.decode_plan_report import decode_report
    from runtime.manifest import Manifest
    from runtime.route import Route, parts_of
    from runtime.tuning_store import stored_values
    from runtime.urls import check_local

    check_local(engine, "engine")
    manifest = Manifest.read(engine)
    if graph is not None:
        _check_graph(graph, manifest)
    if not as_json:
        # Printed before the check, since it helps to understand what the check finds.
        print_text(manifest_text(manifest))
    manifest.check(engine, full=check)
    if graph is not None:
        _write_graph(graph, engine, manifest)
    runs = parts_of(Route.read(engine, check=check, **given(route)).engines) if given(route) else {}
    report, tuning = decode_report(engine, manifest), stored_values(manifest)
    compared = "SHA-256 of every file" if check else "SHA-256 of small files, size of weight files"
    if as_json:
        values = {**dataclasses.asdict(manifest), "model": manifest.model.to_dict()}
        values["weight_bytes"] = manifest.weight_bytes
        if report is not None:
            values["decode_kernels"] = dataclasses.asdict(report)
        values |= {"tuning": tuning, **({"route": runs} if runs else {})}
        print_json({**values, "check": {"passed": True, "compared": compared, "note": HASH_NOTE}})
        return
    for line in _details(report, runs, tuning):
        print_text(line)
    print(f"check      passed: {compared} ({HASH_NOTE})")
    if any(name.endswith(".plan") for name in manifest.files):
        print("note       a plan is code that the library runs: open only engines that you trust")


def _details(report: Any, runs: Mapping[str, Any], tuning: Mapping[str, Any] | None) -> Iterator[str]:
    """Give the lines about what a machine makes of an engine."""
    if report is not None:
        yield f"decode     {decode_text(report)}"
    if runs:
        yield f"route      {route_text(runs)}"
    if tuning is not None:
        said = ", ".join(f"{name} {value}" for name, value in tuning.items())
        yield f"tuned      {said or 'the defaults are the best'}"


def _write_graph(file: Path, engine: Path, manifest: Any) -> None:
    from qwen3vl_export.reports.graph import write_graph
    from qwen3vl_export.reports.pieces import read_graph

    write_graph(read_graph(engine, manifest), file)


def _check_graph(file: Path, manifest: Any) -> None:
    """Check that a graph can be drawn, before anything is read."""
    from engines.disk import check_file
    from qwen3vl_export.reports.graph import check_suffix
    from qwen3vl_export.reports.pieces import check_readable

    check_suffix(file)
    check_readable(manifest)
    check_file(file)


for command in (serve, batch, package, verify, bench, targets, plan, tune):
    app.command()(command)
app.add_typer(cache)


def main() -> None:
    """Run the `qwen3vl` command line; the entry point of the distribution."""
    run_app(app)


if __name__ == "__main__":
    main()

"""The `qwen3vl` command: run, chat with, inspect and verify engines.

Answers, tables and JSON go to stdout; statistics, notes and errors to stderr.
"""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any

import typer

from qwen3vl_export.cli.bench import bench
from qwen3vl_export.cli.conversation import LineChat
from qwen3vl_export.cli.errors import DEBUG_HELP, run_app
from qwen3vl_export.cli.options import (
    Answering,
    AsJson,
    CheckAll,
    Engine,
    Images,
    Opening,
    Quiet,
    Seeing,
    ShowStats,
    System,
    Videos,
    given,
    grouped,
)
from qwen3vl_export.cli.output import (
    is_terminal,
    manifest_text,
    print_json,
    print_stats,
    print_stream,
    print_text,
    read_stdin,
)
from qwen3vl_export.cli.pictures import Pictures
from qwen3vl_export.cli.targets import targets
from qwen3vl_export.cli.verify import verify
from runtime.errors import UsageError

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
    as_json: AsJson = False,
    stats: ShowStats = False,
    quiet: Quiet = False,
    check: CheckAll = False,
) -> None:
    """Answer one prompt. Its answer, and nothing else, appears on stdout while it is generated.

    --json prints one object at the end: text, token_ids (of the answer), finish_reason (eos, stop or length), and
    stats with preprocess_s, queue_s, vision_s, prefill_s, ttft_s (time to first token), tpot_s (time per later token),
    tokens_per_s, prompt_tokens, visual_tokens, new_tokens, peak_cache_bytes, drafted_tokens and accepted_tokens (of
    prompt lookup), cached_tokens and cached_images (found in the cache).

    \b
    Examples:
      qwen3vl run demo-engine "Which digits are there?" --image note.png
      qwen3vl run ENGINE "What changed?" --image before.jpg --image after.jpg
      qwen3vl run ENGINE "What happens, and when?" --video clip.mp4 --fps 1 --max-visual-tokens 4000
      qwen3vl run ENGINE "Write a haiku" --do-sample --temperature 0.8 --seed 1
      qwen3vl run ENGINE "Describe it" --image photo.jpg --max-pixels 500000 --stats
      qwen3vl run ENGINE "Describe it" --image photo.jpg --system "Answer in one sentence." --quiet
      qwen3vl run ENGINE "Locate every cup, in JSON with bbox_2d and label" --image desk.jpg --draw found.png
      qwen3vl run ENGINE --json -- "--a prompt that begins with dashes"
      qwen3vl run ENGINE < question.txt
    """
    from runtime.messages import system_message, user_message

    question = read_stdin() if prompt == "-" or (prompt is None and not is_terminal(sys.stdin)) else prompt
    if question is None:
        raise UsageError(
            "PROMPT is missing", remedy='give one, such as "Describe the image.", or - to read it from stdin'
        )
    pictures.check(image or [])
    model = opening.open(engine, check=check)
    messages: Any = [*system_message(system), *user_message(question, image or [], video or [])]
    messages = pictures.before(model, messages, given(seeing), is_quiet=quiet)
    options = {**given(answering), **given(seeing)}
    if as_json:
        generation = model.generate(messages, **options)
        shown = ("text", "token_ids", "finish_reason")
        values = {name: getattr(generation, name) for name in shown}
        print_json({**values, "stats": dataclasses.asdict(generation.stats)})
    else:
        generation = print_stream(model.stream(messages, **options))
    pictures.after(model, generation.text, image or [], is_quiet=quiet)
    if stats:
        print_stats(generation.stats)


@app.command()
@grouped
def chat(
    engine: Engine,
    *,
    image: Images = None,
    video: Videos = None,
    system: System = None,
    answering: Annotated[Answering, ("max_new_tokens", "do_sample", "temperature", "seed", "prompt_lookup_num_tokens")],
    seeing: Seeing,
    opening: Opening,
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
    LineChat(conversation, model, image or [], video or [], has_stats=stats, is_quiet=quiet).loop()


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
        # Printed before the check, since it helps to understand what the check finds.
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


for command in (verify, bench, targets):
    app.command()(command)


def main() -> None:
    """Run the `qwen3vl` command line; the entry point of the distribution."""
    run_app(app)


if __name__ == "__main__":
    main()

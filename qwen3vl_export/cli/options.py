"""Options that several commands have, and records that a command takes as a group of options.

An option that is not given is not passed on, so that the defaults are those of the checkpoint and of the runtime.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from runtime.errors import UsageError
from runtime.files import read_small_file

if TYPE_CHECKING:
    from runtime.model import Qwen3VLModel

Engine = Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder that qwen3vl-export wrote.")]
CheckAll = Annotated[bool, typer.Option("--check", help="Hash the weight files too, not only the small files.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")]
Images = Annotated[
    # Text, not Path: a path would fold the "//" of a URL, and the refusal of URLs would not see one.
    list[str] | None,
    typer.Option("--image", metavar="PATH", help="Image file to show before the prompt; may be repeated."),
]
Videos = Annotated[
    list[str] | None,
    typer.Option(
        "--video",
        metavar="PATH",
        help="Video file, animated image or folder of frames to show before the prompt; may be repeated.",
    ),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="System message: how the model is to answer.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only errors on stderr, no progress and no notes.")]
ShowStats = Annotated[bool, typer.Option("--stats", help="Print times, speed and cache size on stderr.")]

Tools = Annotated[
    Path | None,
    typer.Option(
        "--tools",
        metavar="FILE.json",
        help="Functions that the model may call, as a JSON list of their definitions; calls are printed as JSON.",
        show_default=False,
    ),
]
HideThinking = Annotated[
    bool, typer.Option("--hide-thinking", help="Do not print on stderr what the model thinks before its answer.")
]


@dataclass(frozen=True)
class Opening:
    """How an engine is opened.

    Attributes:
        min_pixels: Enlarge images and frames that have fewer pixels than this.
        max_pixels: Shrink images and frames that have more pixels than this: faster, with less detail.
        max_image_pixels: Refuse images that have more pixels than this before decoding them. [default: 50000000]
        visual_token_share: Keep this share, above 0 and up to 1, of the visual tokens of each image and video: an
            approximation, which answers sooner. [default: 1, all of them]
        max_context: Capacity of the KV cache in tokens, for prompt, images and answer together.
        window: Keep the rows of so many tokens, the first ones and the newest, in place of --max-context: chats without
            end. An approximation once the window is full.
        sink_tokens: First tokens whose rows a window keeps. [default: 4]
        max_memory: Most memory that the engine may take in all by its plan, in units of 10^9 bytes. [default: the
            machine's]
        fit: Where not all fits, choose fewer kept and running sequences, smaller images, shorter chunks of prompts, a
            shorter context, in this order, and say so; otherwise it is refused.
        threads: Number of CPU threads. [default: OMP_NUM_THREADS, or the number of cores]
        huge_pages: Move the weights to huge pages: opening takes seconds longer, tokens come faster.
        no_cuda_graphs: On a GPU, do not record the decode step as a CUDA graph.
        no_decode_plan: On a GPU, let ONNX Runtime decode, and not the engine's own kernels.
        batch_invariant: Take the form of these kernels whose rounding does not depend on how many requests run at once.
        weights_twice: Take these kernels even where ONNX Runtime keeps a second copy of the weights on the GPU.
        kv_budget: After a longer prompt, keep so many of its rows of the KV cache in each head, those that its last
            tokens attend to most: approximate. For engines built with --kv-scores.
        legacy_video_prompt: Write prompts with videos as transformers before 5.10 did.
        vision_engine: Run the vision tower on this engine of the same checkpoint.
        prefill_engine: Run prompts on this engine of the same checkpoint; its rows of the KV cache are moved.
        no_tuned: Open with the defaults, and not with the settings that `qwen3vl tune` found on this machine.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    max_image_pixels: int | None = None
    visual_token_share: float | None = None
    max_context: int | None = None
    window: Annotated[int | None, typer.Option(metavar="TOKENS")] = None
    sink_tokens: Annotated[int | None, typer.Option(metavar="TOKENS")] = None
    max_memory: Annotated[float | None, typer.Option(metavar="GB")] = None
    fit: bool = False
    threads: int | None = None
    huge_pages: Annotated[bool | None, typer.Option("--huge-pages/--no-huge-pages")] = None
    no_cuda_graphs: bool = False
    no_decode_plan: bool = False
    batch_invariant: bool = False
    weights_twice: bool = False
    kv_budget: Annotated[int | None, typer.Option(metavar="ROWS")] = None
    legacy_video_prompt: bool = False
    vision_engine: Annotated[Path | None, typer.Option(metavar="DIR")] = None
    prefill_engine: Annotated[Path | None, typer.Option(metavar="DIR")] = None
    no_tuned: bool = False

    def open(self, engine: Path, *, check: bool = False, serving: Serving | None = None) -> Qwen3VLModel:
        """Open it.

        Args:
            engine: Its folder.
            check: Hash the weight files too.
            serving: How many requests it takes.

        Raises:
            UsageError: An option is out of range.
        """
        from runtime.model import Qwen3VLModel

        return Qwen3VLModel.from_engine(engine, check=check, **self.arguments(serving))

    def arguments(self, serving: Serving | None = None) -> dict[str, Any]:
        """Return what was given as arguments of `Qwen3VLModel.from_engine`.

        Raises:
            UsageError: An option is out of range.
        """
        options = given(self)
        if self.max_memory is not None:
            if not math.isfinite(self.max_memory):
                raise UsageError(
                    f"--max-memory {self.max_memory}: expected a number of GB",
                    remedy="leave it out for the machine's",
                )
            options["max_memory"] = round(self.max_memory * 1e9)
        for name in ("cuda_graphs", "decode_plan", "tuned"):
            if options.pop(f"no_{name}", False):
                options[name] = False
        if serving is not None:
            options |= serving.arguments()
        return options


@dataclass(frozen=True)
class Serving:
    """How many requests an engine takes at once, and what it keeps for later ones.

    Attributes:
        max_sequences: Most requests that run at once. [default: 8, or as many as fit]
        kept_sequences: Sequences whose KV cache is kept after their end, for prompts that begin as they do.
            [default: 4, or as many as fit]
        no_prefix_cache: Take no part of the KV cache over from other requests.
        vision_cache_bytes: Most bytes of embeddings of images that may come again. [default: 256 MiB, or a sixteenth of
            the memory that is left]
        max_queue: Most requests that wait; more are refused. [default: 256]
        max_queue_tokens: Most tokens of their prompts together. [default: 16 times --max-context]
        max_delay_ms: While others decode, run a prompt in pieces of about this many milliseconds. [default: 200]
    """

    max_sequences: int | None = None
    kept_sequences: int | None = None
    no_prefix_cache: bool = False
    vision_cache_bytes: int | None = None
    max_queue: int | None = None
    max_queue_tokens: int | None = None
    max_delay_ms: Annotated[float | None, typer.Option(metavar="MS")] = None

    def arguments(self) -> dict[str, Any]:
        """Return what was given as arguments of `Qwen3VLModel.from_engine`."""
        options = given(self)
        if options.pop("no_prefix_cache", False):
            options["prefix_cache"] = False
        return options


@dataclass(frozen=True)
class Answering:
    """How an answer is made.

    Attributes:
        max_new_tokens: Most tokens of the answer.
        max_length: Most tokens of prompt and answer together; --max-new-tokens takes precedence.
        do_sample: Sample tokens, or always take the most likely one. [default: the checkpoint's]
        temperature: Divide the logits by this: below 1 is sharper, above 1 flatter. Needs sampling.
        top_k: Keep the K most likely tokens; 0 keeps all. Needs sampling.
        top_p: Keep the most likely tokens whose probabilities add up to P; 1 keeps all. Needs sampling.
        min_p: Drop tokens less than P times as likely as the most likely one; 0 keeps all. Needs sampling.
        repetition_penalty: Above 1, tokens of prompt and answer become less likely; 1 is off.
        presence_penalty: Subtract this from the logit of each token that is already in the answer; 0 is off.
        frequency_penalty: Subtract this once for each time that a token occurs in the answer; 0 is off.
        seed: Seed of the random generator; the same seed gives the same answer.
        stop: End the answer before this text; may be repeated.
        prompt_lookup_num_tokens: Draft up to N tokens by finding the latest ones earlier in prompt or answer: faster
            where the answer copies.
        max_thinking_tokens: Most tokens of the thoughts before the answer; 0 is none. Needs a model that thinks.
        max_repetitions: End an answer that has said the same so many times in a row; 0 is off.
        response_format: What the answer has to look like: JSON in the form of OpenAI's option of that name, or a JSON
            schema; or the file that holds it.
        choice: The answer is one of these texts; may be repeated.
        regex: The answer matches this regular expression.
        logprobs: With --json, print how likely each token was, and the K likeliest in its place.
        n: Make so many answers; --json lists them in choices, otherwise each is printed. Needs sampling.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: Annotated[bool | None, typer.Option("--do-sample/--greedy")] = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    prompt_lookup_num_tokens: Annotated[
        int | None, typer.Option("--prompt-lookup-num-tokens", "--prompt-lookup", metavar="N")
    ] = None
    max_thinking_tokens: int | None = None
    max_repetitions: int | None = None
    response_format: Annotated[str | None, typer.Option(metavar="FILE|JSON")] = None
    choice: Annotated[list[str] | None, typer.Option(metavar="TEXT")] = None
    regex: str | None = None
    logprobs: Annotated[int | None, typer.Option(metavar="K")] = None
    n: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Return what was given as options of `Qwen3VLModel.generate`.

        Raises:
            UsageError: Two options ask for different formats, or a file or JSON cannot be read.
        """
        options = given(self)
        formats = [name for name in ("response_format", "choice", "regex") if name in options]
        if len(formats) > 1:
            names = " and ".join(f"--{name.replace('_', '-')}" for name in formats)
            raise UsageError(f"{names} are given together", remedy="give one of them")
        if "response_format" in options:
            options["response_format"] = _read_format(options["response_format"])
        if choices := options.pop("choice", None):
            options["response_format"] = {"type": "choice", "choices": list(choices)}
        if regex := options.pop("regex", None):
            options["response_format"] = {"type": "regex", "regex": regex}
        if "logprobs" in options:
            options["top_logprobs"] = options["logprobs"]
            options["logprobs"] = True
        return options


def _read_format(text: str) -> Any:
    """Return the JSON of an option's text, or of the file that it names."""
    source = text
    if not text.lstrip().startswith("{"):
        source = read_small_file(Path(text), error=UsageError, remedy="give a file of JSON, or JSON itself").decode(
            "utf-8", "replace"
        )
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--response-format is no JSON: {error}", remedy="give a JSON schema") from error


@dataclass(frozen=True)
class Seeing:
    """How much of images and videos is seen.

    Attributes:
        fps: Take so many frames of a video for each of its seconds. [default: the checkpoint's, 2]
        num_frames: Take so many frames of a video, spread evenly, instead.
        min_frames: Take at least so many of a short one. [default: the checkpoint's, 4]
        max_frames: Take at most so many of a long one. [default: the checkpoint's, 768]
        max_visual_tokens: Shrink the largest images and videos until all of them together are at most so many tokens.
    """

    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    max_visual_tokens: int | None = None


def given(options: Any) -> dict[str, Any]:
    """Return the fields of a record that were given, by name."""
    found = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value not in (field.default, []):  # an empty list: older releases of typer, where nothing is repeated
            found[field.name] = tuple(value) if isinstance(value, list) else value
    return found


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Show typer the fields of each parameter that is a dataclass as options.

    What a field is for, says the docstring of its class. `Annotated[Record, ("field", …)]` shows some of them alone.
    """
    parameters: list[inspect.Parameter] = []
    records: dict[str, tuple[type, tuple[str, ...]]] = {}
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        kind, *marks = _parts(hints[parameter.name])
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        names = marks[0] if marks else tuple(field.name for field in dataclasses.fields(kind))
        records[parameter.name] = kind, names
        parameters += [each for each in _options_of(kind) if each.name in names]

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        made = {name: kind(**{key: values.pop(key) for key in names}) for name, (kind, names) in records.items()}
        command(**values, **made)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _options_of(kind: type) -> list[inspect.Parameter]:
    """Return the fields of a dataclass as typer takes options, described by the docstring of the class."""
    attributes = textwrap.dedent((inspect.getdoc(kind) or "").partition("Attributes:\n")[2].partition("\n\n")[0])
    texts = {found[1]: " ".join(found[2].split()) for found in re.finditer(r"^(\w+): (.*(\n +.*)*)", attributes, re.M)}
    hints = get_type_hints(kind, include_extras=True)
    options = []
    for field in dataclasses.fields(kind):
        base, *marks = _parts(hints[field.name])
        # A switch that is off needs no option that says so.
        words = [f"--{field.name.replace('_', '-')}"] if field.default is False else []
        option = marks[0] if marks else typer.Option(*words)
        option.help = texts.get(field.name)  # python -OO has no docstrings
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        annotation = Annotated[base, option]
        options.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return options


def _parts(hint: Any) -> tuple[Any, ...]:
    """Return a type and what `Annotated` hangs on it."""
    return get_args(hint) if get_origin(hint) is Annotated else (hint,)

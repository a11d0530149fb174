"""`qwen3vl bench`: how fast an engine answers on this machine, or a server, in a few lines."""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3vl_export.cli.bench_load import LoadOptions, bench_load
from qwen3vl_export.cli.bench_url import ServerOptions, bench_url
from qwen3vl_export.cli.options import AsJson, Opening, Serving, grouped
from qwen3vl_export.cli.output import print_json, print_text
from runtime.errors import UsageError
from runtime.shown import columns

if TYPE_CHECKING:
    from qwen3vl_export.load.prompts import Prompts
    from runtime.answer import Stats
    from runtime.model import Qwen3VLModel

_PROMPT = "Describe the image. "
_DEFAULT_RUNS = 5
_OPENING = (
    *("threads", "huge_pages", "no_cuda_graphs", "no_decode_plan", "batch_invariant", "weights_twice"),
    *("max_context", "max_memory"),
)
_GRAPH = {True: ", as a CUDA graph", False: ", without a CUDA graph", None: ""}


@dataclass(frozen=True)
class Speed:
    """Speed of one kind of prompt; times in seconds.

    Attributes:
        prompt_tokens: Tokens of the prompt, visual ones included.
        visual_tokens: How many of them come from the image.
        new_tokens: Tokens of each answer.
        runs: Answers that were timed.
        ttft_p50_s: Median time from the call to the first token.
        ttft_p90_s: The time that nine of ten answers do not exceed, interpolated.
        tpot_s: Median over the answers of the time per later token.
        tokens_per_s: The inverse of `tpot_s`.
    """

    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    runs: int
    ttft_p50_s: float
    ttft_p90_s: float
    tpot_s: float
    tokens_per_s: float


@grouped
def bench(
    engine: Annotated[
        Path | None, typer.Argument(metavar="ENGINE", help="Engine folder that qwen3vl-export wrote; or give --url.")
    ] = None,
    *,
    server: ServerOptions,
    image_size: Annotated[
        str, typer.Option(metavar="WxH", help="Size of the image, which holds random pixels; none leaves it out.")
    ] = "448x448",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Approximate number of tokens of the text.")] = 20,
    new_tokens: Annotated[int, typer.Option(min=2, help="Number of tokens of each answer.")] = 32,
    runs: Annotated[
        int | None, typer.Option(min=1, help="Number of answers to time, after one that warms up. [default: 5]")
    ] = None,
    load: LoadOptions,
    opening: Annotated[Opening, _OPENING],
    serving: Serving,
    as_json: AsJson = False,
) -> None:
    """Time answers on this machine: time to first token (TTFT), time per later token (TPOT), tokens a second.

    Each answer has exactly --new-tokens tokens: the end token does not end it. TTFT covers preprocessing, vision tower
    and prefill. By default one request runs at a time, --runs times.

    With --concurrency or --rate many requests run at once, each with words and pixels of its own. It reports how many
    were answered, refused because the queue was full, and failed; the percentiles 50 to 99 of TTFT, TPOT, latency and
    time in the queue; cache hits and memory. To see what a server can take, raise --rate until requests are refused.

    --url offers the same to a server that speaks OpenAI's API, whatever it runs: streamed chat completions over HTTP,
    images as PNG files. Its own counters are not seen: no queue, batch, cache and memory.

    --json prints one object; docs/commands.md lists its fields.

    \b
    Examples:
      qwen3vl bench demo-engine
      qwen3vl bench ENGINE --image-size 1024x768 --runs 9 --json
      qwen3vl bench ENGINE --concurrency 8 --plot load.svg
      qwen3vl bench ENGINE --rate 2 --duration 60 --max-queue 32 --image-size none
      qwen3vl bench --url http://127.0.0.1:8000 --concurrency 8 --requests 64 --image-size 512x512
    """
    size = parse_size(image_size)
    load.check()
    server.check(engine, load, opening, serving)
    _check_runs(runs, load)
    if engine is None:
        bench_url(server, size, prompt_tokens, new_tokens, load, as_json=as_json)
        return
    model, where = _opened(engine, opening, serving)
    if load.is_given:
        where["max_sequences"] = model.limits.max_sequences
        bench_load(model, _prompts(model, prompt_tokens, size, load), new_tokens, load, where, as_json=as_json)
        return
    speed = measure(model, size, prompt_tokens, new_tokens, runs or _DEFAULT_RUNS)
    # Known after the first step; None if this kind of engine records nothing.
    where |= {name: getattr(model.session, name, None) for name in ("decode_recorded", "decode_kernels")}
    if as_json:
        print_json({**where, **asdict(speed)})
    else:
        print_text("\n".join(columns(_rows(speed, where))))


def _check_runs(runs: int | None, load: LoadOptions) -> None:
    if load.is_given and runs is not None:
        raise UsageError("--runs is of one request at a time", remedy="pass --requests with --concurrency or --rate")


def _prompts(model: Qwen3VLModel, num_tokens: int, size: tuple[int, int] | None, load: LoadOptions) -> Prompts:
    from qwen3vl_export.load.prompts import Prompts

    return Prompts.of_tokens(model.tokenizer, num_tokens, size, shared_tokens=load.shared_prefix, seed=load.seed)


def _opened(engine: Path, opening: Opening, serving: Serving) -> tuple[Qwen3VLModel, dict[str, Any]]:
    """Open an engine and return it with what it runs on."""
    import time

    from runtime.machine import default_threads

    start = time.perf_counter()
    model = opening.open(engine, serving=serving)
    loaded = time.perf_counter() - start
    return model, {
        "device": device(model),
        "threads": opening.threads or default_threads(),
        "target": model.manifest.target,
        "load_s": loaded,
    }


def _rows(speed: Speed, where: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("device", f"{where['device']}, threads: {where['threads']}"),
        ("engine", f"{where['target']}, loaded in {where['load_s']:.2f} s"),
        ("prompt", f"{speed.prompt_tokens} tokens, {speed.visual_tokens} of them visual"),
        ("TTFT", f"p50 {1e3 * speed.ttft_p50_s:.1f} ms, p90 {1e3 * speed.ttft_p90_s:.1f} ms ({speed.runs} runs)"),
        ("TPOT", f"{1e3 * speed.tpot_s:.2f} ms"),
        ("decode", f"{speed.tokens_per_s:.1f} tokens/s{_GRAPH[where['decode_recorded']]}"),
        *([("kernels", where["decode_kernels"])] if where["decode_kernels"] else []),
    ]


def measure(
    model: Qwen3VLModel, image_size: tuple[int, int] | None, prompt_tokens: int, new_tokens: int, runs: int
) -> Speed:
    """Time `runs` greedy answers, after one that warms up.

    Args:
        model: An opened engine.
        image_size: Width and height of the image in pixels, or none.
        prompt_tokens: Length of the text: its words are repeated until they reach it.
        new_tokens: Tokens of each answer, at least 2.
        runs: Answers to time.
    """
    import numpy as np

    per_sentence = len(model.tokenizer.encode(_PROMPT))
    content: list[dict[str, Any]] = [{"type": "text", "text": _PROMPT * max(1, round(prompt_tokens / per_sentence))}]
    if image_size is not None:
        width, height = image_size
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        content.insert(0, {"type": "image", "image": pixels})
    messages = [{"role": "user", "content": content}]
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": []}
    stats = [model.generate(messages, **options).stats for _ in range(runs + 1)][1:]
    return summarise(stats)


def summarise(stats: Sequence[Stats]) -> Speed:
    """Return percentiles over the answers."""
    import numpy as np

    first = stats[0]
    times = [each.ttft_s for each in stats]
    tpot = statistics.median(each.tpot_s for each in stats)
    return Speed(
        prompt_tokens=first.prompt_tokens,
        visual_tokens=first.visual_tokens,
        new_tokens=first.new_tokens,
        runs=len(stats),
        ttft_p50_s=float(np.percentile(times, 50)),
        ttft_p90_s=float(np.percentile(times, 90)),
        tpot_s=tpot,
        tokens_per_s=1 / tpot,
    )


def parse_size(text: str) -> tuple[int, int] | None:
    """Return width and height of `WxH`, or none for `none`.

    Raises:
        UsageError: It is neither.
    """
    if text == "none":
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise UsageError(
            f"--image-size {text}: expected WIDTHxHEIGHT in pixels, such as 1024x768, or none",
            remedy="leave it out for 448x448",
        )
    return int(parts[0]), int(parts[1])


def device(model: Qwen3VLModel) -> str:
    """Return the name of the GPU that the engine runs on, or of the processor."""
    from engines.hardware import probe
    from runtime.session import is_on_gpu

    machine = probe()
    if not is_on_gpu(model.manifest):
        return machine.cpu
    return machine.gpu.name if machine.gpu else "a GPU that nvidia-smi does not list"

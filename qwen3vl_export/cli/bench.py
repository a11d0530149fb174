"""`qwen3vl bench`: how fast engines answer on this machine, or a server, in a few lines."""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

import time
from typing import Annotated

import typer

from qwen3vl_export.cli.bench_load import LoadOptions, bench_load
from qwen3vl_export.cli.bench_sweep import ReportOptions, SweepOptions, bench_sweep, device, named
from qwen3vl_export.cli.bench_url import ServerOptions, bench_url
from qwen3vl_export.cli.options import AsJson, Opening, Serving, given, grouped
from runtime.errors import UsageError
from runtime.machine import default_threads

_OPENING = (
    *("threads", "huge_pages", "no_cuda_graphs", "no_decode_plan", "batch_invariant", "weights_twice"),
    *("max_context", "max_memory", "fit", "vision_engine", "prefill_engine", "no_tuned"),
)


@grouped
def bench(
    engines: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]ENGINE",
            help="Engine folders that qwen3vl-export wrote, which take turns; or give --url.",
        ),
    ] = None,
    *,
    server: ServerOptions,
    asked: SweepOptions,
    report: ReportOptions,
    load: LoadOptions,
    opening: Annotated[Opening, _OPENING],
    serving: Serving,
    as_json: AsJson = False,
) -> None:
    """Time answers on this machine: time to first token (TTFT), time per later token (TPOT), tokens a second.

    Each answer has exactly --new-tokens tokens: the end token does not end it. TTFT covers preprocessing, vision tower
    and prefill. Every prompt has a text and pixels of its own, so that no cache knows it. Lists make a sweep: each
    point is measured --repeats times after one of warm-up, engines in turns; medians with their quartiles are printed.

    --compare sets each point beside that of an earlier file, --against the engines beside one of them, with the factor
    between them, its 95 % interval and a verdict. The exit code is 13 if --fail-slower is exceeded. docs/benchmarks.md
    says what that can tell: on a busy machine, --against more than --compare.

    With --concurrency or --rate many requests run at once, each with words and pixels of its own. It reports how many
    were answered, refused because the queue was full, and failed; the percentiles 50 to 99 of TTFT, TPOT, latency and
    time in the queue; cache hits and memory. To see what a server can take, raise --rate until requests are refused.

    --url offers the same to a server that speaks OpenAI's API, whatever it runs: streamed chat completions over HTTP,
    images as PNG files. Its own counters are not seen: no queue, batch, cache and memory.

    --json prints one object for one point, --output json all of them; docs/commands.md lists the fields.

    \b
    Examples:
      qwen3vl bench demo-engine
      qwen3vl bench ENGINE --prompt-tokens 128,512 --new-tokens 32,128 --batch 1,4 --image-size none
      qwen3vl bench fp32=ENGINE int4=OTHER --repeats 9 --against fp32 --html report.html
      qwen3vl bench ENGINE --compare earlier.json --fail-slower 5%
      qwen3vl bench ENGINE --concurrency 8 --plot load.svg
      qwen3vl bench --url http://127.0.0.1:8000 --concurrency 8 --requests 64 --image-size 512x512
    """
    load.check()
    server.check(engines[0] if engines else None, load, opening, serving)
    report.check(as_json=as_json)
    if engines and not load.is_given:
        bench_sweep(engines, asked, report, opening, serving, as_json=as_json)
    else:
        _bench_many(engines or [], server, asked, report, load, opening, serving, as_json=as_json)


def _bench_many(
    engines: list[str],
    server: ServerOptions,
    asked: SweepOptions,
    report: ReportOptions,
    load: LoadOptions,
    opening: Opening,
    serving: Serving,
    *,
    as_json: bool,
) -> None:
    """Send many requests at once, to a server or to one engine."""
    if beside := list(given(report)):
        name = beside[0].replace("_", "-")
        raise UsageError(f"--{name} is of a sweep, not of many requests", remedy="leave --concurrency and --rate out")
    size, prompt_tokens, new_tokens = asked.of_many_requests()
    if not engines:
        bench_url(server, size, prompt_tokens, new_tokens, load, as_json=as_json)
        return
    if len(engines) > 1:
        raise UsageError("many requests go to one engine", remedy="leave the others out, and measure them after it")
    from qwen3vl_export.load.prompts import Prompts

    start = time.perf_counter()
    (folder,) = named(engines).values()
    with opening.open(folder, serving=serving) as model:
        where = {
            "device": device(model),
            "threads": model.threads or default_threads(),
            "target": model.manifest.target,
            "load_s": time.perf_counter() - start,
            "max_sequences": model.limits.max_sequences,
        }
        prompts = Prompts.of_tokens(
            model.tokenizer, prompt_tokens, size, shared_tokens=load.shared_prefix, seed=load.seed
        )
        bench_load(model, prompts, new_tokens, load, where, as_json=as_json)

"""`python -m benchmarks serve`: what an HTTP server adds to the runtime in-process."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import options
from benchmarks.measure import environment
from benchmarks.result_files import RESULTS, markdown, write
from benchmarks.serve_process import Memory, ServerProcess, own_server
from benchmarks.serve_work import Work, do
from benchmarks.serve_worker import Worker
from qwen3vl_export.load.connections import Address
from qwen3vl_export.load.server import HttpServer
from runtime.manifest import Manifest

SIDES = ("in-process", "server")
_TTFT_TOKENS = 2


def serve(
    engine: Annotated[Path, typer.Argument(help="Engine folder.")],
    threads: Annotated[int, typer.Option(min=1, help="Threads of an engine.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="How often each side has its turn.")] = 5,
    streams: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each stream in a round.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text, about.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer of a stream.")] = 64,
    singles: Annotated[int, typer.Option(min=1, help="Requests one at a time in a round, for TTFT.")] = 5,
    images: Annotated[int, typer.Option(min=0, help="Of these, how many with an image.")] = 3,
    image_side: Annotated[int, typer.Option(min=32, help="Its width and height.")] = 512,
    starts: Annotated[int, typer.Option(min=1, help="How often the server is started, to time it.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and write no files.")] = False,
    results: options.Results = RESULTS,
) -> None:
    """Measure tokens a second, TTFT, start and memory of the server beside those of the engine in-process, in turns.

    The server and the engine in-process are two processes with the same work in the same order, of which one at a time
    has some. The load is generated in a third for the server, and by the engine's own process for the other. Memory is
    that after all of it.
    """
    manifest = Manifest.read(engine)
    sizes = {
        "threads": threads, "rounds": rounds, "streams": streams, "requests": requests, "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens, "singles": singles, "images": images, "image_side": image_side,
    }  # fmt: skip
    result: dict[str, Any] = {
        "model": Path(str(manifest.source.get("name"))).name,
        "target": manifest.target,
        "workload": sizes,
        "environment": environment(),
    }
    with tempfile.TemporaryDirectory() as name:
        log, command = Path(name) / "server.log", own_server(engine, threads)
        ready_s = []
        for _ in range(starts - 1):
            with ServerProcess(command, "/ready", log) as server:
                ready_s.append(server.ready_s)
        with ServerProcess(command, "/ready", log) as server, Worker(str(engine), threads) as worker:
            result |= _measure(server, worker, sizes) | {"ready_s": [*ready_s, server.ready_s]}
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        write(f"serve-{result['model']}-{result['target']}", result, table(result), results)


def _measure(server: ServerProcess, worker: Worker, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Give both sides the same work in turns."""
    client = HttpServer(Address.parse(server.url))
    num_words = max(1, round(sizes["prompt_tokens"] / (client.tokens_per_word() or 1.0)))
    sides: dict[str, Callable[[Work], dict[str, Any]]] = {
        "in-process": worker.do,
        "server": lambda work: do(client, work),
    }
    found: dict[str, dict[str, list[Any]]] = {}
    for round_ in range(sizes["rounds"] + 1):
        for kind, work in _works(sizes, num_words, seed=round_).items():
            for side in SIDES if round_ % 2 else SIDES[::-1]:
                typer.echo(f"round {round_}: {kind}, {side}", err=True)
                measured = sides[side](work)
                if round_:  # the first one warms up
                    found.setdefault(kind, {name: [] for name in SIDES})[side].append(measured)
    memory = {side: asdict(Memory.of(process.pid)) for side, process in zip(SIDES, (worker, server), strict=True)}
    return {"kinds": found, "memory": memory}


def _works(sizes: Mapping[str, int], num_words: int, seed: int) -> dict[str, Work]:
    streams = sizes["streams"]
    works = {
        "streams": Work(streams, streams * sizes["requests"], num_words, sizes["new_tokens"], seed=3 * seed),
        "text": Work(1, sizes["singles"], num_words, _TTFT_TOKENS, seed=3 * seed + 1),
    }
    if sizes["images"]:
        works["image"] = Work(1, sizes["images"], num_words, _TTFT_TOKENS, sizes["image_side"], seed=3 * seed + 2)
    return works


def table(result: Mapping[str, Any]) -> str:
    """Return the table of a result: both sides, and what the server adds."""
    sizes, kinds = result["workload"], result["kinds"]
    rows = [["", *SIDES, "the server adds"]]
    speeds = [statistics.median(each["tokens_per_s"] for each in kinds["streams"][side]) for side in SIDES]
    ratios = [
        1 - there["tokens_per_s"] / here["tokens_per_s"]
        for here, there in zip(*(kinds["streams"][side] for side in SIDES), strict=True)
    ]
    less = f"{100 * statistics.median(ratios):.1f} % less ({', '.join(f'{100 * each:.1f}' for each in ratios)})"
    rows.append([f"tokens/s, {sizes['streams']} streams", *(f"{each:.1f}" for each in speeds), less])
    for kind, what in (("text", "text"), ("image", f"{sizes['image_side']}x{sizes['image_side']}")):
        if kind in kinds:
            times = [[each for turn in kinds[kind][side] for each in turn["ttft_s"]] for side in SIDES]
            here, there = (1e3 * statistics.median(values) for values in times)
            name = f"TTFT, {what}, median of {len(times[0])}"
            rows.append([name, f"{here:.1f} ms", f"{there:.1f} ms", f"{there - here:+.1f} ms"])
    for name, what in (("rss", "resident memory"), ("anonymous", "of it anonymous")):
        values = [result["memory"][side][name] / 1e6 for side in SIDES]
        rows.append([what, *(f"{each:.0f} MB" for each in values), f"{values[1] - values[0]:+.0f} MB"])
    ready = result["ready_s"]
    times_text = ", ".join(f"{each:.2f}" for each in ready)
    rows.append(["start to /ready", "", f"{statistics.median(ready):.2f} s", f"({times_text})"])
    return markdown(rows) + (
        f"\n{result['model']}, {result['target']}, {sizes['threads']} threads; texts of about {sizes['prompt_tokens']} "
        f"tokens, answers of {sizes['new_tokens']} in streams; medians of {sizes['rounds']} rounds, of tokens/s with "
        "each round. Both sides decode the same PNG files.\n"
    )

"""Race engines of one model against each other: they take turns call by call, so that noise hits all alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import measure, report
from benchmarks.speculation import Engine
from runtime.contract import DecoderInputs, no_visual_embeds
from runtime.errors import UsageError

CACHED = (20, 512, 3000)


def decode_step(engine: Engine, num_cached: int, num_new: int, cache: Any) -> float:
    """Return the seconds of one call of `num_new` tokens behind `num_cached`."""
    places = np.arange(num_cached, num_cached + num_new)
    start = time.perf_counter()
    engine.session.decode(
        DecoderInputs.text(
            (places % engine.config.text.vocab_size)[None],
            np.array([num_cached]),
            no_visual_embeds(engine.config),
            logits_positions=np.array([[num_new - 1]]),
        ),
        cache,
    )
    return time.perf_counter() - start


def run(engines: Mapping[str, Engine], repeats: int) -> list[dict[str, Any]]:
    """Time single tokens behind `CACHED` positions, and a prompt of 512 tokens."""
    works = [(f"decode@{cached}", cached, 1, repeats) for cached in CACHED] + [("prefill 512", 0, 512, 3)]
    rng = random.Random(0)
    rows = []
    for work, cached, num_new, turns in works:
        caches = {name: engine.session.new_cache(cached + num_new) for name, engine in engines.items()}
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(turns + 2):
            for name in rng.sample(list(engines), len(engines)):
                taken = decode_step(engines[name], cached, num_new, caches[name])
                if turn >= 2:
                    seconds[name].append(taken)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        rows.append({"work": work, "median_s": medians, "cache_bytes": {n: c.num_bytes for n, c in caches.items()}})
    return rows


def table(result: Mapping[str, Any]) -> str:
    """Return the body of the result's page."""
    first = result["engines"][0]
    head = ("work", *result["engines"], *(f"{name}, × as fast as {first}" for name in result["engines"][1:]))
    rows = []
    for row in result["rows"]:
        medians = row["median_s"]
        cells = [f"{medians[name] * 1000:.1f} ms" for name in result["engines"]]
        rows.append((row["work"], *cells, *(f"{medians[first] / medians[n]:.2f}" for n in result["engines"][1:])))
    return f"{result['threads']} threads. Medians; the engines take turns.\n\n{report.table([head, *rows])}"


def race(
    engines: Annotated[list[Path], typer.Argument(help="Engine folders of one model, the first to compare with.")],
    name: Annotated[str, typer.Option(help="Names the result: race-NAME.")],
    threads: int = 2,
    repeats: int = 40,
    results: Annotated[Path, typer.Option(help="Folder for the JSON file and the table.")] = report.RESULTS,
) -> None:
    """Race engines of one model: single tokens behind short and long caches, and a prompt."""
    environment = measure.environment()
    opened = {folder.absolute().name: Engine(folder, threads, 0) for folder in engines}
    if len(opened) < len(engines):
        raise UsageError("two engine folders have the same name, which names them in the table")
    rows = run(opened, repeats)
    result = {"engines": list(opened), "threads": threads, "rows": rows, "environment": environment}
    path = report.write(f"race-{name}", result, results)
    typer.echo(path.read_text(encoding="utf-8"))

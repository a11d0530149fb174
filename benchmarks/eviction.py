"""`python -m benchmarks kv-eviction ENGINE`: what rows of the KV cache cost a decode step, and giving them up.

Measured is the processor time of one thread, which a busy machine changes less than the time that passes.

Shapes: W tokens of the window, N query heads, K kv heads, T rows, H head dim.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from benchmarks import options
from benchmarks.measure import environment
from benchmarks.result_files import RESULTS, markdown, write
from runtime.cache_eviction import choose_rows, window_scores
from runtime.contract import DecoderInputs
from runtime.errors import UsageError

if TYPE_CHECKING:
    from runtime.model import Qwen3VLModel
    from runtime.sessions.ort_cpu import OrtKVCache

ROWS = (64, 256, 512, 1024, 2048, 3072, 4096)
PROMPTS = (512, 1024, 2048, 4096)
KEPT = 4
"""Of a prompt, one row of so many is kept."""
_FILL_ROWS = 4200


def kv_eviction(
    engine: Annotated[Path, typer.Argument(help="Engine built with --kv-scores, its cache in floats.")],
    name: Annotated[str, typer.Option(help="Of the model, for the result.")] = "qwen3-vl-2b",
    repeats: Annotated[int, typer.Option(min=1)] = 8,
    results: options.Results = RESULTS,
) -> None:
    """Time decode steps after some rows, and the eviction of prompts."""
    from runtime.model import Qwen3VLModel

    model = Qwen3VLModel.from_engine(engine, threads=1, tuned=False, max_context=_FILL_ROWS)
    if "kv_scores" not in model.manifest.capabilities:
        raise UsageError(f"{engine}: it gives no queries", remedy="build it with --kv-scores")
    machine = environment()
    cache = model.session.new_cache(_FILL_ROWS)
    result = {
        "model": name,
        "target": model.manifest.target,
        "kept": KEPT,
        "steps_s": _steps(model, cache, repeats),
        "evictions": {str(rows): _eviction(model, cache, rows, repeats) for rows in PROMPTS},
        "environment": machine,
    }
    write(f"eviction-{name}-{model.manifest.target}", result, table(result), results)


def _steps(model: Qwen3VLModel, cache: OrtKVCache, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of decode steps, by rows before them; the numbers of rows take turns."""
    _fill(model, cache)
    embeds = model.encode_images(())
    found: dict[str, list[float]] = {str(rows): [] for rows in ROWS}
    for run in range(repeats + 1):
        for rows in ROWS:
            inputs = DecoderInputs.text(np.array([[5]]), np.array([rows]), embeds)
            seconds = _cpu_s(lambda inputs=inputs: model.session.decode(inputs, cache))
            if run:  # the first warms up
                found[str(rows)].append(seconds)
    return found


def _eviction(model: Qwen3VLModel, cache: OrtKVCache, num_rows: int, repeats: int) -> dict[str, Any]:
    """Return the seconds of choosing and moving the rows of a prompt, in all layers, and the memory given back."""
    text, window = model.config.text, int(model.manifest.capabilities["kv_scores"])
    queries_WNH = np.random.default_rng(1).standard_normal((window, text.num_heads, text.head_dim), np.float32)
    budget = num_rows // KEPT

    def evict() -> None:
        for layer in range(text.num_layers):
            scores_KT = window_scores(queries_WNH, cache.keys(layer, 0, num_rows), text.head_dim**-0.5)
            cache.keep_rows(layer, 0, choose_rows(scores_KT, budget, window))
        cache.release_rows(0, budget, num_rows)

    seconds = []
    freed_bytes = 0
    for _ in range(repeats):
        _fill(model, cache)
        before = _resident_bytes()
        seconds.append(_cpu_s(evict))
        freed_bytes = before - _resident_bytes()
    return {"cpu_s": seconds, "freed_bytes": freed_bytes}


def _fill(model: Qwen3VLModel, cache: OrtKVCache) -> None:
    """Put random keys and values into all rows: rows of zeros would all be the system's one page of zeros."""
    text = model.config.text
    rows = np.random.default_rng(0).standard_normal((1, text.num_kv_heads, _FILL_ROWS, text.head_dim), np.float32)
    for layer in range(text.num_layers):
        cache.write_layer(layer, rows, rows)


def _cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux names RssAnon")


def table(result: Mapping[str, Any]) -> str:
    """Return the cost of rows and of giving them up."""
    medians = {int(rows): statistics.median(values) for rows, values in result["steps_s"].items()}
    steps = [("rows before the step", "CPU ms"), *((str(rows), f"{1e3 * s:.1f}") for rows, s in medians.items())]
    slope, start = np.polyfit([*medians], [*medians.values()], 1)
    evictions = [
        ("prompt", "rows kept", "CPU ms of giving up", "saved a token, ms", "paid back after tokens", "MB given back")
    ]
    for rows, found in result["evictions"].items():
        cost, kept = statistics.median(found["cpu_s"]), int(rows) // result["kept"]
        saved = slope * (int(rows) - kept)
        numbers = f"{1e3 * cost:.0f}", f"{1e3 * saved:.1f}", f"{cost / saved:.0f}", f"{found['freed_bytes'] / 1e6:.0f}"
        evictions.append((rows, str(kept), *numbers))
    num_repeats = len(next(iter(result["steps_s"].values())))
    return (
        f"{result['model']}, {result['target']}, one thread; medians of {num_repeats}. A step takes about "
        f"{1e3 * start:.0f} ms, and {1e6 * slope:.0f} ms more for each 1000 rows.\n\n{markdown(steps)}\n"
        f"{markdown(evictions)}"
    )

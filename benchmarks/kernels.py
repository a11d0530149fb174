"""`python -m benchmarks kernels`: steps of engines of one checkpoint in turns, beside the bandwidth of the memory."""

from __future__ import annotations

import ctypes
import math
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import kernels_profile, measure, options
from benchmarks.kernels_profile import inputs
from benchmarks.result_files import RESULTS, markdown, write
from runtime import native
from runtime.errors import UsageError
from runtime.machine import default_threads
from runtime.manifest import Manifest
from runtime.session import KVCache, Session, SessionOptions, open_session
from runtime.vision_inputs import blank_inputs, takes_grey_levels

_BATCHES = (1, 2, 4, 8)
_STEPS = 4
_READ_BYTES = 1 << 30


@dataclass(frozen=True)
class Opened:
    """One of the engines that take turns."""

    folder: Path
    manifest: Manifest
    session: Session
    cache: KVCache
    opening_s: float


def kernels(
    engines: Annotated[list[Path], typer.Argument(help="Engine folders of one checkpoint; ratios are to the last.")],
    context: Annotated[int, typer.Option(help="Cached tokens before a decode step.")] = 512,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    image: Annotated[int, typer.Option(help="Patches of the image that is timed, made square; 0 for none.")] = 1024,
    rounds: Annotated[int, typer.Option(min=2, help="Turns of each engine.")] = 9,
    patches: Annotated[int, typer.Option(help="Patches of the image whose memory is measured; 0 for none.")] = 3072,
    results: options.Results = RESULTS,
) -> None:
    """Compare steps, prompts, images, opening and memory of engines, such as those of --kernels own and ort.

    Engines take turns, so that a busy minute falls on all of them; the table has medians. The bandwidth of the memory
    is that of as many threads reading 1 GiB, once in each round.
    """
    if len({Manifest.read(engine).source["name"] for engine in engines}) > 1:
        raise UsageError("the engines are of several checkpoints", remedy="give engines of one checkpoint")
    memory = [_memory(engine, patches) if patches else None for engine in engines]
    opened = [_open(engine, max(_BATCHES), context + _STEPS, prompt) for engine in engines]
    times, bandwidths = _take_turns(opened, (context, prompt, image), rounds)
    rows = []
    for engine, taken, used in zip(opened, times, memory, strict=True):
        products = kernels_profile.products(engine.folder, context, rounds)
        rows.append(
            {
                "target": engine.manifest.target,
                "kernels": native.isa() if engine.manifest.capabilities.get("custom_ops") else "ONNX Runtime",
                "cache_dtype": engine.manifest.capabilities["cache_dtype"],
                "opening_s": engine.opening_s,
                "times": {name: measure.summarise(values) for name, values in taken.items()},
                "products": products,
                "memory": used,
            }
        )
    result = {
        "environment": measure.environment(),
        "threads": default_threads(),
        "context": context,
        "prompt": prompt,
        "bandwidth_bytes_per_s": median(bandwidths),
        "engines": rows,
    }
    write("kernels", result, table(result), results)


def _open(folder: Path, slots: int, context: int, prompt: int) -> Opened:
    manifest = Manifest.read(folder)
    open_session(folder, manifest, SessionOptions())  # the file's pages come into memory
    start = time.perf_counter()
    session = open_session(folder, manifest, SessionOptions())
    opening_s = time.perf_counter() - start
    return Opened(folder, manifest, session, session.new_cache(max(context, prompt), slots), opening_s)


def _take_turns(
    opened: list[Opened], sizes: tuple[int, int, int], rounds: int
) -> tuple[list[dict[str, list[float]]], list[float]]:
    times: list[dict[str, list[float]]] = [{} for _ in opened]
    bandwidths = []
    read = np.full(_READ_BYTES, 2, np.uint8)
    for turn in range(rounds + 1):
        bandwidths.append(_bandwidth(read))
        for engine, taken in zip(opened, times, strict=True):
            for name, call, calls in _work(engine, *sizes):
                if calls > 1:  # a step is short, and begins with what another engine left in the caches
                    call()
                each = measure.seconds(call) / calls
                if turn:  # the first turn warms up
                    taken.setdefault(name, []).append(each)
    return times, bandwidths[1:]


def _work(engine: Opened, context: int, prompt: int, image: int) -> list[tuple[str, Callable[[], object], int]]:
    """Return name, call and number of steps in it of all that is timed."""

    def steps(batch: int) -> Callable[[], object]:
        return lambda: [
            engine.session.decode(inputs(engine.manifest, batch, 1, context + i), engine.cache) for i in range(_STEPS)
        ]

    decode = [(f"decode, {batch} sequences", steps(batch), _STEPS) for batch in _BATCHES]
    prefill = inputs(engine.manifest, 1, prompt, 0)
    work = [*decode, (f"prompt of {prompt}", lambda: engine.session.prefill(prefill, engine.cache), 1)]
    if image:
        vision = engine.manifest.model.vision
        side = vision.spatial_merge_size * max(1, round(math.sqrt(image) / vision.spatial_merge_size))
        takes_levels = takes_grey_levels(engine.manifest.capabilities)
        patches = blank_inputs(side, side, vision, takes_levels=takes_levels)
        work.append((f"image of {side * side} patches", lambda: engine.session.vision(patches), 1))
    return work


def _bandwidth(array: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
    """Return bytes a second that the threads read together: the C library looks for a byte that is not there."""
    search = ctypes.CDLL(None).memchr
    search.argtypes, search.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    parts = np.array_split(array, default_threads())
    with ThreadPoolExecutor(len(parts)) as pool:
        taken = measure.seconds(lambda: list(pool.map(lambda part: search(part.ctypes.data, 1, part.nbytes), parts)))
    return array.nbytes / taken


def _memory(engine: Path, patches: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.kernels_memory", str(engine), str(patches)]
        found, _ = measure.child_result(command, Path(folder) / "memory.json")
    return found


def table(result: dict[str, Any]) -> str:
    """Return the table of a result."""
    rows = result["engines"]
    base = rows[-1]["times"]
    head = ["", *(f"`{row['target']}`, {row['kernels']}, cache {row['cache_dtype']}" for row in rows)]
    lines = [head]
    for name in base:
        cells = []
        for row in rows:
            taken = row["times"][name]["median_s"]
            cells.append(f"{taken * 1e3:.1f} ms ({base[name]['median_s'] / taken:.2f} ×)")
        lines.append([name, *cells])
    one, eight = (f"decode, {batch} sequences" for batch in (_BATCHES[0], _BATCHES[-1]))
    gains = [8 * row["times"][one]["median_s"] / row["times"][eight]["median_s"] for row in rows]
    lines.append(["tokens/s of 8 sequences against one", *(f"{gain:.2f} ×" for gain in gains)])
    bandwidth = result["bandwidth_bytes_per_s"]
    lines.append(
        ["products of one decode step", *(_products(row["products"], bandwidth) for row in rows)],
    )
    lines.append(["opening", *(f"{row['opening_s']:.2f} s" for row in rows)])
    if rows[0]["memory"]:
        lines.append(
            ["anonymous memory less KV cache", *(f"{r['memory']['anonymous_bytes'] / 1e9:.2f} GB" for r in rows)]
        )
        lines.append(
            ["resident memory less KV cache", *(f"{r['memory']['resident_bytes'] / 1e9:.2f} GB" for r in rows)]
        )
    text = (
        f"{result['threads']} threads, {result['context']} cached tokens before a decode step; medians, engines in "
        f"turns. The memory gave {bandwidth / 1e9:.1f} GB/s. In brackets: times as fast as the last column.\n\n"
    )
    return text + markdown(lines)


def _products(products: dict[str, float], bandwidth: float) -> str:
    rate = products["bytes"] / products["median_s"]
    return f"{products['median_s'] * 1e3:.1f} ms, {rate / 1e9:.1f} GB/s ({rate / bandwidth:.0%} of the memory's)"

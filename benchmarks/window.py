"""`python -m benchmarks window`: a chat of 100 000 tokens with a sliding window, and what dropping rows costs."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import options
from benchmarks.export import run_export
from benchmarks.measure import child_result, environment
from benchmarks.result_files import RESULTS, markdown, write

TARGET = "ort-cpu-fp32"
TRAINED = 4096
_PARTS = 10
_LARGE = 448
_SHARES = (4, 8, 16, 32)
_MOVED_WINDOW, _MOVED_SHAPE = 4096, (28, 8, 128)
_CACHES = ("float32", "float16", "int8")

Windows = Annotated[str, typer.Option(help="Windows; the first is that of the long chat.")]


def window(
    checkpoint: str = "demo-long",
    tokens: Annotated[int, typer.Option(help="Tokens of the long chat.")] = 100_000,
    compared_tokens: Annotated[int, typer.Option(help="Tokens of all others.")] = 20_000,
    windows: Windows = "1024,512,2048",
    results: options.Results = RESULTS,
    work_dir: options.WorkDir = None,
) -> None:
    """Chat about one picture after the other, exactly while that fits, and with windows of several sizes and sinks."""
    machine = environment()
    sizes = [int(each) for each in windows.split(",")]
    # Name, window, sinks, what the sinks do, tokens; the long one comes last.
    runs: list[tuple[str, int, int, str, int]] = [
        ("exact", 0, 0, "moved", TRAINED),
        *((f"window {size}", size, 4, "moved", compared_tokens) for size in sizes),
        (f"window {sizes[0]}, sinks stay", sizes[0], 4, "stay", compared_tokens),
        *((f"window {sizes[0]}, {n} sinks", sizes[0], n, "moved", compared_tokens) for n in (0, 1, 16)),
        (f"window {sizes[0]}, the long chat", sizes[0], 4, "moved", tokens),
    ]
    chats = {}
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        engine = Path(name) / "engine"
        run_export(checkpoint, engine, TARGET)
        for number, (title, size, sinks, form, length) in enumerate(runs):
            side = _LARGE if length == tokens else 0
            arguments = [str(engine), str(length), str(size), str(sinks), form, str(side)]
            command = [sys.executable, "-m", "benchmarks.window_chat", *arguments]
            found, _ = child_result(command, Path(name) / f"{number}.json")
            chats[title] = {"cache_bytes": found["cache_bytes"], "parts": _parts(found["turns"], length)}
    moves = {dtype: _moves(dtype) for dtype in _CACHES}
    result = {"model": Path(checkpoint).name, "target": TARGET, "chats": chats, "moves": moves, "environment": machine}
    write("window", result, table(result), results)


def _parts(turns: Sequence[Mapping[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Return what a chat took and gave in each tenth of its tokens; the first is what an exact cache holds as well."""
    ends = [min(TRAINED, tokens), *(tokens * part // _PARTS for part in range(1, _PARTS + 1))]
    ends = sorted({end for end in ends if end >= TRAINED})
    found, begin = [], 0
    for end in ends:
        part = [
            turn for turn in turns if begin <= turn["prompt_tokens"] and (turn["prompt_tokens"] < end or end == tokens)
        ]
        begin = end
        if not part:
            continue
        found.append(
            {
                "tokens": part[-1]["prompt_tokens"],
                "turns": len(part),
                "right": sum(turn["right"] for turn in part),
                "cache_rows": max(turn["cache_rows"] for turn in part),
                "most_new_tokens": max(turn["new_tokens"] for turn in part),
                "anonymous_bytes": part[-1]["anonymous_bytes"],
                "turn_cpu_s": statistics.median(turn["cpu_s"] for turn in part),
                "least_preprocess_s": min(turn["preprocess_s"] for turn in part),
            }
        )
    return found


def _moves(dtype: str) -> dict[str, float]:
    """Return the seconds for each token that rows take to move, by the share of a window that is dropped at a time."""
    import numpy as np

    from runtime.cache_types import CacheType
    from runtime.sessions.ort_cpu import OrtKVCache

    layers, heads, head_dim = _MOVED_SHAPE
    kind = CacheType(dtype, 8 * np.dtype(dtype).itemsize)
    cache = OrtKVCache([kind] * layers, (1, heads, _MOVED_WINDOW, head_dim), np.ones((layers, 2, heads, head_dim)))
    for layer in range(layers):
        cache.layer(layer)
    cache.move_rows(0, 1, 0, _MOVED_WINDOW - 1)  # its memory is there now
    found = {}
    for share in _SHARES:
        dropped = _MOVED_WINDOW // share
        times = []
        for _ in range(5):
            start = time.process_time()
            cache.move_rows(0, 4 + dropped, 4, _MOVED_WINDOW - dropped - 4)
            times.append(time.process_time() - start)
        found[str(share)] = min(times) / dropped
    return found


def table(result: Mapping[str, Any]) -> str:
    """Return the long chat by its tokens, all chats beside each other, and what a move costs."""
    chats = result["chats"]
    long = max(chats, key=lambda title: chats[title]["parts"][-1]["tokens"])
    columns = (
        "tokens so far",
        "turns",
        "right",
        "rows",
        "most new tokens of a turn",
        "anonymous MB",
        "turn, CPU s",
        "prompt, s",
    )
    rows = [columns]
    for part in chats[long]["parts"]:
        memory, turn, prompt = part["anonymous_bytes"] / 1e6, part["turn_cpu_s"], part["least_preprocess_s"]
        rows.append(
            (
                *(str(part["tokens"]), str(part["turns"]), _right([part]), str(part["cache_rows"])),
                *(str(part["most_new_tokens"]), f"{memory:.0f}", f"{turn:.3f}", f"{prompt:.3f}"),
            )
        )
    beside = [("cache", "KV cache, MB", f"right up to {TRAINED} tokens", "right behind", "turns behind")]
    for title, chat in chats.items():
        first, behind = chat["parts"][:1], chat["parts"][1:]
        turns = sum(part["turns"] for part in behind)
        memory = f"{chat['cache_bytes'] / 1e6:.1f}"
        beside.append((title, memory, _right(first), _right(behind) if turns else "–", str(turns or "–")))
    cost = [("cache", *(f"1/{share}" for share in _SHARES))]
    cost += [
        (dtype, *(f"{1e3 * found[str(share)]:.2f}" for share in _SHARES)) for dtype, found in result["moves"].items()
    ]
    layers, heads, head_dim = _MOVED_SHAPE
    shape = f"{layers} layers, {heads} heads of {head_dim}, one sequence"
    return (
        f"`{result['model']}`, {result['target']}: one chat, each turn a picture of its own and one of the four "
        f"questions about it. {long}, with pictures of at least {_LARGE} pixels a side, by tokens; processor time of a "
        f"turn is the median, the time of rendering and encoding a prompt the least:\n\n{markdown(rows)}\n"
        f"All caches; but for the long chat, the same pictures, of usual sizes:\n\n{markdown(beside)}\n"
        f"Milliseconds of a processor for each token that moving rows takes, the least of five, by the share of a "
        f"window of {_MOVED_WINDOW} that is dropped at a time ({shape}):\n\n{markdown(cost)}"
    )


def _right(parts: Sequence[Mapping[str, Any]]) -> str:
    right, turns = sum(part["right"] for part in parts), sum(part["turns"] for part in parts)
    return f"{100 * right / turns:.1f} %"

"""Exports of the demo that are killed at random moments: is there a whole engine after each, and nothing beside it?"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from engines.build import build_engine
from engines.disk import sync_files
from engines.exchange import exchange
from engines.output import check_output
from engines.registry import get
from engines.work_folder import is_work_folder
from helpers import PICTURES
from runtime.errors import Qwen3VLError
from runtime.manifest import Manifest

if TYPE_CHECKING:
    from engines.bundle import Bundle

_IMAGE, _ANSWER = PICTURES / "held_out_0.png", "1654"
_MARK = "export_number"
# Longer than it takes: some exports end.
_PUT_S = 0.01


def kill_exports(
    bundle: Bundle, target: str, folder: Path, count: int, seed: int, *, has_exchange: bool = True
) -> dict[str, Any]:
    """Export until `count` exports were killed, and look at the engine after each, and after the start of the next run.

    The graphs are traced once: a killed process checks the output, lowers, quantises, writes, flushes and exchanges.
    Of three moments one is chosen from the whole of that time, one from its second half, where files are written, and
    one from the first milliseconds after the flush, in which the engine is put into its place.

    Args:
        bundle: The demo's.
        target: What to build for.
        folder: An empty folder.
        count: Exports to kill.
        seed: Of the moments.
        has_exchange: False as if the file system could not exchange two names in one step.

    Returns:
        Counts: `exports`, `killed` (the rest ended first), `old` and `new` (the engine that was there afterwards),
            `missing` (none; the next run has to put the older one back), `broken` (after the next run began not
            loadable, not complete, or with another answer), `left` (exports after which something lay beside the
            engine), `left_after_next_run`.
    """
    moments = random.Random(seed)
    output = folder / "engine"
    counts = dict.fromkeys(("exports", "killed", "old", "new", "missing", "broken", "left", "left_after_next_run"), 0)
    typical_s = min(_run(bundle, target, output, 0, has_exchange)[0] for _ in range(3))
    present = 0
    while counts["killed"] < count:
        counts["exports"] += 1
        number = counts["exports"]
        after_s = (moments.uniform(0, typical_s), moments.uniform(0.5, 1.1) * typical_s, moments.uniform(0, _PUT_S))
        _, is_killed = _run(
            bundle, target, output, number, has_exchange, after_s[number % 3], is_after_flush=number % 3 == 2
        )
        counts["killed"] += is_killed
        found = _mark_of(output)
        counts["missing" if found is None else "new" if found == number else "old"] += 1
        counts["left"] += bool(_beside(output))
        check_output(output)  # how every run begins
        counts["left_after_next_run"] += bool(_beside(output))
        found = _mark_of(output)
        if found not in (present, number) or not _is_whole(output):
            counts["broken"] += 1
            shutil.rmtree(output, ignore_errors=True)
            _run(bundle, target, output, number, has_exchange)
            found = number
        present = found
    return {"typical_s": typical_s, **counts}


def _run(
    bundle: Bundle,
    target: str,
    output: Path,
    number: int,
    has_exchange: bool,
    kill_after_s: float | None = None,
    *,
    is_after_flush: bool = False,
) -> tuple[float, bool]:
    """Export in a process of its own; return its seconds, and whether it was killed."""
    context = multiprocessing.get_context("fork")
    ready, flushed = context.Event(), context.Event()

    def export() -> None:
        copy = dataclasses.replace(bundle, source={**bundle.source, _MARK: number})

        def flush(folder: Path) -> None:
            sync_files(folder)
            flushed.set()

        way = exchange if has_exchange else lambda *_: False
        with mock.patch("engines.output.exchange", way), mock.patch("engines.output.sync_files", flush):
            ready.set()
            check_output(output, copy.weight_bytes)
            build_engine(copy, get(target), output)
        os._exit(0)

    process = context.Process(target=export)
    process.start()
    ready.wait()
    started = time.perf_counter()
    if is_after_flush:
        flushed.wait()
    process.join(kill_after_s)
    is_killed = process.is_alive()
    if is_killed:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the export ended with {process.exitcode}")
    return time.perf_counter() - started, process.exitcode != 0


def _mark_of(output: Path) -> int | None:
    """Return the number of the export that wrote an engine, or None if there is no engine."""
    try:
        return int(Manifest.read(output).source[_MARK])
    except Qwen3VLError:
        return None


def _beside(output: Path) -> list[str]:
    return [name for name in os.listdir(output.parent) if is_work_folder(name)]


def _is_whole(output: Path) -> bool:
    """Tell whether every file has its hash, no other lies there, and the engine reads the digits of a picture."""
    from runtime.model import Qwen3VLModel

    try:
        manifest = Manifest.read(output)
        manifest.check(output, full=True)
        model = Qwen3VLModel.from_engine(output, threads=1)
        question = [{"type": "image", "image": str(_IMAGE)}, {"type": "text", "text": "Read the digits."}]
        answer = model.generate([{"role": "user", "content": question}], max_new_tokens=8, do_sample=False).text
    except Qwen3VLError:
        return False
    return answer == _ANSWER and len(os.listdir(output)) == len(manifest.files) + 1

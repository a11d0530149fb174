"""`qwen3vl batch`: a file of requests in OpenAI's batch format to a file of results."""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3vl_export.cli.cache import Building
from qwen3vl_export.cli.engines import open_engines
from qwen3vl_export.cli.options import AsJson, CheckAll, Opening, Quiet, Serving, grouped
from qwen3vl_export.cli.output import is_terminal, note, print_json
from qwen3vl_export.cli.progress import counting
from runtime.errors import UsageError
from runtime.installation import how_to_install

if TYPE_CHECKING:
    from runtime.server.batch.run import Batch, Tally
    from runtime.server.engines import Engines
    from runtime.server.settings import ServerSettings

# Requests that are prepared while others run: enough that a place which becomes free is taken at once.
_AHEAD = 4
_NOTE_S = 60.0
_MB = 1_000_000


@dataclass(frozen=True)
class Asking:
    """What the requests of a batch may be and take.

    Attributes:
        allow_local_files: Images and videos may be paths; relative ones begin in the folder of IN. Any file that this
            user may read can be named, so only for batches of your own.
        allow_url_host: Host from which images and videos may be fetched by URL; may be repeated. [default: none]
        max_body: Longest line in MB.
        max_answer_tokens: Most tokens of an answer. [default: what the context leaves]
        max_choices: Most answers to one request.
        max_frames: Most frames of a video that a request may ask for.
        request_timeout: Seconds in which an answer has to be complete. [default: no limit]
        concurrency: Requests in progress at once. [default: as many as the engines run, and 4 that are prepared]
    """

    allow_local_files: bool = False
    allow_url_host: Annotated[list[str] | None, typer.Option(metavar="HOST")] = None
    max_body: Annotated[float, typer.Option(metavar="MB")] = 64
    max_answer_tokens: int | None = None
    max_choices: int = 16
    max_frames: int = 768
    request_timeout: Annotated[float | None, typer.Option(metavar="S")] = None
    concurrency: Annotated[int | None, typer.Option(metavar="N", min=1)] = None

    def settings(self, source: Path) -> ServerSettings:
        """Return them as the server takes them.

        Raises:
            UsageError: One is out of range.
        """
        from runtime.server.settings import ServerSettings

        return ServerSettings(
            allowed_url_hosts=tuple(self.allow_url_host or ()),
            local_folder=source.absolute().parent if self.allow_local_files else None,
            max_body_bytes=round(min(self.max_body, 1e6) * _MB),
            max_answer_tokens=self.max_answer_tokens,
            max_choices=self.max_choices,
            max_frames=self.max_frames,
            request_timeout_s=self.request_timeout,
        )


@grouped
def batch(
    source: Annotated[Path, typer.Argument(metavar="IN", help="File of requests, one on each line.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="File of results. One that was interrupted is continued.")
    ],
    *,
    engine: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]ENGINE",
            help="Engine folder, or a checkpoint, which is built first and kept; may be repeated. Requests ask for it "
            "by its name, which is the checkpoint's unless another is given.",
        ),
    ],
    errors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write results that are errors into this file, not into OUT.")
    ] = None,
    asking: Asking,
    building: Building,
    opening: Opening,
    serving: Serving,
    as_json: AsJson = False,
    quiet: Quiet = False,
    check: CheckAll = False,
) -> None:
    """Answer a file of requests in OpenAI's batch format.

    Each line of IN has custom_id, method ("POST"), url ("/v1/chat/completions" or "/v1/completions") and body. Each
    line of OUT has id, custom_id, response (status_code, request_id, body) and error, in the order in which requests
    are answered. A request that cannot be answered has a result, too, and the batch goes on.

    The same command again goes on where an earlier one ended, however that was: each request has one result. Ctrl-C
    begins no further requests and answers those in progress; a second one drops them.

    --json prints one object: lines, done_before, succeeded, failed, left, prompt_tokens, new_tokens, seconds,
    tokens_per_s, output, errors (null without --errors).

    \b
    Examples:
      qwen3vl batch requests.jsonl results.jsonl --engine demo
      qwen3vl batch IN OUT --engine ENGINE --errors failed.jsonl --allow-local-files
      qwen3vl batch IN OUT --engine small=engines/2b --engine large=engines/8b
    """
    _check_installed()
    from runtime.server.batch.run import Batch

    settings = asking.settings(source)
    is_quiet = quiet or as_json
    with Batch(source, output, errors, max_bytes=settings.max_body_bytes) as opened:
        tally = opened.tally
        if tally.num_done < tally.num_lines:
            engines = open_engines(engine, building, opening, serving, settings, check=check, is_quiet=is_quiet)
            _answer(opened, engines, asking.concurrency or _places(engines), is_quiet=is_quiet)
        if not is_quiet:
            note(_summary(tally, output, errors))
    if as_json:
        print_json({**_values(tally), "output": str(output), "errors": None if errors is None else str(errors)})
    if tally.num_done < tally.num_lines:
        raise KeyboardInterrupt


def _answer(opened: Batch, engines: Engines, places: int, *, is_quiet: bool) -> None:
    """Answer all that has no result yet, and close the engines."""
    from runtime.server.batch.answering import answer_with

    try:
        with _shown(opened.tally, is_quiet=is_quiet) as show:
            asyncio.run(_run(opened, answer_with(engines), places, show, is_quiet=is_quiet))
    finally:
        engines.close(drain=False)


async def _run(opened: Batch, answer: Any, places: int, show: Callable[[Tally], None], *, is_quiet: bool) -> None:
    """Answer until the end, or until the first signal; the second one drops what is in progress."""
    stop = asyncio.Event()
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def on_signal() -> None:
        if stop.is_set():
            task.cancel()
            return
        stop.set()
        if not is_quiet:
            note("answering what is in progress; again to drop it")

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(RuntimeError, ValueError):  # not the main thread: nobody sends it signals
            loop.add_signal_handler(number, on_signal)
    with contextlib.suppress(asyncio.CancelledError):
        await opened.run(answer, places, show, stop)


def _places(engines: Engines) -> int:
    limits = [each.model.limits for each in engines.values()]
    return sum(each.max_sequences + min(_AHEAD, each.max_queue) for each in limits)


@contextlib.contextmanager
def _shown(tally: Tally, *, is_quiet: bool) -> Iterator[Callable[[Tally], None]]:
    """Return what shows how far a batch is: a bar on a terminal, elsewhere a line each minute."""
    if is_quiet:
        yield lambda now: None
        return
    if tally.num_before:
        note(f"{tally.num_before} of {tally.num_lines} requests were answered before")
    if is_terminal(sys.stderr):
        with counting("answering") as draw:
            yield lambda now: draw(now.num_done, now.num_lines, _progress(now))
        return
    last = time.monotonic()

    def each_minute(now: Tally) -> None:
        nonlocal last
        if time.monotonic() - last >= _NOTE_S:
            last = time.monotonic()
            note(_progress(now))

    yield each_minute


def _progress(tally: Tally) -> str:
    left = "" if tally.left_s is None else f", {_time(tally.left_s)} left"
    failed = f", {tally.num_failed} failed" if tally.num_failed else ""
    return f"{tally.num_done} of {tally.num_lines}, {tally.tokens_per_s:.1f} tokens/s{failed}{left}"


def _summary(tally: Tally, output: Path, errors: Path | None) -> str:
    here = tally.num_done - tally.num_before
    said = [f"{output}: {tally.num_done} of {tally.num_lines} requests have a result"]
    if here:
        said.append(f"{here} of this run, in {_time(tally.seconds)}, {tally.tokens_per_s:.1f} tokens/s")
    if tally.num_failed:
        said.append(f"{tally.num_failed} failed" + (f", see {errors}" if errors is not None else ""))
    if tally.num_done < tally.num_lines:
        said.append("the same command again answers the rest")
    return "; ".join(said)


def _time(seconds: float) -> str:
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{whole:02}"


def _values(tally: Tally) -> dict[str, Any]:
    return {
        "lines": tally.num_lines,
        "done_before": tally.num_before,
        "succeeded": tally.num_succeeded,
        "failed": tally.num_failed,
        "left": tally.num_lines - tally.num_done,
        "prompt_tokens": tally.prompt_tokens,
        "new_tokens": tally.new_tokens,
        "seconds": round(tally.seconds, 3),
        "tokens_per_s": round(tally.tokens_per_s, 2),
    }


def _check_installed() -> None:
    import importlib.util

    if importlib.util.find_spec("fastapi") is None:
        raise UsageError("batch needs the Python package fastapi", remedy=how_to_install("serve"))

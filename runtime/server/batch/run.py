"""Answer all requests of a file that have no result yet, many at once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UsageError
from runtime.server.batch.answering import Answer, Outcome
from runtime.server.batch.lines import Contents, Line, read_lines, scan
from runtime.server.batch.results import Results

_SYNC_S = 1.0


@dataclass
class Tally:
    """How far a batch is.

    Attributes:
        num_lines: Requests in the file.
        num_before: Those that had a result before this run.
        num_succeeded: Those that this run answered.
        num_failed: Those of this run whose result is an error.
        prompt_tokens: Tokens of the prompts of this run.
        new_tokens: Tokens of its answers.
        is_stopped: Whether it was told to stop before the end.
    """

    num_lines: int
    num_before: int
    num_succeeded: int = 0
    num_failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    is_stopped: bool = False
    started: float = field(default_factory=time.perf_counter)

    @property
    def num_done(self) -> int:
        """Requests that have a result now."""
        return self.num_before + self.num_succeeded + self.num_failed

    @property
    def seconds(self) -> float:
        """Since this run began to answer."""
        return time.perf_counter() - self.started

    @property
    def tokens_per_s(self) -> float:
        """Tokens of answers in each second of this run."""
        return self.new_tokens / max(self.seconds, 1e-9)

    @property
    def left_s(self) -> float | None:
        """Estimate of the time until the end; None before the first result."""
        num_here = self.num_done - self.num_before
        return (self.num_lines - self.num_done) * self.seconds / num_here if num_here else None


class Batch:
    """A file of requests, and the files of their results.

    Args:
        source: The requests.
        output: The results. One that an earlier run began is continued.
        errors: Results that are errors; they are in the output if there is no such file.
        max_bytes: Longest line that is read.

    Raises:
        UsageError: A file cannot be read or written, or two of them are one; a custom_id is there twice; the results
            are of other requests.
    """

    def __init__(self, source: Path, output: Path, errors: Path | None, *, max_bytes: int) -> None:
        _check_apart(source, output, errors)
        self._source, self._max_bytes = source, max_bytes
        contents = scan(source, max_bytes)
        with contextlib.ExitStack() as stack:
            self._output = stack.enter_context(Results(output))
            self._errors = self._output if errors is None else stack.enter_context(Results(errors))
            self._is_done = _done(contents, self._files(), source)
            for each in self._files():
                each.cut()
            self._files_open = stack.pop_all()
        self.tally = Tally(len(contents), int(self._is_done.sum()))

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self._files_open.close()

    async def run(self, answer: Answer, places: int, on_result: Callable[[Tally], None], stop: asyncio.Event) -> None:
        """Answer what is left; the results are in the files when this returns, in the order in which they came.

        Args:
            answer: Answers one.
            places: How many are answered at once. So many lines are held in memory, and no more.
            on_result: Called after each.
            stop: When it is set, no further request is begun; those that were are answered.

        Raises:
            Qwen3VLError: What `answer` raises, or a file cannot be written. What runs is cancelled then.
        """
        lines = self._left()
        self.tally.started = time.perf_counter()

        async def work() -> None:
            for line in lines:  # one iterator for all
                if stop.is_set():
                    self.tally.is_stopped = True
                    return
                self._take(await answer(line))
                on_result(self.tally)

        try:
            async with asyncio.TaskGroup() as outer:
                syncing = outer.create_task(self._keep_syncing())
                async with asyncio.TaskGroup() as group:
                    for _ in range(places):
                        group.create_task(work())
                syncing.cancel()
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        finally:
            for each in self._files():
                each.sync()

    def _take(self, outcome: Outcome) -> None:
        (self._errors if outcome.is_failure else self._output).append(outcome.result)
        self.tally.num_failed += outcome.is_failure
        self.tally.num_succeeded += not outcome.is_failure
        self.tally.prompt_tokens += outcome.prompt_tokens
        self.tally.new_tokens += outcome.new_tokens

    def _left(self) -> Iterator[Line]:
        """Yield the lines that have no result; those that were added since the scan wait for the next run."""
        for is_done, line in zip(self._is_done, read_lines(self._source, self._max_bytes), strict=False):
            if not is_done:
                yield line

    def _files(self) -> tuple[Results, ...]:
        return (self._output,) if self._errors is self._output else (self._output, self._errors)

    async def _keep_syncing(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_S)
            for each in self._files():
                await asyncio.to_thread(each.sync)


def _done(contents: Contents, files: tuple[Results, ...], source: Path) -> NDArray[np.bool_]:
    """Return which lines have a result.

    Raises:
        UsageError: A result is of no line of the file, or of one that has changed, or there are two.
    """
    keys, ids = array("Q"), array("Q")
    for each in files:
        for into, more in zip((keys, ids), each.finished(), strict=True):
            into.extend(more)
    if not keys:
        return np.zeros(len(contents), np.bool_)
    order = np.argsort(np.frombuffer(keys, np.uint64), kind="stable")
    known, digests = np.frombuffer(keys, np.uint64)[order], np.frombuffer(ids, np.uint64)[order]
    names = " and ".join(str(each.path) for each in files)
    remedy = "give other files for the results: those that are there belong to another file of requests"
    if np.any(known[1:] == known[:-1]):
        raise UsageError(f"{names}: two results have the same custom_id", remedy=remedy)
    places = np.minimum(np.searchsorted(known, contents.keys), len(known) - 1)
    is_known: NDArray[np.bool_] = known[places] == contents.keys
    is_changed = is_known & (digests[places] != contents.ids)
    if np.any(is_changed):
        number = int(contents.numbers[np.argmax(is_changed)])
        raise UsageError(
            f"{source}: line {number} has changed since its result was written into {names}", remedy=remedy
        )
    num_strange = len(known) - int(is_known.sum())
    if num_strange:
        raise UsageError(f"{names}: {num_strange} results are of requests that {source} does not have", remedy=remedy)
    return is_known


def _check_apart(source: Path, output: Path, errors: Path | None) -> None:
    files = [("the requests", source), ("the results", output)] + ([] if errors is None else [("--errors", errors)])
    for index, (name, path) in enumerate(files):
        for other, beside in files[:index]:
            try:
                is_same = path.resolve() == beside.resolve() or path.samefile(beside)
            except (OSError, RuntimeError, ValueError):
                is_same = False  # one is missing, or no name of a file, which is found when it is opened
            if is_same:
                raise UsageError(f"{path}: {name} and {other} are one file", remedy="give each a file of its own")


def _first(failure: BaseException) -> BaseException:
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure

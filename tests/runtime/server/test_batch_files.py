"""Files of batches: which lines are requests, which have a result, and that each gets exactly one."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import CapacityError, EngineError, UsageError
from runtime.server.batch.answering import Outcome
from runtime.server.batch.lines import Line, read_lines, scan
from runtime.server.batch.results import Results
from runtime.server.batch.run import Batch, Tally

MOST = 1000


def request(name: str, **more: Any) -> str:
    return json.dumps({"custom_id": name, **more})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{request(f'r{number}')}\n" for number in range(20)))
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def result(line: Line) -> dict[str, Any]:
    return {"id": line.line_id, "custom_id": line.custom_id, "response": {"status_code": 200}, "error": None}


async def at_once(line: Line) -> Outcome:
    return Outcome(result(line), is_failure=line.values is None, prompt_tokens=2, new_tokens=3)


def run(
    source: Path,
    output: Path,
    errors: Path | None = None,
    *,
    answer: Any = at_once,
    places: int = 3,
    stop_after: int = 1000,
) -> Tally:
    async def all_of(batch: Batch) -> None:
        stop = asyncio.Event()

        def on_result(tally: Tally) -> None:
            if tally.num_done - tally.num_before == stop_after:
                stop.set()

        await batch.run(answer, places, on_result, stop)

    with Batch(source, output, errors, max_bytes=MOST) as batch:
        asyncio.run(all_of(batch))
        return batch.tally


def names(path: Path) -> list[str]:
    return sorted(json.loads(line)["custom_id"] for line in path.read_text().splitlines())


EVERY = sorted(f"r{number}" for number in range(20))


def test_lines_are_requests(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    long = request("long", body="x" * MOST)
    broken = [
        b"{broken",
        b"[1]",
        b'{"custom_id": 3}',
        b'{"custom_id": ""}',
        b"{broken",
        b'{"x": NaN}',
        b"\xff",
        b"[" * 900,
    ]
    path.write_bytes(
        b"\xef\xbb\xbf"
        + request("first").encode()
        + b"\r\n\n  \n"
        + b"\n".join(broken)
        + f"\n{long}\n".encode()
        + request("last").encode()
    )
    lines = list(read_lines(path, MOST))
    assert [line.custom_id for line in lines] == ["first", *[None] * len(broken), None, "last"]
    assert [line.number for line in lines] == [1, *range(4, 4 + len(broken) + 2)]
    assert [bool(line.problem) for line in lines] == [False, *[True] * (len(broken) + 1), False]
    assert [line.values is None for line in lines] == [bool(line.problem) for line in lines]
    assert "more than 1000 bytes" in lines[-2].problem and all("Remedy: " in line.problem for line in lines[1:-1])
    assert len({line.line_id for line in lines}) == len({line.key for line in lines}) == len(lines)
    # The id is of what the line holds, wherever that stands; another line of that length has another.
    path.write_text(f"\n{request('first')}\n{long.replace('x', 'y')}\n{long}")
    again = list(read_lines(path, MOST))
    assert again[0].line_id == lines[0].line_id and again[1].line_id != again[2].line_id


def test_the_longest_line_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    exact = request("a", body="")[:-2]
    exact += "x" * (MOST - len(exact) - 2) + '"}'
    for ending in ("", "\n", "\r\n"):
        path.write_text(exact + ending)
        assert [line.problem for line in read_lines(path, MOST)] == [""]
        assert "more than" in next(read_lines(path, MOST - 1)).problem


def test_a_custom_id_that_is_there_twice_is_named_with_both_lines(source: Path) -> None:
    source.write_text(source.read_text() + f"\n{request('r7', body=1)}\n")
    with pytest.raises(UsageError, match="lines 8 and 22 have the same custom_id, 'r7'"):
        scan(source, MOST)
    source.write_text("{broken\n{broken\n")
    assert len(scan(source, MOST)) == 2


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "empty", "blank"])
def test_a_file_without_requests_is_refused(kind: str, tmp_path: Path, output: Path) -> None:
    path = tmp_path / "in.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_text("" if kind == "empty" else "\n \n")
    with pytest.raises(UsageError) as error:
        run(path, output)
    assert error.value.remedy and not output.exists()


@pytest.mark.parametrize(
    "cut", [b"", b"{", b'{"id": "batch_req_12', b'{"id": "batch_req_123", "custom_id"', b"\0" * 99]
)
def test_a_cut_line_is_taken_off(cut: bytes, source: Path, output: Path) -> None:
    run(source, output, stop_after=5)
    whole = output.read_bytes()
    output.write_bytes(whole + cut)
    with Batch(source, output, None, max_bytes=MOST):
        assert output.read_bytes() == whole
    assert run(source, output).num_before == whole.count(b"\n")
    assert names(output) == EVERY


@pytest.mark.parametrize(
    "contents", [b"notes", b"{}", b"{}\n", b'{"id": "batch_req_1", "custom_id": "a"}\n', b'{"id": 1}\n{"id"', b"\n"]
)
def test_a_file_of_something_else_is_left_alone(contents: bytes, source: Path, output: Path) -> None:
    output.write_bytes(contents)
    with pytest.raises(UsageError, match="is no result of a batch"):
        run(source, output)
    assert output.read_bytes() == contents


def test_one_process_at_a_time_writes(source: Path, output: Path) -> None:
    with Results(output), pytest.raises(UsageError, match="another process writes to it"):
        run(source, output)
    assert run(source, output).num_done == 20


@pytest.mark.parametrize(
    "place", ["folder", "missing/out.jsonl", "/dev/null", "/dev/full", "pipe", "a\0b", "in.jsonl", "link"]
)
def test_an_output_that_cannot_be_is_refused(place: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(source)
    before = source.read_bytes()
    with pytest.raises(UsageError) as error:
        run(source, tmp_path / place)
    assert error.value.remedy and source.read_bytes() == before


def test_errors_need_a_file_of_their_own(source: Path, output: Path) -> None:
    for errors in (source, output):
        with pytest.raises(UsageError, match="are one file"):
            run(source, output, errors)
    assert not output.exists()


def test_a_full_disk_ends_the_batch_and_it_goes_on_later(source: Path, output: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CapacityError, match="may not become larger"):
            run(source, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert output.stat().st_size == 1000 and not output.read_bytes().endswith(b"\n")
    assert run(source, output).num_before > 2
    assert names(output) == EVERY


def test_as_many_as_there_are_places_run_at_once(source: Path, output: Path) -> None:
    running, most = 0, 0

    async def answer(line: Line) -> Outcome:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001 * (line.number % 3))
        running -= 1
        return await at_once(line)

    tally = run(source, output, answer=answer, places=4)
    assert most == 4
    assert (tally.num_lines, tally.num_before, tally.num_succeeded, tally.num_failed) == (20, 0, 20, 0)
    assert (tally.prompt_tokens, tally.new_tokens) == (40, 60)
    assert names(output) == EVERY


def test_no_more_lines_are_read_than_are_answered(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, answered, most = 0, 0, 0

    def counted(path: Path, max_bytes: int) -> Iterator[Line]:
        nonlocal read
        for line in read_lines(path, max_bytes):
            read += 1
            yield line

    async def answer(line: Line) -> Outcome:
        nonlocal answered, most
        most = max(most, read - answered)
        await asyncio.sleep(0)
        answered += 1
        return await at_once(line)

    monkeypatch.setattr("runtime.server.batch.run.read_lines", counted)
    run(source, output, answer=answer, places=4)
    assert 4 <= most <= 5 and answered == 20


def test_what_is_answered_is_not_asked_again(source: Path, output: Path, tmp_path: Path) -> None:
    """Failures are results, too, also in a file of their own."""
    source.write_text(source.read_text() + "{broken\n{broken\n")
    asked: list[int] = []

    async def answer(line: Line) -> Outcome:
        asked.append(line.number)
        return await at_once(line)

    errors = tmp_path / "errors.jsonl"
    places = 1
    for stop_after in (7, 13, 1, 1000):
        run(source, output, errors, answer=answer, places=places, stop_after=stop_after)
        places = 3
    assert sorted(asked) == list(range(1, 23))
    assert names(output) == EVERY
    assert [json.loads(line)["custom_id"] for line in errors.read_text().splitlines()] == [None, None]
    tally = run(source, output, errors)
    assert (tally.num_before, tally.num_done) == (22, 22)
    # More requests may be added; their order may change.
    lines = source.read_text().splitlines()[:20]
    errors.unlink()
    source.write_text("\n".join([request("new"), *reversed(lines)]))
    tally = run(source, output)
    assert (tally.num_before, tally.num_succeeded) == (20, 1)


def change_line(lines: list[str]) -> None:
    lines[4] = request("r4", body="another")


def take_line(lines: list[str]) -> None:
    del lines[4]


def change_name(lines: list[str]) -> None:
    lines[4] = request("other")


@pytest.mark.parametrize(
    ("change", "words"),
    [(change_line, "line 5 has changed"), (take_line, "1 results are of requests"), (change_name, "1 results are of")],
)
def test_requests_that_changed_since_are_noticed(
    change: Callable[[list[str]], None], words: str, source: Path, output: Path
) -> None:
    run(source, output)
    before = output.read_bytes()
    lines = source.read_text().splitlines()
    change(lines)
    source.write_text("\n".join(lines))
    with pytest.raises(UsageError, match=words):
        run(source, output)
    assert output.read_bytes() == before


def test_two_results_of_one_request_are_noticed(source: Path, output: Path) -> None:
    run(source, output)
    output.write_bytes(output.read_bytes() + output.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(UsageError, match="two results have the same custom_id"):
        run(source, output)


def test_what_runs_is_answered_when_the_batch_is_stopped(source: Path, output: Path) -> None:
    begun = []

    async def answer(line: Line) -> Outcome:
        begun.append(line.custom_id)
        await asyncio.sleep(0.001 * line.number)
        return await at_once(line)

    tally = run(source, output, answer=answer, places=4, stop_after=2)
    assert tally.is_stopped and names(output) == sorted(begun) and len(begun) < 20
    assert tally.num_done == len(begun)


def test_an_engine_that_fails_ends_the_batch(source: Path, output: Path) -> None:
    """What was answered stays; what ran beside it is stopped, and answered when the batch is run again."""
    stopped = []

    async def answer(line: Line) -> Outcome:
        if line.number == 6:
            raise EngineError("the engine has failed", remedy="open it again")
        if line.number > 5:
            try:
                await asyncio.sleep(3600)
            finally:
                stopped.append(line.number)
        return await at_once(line)

    with pytest.raises(EngineError, match="has failed"):
        run(source, output, answer=answer, places=3)
    assert len(stopped) == 2 and names(output) == EVERY[:1] + sorted(
        EVERY[i] for i in map(EVERY.index, ["r1", "r2", "r3", "r4"])
    )
    assert run(source, output).num_before == 5
    assert names(output) == EVERY


def test_a_failure_of_the_disk_is_told(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UsageError, match="cannot be written: Input/output error"):
        run(source, output)


def test_many_requests_take_little_memory(tmp_path: Path) -> None:
    """24 bytes for each; the rest is what Python itself takes."""
    import tracemalloc

    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"custom_id": "{number}"}}\n' for number in range(30_000)))
    tracemalloc.start()
    try:
        contents = scan(path, MOST)
        current, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(contents) == 30_000 and len(np.unique(contents.keys)) == 30_000
    assert current < 30_000 * 60 and peak < 30_000 * 100

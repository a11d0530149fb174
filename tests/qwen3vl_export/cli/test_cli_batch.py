"""`qwen3vl batch` as a process that is killed, stopped and started again; and what it says."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from helpers import PICTURES, ROOT
from helpers.command_line import call
from helpers.http_server import shown
from qwen3vl_export.cli.run import app
from runtime.errors import UsageError

_COMMAND = [sys.executable, "-m", "qwen3vl_export.cli.run", "batch"]
_PATIENCE_S = 120
_NUM_LINES = 200


def requests(count: int, **more: Any) -> str:
    """Requests about pictures, some of which cannot be answered."""
    truths = json.loads((PICTURES / "truth.json").read_text())
    lines = []
    for number in range(count):
        if number % 11 == 7:
            lines.append("{broken")
            continue
        picture = "missing.png" if number % 13 == 5 else truths[number % len(truths)]["file"]
        body = {"messages": [{"role": "user", "content": shown("Read the digits.", picture)}], "temperature": 0, **more}
        values = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(values))
    return "\n".join(lines)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file beside the pictures that it names."""
    for picture in PICTURES.glob("*.png"):
        (tmp_path / picture.name).symlink_to(picture)
    path = tmp_path / "in.jsonl"
    path.write_text(requests(_NUM_LINES))
    return path


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    words = [*map(str, arguments), "--allow-local-files", "--threads", "1"]
    return subprocess.Popen([*_COMMAND, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answers(path: Path) -> dict[str, Any]:
    """What a file of results says of each request, without what another run says in another way."""
    found: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        result = json.loads(line)
        assert result["id"] not in found, "a request has two results"
        response = result["response"]
        if response is None:
            found[result["id"]] = (result["custom_id"], result["error"])
        elif response["status_code"] != 200:
            found[result["id"]] = (result["custom_id"], response["status_code"], response["body"])
        else:
            found[result["id"]] = (result["custom_id"], response["body"]["choices"])
    return found


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)


def test_a_batch_that_is_killed_goes_on(demo_engine: Path, source: Path, tmp_path: Path) -> None:
    """Each request has one result, and it is that of a batch which nothing disturbed."""
    undisturbed, output = tmp_path / "undisturbed.jsonl", tmp_path / "out.jsonl"
    options = ("--engine", str(demo_engine), "--allow-local-files", "--threads", "1")
    code, printed, _ = call(app, "batch", str(source), str(undisturbed), *options, "--json")
    summary = json.loads(printed)
    assert code == 0 and summary["lines"] == summary["succeeded"] + summary["failed"] == _NUM_LINES
    moments = random.Random(17)
    num_killed, before = 0, 0
    for _ in range(3):
        process = started(source, output, "--engine", demo_engine, "--concurrency", "2")
        wait_for_lines(output, before + moments.randint(1, 12), process)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        num_killed += process.wait(_PATIENCE_S) == -signal.SIGKILL
        process.communicate()
        before = output.read_bytes().count(b"\n")
    assert num_killed == 3 and 0 < before < _NUM_LINES
    # As if it had been killed in the middle of a write.
    output.write_bytes(output.read_bytes() + output.read_bytes().splitlines()[0][:40])
    last = json.loads(call(app, "batch", str(source), str(output), *options, "--json")[1])
    assert last["done_before"] == before and last["succeeded"] + last["failed"] == _NUM_LINES - before
    found = answers(output)
    assert len(found) == _NUM_LINES and found == answers(undisturbed)


def test_an_interrupt_answers_what_runs_and_says_how_to_go_on(demo_engine: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    source.write_text(requests(40, max_tokens=120, ignore_eos=True))
    process = started(source, output, "--engine", demo_engine, "--max-sequences", "2")
    wait_for_lines(output, 1, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=_PATIENCE_S)[1]
    assert process.returncode == 130
    num_lines = output.read_bytes().count(b"\n")
    assert f"{num_lines} of 40 requests have a result" in said and 0 < num_lines < 40
    assert "the same command again answers the rest" in said and said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said and len(answers(output)) == num_lines
    code, _, said = call(app, "batch", str(source), str(output), "--engine", str(demo_engine), "--allow-local-files")
    assert code == 0 and f"{num_lines} of 40 requests were answered before" in said
    assert len(answers(output)) == 40


def test_a_second_interrupt_drops_what_runs(demo_engine: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    source.write_text(requests(1) + "\n" + requests(5, max_tokens=3000, ignore_eos=True).partition("\n")[2])
    process = started(source, output, "--engine", demo_engine)
    wait_for_lines(output, 1, process)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline() == "answering what is in progress; again to drop it\n"
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=_PATIENCE_S)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert len(answers(output)) == 1 and "1 of 5 requests have a result" in said


def test_failures_go_where_they_are_asked_for(demo_engine: Path, source: Path, tmp_path: Path) -> None:
    output, errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    source.write_text(requests(14))
    words = ("batch", str(source), str(output), "--errors", str(errors), "--engine", f"mine={demo_engine}")
    code, printed, said = call(app, *words, "--allow-local-files", "--json")
    assert code == 0 and said == ""
    summary = json.loads(printed)
    assert list(summary) == [
        *("lines", "done_before", "succeeded", "failed", "left", "prompt_tokens", "new_tokens", "seconds"),
        *("tokens_per_s", "output", "errors"),
    ]
    assert [summary[name] for name in ("lines", "done_before", "succeeded", "failed", "left")] == [14, 0, 12, 2, 0]
    assert summary["errors"] == str(errors) and summary["new_tokens"] > 12
    assert len(answers(output)) == 12 and len(answers(errors)) == 2
    assert json.loads(output.read_text().splitlines()[0])["response"]["body"]["model"] == "mine"
    code, _, said = call(app, *words)
    assert code == 0 and said == f"{output}: 14 of 14 requests have a result\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none.jsonl", "out.jsonl"), "none.jsonl: cannot be read"),
        (("in.jsonl", "in.jsonl"), "are one file"),
        (("in.jsonl", "missing/out.jsonl"), "cannot be written"),
        (("in.jsonl", "out.jsonl", "--max-choices", "0"), "max_choices = 0"),
        (("in.jsonl", "out.jsonl", "--engine", "twice=ENGINE"), "2 engines with 1 different names"),
        (("in.jsonl", "out.jsonl", "--engine", "=ENGINE"), "is not NAME=ENGINE"),
    ],
)
def test_what_cannot_be_is_said_before_the_work(
    arguments: tuple[str, ...], words: str, demo_engine: Path, source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [word.replace("ENGINE", str(demo_engine)) for word in arguments]
    code, printed, said = call(app, "batch", *given, "--engine", f"twice={demo_engine}")
    assert code == UsageError.exit_code and printed == ""
    assert words in said and "remedy: " in said

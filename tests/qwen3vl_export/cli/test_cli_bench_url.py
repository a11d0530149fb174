"""`qwen3vl bench --url`: what it prints of a server, and options that do not fit together."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer

from helpers.chat_server import Asked, answer, chat_server
from helpers.command_line import call
from qwen3vl_export.cli.bench import bench
from runtime.errors import RequestError, UsageError


def run(*options: str) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command()(bench)
    return call(app, *options)


def test_a_server_is_asked_as_an_engine_is(tmp_path: Path) -> None:
    key, plot = tmp_path / "key", tmp_path / "load.svg"
    key.write_text("secret\n", encoding="utf-8")
    options = ("--concurrency", "3", "--requests", "7", "--image-size", "64x48", "--prompt-tokens", "30")
    with chat_server(answer) as server:
        code, out, err = run(
            *("--url", f"{server.url}/v1", *options, "--new-tokens", "5", "--shared-prefix", "40"),
            *("--api-key-file", str(key), "--plot", str(plot), "--json"),
        )
    assert code == 0, err
    found = json.loads(out)
    assert [found[name] for name in ("offered", "done", "refused", "failed", "new_tokens")] == [7, 7, 0, 0, 35]
    assert (found["url"], found["model"], found["left_out"]) == (server.url, "stand-in", [])
    assert found["concurrency"] == 3 and found["rate"] is None
    assert found["prompt_words"] == 15, "the server says that a word has two tokens"
    assert found["rss_peak_bytes"] is None and found["queue_s"] == {}
    assert all(headers["Authorization"] == "Bearer secret" for headers in server.headers)
    system, user = server.bodies[-1]["messages"]
    assert len(system["content"].split()) == 20 and len(user["content"][1]["text"].split()) == 15
    assert "secret" not in out + err
    assert "whole answer" in "".join(ElementTree.parse(plot).getroot().itertext())


def test_lines_for_readers() -> None:
    def old(asked: Asked, body: dict[str, object]) -> None:
        for name in ("ignore_eos", "stream_options"):
            if name in body:
                asked.refuse(400, f"unknown field {name}")
                return
        answer(asked, body)

    with chat_server(old, models=("a", "b")) as server:
        code, out, err = run(
            "--url", server.url, "--model", "b", "--rate", "200", "--requests", "4", "--image-size", "none"
        )
    assert code == 0, err
    lines = [line.split("  ")[0] for line in out.splitlines()]
    assert lines == ["server", "left out", "left out", "prompt", "requests", "speed", "TTFT", "TPOT", "latency"]
    assert "model b" in out and "20 words, since the server does not count tokens" in out
    assert "each chunk of an answer counts as a token" in out and "answers may end before --new-tokens" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "neither an engine nor a server"),
        (("ENGINE", "--url", "http://h", "--concurrency", "1"), "ENGINE (ENGINE) and --url are given together"),
        (("--url", "http://h"), "--url needs many requests"),
        (("--url", "http://h", "--runs", "3"), "--url needs many requests"),
        (("--url", "http://h", "--rate", "1", "--threads", "2"), "--threads is of an engine that is opened here"),
        (("--url", "http://h", "--rate", "1", "--max-queue", "2"), "--max-queue is of an engine that is opened here"),
        (("--url", "nowhere", "--rate", "1"), "expected http:// or https://"),
        (("--url", "http://h", "--rate", "1", "--api-key-file", "no-such-file"), "no-such-file"),
        (("ENGINE", "--model", "x"), "--model is of a server"),
        (("ENGINE", "--api-key-file", "x"), "--api-key-file is of a server"),
    ],
)
def test_what_is_refused(options: tuple[str, ...], said: str) -> None:
    code, out, err = run(*options)
    assert (code, out) == (UsageError.exit_code, "") and said in err and "remedy:" in err


@pytest.mark.parametrize("text", ["", "\n", "two\nlines", "schlüssel"])
def test_files_that_hold_no_key(tmp_path: Path, text: str) -> None:
    key = tmp_path / "key"
    key.write_text(text, encoding="utf-8")
    code, _, err = run("--url", "http://127.0.0.1:9", "--rate", "1", "--api-key-file", str(key))
    assert code == UsageError.exit_code and "holds no key" in err


def test_a_server_that_does_not_run() -> None:
    with chat_server(answer) as server:
        url = server.url
    code, _, err = run("--url", url, "--concurrency", "1")
    assert code == RequestError.exit_code and f"no connection to {url}" in err and "remedy: check --url" in err

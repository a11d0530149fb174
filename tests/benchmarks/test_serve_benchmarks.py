"""The benchmarks of the server: one run of each on the tiny shape, and the tables made of results."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.report import render
from benchmarks.serve_peers import OURS, PEER, vision_of
from benchmarks.serve_process import Memory, ServerProcess, cpu_s
from benchmarks.serve_work import FromFiles, Work, do
from helpers import ROOT
from helpers.chat_server import answer, chat_server
from qwen3vl_export.load.connections import Address
from qwen3vl_export.load.server import HttpServer
from runtime.errors import EngineError, UsageError
from runtime.model import Qwen3VLModel

STAND_IN = """
import sys, time
from helpers.chat_server import answer, chat_server

def seeing(asked, body):
    print("decoding image batch 1/1, n_tokens_batch = 4", flush=True)
    answer(asked, body)

print(" ".join(sys.argv), flush=True)
print("clip_model_loader: has vision encoder", flush=True)
with chat_server(seeing, port=int(sys.argv[sys.argv.index("--port") + 1])):
    time.sleep(600)
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="there is no /proc")


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A program that is called as llama-server is, and answers."""
    paths = f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\n"
    (tmp_path / "stand_in.py").write_text(paths + STAND_IN, encoding="utf-8")
    program = tmp_path / "llama-server"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/stand_in.py "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return program


def run(*options: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*options, "--json"])
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@needs_proc
def test_both_sides_do_the_same_work(tiny_engine: Path) -> None:
    pytest.importorskip("uvicorn")
    sizes = ("--threads", "1", "--rounds", "2", "--streams", "3", "--requests", "2", "--new-tokens", "4")
    singles = ("--singles", "2", "--images", "1", "--image-side", "64", "--starts", "1", "--prompt-tokens", "12")
    result = run("serve", str(tiny_engine), *sizes, *singles)
    for kind, num_requests, new_tokens in (("streams", 6, 24), ("text", 2, 4), ("image", 1, 2)):
        here, there = (result["kinds"][kind][side] for side in ("in-process", "server"))
        for mine, other in zip(here, there, strict=True):
            assert mine["new_tokens"] == other["new_tokens"] == new_tokens
            assert sorted(mine["prompt_tokens"]) == sorted(other["prompt_tokens"])
            assert len(mine["ttft_s"]) == len(other["ttft_s"]) == num_requests
        assert len(here) == len(there) == 2
    assert len(result["ready_s"]) == 1
    assert all(0 < each["anonymous"] <= each["rss"] for each in result["memory"].values())
    text = render("serve-tiny-ort-cpu-fp32", result)
    assert "tokens/s, 3 streams" in text and "TTFT, 64x64, median of 2" in text and "start to /ready" in text


@needs_proc
def test_both_servers_see_the_same_requests(tiny_engine: Path, stand_in: Path, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    weights = tmp_path / "weights.gguf"
    weights.write_bytes(b"GGUF")
    peer = ("--llama-server", str(stand_in), "--gguf", str(weights), "--mmproj", str(weights), "--peer-option=--fast")
    sizes = ("--threads", "1", "--rounds", "1", "--clients", "1,2", "--requests", "1", "--new-tokens", "3")
    result = run("serve-peers", str(tiny_engine), *peer, *sizes, "--image-side", "64", "--prompt-tokens", "12")
    assert [(each["side"], each["clients"], each["new_tokens"]) for each in result["turns"]] == [
        (PEER, 1, 3), (OURS, 1, 3), (PEER, 2, 6), (OURS, 2, 6),
    ]  # fmt: skip
    assert result["peer"] | {"images": 4, "visual_tokens": [4]} == result["peer"], "one warms up"
    assert result["peer_options"] == ["--fast"]
    text = render("peers-tiny-ort-cpu-fp32", result)
    assert text.count("llama-server") >= 2 and "visual [4] there" in text


def test_a_peer_that_sees_no_image_is_no_peer() -> None:
    assert vision_of("has vision encoder\ndecoding image batch 1/1, n_tokens_batch = 256\n") == {
        "images": 1,
        "visual_tokens": [256],
    }
    for log in ("", "has vision encoder", "decoding image batch 1/1, n_tokens_batch = 256"):
        with pytest.raises(EngineError, match="saw no image"):
            vision_of(log)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such engine')"]
    with pytest.raises(UsageError, match="did not become ready: no such engine"):
        ServerProcess(command, "/ready", tmp_path / "log")


def test_an_answer_that_is_too_short_is_no_measurement() -> None:
    with chat_server(lambda asked, body: answer(asked, {**body, "max_tokens": 2})) as server:
        client = HttpServer(Address.parse(server.url))
        with pytest.raises(EngineError, match=r"answers have \[2\] tokens instead of 5"):
            do(client, Work(1, 1, 3, 5))


def test_a_request_that_fails_is_no_measurement() -> None:
    with chat_server(lambda asked, body: asked.refuse(500, "broken")) as server:
        client = HttpServer(Address.parse(server.url))
        with pytest.raises(EngineError, match="HTTP 500: broken"):
            do(client, Work(1, 3, 3, 5))


def test_the_engine_in_process_decodes_files_too(tiny_engine: Path) -> None:
    with Qwen3VLModel.from_engine(tiny_engine, threads=1, max_context=256) as model:
        found = do(FromFiles(model), Work(2, 3, 3, 4, image_side=64))
        (text,) = do(FromFiles(model), Work(1, 1, 3, 4))["prompt_tokens"]
        (picture,) = do(FromFiles(model), Work(1, 1, 3, 4, image_side=64))["prompt_tokens"]
    assert found["new_tokens"] == 12 and len(found["ttft_s"]) == 3
    assert found["tokens_per_s"] == pytest.approx(12 / found["wall_s"])
    assert picture == text + 4 + 2, "tokens of the image, and the marks around it"


@needs_proc
def test_memory_and_processor_time_of_a_process() -> None:
    block = bytearray(os.urandom(8)) * (4 << 20)
    memory = Memory.of(os.getpid())
    assert memory.rss >= memory.anonymous >= len(block)
    assert cpu_s(os.getpid()) > 0

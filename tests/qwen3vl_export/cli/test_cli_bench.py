"""`qwen3vl bench`: its figures, its output, and sizes that it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

import engines.hardware
from engines.hardware import Gpu, Hardware
from helpers.command_line import call
from qwen3vl_export.cli.bench import bench, parse_size, summarise
from runtime.answer import Stats
from runtime.errors import UsageError
from runtime.sessions import ort_cpu

DECODE = ort_cpu.OrtCpuSession.decode
MACHINE = Hardware("Abacus", (), 2, 24 << 30, (Gpu("NVIDIA H200", "9.0", 140 << 30, 139 << 30, "570.1"),))


def stats(ttft_s: float, tpot_s: float) -> Stats:
    return Stats(
        preprocess_s=0.0,
        queue_s=0.0,
        vision_s=0.0,
        prefill_s=0.0,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        tokens_per_s=1 / tpot_s,
        prompt_tokens=30,
        visual_tokens=16,
        new_tokens=8,
        peak_cache_bytes=1,
    )


def test_percentiles_are_those_of_the_answers() -> None:
    speed = summarise([stats(ttft, 0.01 * ttft) for ttft in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)])
    assert (speed.ttft_p50_s, speed.ttft_p90_s) == (6.0, 10.0)
    assert speed.tpot_s == pytest.approx(0.06) and speed.tokens_per_s == pytest.approx(1 / 0.06)
    assert (speed.runs, speed.prompt_tokens, speed.visual_tokens, speed.new_tokens) == (11, 30, 16, 8)


def test_sizes() -> None:
    assert parse_size("1024x768") == (1024, 768)
    assert parse_size("none") is None


@pytest.mark.parametrize("text", ["1024", "0x5", "axb", "5x", "-4x4", "1x2x3", "٣x٣"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="WIDTHxHEIGHT"):
        parse_size(text)


def test_command_prints_what_it_measured(tiny_engine: Path) -> None:
    app = typer.Typer()
    app.command()(bench)
    options = [str(tiny_engine), "--new-tokens", "4", "--runs", "2", "--threads", "1"]
    code, out, _ = call(app, *options, "--image-size", "96x64", "--prompt-tokens", "40", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["visual_tokens"], found["new_tokens"], found["runs"], found["threads"]) == (6, 4, 2, 1)
    assert found["target"] == "ort-cpu-fp32"
    assert 0 < found["ttft_p50_s"] <= found["ttft_p90_s"] and found["tpot_s"] > 0
    code, out, _ = call(app, *options, "--image-size", "none")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["device", "engine", "prompt", "TTFT", "TPOT", "decode"]
    assert "0 of them visual" in out


@pytest.mark.parametrize(
    ("recorded", "said"), [(True, "tokens/s, as a CUDA graph"), (False, "tokens/s, without a CUDA graph")]
)
def test_bench_names_the_gpu_and_says_whether_steps_were_recorded(
    gpu_engine: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool, said: str
) -> None:
    monkeypatch.setattr(engines.hardware, "probe", lambda: MACHINE)

    def decode(session: Any, *call: Any) -> Any:
        session.decode_recorded = recorded  # as sessions on a GPU: nobody knows before the first step
        return DECODE(session, *call)

    monkeypatch.setattr(ort_cpu.OrtCpuSession, "decode", decode)
    _, out, _ = run_bench(gpu_engine)
    assert "NVIDIA H200" in out.splitlines()[0]
    assert out.splitlines()[-1].endswith(said)
    _, out, _ = run_bench(gpu_engine, "--json")
    found = json.loads(out)
    assert (found["device"], found["decode_recorded"]) == ("NVIDIA H200", recorded)
    _, out, _ = run_bench(gpu_engine, "--concurrency", "2", "--json")
    assert json.loads(out)["decode_recorded"] is recorded


def test_bench_names_the_processor_of_other_engines(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.hardware, "probe", lambda: MACHINE)
    code, out, _ = run_bench(tiny_engine, "--json")
    found = json.loads(out)
    assert (code, found["device"], found["decode_recorded"]) == (0, "Abacus", None)


def test_bench_passes_the_option_on(tiny_engine: Path) -> None:
    code, _, err = run_bench(tiny_engine, "--no-cuda-graphs")
    assert code == UsageError.exit_code and "does not run on a GPU" in err


def run_bench(folder: Path, *options: str) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command()(bench)
    runs = () if "--concurrency" in options else ("--runs", "1")
    return call(app, str(folder), "--image-size", "none", "--new-tokens", "2", *runs, *options)

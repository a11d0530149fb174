"""`qwen3vl bench`: its figures, its output, sweeps, comparisons, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import typer

import engines.hardware
from engines.hardware import Gpu, Hardware
from helpers.command_line import call
from qwen3vl_export.cli.bench import bench
from runtime.errors import CapacityError, EngineError, RegressionError, UsageError
from runtime.sessions import ort_cpu

DECODE = ort_cpu.OrtCpuSession.decode
MACHINE = Hardware("Abacus", (), 2, 24 << 30, (Gpu("NVIDIA H200", "9.0", 140 << 30, 139 << 30, "570.1"),))


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


SWEEP = ("--prompt-tokens", "4,8", "--batch", "1,2", "--image-size", "none,64x64", "--repeats", "4", "--threads", "1")


def swept(*arguments: str) -> tuple[int, str, str]:
    """With two tokens of answer; options that come later replace earlier ones."""
    app = typer.Typer()
    app.command()(bench)
    return call(app, "--new-tokens", "2", *SWEEP, *arguments)


@pytest.fixture(scope="module")
def earlier(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a sweep with two engines, whose times are those of a machine a thousand times as fast."""
    code, out, err = swept(f"a={tiny_engine}", f"b={tiny_engine}", "--output", "json")
    assert code == 0, err
    values = json.loads(out)
    for point in values["points"]:
        for name in ("ttft_s", "tpot_s"):
            point[name]["samples"] = [each / 1000 for each in point[name]["samples"]]
    file = tmp_path_factory.mktemp("earlier") / "earlier.json"
    file.write_text(json.dumps(values), encoding="utf-8")
    return file


def test_a_sweep_measures_every_point_of_every_engine(earlier: Path, tiny_engine: Path) -> None:
    points = json.loads(earlier.read_text(encoding="utf-8"))["points"]
    asked = [[each[name] for name in ("engine", "image_size", "text_tokens", "batch")] for each in points]
    assert asked == [
        [engine, size, tokens, batch]
        for size in (None, "64x64")
        for tokens in (4, 8)
        for batch in (1, 2)
        for engine in ("a", "b")
    ]
    for each in points:
        assert (each["runs"], each["new_tokens"], each["threads"], each["environment"]["threads"]) == (4, 2, 1, 1)
        assert each["images"] == (each["image_size"] is not None) and each["visual_tokens"] == 4 * each["images"]
        assert each["warmup_s"] > 0 and len(each["latency_s"]["samples"]) == 4
        assert each["tokens_per_s"] == pytest.approx(each["batch"] / each["tpot_s"]["median"])
        assert each["memory_bytes"]["weights"] > 0 and len(each["files_sha256"]) == 64
    assert points[2]["prompt_tokens"] == points[0]["prompt_tokens"] and points[4]["prompt_tokens"] > 4


def test_a_sweep_is_a_table_unless_another_form_is_asked_for(tiny_engine: Path) -> None:
    code, out, _ = swept(str(tiny_engine))
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("| engine | target |") and len(lines[2:10]) == 8
    assert all(line.startswith(f"| {tiny_engine.name} | ort-cpu-fp32 |") for line in lines[2:10])
    code, out, _ = swept(str(tiny_engine), "--output", "csv", "--batch", "1", "--image-size", "none")
    rows = list(csv.DictReader(out.splitlines()))
    assert code == 0 and [row["text_tokens"] for row in rows] == ["4", "8"]
    code, out, _ = swept(str(tiny_engine), "--output", "jsonl", "--batch", "1", "--image-size", "none")
    assert code == 0 and [json.loads(line)["text_tokens"] for line in out.splitlines()] == [4, 8]


def test_a_comparison_with_an_earlier_file(earlier: Path, tiny_engine: Path, tmp_path: Path) -> None:
    page = tmp_path / "bench.html"
    code, out, err = swept(
        *(f"b={tiny_engine}", "--compare", str(earlier), "--fail-slower", "5%"),
        *("--batch", "1,4", "--image-size", "none", "--html", str(page)),
    )
    assert code == RegressionError.exit_code == 13
    assert "4 of 4 times are longer by more than 5 %; most " in err and " of b at " in err and "remedy: " in err
    assert out.count("| slower |") == 4 and "- not in the earlier file: b: 4 tokens, 2 new, batch 4" in out
    assert "- only in the earlier file: a: 4 tokens, 2 new" in out
    text = page.read_text(encoding="utf-8")
    assert "Of 4 figures against the earlier file: 4 slower" in text and "Speed of b" in text, (
        "the page is written before the failure"
    )
    code, out, err = swept(f"b={tiny_engine}", "--compare", str(earlier), "--batch", "1", "--output", "csv")
    assert code == 0 and "verdict_ttft_s" in out and "Of 8 figures against the earlier file: 8 slower" in err, (
        "lines of points have no place for it"
    )


def test_what_did_not_become_slower_passes(tiny_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "earlier.jsonl"
    options = (str(tiny_engine), "--batch", "1", "--image-size", "none", "--prompt-tokens", "4")
    code, out, _ = swept(*options, "--output", "jsonl")
    values = json.loads(out)
    for name in ("ttft_s", "tpot_s"):
        values[name]["samples"] = [1000 * each for each in values[name]["samples"]]
    file.write_text(json.dumps(values), encoding="utf-8")
    code, out, err = swept(*options, "--compare", str(file), "--fail-slower", "0", "--output", "json")
    assert code == 0, err
    (point,) = json.loads(out)["points"]
    assert [point["compared"][name]["verdict"] for name in ("ttft_s", "tpot_s")] == ["faster", "faster"]


def test_engines_of_one_run_beside_each_other(tiny_engine: Path) -> None:
    options = ("--batch", "1", "--image-size", "none", "--prompt-tokens", "4", "--repeats", "6")
    engines = (f"a={tiny_engine}", f"b={tiny_engine}")
    # Twenty times as slow is what no load makes of one of two equal engines.
    code, out, err = swept(*engines, *options, "--against", "a", "--fail-slower", "1900%")
    assert code == 0, err
    assert out.count("| b | 4 tokens, 2 new | T") == 2 and "figures against a in the same rounds" in out
    code, _, err = swept(*engines, "--against", "c")
    assert code == UsageError.exit_code and "--against 'c': no such engine" in err and "one of a, b" in err
    code, _, err = swept(engines[0], "--against", "a")
    assert code == UsageError.exit_code and "--against needs a second engine" in err
    code, _, err = swept(*engines, "--against", "a", "--fail-slower", "1")
    assert code == UsageError.exit_code and "cannot be judged by 4 rounds" in err


def test_a_busy_machine_is_said(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.hardware, "available_cores", lambda: 4)
    for load, is_busy in ((1.9, False), (2.6, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        code, _, err = run_bench(tiny_engine)
        assert code == 0 and ("2.6 processes ran in the minute before" in err) is is_busy, err


def test_a_page_of_one_point(tiny_engine: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "bench.html"
    code, out, _ = run_bench(tiny_engine, "--html", str(page))
    assert code == 0 and out.startswith("device ")
    assert page.read_text(encoding="utf-8").count("<section>") == 6


def test_more_sequences_than_usual_are_opened_for_a_larger_batch(tiny_engine: Path) -> None:
    options = ("--batch", "9", "--image-size", "none", "--prompt-tokens", "4", "--max-context", "64")
    code, out, err = swept(str(tiny_engine), *options, "--output", "json")
    assert code == 0, err
    assert [each["batch"] for each in json.loads(out)["points"]] == [9]
    code, _, err = swept(str(tiny_engine), *options, "--max-sequences", "2")
    assert code == UsageError.exit_code and "runs 2 sequences at once" in err and "--max-sequences 9" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompt-tokens", "x"), "--prompt-tokens 'x': 'x' is neither a number nor a range"),
        (("--new-tokens", "1,2"), "--new-tokens '1,2': 1 is below 2"),
        (("--batch", "0"), "--batch '0': 0 is below 1"),
        (("--images", "1-3*1"), "--images '1-3*1': the range never ends"),
        (("--image-size", "big"), "--image-size 'big': expected WIDTHxHEIGHT"),
        (("--image-size", "none", "--images", "2"), "--images has no use without an image size"),
        (("--output", "yaml"), "--output 'yaml': unknown"),
        (("--json",), "--json is of one point, not of 8"),
        (("--json", "--output", "csv"), "--json and --output are given together"),
        (("--json", "--compare", "x"), "--json and --compare are given together"),
        (("--fail-slower", "5%"), "--fail-slower needs figures to compare with"),
        (("--fail-slower", "x%", "--compare", "x"), "--fail-slower 'x%': expected a percentage"),
        (("--fail-slower", "-1", "--compare", "x"), "--fail-slower '-1': expected a percentage"),
        (("--fail-slower", "nan", "--compare", "x"), "--fail-slower 'nan': expected a percentage"),
        (("--compare", "none.json"), "none.json: missing"),
        (("--compare", "none.json", "--against", "a"), "--compare and --against are given together"),
        (("--json", "--against", "a"), "--json and --against are given together"),
        (("--html", "/dev/null/page.html"), "/dev/null/page.html"),
        (("--html", "page.pdf"), "--html 'page.pdf': a page is an .html file"),
        (("--concurrency", "2", "--repeats", "2"), "--repeats is of one request at a time"),
        (("--concurrency", "2", "--html", "x.html"), "--html is of a sweep, not of many requests"),
        (("--rate", "2", "--output", "csv"), "--output is of a sweep"),
    ],
)
def test_what_is_refused(tiny_engine: Path, options: tuple[str, ...], said: str) -> None:
    code, out, err = swept(str(tiny_engine), *options)
    assert code == UsageError.exit_code and out == "", err
    message = json.loads(err)["error"]["message"] if "--json" in options else err
    assert said in message and "remedy" in err


def test_points_beyond_the_context_are_refused(tiny_engine: Path) -> None:
    options = ("--image-size", "none", "--batch", "1", "--max-context", "64")
    code, out, err = swept(str(tiny_engine), *options, "--prompt-tokens", "4,999999999", "--new-tokens", "2")
    assert code == CapacityError.exit_code and out == "" and "1000000001 tokens of text and answer" in err
    # With the chat template it is too long, and a shorter answer would pass for one of 32 tokens.
    code, out, err = swept(str(tiny_engine), *options, "--prompt-tokens", "32", "--new-tokens", "32")
    assert code == CapacityError.exit_code and out == "" and "of the 32 new ones" in err and "--max-context" in err


def test_many_requests_are_of_one_kind(tiny_engine: Path) -> None:
    app = typer.Typer()
    app.command()(bench)
    code, _, err = call(app, str(tiny_engine), "--concurrency", "2", "--prompt-tokens", "4,8")
    assert code == UsageError.exit_code and "many requests are of one kind, and the lists make 2" in err
    code, _, err = call(app, str(tiny_engine), f"b={tiny_engine}", "--concurrency", "2")
    assert code == UsageError.exit_code and "many requests go to one engine" in err


def test_names_of_engines(tiny_engine: Path, tmp_path: Path) -> None:
    code, _, err = swept(str(tiny_engine), str(tiny_engine))
    assert code == UsageError.exit_code and f"two engines are called '{tiny_engine.name}'" in err
    code, _, err = swept(f"={tiny_engine}")
    assert code == UsageError.exit_code and "is not NAME=ENGINE" in err
    code, _, err = swept(f"a={tmp_path}/none")
    assert code == EngineError.exit_code and f"{tmp_path}/none: no such engine folder" in err
    odd = tmp_path / "a=b"
    odd.symlink_to(tiny_engine)
    code, out, _ = swept(str(odd), "--prompt-tokens", "4", "--batch", "1", "--image-size", "none", "--output", "csv")
    assert code == 0 and out.splitlines()[1].startswith(f"{tiny_engine.name},"), "a folder of that name"


def test_what_cannot_be_judged_is_refused_before_the_work(earlier: Path, tiny_engine: Path) -> None:
    code, _, err = swept(f"b={tiny_engine}", "--compare", str(earlier), "--fail-slower", "5%", "--repeats", "1")
    assert code == UsageError.exit_code and "cannot be judged by 4 repetitions then and 1 now" in err
    code, _, err = swept(f"b={tiny_engine}", "--compare", str(earlier), "--prompt-tokens", "5")
    said = "has nothing to compare with, but 16 other points, the first of them 'a' at 4 tokens, 2 new"
    assert code == UsageError.exit_code and said in err
    code, _, err = swept(f"c={tiny_engine}", "--compare", str(earlier))
    assert code == UsageError.exit_code and said in err and "NAME=ENGINE" in err


def test_engines_that_do_not_fit_together(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import runtime.memory

    monkeypatch.setattr(runtime.memory, "machine_bytes", lambda: 1000)
    code, _, err = swept(f"a={tiny_engine}", f"b={tiny_engine}")
    assert code == CapacityError.exit_code and "the weights of 2 engines take" in err and "--compare first.json" in err


def run_bench(folder: Path, *options: str) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command()(bench)
    runs = () if "--concurrency" in options else ("--runs", "1")  # the older name of --repeats
    return call(app, str(folder), "--image-size", "none", "--new-tokens", "2", *runs, *options)

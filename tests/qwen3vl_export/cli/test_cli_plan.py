"""`qwen3vl plan`: engines and models, sizes as people write them, exit codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qwen3vl_export.cli.quantities import parse_bytes, parse_sides, parse_tokens
from qwen3vl_export.cli.run import app
from qwen3vl_export.memory_report import report_of
from runtime.errors import CapacityError, UsageError
from runtime.manifest import Manifest
from runtime.memory_plan import Planner, Work


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_quantities() -> None:
    assert [parse_tokens("--context", text) for text in ("4096", "32k", "1M", "1K")] == [4096, 32768, 1 << 20, 1024]
    found = [parse_bytes("--memory", text) for text in ("16GB", "16 GiB", "1.5MB", "512kB", "1KiB")]
    assert found == [16 * 10**9, 16 << 30, 1_500_000, 512_000, 1024]
    assert parse_sides("--image", "1024x768") == parse_sides("--image", "1024X768") == (1024, 768)
    for parse, texts in (
        (parse_tokens, ("", "0", "-1", "32kk", "1.5k", "k", "٣")),
        (parse_bytes, ("", "16", "0GB", "-1GB", "16 gb", "1e9B", "0.0000001GB")),
        (parse_sides, ("", "1024", "0x10", "10x", "axb", "1024x-1")),
    ):
        for text in texts:
            with pytest.raises(UsageError, match="--option") as caught:
                parse("--option", text)
            assert "write such as" in (caught.value.remedy or "")


def test_the_plan_of_an_engine(demo_engine: Path, tmp_path: Path) -> None:
    arguments = (str(demo_engine), "--context", "1k", "--batch", "2", "--threads", "1", "--memory", "1GB")
    page = tmp_path / "plan.html"
    done = call(*arguments, "--image", "512x256", "--json", "--html", str(page))
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    expected = Planner.of(Manifest.read(demo_engine), 1).plan(Work(1024, 2, images=(512,)))
    assert values["parts"] == dict(expected.parts) and values["total_bytes"] == expected.total_bytes
    assert (values["target"], values["limit_bytes"], values["fits"]) == ("ort-cpu-fp32", 10**9, True)
    assert values["largest"]["context"] == 4096 and values["largest"]["sequences"] > 2
    assert values["patches"] == [512] and "KV cache" in page.read_text(encoding="utf-8")
    text = call(*arguments).stdout
    assert "KV cache" in text and "█" in text and "fits" in text and "the most of each that fits" in text


def test_what_does_not_fit_is_shown_and_refused(demo_engine: Path) -> None:
    done = call(str(demo_engine), "--batch", "8", "--memory", "120MB", "--threads", "1")
    assert "too large by" in done.stdout and "context" in done.stdout
    assert isinstance(done.exception, CapacityError) and "--fit" in (done.exception.remedy or "")


def test_the_plan_of_a_model_reads_no_weights() -> None:
    done = call("qwen3-vl-8b", "--target", "ort-cpu-int4", "--kernels", "ort", "--context", "32k", "--json")
    values = json.loads(done.stdout.splitlines()[0])
    assert values["parts"]["KV cache"] == 2 * 36 * 8 * 128 * 4 * 32768
    assert 5e9 < values["parts"]["weights"] < 6e9
    gpu = json.loads(call("qwen3-vl-2b", "--target", "trt-fp16", "--memory", "8GB", "--json").stdout)
    assert gpu["device"] == "gpu" and gpu["mapped_bytes"] == 0 and gpu["fits"]


def test_what_fits_is_not_what_was_asked_for_where_nothing_is_built() -> None:
    arguments = "qwen3-vl-2b", "--target", "trt-fp16", "--memory", "80GB", "--context", "2k", "--json"
    largest = json.loads(call(*arguments).stdout)["largest"]
    assert largest["context"] == 262144 and largest["sequences"] > 8
    assert largest["image_side"] == 45 * 32, "its tokens are in the context"


def test_slots_that_are_kept_do_not_run(demo_engine: Path, tmp_path: Path) -> None:
    built = Manifest.read(demo_engine)
    built = dataclasses.replace(built, capabilities={**built.capabilities, "max_batch": 4})
    report = report_of("", "", Planner.of(built, 1), 1, Work(64, kept=1), 1 << 40)
    assert report.largest is not None and report.largest.sequences == 3


def test_a_smaller_context_is_no_remedy_for_weights() -> None:
    done = call("qwen3-vl-2b", "--target", "ort-cpu-fp32", "--memory", "1GB")
    assert done.exception.remedy == "choose a target of fewer bits, or a smaller model"


def test_frames_of_a_video_are_seen_in_pairs() -> None:
    done = call("tiny", "--target", "ort-cpu-fp32", "--image", "64x64", "--video", "5", "--json")
    assert json.loads(done.stdout)["patches"] == [16, 16, 16]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nothing-here",), "no such folder"),
        (("tiny", "--memory", "16"), "--memory '16'"),
        (("tiny", "--images", "2"), "their size is missing"),
        (("tiny", "--context", "1M", "--target", "ort-cpu-fp32"), "--context = 1048576"),
        (("tiny", "--target", "trt-fp16", "--kernels", "own"), "no such kernels"),
        (
            ("qwen3-vl-2b", "--target", "ort-cpu-fp32", "--image", "4096x4096"),
            "are 16384 tokens",
        ),
    ],
)
def test_bad_input(arguments: tuple[str, ...], expected: str) -> None:
    done = call(*arguments)
    assert isinstance(done.exception, UsageError) and expected in str(done.exception)


def test_an_engine_has_its_own_target(demo_engine: Path) -> None:
    done = call(str(demo_engine), "--target", "ort-cpu-fp32")
    assert isinstance(done.exception, UsageError) and "leave them out" in (done.exception.remedy or "")

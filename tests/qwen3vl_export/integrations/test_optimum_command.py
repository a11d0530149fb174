"""`optimum-cli export qwen3vl` hands each option to `qwen3vl-export`, some of them under optimum's names."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines.hardware import Hardware
from helpers import ROOT
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.export import Exported
from qwen3vl_export.integrations.optimum.command import FIXED, WORDS, add_options, parameters, run
from qwen3vl_export.integrations.optimum.target import target_for
from qwen3vl_export.request import ExportRequest
from runtime.errors import CapacityError, TargetError, UsageError

GIVEN: dict[str, tuple[list[str], Any]] = {
    "model": (["-m", "demo"], "demo"),
    "target": (["--target", "ort-cpu-int4"], "ort-cpu-int4"),
    "output": (["out"], Path("out")),
    "bundle": (["--bundle", "b"], Path("b")),
    "calibration": (["--calibration", "c"], Path("c")),
    "kv_cache": (["--kv-cache", "mixed"], "mixed"),
    "kv_cache_ratio": (["--kv-cache", "mixed", "--kv-cache-ratio", "0.5"], 0.5),
    "kv_scores": (["--kv-scores"], True),
    "kernels": (["--kernels", "ort"], "ort"),
    "decode_plan": (["--no-decode-plan"], False),
    "max_context": (["--max-context", "128"], 128),
    "max_batch": (["--max-batch", "2"], 2),
    "prefill_chunk": (["--prefill-chunk", "64"], 64),
    "max_patches": (["--max-patches", "4096"], 4096),
    "compute_capability": (["--compute-capability", "8.6", "--compute-capability", "9.0"], ("8.6", "9.0")),
    "strip_weights": (["--strip-weights"], True),
    "weight_streaming": (["--weight-streaming"], True),
    "version_compatible": (["--version-compatible"], True),
    "hardware_compatible": (["--hardware-compatible"], True),
    "token_scores": (["--token-scores"], True),
    "compile": (["--no-compile"], False),
    "weights": (["--no-weights"], False),
    "cache_dir": (["--cache_dir", "hub"], Path("hub")),
}


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[ExportRequest]:
    """What is exported, instead of an export."""
    found: list[ExportRequest] = []

    def export(request: ExportRequest, progress: Any) -> Exported:
        found.append(request)
        return Exported(Path("out"), request.target, True, 5, 1.0, 2.0, None)

    monkeypatch.setattr("qwen3vl_export.export.export", export)
    return found


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_options(parser)
    with pytest.raises(SystemExit) as end:
        run(parser.parse_args(words))
    return int(end.value.code or 0)


def test_every_option_of_an_export_is_offered() -> None:
    fields = [field.name for field in dataclasses.fields(ExportRequest)]
    assert fields == [*GIVEN]
    assert [each.name for each in parameters()] == [*fields, "as_json", "quiet"]
    assert {*WORDS} <= {*fields}


@pytest.mark.parametrize("name", GIVEN)
def test_each_option_is_handed_on(name: str, requests: list[ExportRequest]) -> None:
    words, value = GIVEN[name]
    model = [] if name == "model" else ["--model", "demo"]
    assert call(*model, *words) == 0
    default = ExportRequest("demo")
    beside = {"kv_cache": "mixed"} if name == "kv_cache_ratio" else {}  # which is of no other kind
    assert requests == [dataclasses.replace(default, **{name: value}, **beside)]
    if name != "model":
        assert getattr(default, name) != value


def test_what_is_not_given_is_not_handed_on(requests: list[ExportRequest]) -> None:
    assert call("-m", "demo") == 0
    assert requests == [ExportRequest("demo")]
    assert call("--model=-strange", "--", "-out") == 0
    assert requests[1] == ExportRequest("-strange", output=Path("-out"))


@pytest.mark.parametrize(("option", "values"), FIXED.items())
def test_options_without_a_choice(
    option: str, values: tuple[str, ...], requests: list[ExportRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    for value in values:
        assert call("-m", "demo", f"--{option}", value) == 0
    assert requests == [ExportRequest("demo")] * len(values)
    assert call("-m", "demo", f"--{option}", "other") == 2
    assert f"error: --{option} 'other': Qwen3-VL is exported for {values[0]} alone\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (["--weight-format", "fp32"], "ort-cpu-fp32"),
        (["--dtype", "fp32", "--device", "cpu"], "ort-cpu-fp32"),
        (["--weight-format", "int8"], "ort-cpu-int8"),
        (["--weight-format", "int4", "--device", "cpu"], "ort-cpu-int4"),
        (["--device", "cpu"], "ort-cpu-int8"),
    ],
)
def test_weight_formats_choose_the_target(words: list[str], target: str, requests: list[ExportRequest]) -> None:
    assert call("-m", "demo", *words) == 0
    assert requests == [ExportRequest("demo", target=target)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trust-remote-code"], "--trust-remote-code: the model is defined in this package"),
        (["--target", "ort-cpu-int4", "--weight-format", "int4"], "--target and --weight-format both say the target"),
        (["--target", "ort-cpu-int4", "--device", "cpu"], "--target and --device both say the target"),
        (["--bundle", "b", "--weight-format", "int4"], "--weight-format is a target's, and a bundle is for none"),
        (["--weight-format", "int3"], "--weight-format 'int3': no target has weights in that format"),
        (["--weight-format", "fp16", "--device", "cpu"], "--weight-format 'fp16' --device cpu: no target has weights"),
        (["--device", "tpu"], "--device 'tpu' is not known"),
        (["--max-context", "many"], "Invalid value for '--max-context'"),
    ],
)
def test_what_is_refused(
    words: list[str], message: str, requests: list[ExportRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("-m", "demo", *words) == 2
    assert message in capsys.readouterr().err and requests == []


def test_errors_are_json_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("-m", "demo", "--trust-remote-code", "--json") == 2
    assert json.loads(capsys.readouterr().err)["error"]["type"] == "UsageError"
    assert call("-m", "demo", "--trust-remote-code", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_what_runs_nowhere_here_names_the_targets() -> None:
    config = Checkpoint.open("demo").config
    with pytest.raises(TargetError, match=r"^--weight-format 'nvfp4': ") as caught:
        target_for("nvfp4", None, lambda: config)
    assert "--target with one of trt-nvfp4, trt-rtx-nvfp4" in str(caught.value.remedy)
    small = Hardware("", (), 1, 1)
    with pytest.raises(CapacityError, match=r"^--device cpu: no target fits the memory"):
        target_for(None, "cpu", lambda: config, hardware=small)
    with pytest.raises(UsageError, match="pass one of cpu, cuda, gpu"):
        target_for(None, "tpu", lambda: config)


def test_the_command_line_of_optimum(tmp_path: Path) -> None:
    code = "from optimum.commands.optimum_cli import main; main()"
    command = [sys.executable, "-c", code, "export", "qwen3vl"]

    def cli(*words: str) -> subprocess.CompletedProcess[str]:
        path = {"PYTHONPATH": str(ROOT)}
        return subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, env=path, timeout=300)

    helped = cli("--help")
    assert helped.returncode == 0 and "--weight-format FORMAT" in helped.stdout and "--max-context" in helped.stdout
    made = cli("-m", "demo", "engine", "--weight-format", "fp32", "--task", "image-text-to-text", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["target"] == "ort-cpu-fp32"
    assert json.loads((tmp_path / "engine" / "engine.json").read_text())["target"] == "ort-cpu-fp32"
    missing = cli("-m", "nothing/here@", "engine")
    assert missing.returncode == 3 and missing.stderr.startswith("error: ")
    assert cli().returncode == 2  # argparse: -m is required

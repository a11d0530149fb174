"""An export as one call: what a request refuses, what it makes of its options, what is told of the stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from demo_training.prompts import training_prompts
from engines.build_options import BuildOptions
from engines.bundle import Bundle
from engines.progress import Progress, Stage
from qwen3vl_export import export as exporting
from qwen3vl_export.export import export
from qwen3vl_export.request import ExportRequest
from runtime.errors import UsageError
from runtime.manifest import Manifest


class Log(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.num_bytes = self.total_bytes = 0

    def report(self, stage: Stage, text: str) -> None:
        assert text
        self.stages.append(stage)

    def advance(self, num_bytes: int, total_bytes: int) -> None:
        self.num_bytes, self.total_bytes = self.num_bytes + num_bytes, total_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bundle": Path("b"), "output": Path("o")}, "--bundle and --output exclude each other"),
        ({"bundle": Path("b"), "calibration": Path("c")}, "--calibration changes weights"),
        ({"weights": False, "calibration": Path("c")}, "--calibration changes weights"),
        ({"bundle": Path("b"), "kv_cache": "int8"}, "--kv-cache has to run the engine"),
        ({"weights": False, "kv_cache": "int8"}, "--kv-cache has to run the engine"),
    ],
)
def test_what_excludes_each_other_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExportRequest("demo", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_context": 1}, "max_context = 1, expected at least 2"),
        ({"max_batch": 0}, "max_batch = 0, expected at least 1"),
        ({"prefill_chunk": "8"}, "prefill_chunk = '8', expected at least 2"),
        ({"max_patches": -5}, "max_patches = -5, expected at least 4"),
        ({"max_context": True}, "max_context = True"),
        ({"compute_capability": 5}, "compute_capability cannot be read"),
        ({"output": 5}, "output cannot be read"),
        ({"weights": "no"}, "weights must be True or False"),
        ({"model": 5}, "model cannot be read"),
    ],
)
def test_values_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExportRequest(**{"model": "demo", **options})


def test_a_request_takes_texts_for_paths_and_one_gpu_for_several() -> None:
    request = ExportRequest("demo", output="out/x", compute_capability="8.6")  # type: ignore[arg-type]
    assert request.output == Path("out/x") and request.compute_capability == ("8.6",)
    assert hash(request) == hash(ExportRequest("demo", output=Path("out/x"), compute_capability=["8.6"]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"max_context": 8192}, BuildOptions(max_context=8192, prefill_chunk=512)),
        ({"max_context": 64}, BuildOptions(max_context=64, prefill_chunk=64)),
        ({"max_context": 64, "prefill_chunk": 16}, BuildOptions(max_context=64, prefill_chunk=16)),
        ({"max_batch": 2, "max_patches": 4096}, BuildOptions(max_batch=2, patch_buckets=(1024, 4096))),
        ({"compute_capability": ["8.6"]}, BuildOptions(compute_capabilities=("8.6",))),
        ({"strip_weights": True}, BuildOptions(strip_weights=True)),
    ],
)
def test_the_options_of_a_build(options: dict[str, Any], expected: BuildOptions | None) -> None:
    assert ExportRequest("demo", **options).build_options == expected


def test_only_a_compiler_takes_more_than_context_and_batch() -> None:
    assert ExportRequest("demo", max_context=64, max_batch=2).compiler_options == {}
    asked = ExportRequest("demo", max_patches=64, weight_streaming=True)
    assert asked.compiler_options == {"patch_buckets": (64,), "weight_streaming": True}


def test_the_stages_of_an_engine_in_few_bits(
    demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "make_bundle", lambda *_, **__: demo_bundle)
    monkeypatch.setattr(exporting, "read_prompts", lambda _: training_prompts(2))
    log, output = Log(), tmp_path / "engine"
    request = ExportRequest("demo", "ort-cpu-int4", output, calibration=tmp_path, kv_cache="int8")
    exported = export(request, log)
    cache = [Stage.QUANTISING_CACHE]
    assert log.stages == [Stage.TRACING, Stage.CALIBRATING, Stage.LOWERING, Stage.WRITING, *cache]
    assert (exported.output, exported.target, exported.is_engine) == (output, "ort-cpu-int4", True)
    assert 0 < exported.trace_s <= exported.total_s
    assert exported.manifest == Manifest.read(output)
    assert {*exported.manifest.source} >= {"calibration", "cache_calibration"}
    # All that is written but the padding between weights.
    assert log.num_bytes == log.total_bytes and 0.8 < log.total_bytes / exported.weight_bytes <= 1
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    assert "calibration" not in demo_bundle.source


def test_a_bundle_is_for_no_target(demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "make_bundle", lambda *_, **__: demo_bundle)
    log, folders = Log(), [tmp_path / "first", tmp_path / "second"]
    for folder in folders:  # a bundle may be written as often as one likes
        exported = export(ExportRequest("demo", bundle=folder), log)
        assert (exported.output, exported.target, exported.is_engine, exported.manifest) == (folder, None, False, None)
        assert exported.weight_bytes == demo_bundle.weight_bytes
    assert log.stages == 2 * [Stage.TRACING, Stage.WRITING]
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first == second and "decoder.onnx.data" in first

"""`--kernels` and what follows from it: which graphs are built, what is said, what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from engines.bundle import Bundle
from engines.progress import Progress, Stage
from helpers.command_line import call
from qwen3vl_export import export as exporting
from qwen3vl_export.cli.export import app
from qwen3vl_export.export import export
from qwen3vl_export.request import ExportRequest
from runtime import native
from runtime.errors import EngineError, TargetError, UsageError
from runtime.manifest import Manifest
from runtime.memory import cache_bytes

OWN = {"MatMulInt4", "MatMulInt8", "LookUpInt4", "DecodeAttention"}
ORT = {"MatMulNBits.4", "MatMulNBits.8", "GatherBlockQuantized.4", "MatMulIntegerToFloat"}
MISSING = EngineError("the library is missing", remedy="build it")


class Log(Progress):
    """Keeps what is said before the model is traced."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def report(self, stage: Stage, text: str) -> None:
        if stage is Stage.CHOOSING:
            self.said.append(text)


@pytest.fixture(autouse=True)
def traced(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace the demo once for all tests; to build an engine takes no library."""
    monkeypatch.setattr(exporting, "make_bundle", lambda *_, **__: demo_bundle)
    monkeypatch.setattr(native, "failure", lambda: None)
    monkeypatch.setattr(native, "isas", lambda: ("avx2", "portable"))


def built(folder: Path, log: Log | None = None, **options: Any) -> Manifest:
    """Return the manifest of an engine of 4 bits."""
    exported = export(ExportRequest("demo", "ort-cpu-int4", folder / "engine", **options), log or Log())
    assert exported.manifest is not None and exported.manifest == Manifest.read(exported.output)
    return exported.manifest


@pytest.mark.parametrize("kernels", [None, "own"])
def test_an_engine_is_built_with_our_own_kernels(kernels: str | None, tmp_path: Path) -> None:
    log = Log()
    capabilities = built(tmp_path, log, kernels=kernels).capabilities
    assert (capabilities["custom_ops"], set(capabilities["kernels"])) == ("qwen3vl.cpu", OWN)
    assert log.said == []
    graph = onnx.load(tmp_path / "engine" / "decoder.onnx", load_external_data=False)
    assert {opset.domain for opset in graph.opset_import} == {"", "qwen3vl.cpu"}


def test_an_engine_is_built_with_onnx_runtimes_kernels_alone(tmp_path: Path) -> None:
    log = Log()
    capabilities = built(tmp_path, log, kernels="ort").capabilities
    assert "custom_ops" not in capabilities and set(capabilities["kernels"]) == ORT
    assert log.said == []


def test_without_the_library_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "failure", lambda: MISSING)
    log = Log()
    assert set(built(tmp_path, log).capabilities["kernels"]) == ORT
    assert log.said == ["note: ort-cpu-int4 is built with --kernels ort, not own: the library is missing"]


def test_what_cannot_be_built_is_refused_before_the_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*options: str, code: int) -> str:
        found, _, err = call(app, "no/such-model", *options, "--output", str(tmp_path / "engine"))
        assert found == code and list(tmp_path.iterdir()) == []
        return err

    usage = UsageError.exit_code
    err = refused("--target", "ort-cpu-int4", "--kernels", "cuda", code=usage)
    assert "--kernels cuda: ort-cpu-int4 has no such kernels" in err and "own, ort" in err
    assert "ort-cpu-fp32 has no such kernels" in refused("--target", "ort-cpu-fp32", "--kernels", "own", code=usage)
    half = ("--kv-cache", "float16")
    err = refused("--target", "ort-cpu-int4", "--kernels", "ort", *half, code=usage)
    assert "ort-cpu-int4 has no float16 KV cache with these kernels" in err and "--kernels own" in err
    err = refused("--target", "ort-cpu-fp32", *half, code=usage)
    assert "ort-cpu-fp32 has no float16 KV cache" in err and "--kernels" not in err
    assert "the kinds are float16, int8, int4" in refused("--target", "ort-cpu-int4", "--kv-cache", "int2", code=usage)
    monkeypatch.setattr(native, "failure", lambda: MISSING)
    err = refused("--target", "ort-cpu-int4", "--kernels", "own", code=TargetError.exit_code)
    assert "--kernels own: the library is missing" in err and "--kernels ort" in err


def test_a_bundle_has_no_kernels() -> None:
    with pytest.raises(UsageError, match="a bundle is for none"):
        ExportRequest("demo", bundle=Path("b"), kernels="ort")


def test_half_a_cache_needs_no_prompts(tmp_path: Path) -> None:
    manifest = built(tmp_path, kv_cache="float16")
    capabilities = manifest.capabilities
    assert (capabilities["cache_dtype"], capabilities.get("cache_bits")) == ("float16", None)
    assert set(capabilities["kernels"]) == OWN - {"DecodeAttention"} | {"DecodeAttentionFloat16"}
    whole = cache_bytes(manifest.model, {"cache_dtype": "float32"}, 100)
    assert cache_bytes(manifest.model, capabilities, 100) == whole // 2
    assert "cache_calibration" not in manifest.source
    graph = onnx.load(tmp_path / "engine" / "decoder.onnx", load_external_data=False).graph
    types = {value.type.tensor_type.elem_type for value in graph.input if value.name.startswith("past_key_values")}
    assert types == {onnx.TensorProto.FLOAT16}
    assert manifest.files["decoder.onnx"].num_bytes == (tmp_path / "engine" / "decoder.onnx").stat().st_size

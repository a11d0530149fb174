"""Options and reports of engines on a GPU: CUDA graphs, the limit of memory, out of memory, `qwen3vl bench`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import typer

import engines.hardware
import runtime.engine_options
from engines.hardware import Gpu, Hardware
from helpers.command_line import call
from qwen3vl_export.cli.bench import bench
from runtime.errors import CapacityError, EngineError, UsageError
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel
from runtime.session import SessionOptions
from runtime.sessions import ort_cpu, ort_cuda

MACHINE = Hardware("Abacus", (), 2, 24 << 30, (Gpu("NVIDIA H200", "9.0", 140 << 30, 139 << 30, "570.1"),))
CPU = ort_cuda.Device("CPUExecutionProvider", "cpu")


@pytest.fixture
def gpu_engine(tiny_engine: Path, tmp_path: Path) -> Path:
    """An engine whose manifest says that it lives on a GPU; the CPU's session opens it."""
    folder = tmp_path / "engine"
    shutil.copytree(tiny_engine, folder)
    manifest = Manifest.read(folder)
    dataclasses.replace(manifest, capabilities={**manifest.capabilities, "device": "gpu"}).write(folder)
    return folder


def test_the_machines_memory_limits_engines_of_the_cpu_alone(
    tiny_engine: Path, gpu_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.engine_options, "machine_bytes", lambda: 1)
    with pytest.raises(CapacityError, match=r"the limit is 0\.00 GB"):
        Qwen3VLModel.from_engine(tiny_engine)
    Qwen3VLModel.from_engine(gpu_engine)
    with pytest.raises(CapacityError):
        Qwen3VLModel.from_engine(gpu_engine, max_memory=1)


def test_an_engine_of_the_cpu_records_nothing(tiny_engine: Path) -> None:
    with pytest.raises(UsageError, match=r"cuda_graphs=False: .* does not run on a GPU"):
        Qwen3VLModel.from_engine(tiny_engine, cuda_graphs=False)


@pytest.mark.parametrize("given", [{}, {"cuda_graphs": False}, {"threads": 2}])
def test_an_engine_of_a_gpu_is_told(gpu_engine: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> None:
    found: list[SessionOptions] = []
    monkeypatch.setattr(ort_cpu, "open_session", lambda folder, manifest, options: found.append(options))
    Qwen3VLModel.from_engine(gpu_engine, **given)
    assert found == [SessionOptions(**given)]


def test_huge_pages_are_refused(gpu_engine: Path) -> None:
    with pytest.raises(UsageError, match="huge_pages: the weights are on the GPU"):
        Qwen3VLModel.from_engine(gpu_engine, huge_pages=True)


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_onnx_runtime_records_unless_told_otherwise(
    tmp_path: Path, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, cuda_graphs: bool
) -> None:
    options: dict[str, Any] = {}
    monkeypatch.setattr(ort_cuda, "_open", lambda path, device, given, threads: options.update({path.name: given}))
    ort_cuda.open_session(tmp_path, Manifest.read(tiny_engine), SessionOptions(cuda_graphs=cuda_graphs))
    assert ("enable_cuda_graph" in options["decoder.onnx"]) == cuda_graphs
    assert "enable_cuda_graph" not in options["vision.onnx"]
    assert all("enable_skip_layer_norm_strict_mode" in each for each in options.values())


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 9", CapacityError),
        ("CUDA failure 2: out of memory ; GPU=0", CapacityError),
        ("No such operator", EngineError),
    ],
)
def test_out_of_memory_while_opening_is_a_capacity_error(
    tmp_path: Path, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, message: str, error: type[Exception]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(error, match=message.split()[0]):
        ort_cuda.OrtCudaSession(tmp_path, Manifest.read(tiny_engine), device=CPU)


@pytest.mark.parametrize(
    ("recorded", "said"), [(True, "tokens/s, as a CUDA graph"), (False, "tokens/s, without a CUDA graph")]
)
def test_bench_names_the_gpu_and_says_whether_steps_were_recorded(
    gpu_engine: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool, said: str
) -> None:
    monkeypatch.setattr(engines.hardware, "probe", lambda: MACHINE)
    monkeypatch.setattr(ort_cpu.OrtCpuSession, "decode_recorded", recorded, raising=False)
    _, out, _ = run_bench(gpu_engine)
    assert "NVIDIA H200" in out.splitlines()[0]
    assert out.splitlines()[-1].endswith(said)
    _, out, _ = run_bench(gpu_engine, "--json")
    found = json.loads(out)
    assert (found["device"], found["decode_recorded"]) == ("NVIDIA H200", recorded)


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
    return call(app, str(folder), "--image-size", "none", "--new-tokens", "2", "--runs", "1", *options)

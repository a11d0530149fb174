"""What a record says of building and running, on machines with and without a GPU, libraries and the exporter's."""

from __future__ import annotations

import importlib.util

import pytest

from engines.hardware import Gpu, Hardware
from engines.registry import get
from engines.target import Availability
from runtime.installation import how_to_install

NONE = Hardware("Abacus", (), 2, 32 << 30)
EXPORT = ("onnx_ir", "onnxscript", "torch")
OTHER_GPU = "builds here; to run, it needs an NVIDIA GPU of SM 7.5, 8.0, 8.6, 8.9, 12.0, 12.1, not Test GPU"


def with_gpu(capability: str) -> Hardware:
    return Hardware("Abacus", (), 2, 32 << 30, gpus=(Gpu("Test GPU", capability, 24 << 30, 22 << 30, "570.1"),))


def lowered(name: str) -> str:
    return f"for the lowered graphs alone: qwen3vl-export MODEL --target {name} --no-compile"


NO_GPU = f"an NVIDIA GPU is needed, to build and to run; {lowered('trt-fp16')}"
OLD_GPU = f"a GPU of SM 8.9 or later is needed, the Test GPU has 8.6; {lowered('trt-fp8')}"


@pytest.mark.parametrize(
    ("name", "machine", "absent", "expected"),
    [
        ("ort-cpu-int8", NONE, (), Availability(True, True)),
        ("ort-cpu-int8", NONE, ("onnxruntime",), Availability(True, False, how_to_install("cpu"))),
        ("ort-cpu-int8", NONE, ("torch",), Availability(False, True, how_to_install("export"))),
        ("ort-cpu-int8", NONE, (*EXPORT, "onnxruntime"), Availability(False, False, how_to_install("export", "cpu"))),
        ("ort-cuda-fp16", NONE, (), Availability(True, False, "builds here; needs an NVIDIA GPU to run")),
        ("ort-cuda-fp16", with_gpu("7.5"), ("onnxruntime",), Availability(True, False, how_to_install("cuda"))),
        ("trt-fp16", NONE, (), Availability(False, False, NO_GPU)),
        ("trt-fp8", with_gpu("8.6"), (), Availability(False, False, OLD_GPU)),
        ("trt-fp16", with_gpu("8.6"), (), Availability(True, True)),
        (
            "trt-fp16",
            with_gpu("8.6"),
            ("tensorrt",),
            Availability(False, False, f"{how_to_install('tensorrt')}; {lowered('trt-fp16')}"),
        ),
        ("trt-fp16", with_gpu("8.6"), ("torch",), Availability(False, True, how_to_install("export"))),
        ("trt-rtx-fp16", with_gpu("8.6"), (), Availability(True, True)),
        ("trt-rtx-fp16", with_gpu("9.0"), (), Availability(True, False, OTHER_GPU)),
        ("trt-rtx-fp16", NONE, ("tensorrt_rtx",), Availability(False, False, how_to_install("tensorrt-rtx"))),
        ("trt-rtx-fp16", with_gpu("8.6"), ("torch",), Availability(False, True, how_to_install("export"))),
    ],
)
def test_what_a_machine_can_do(
    name: str, machine: Hardware, absent: tuple[str, ...], expected: Availability, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, package=None: None if module in absent else module)
    assert get(name).availability(machine) == expected


def test_a_library_without_the_provider_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    target, machine = get("ort-cuda-fp16"), with_gpu("8.6")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    found = target.availability(machine)
    assert (found.can_build, found.can_run) == (True, False)
    assert found.reason.startswith("onnxruntime-gpu has to take the place of onnxruntime: uninstall onnxruntime, then ")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, package=None: module)
    assert target.availability(machine) == Availability(True, True)
    for absent in ("cuda", "cuda.bindings"):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda module, absent=absent: module if module != absent else None
        )
        found = target.availability(machine)
        assert (found.can_build, found.can_run) == (True, False)
        assert found.reason.startswith("cuda-bindings is missing: ") and "`cuda`" in found.reason

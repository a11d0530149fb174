"""What an engine is opened with: the limit of memory, and which options an engine of a GPU takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import runtime.engine_options
from runtime.errors import CapacityError, UsageError
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel
from runtime.session import SessionOptions
from runtime.sessions import ort_cpu


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
    opened = ort_cpu.open_session

    def open_session(folder: Path, manifest: Manifest, options: SessionOptions) -> ort_cpu.OrtCpuSession:
        found.append(options)
        return opened(folder, manifest, options)

    monkeypatch.setattr(ort_cpu, "open_session", open_session)
    Qwen3VLModel.from_engine(gpu_engine, **given)
    assert found == [SessionOptions(**given)]


def test_huge_pages_are_refused(gpu_engine: Path) -> None:
    with pytest.raises(UsageError, match="huge_pages: the weights are on the GPU"):
        Qwen3VLModel.from_engine(gpu_engine, huge_pages=True)

"""Telemetry of ONNX Runtime is off in processes that import this package, and threads are those the process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from runtime import machine, settings

pytestmark = pytest.mark.portable
OPEN = """
import onnxruntime
onnxruntime.InferenceSession({graph!r}, providers=["CPUExecutionProvider"])
"""


def run(code: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a home of its own, and few variables: the library has no telemetry where CI is set, for one."""
    kept = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS") if key in os.environ}
    environment = {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-c", code], cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def files_in(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


def test_a_process_that_opens_an_engine_keeps_no_device_id(demo_engine: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    code = f"from qwen3_vl import Qwen3VLModel\nQwen3VLModel.from_engine({str(demo_engine)!r}).generate('Count.')"
    done = run(code, home)
    assert files_in(home) == [] and "telemetry" not in done.stderr


def test_onnxruntime_before_this_package_is_warned_of_once(demo_engine: Path, tmp_path: Path) -> None:
    code = OPEN.format(graph=str(demo_engine / "vision.onnx"))
    late = run(code + "import runtime.model, runtime.chat", tmp_path)
    assert late.stderr.count("warning: ") == 1
    assert "onnxruntime was imported before this package" in late.stderr
    assert "set ORT_DISABLE_TELEMETRY=1 before Python starts, or import qwen3_vl before onnxruntime" in late.stderr
    for value in ("1", "0"):  # whoever says so, has chosen
        assert "warning: " not in run(code + "import runtime.model", tmp_path, ORT_DISABLE_TELEMETRY=value).stderr


def test_a_variable_that_is_set_behind_the_library_is_too_late(tmp_path: Path) -> None:
    setting = "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '1'\n"
    for code in ("import onnxruntime\n" + setting, setting + "import onnxruntime\n"):  # which of them, nobody can tell
        assert run(code + "import qwen3_vl", tmp_path).stderr.count("warning: ") == 1
    assert "warning: " not in run(setting + "import qwen3_vl, onnxruntime", tmp_path).stderr


def test_the_public_package_before_the_library_is_early_enough(demo_engine: Path, tmp_path: Path) -> None:
    done = run("import qwen3_vl\n" + OPEN.format(graph=str(demo_engine / "vision.onnx")), tmp_path)
    assert files_in(tmp_path) == [] and "warning: " not in done.stderr


def test_without_a_record_of_the_first_variables_the_present_ones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: Path) -> bytes:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_bytes", absent)
    monkeypatch.setitem(sys.modules, "onnxruntime", sys)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    assert settings.disable_telemetry()
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    assert not settings.disable_telemetry() and os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def test_the_script_that_starts_the_library_in_another_process_turns_it_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A program that prints its environment stands for Python with the library."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    import list_ort_cuda_kernels

    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nunset LD_PRELOAD\necho "{\\"telemetry\\": \\"$ORT_DISABLE_TELEMETRY\\"}"\n')
    python.chmod(0o755)
    monkeypatch.setattr(list_ort_cuda_kernels, "LIBRARIES", ("libcuda.so.1",))
    assert list_ort_cuda_kernels.list_kernels(str(python)) == {"telemetry": "1"}


def test_the_library_would_write_without_the_variable(demo_engine: Path, tmp_path: Path) -> None:
    """Else the test above could not fail; a release that writes nothing is no fault."""
    import onnxruntime

    run(OPEN.format(graph=str(demo_engine / "vision.onnx")), tmp_path)
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) == (1, 32):
        assert [name for name in files_in(tmp_path) if "deviceid" in name]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("3", 3),
        ("4,2", 4),
        (" 2 ", 2),
        ("", None),
        ("0", None),
        ("-1", None),
        ("many", None),
        ("9" * 20, int("9" * 20)),
    ],
)
def test_omp_num_threads(value: str, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert settings.omp_num_threads() == expected
    most = machine.MAX_THREADS_PER_CORE * machine.available_cores()
    assert machine.default_threads() == min(expected or machine.available_cores(), most)


@pytest.mark.parametrize(("quotas", "expected"), [([], 8), ([2.5], 2), ([0.5], 1), ([16.0], 8), ([6.0, 3.0], 3)])
def test_cores_are_those_of_affinity_and_quota(
    quotas: list[float], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert machine.available_cores(quotas) == expected


def test_a_process_of_one_core_opens_an_engine_with_one_thread(demo_engine: Path, tmp_path: Path) -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.environ.pop('OMP_NUM_THREADS', None)\n"
        "from runtime.machine import default_threads; assert default_threads() == 1\n"
        "from qwen3_vl import Qwen3VLModel\n"
        f"model = Qwen3VLModel.from_engine({str(demo_engine)!r})\n"
        "print(model.session._decoder.get_session_options().intra_op_num_threads)"
    )
    assert run(code, tmp_path).stdout.split() == ["1"]


@pytest.mark.parametrize(("before", "index", "after"), [(None, 1, "1"), ("", 0, "0"), ("2, 5", 1, "5"), ("2,5", 2, "")])
def test_one_gpu_of_those_that_are_visible(
    before: str | None, index: int, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    settings.show_one_gpu(index)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after

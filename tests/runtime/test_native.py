"""The library of own kernels is found, checked and chosen from, and each thing that is wrong with it is said."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime as ort
import pytest

from helpers import ROOT
from helpers.native_library import compiled, stand_in
from runtime import native
from runtime.errors import EngineError, UsageError

pytestmark = pytest.mark.portable


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_where_a_compiler_is_the_library_is_there() -> None:
    """Else the tests of the own kernels would be skipped, and nobody would see it."""
    assert native.problem() == "", "run: make native"


def test_the_best_instruction_set_is_in_use(tmp_path: Path) -> None:
    library = stand_in(tmp_path)
    assert native.problem(library) == ""
    assert (native.isas(library), native.isa(library)) == (("avx2", "portable"), "avx2")


def test_another_one_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3VL_CPU_ISA", "portable")
    library = stand_in(tmp_path)
    assert native.isa(library) == "portable"
    native.use("avx2", library)
    assert native.isa(library) == "avx2"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("amx_int8", "this processor does not run it"),
        ("sse9", "there is no instruction set of that name"),
        ("avx", "there is no instruction set of that name"),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN3VL_CPU_ISA", name)
    library = stand_in(tmp_path)
    with pytest.raises(UsageError, match=f"QWEN3VL_CPU_ISA: '{name}': {reason}; it runs avx2, portable") as caught:
        native.isa(library)
    assert caught.value.remedy == "choose one of those, or leave QWEN3VL_CPU_ISA out for avx2"
    assert reason in native.problem(library)


def test_what_the_system_refuses_is_said_and_offered_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3VL_CPU_ISA", "amx_int8")
    library = stand_in(tmp_path, isas="amx_int8,avx2,portable", granted="avx2,portable")
    expected = "QWEN3VL_CPU_ISA: 'amx_int8': the system refuses it to this process; it runs avx2, portable"
    with pytest.raises(UsageError, match=expected) as caught:
        native.isa(library)
    assert caught.value.remedy == "choose one of those, or leave QWEN3VL_CPU_ISA out for avx2"


def test_an_empty_variable_chooses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3VL_CPU_ISA", " ")
    assert native.isa(stand_in(tmp_path)) == "avx2"


def test_a_missing_library_is_said_with_the_command_that_builds_it(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="the library of own kernels is missing") as caught:
        native.register(ort.SessionOptions(), tmp_path / "none.so")
    for words in ("make setup", "install the package", "g++", "qwen3vl-export --kernels ort"):
        assert words in str(caught.value.remedy)


def test_a_library_of_another_version_is_refused(tmp_path: Path) -> None:
    library = stand_in(tmp_path, version=2)
    assert native.problem(library).endswith("the library of own kernels is of version 2, expected 1")


def test_another_file_is_no_library(tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library")
    other = compiled("int nothing(void) { return 0; }", tmp_path / "other.so")
    for path in (text, other):
        assert "does not load as the library of own kernels" in native.problem(path)


def test_a_library_that_onnxruntime_refuses_is_said(tmp_path: Path) -> None:
    library = stand_in(tmp_path, refuses=True)
    expected = rf"ONNX Runtime {ort.__version__} refuses the library of own kernels \(.*no interface 17"
    with pytest.raises(EngineError, match=expected):
        native.register(ort.SessionOptions(), library)
    assert "refuses the library of own kernels" in native.problem(library)


@pytest.mark.parametrize(("isas", "has"), [("portable", "lacks"), ("avx2,portable", "has")])
def test_portable_code_is_warned_of(isas: str, has: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = stand_in(tmp_path, isas=isas)
    native.use("portable", library)
    native.warn_of_portable_code(library)
    assert f"portable code, many times slower than with AVX2, which this processor {has}" in caplog.text


def test_others_are_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    native.warn_of_portable_code(stand_in(tmp_path))
    assert not caplog.text


def test_without_onnxruntime_it_is_only_loaded(tmp_path: Path) -> None:
    """Engines may be built where no engine runs."""
    library = stand_in(tmp_path, refuses=True)
    code = (
        "import sys\nsys.modules['onnxruntime'] = None\n"
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'onnxruntime' else find(name)\n"
        "from pathlib import Path\nfrom runtime import native\n"
        f"assert native.problem(Path({str(library)!r})) == ''"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

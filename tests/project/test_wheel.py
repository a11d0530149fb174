"""The wheel holds all that it needs: export in one empty environment, run that engine in another without torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from helpers import ROOT
from runtime import native
from scripts import share_torch, wheels


def run(*command: str | Path, cwd: Path) -> str:
    # An editable install of this checkout must not be found: only the wheel counts.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    wheels.copy_tracked(folder / "source")
    # Optimising takes 20 s, and nothing here runs the kernels.
    flags = folder / "source" / "native" / "build.toml"
    flags.write_text(flags.read_text(encoding="utf-8").replace('"-O3"', '"-O0"'), encoding="utf-8")
    return wheels.build_source(folder / "source", folder)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@needs_compiler
def test_the_wheel_holds_the_library_of_own_kernels(wheel: Path, tmp_path: Path) -> None:
    assert wheels.why_not_binary(wheel) == "" and "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        library = Path(archive.extract("runtime/native/libqwen3vl_cpu.so", tmp_path))
        assert "Root-Is-Purelib: false" in archive.read(f"{dist_info(archive)}/WHEEL").decode()
    assert native.problem(library) == ""
    if shutil.which("readelf") is not None:
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", library, cwd=tmp_path))
        assert set(needed) <= {"libc.so.6", "libm.so.6"}


def test_without_a_compiler_it_holds_all_else(tmp_path: Path) -> None:
    wheels.copy_tracked(tmp_path / "source")
    options = ("--no-deps", "--no-build-isolation", "-w", tmp_path, tmp_path / "source")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CC", "CXX"):
            patch.setenv(name, "/no/compiler")
        run(sys.executable, "-m", "pip", "wheel", "--log", tmp_path / "log", *options, cwd=tmp_path)
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert "note: the library of own kernels was not built" in said
    (plain,) = tmp_path.glob("*.whl")
    assert "the own kernels were not built" in wheels.why_not_binary(plain)
    with zipfile.ZipFile(plain) as archive:
        names = archive.namelist()
        assert "Root-Is-Purelib: true" in archive.read(f"{dist_info(archive)}/WHEEL").decode()
    assert not [name for name in names if name.endswith(".so")] and "runtime/native/__init__.py" in names


def test_a_library_of_other_sources_does_not_stay_in_a_checkout(tmp_path: Path) -> None:
    """An editable install would run it."""
    wheels.copy_tracked(tmp_path)
    library = tmp_path / "runtime" / "native" / native.LIBRARY.name
    library.touch()
    os.utime(library, (0, 0))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CC", "CXX"):
            patch.setenv(name, "/no/compiler")
        run(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=tmp_path)
    assert not library.exists()


def test_the_source_distribution_holds_what_is_compiled(tmp_path: Path) -> None:
    wheels.copy_tracked(tmp_path / "source")
    code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=tmp_path / "source")
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native_files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "native").glob("*.*")}
    assert len(native_files) > 5 and native_files | {"setup.py"} <= names


def dist_info(archive: zipfile.ZipFile) -> str:
    return next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)


def test_the_wheel_is_small_and_trains_nothing(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"configs", "engines", "qwen3_vl", "qwen3vl_export", "runtime"}
    # Of the demo: checkpoints, pictures, and the held-out questions of `qwen3vl verify --tasks`.
    demo = {name.removeprefix("qwen3vl_export/demo/") for name in names if name.startswith("qwen3vl_export/demo/")}
    assert {name for name in demo if name.endswith(".py")} == {"__init__.py", "data.py", "distractors.py", "tasks.py"}
    assert {"checkpoint/model.safetensors", "checkpoint_moe/model.safetensors", "images/truth.json"} <= demo
    assert "qwen3vl_export/reports/page.css" in names
    # 12 MB of them are the two demo checkpoints, 0.6 the own kernels and their proofs.
    assert wheel.stat().st_size <= 14_000_000


def install(binaries: Path, wheel: Path, extras: str) -> None:
    """Install the wheel and its extras, in the versions of the lock: they do not depend on the day."""
    options = ("-q", "--no-compile", "-c", ROOT / "locks" / "demo.txt")
    run(binaries / "pip", "install", *options, f"{wheel}[{extras}]", cwd=binaries)


def installed(binaries: Path, cwd: Path) -> set[str]:
    return {entry["name"] for entry in json.loads(run(binaries / "pip", "list", "--format", "json", cwd=cwd))}


def ask(binaries: Path, engine: Path, cwd: Path) -> tuple[str, str]:
    """Answer the first shipped picture with the installed command; return the answer and the truth."""
    find = "import importlib.resources as r; print(r.files('qwen3vl_export') / 'demo' / 'images')"
    images = Path(run(binaries / "python", "-c", find, cwd=cwd).strip())
    assert ROOT not in images.parents
    entry = json.loads((images / "truth.json").read_text())[0]
    answer = run(binaries / "qwen3vl", "run", engine, entry["question"], "--image", images / entry["file"], cwd=cwd)
    return answer.strip(), entry["answer"]


@pytest.fixture(scope="module")
def exported(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Commands of an environment with the wheel and its extras [export,cpu], and the engine that they exported.

    PyTorch is a link to that of this environment: its gigabytes take minutes to install.
    """
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(share_torch, "SHARED", folder / "shared")
        patch.setattr(share_torch, "CONSTRAINTS", folder / "shared" / "constraints.txt")
        share_torch.make_environment(folder / "env")
    for link in (folder / "shared").glob("torchvision*"):
        link.unlink()
    binaries = folder / "env" / "bin"
    install(binaries, wheel, "export,cpu")
    run(binaries / "qwen3vl-export", "demo", "--target", "ort-cpu-fp32", "--output", folder / "engine", cwd=folder)
    return binaries, folder / "engine"


def test_export_extra_exports_the_demo(exported: tuple[Path, Path], tmp_path: Path) -> None:
    assert not installed(exported[0], tmp_path) & {"torchvision", "transformers"}
    answer, truth = ask(*exported, tmp_path)
    assert answer == truth


def test_cpu_extra_alone_runs_that_engine(wheel: Path, exported: tuple[Path, Path], tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    binaries = tmp_path / "env" / "bin"
    install(binaries, wheel, "cpu")
    assert not installed(binaries, tmp_path) & {"torch", "torchvision", "transformers", "onnx", "onnx-ir"}
    answer, truth = ask(binaries, exported[1], tmp_path)
    assert answer == truth

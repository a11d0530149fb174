"""The libraries of a GPU pack: onnxruntime-gpu for one GPU, and wheels that the machine's Python may lack."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from benchmarks.gpu.prune import prune
from runtime.errors import UsageError

# What the runtime imports, with the least version that will do where the machine has one (pyproject.toml) and what is
# fetched where it has none.
WHEELS = {
    "tokenizers": ("0.22", ">=0.22"),
    "jinja2": ("3.1.6", ">=3.1.6"),
    "markupsafe": ("2.0", ">=2.0"),
    "pillow": ("10.4", ">=10.4"),
    "cuda-bindings": ("12.9", ">=12.9,<14"),
    "cuda-pathfinder": ("1.0", ">=1.0"),
}
ONNXRUNTIME = "onnxruntime-gpu>=1.31"
# Parts of the wheel that opening an engine does not import, by where their names begin.
_LEFT_OUT = (
    "onnxruntime/transformers/",
    "onnxruntime/tools/",
    "onnxruntime/quantization/",
    "onnxruntime/datasets/",
    "onnxruntime/backend/",
    "onnxruntime/capi/libonnxruntime.so",
    "onnxruntime/capi/libonnxruntime_providers_tensorrt.so",
)
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


@dataclass(frozen=True)
class Site:
    """An unpacked library: where, its version, and what pruning found in each of its files."""

    folder: Path
    version: str
    pruned: dict[str, Any]


def unpack_onnxruntime(wheel: Path | None, python: str, sm: int, work: Path) -> Site:
    """Unpack the wheel, fetched if none is given, without what is not needed, and prune its machine code.

    Raises:
        UsageError: It is not a wheel of onnxruntime-gpu for that Python, or it has no machine code for that GPU.
    """
    if wheel is None:
        typer.echo("fetching onnxruntime-gpu")
        fetch([ONNXRUNTIME], python, work / "onnxruntime")
        (wheel,) = (work / "onnxruntime").glob("*.whl")
    tag = f"cp{python.replace('.', '')}"
    if not (wheel.name.startswith("onnxruntime_gpu-") and f"-{tag}-" in wheel.name and zipfile.is_zipfile(wheel)):
        raise UsageError(
            f"{wheel} is not a wheel of onnxruntime-gpu for Python {python}",
            remedy=f"give one named onnxruntime_gpu-VERSION-{tag}-…, or leave --onnxruntime out to fetch it",
        )
    folder = work / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = [each for each in archive.namelist() if not each.startswith(_LEFT_OUT)]
        archive.extractall(folder, names)
    pruned = {}
    for path in sorted(folder.rglob("*.so")):
        found = prune(path, sm)
        if found.num_fat_binaries:
            if found.num_without_code == found.num_fat_binaries:
                held = ", ".join(str(each) for each in sorted(found.bytes_by_sm))
                raise UsageError(
                    f"{wheel.name}: {path.name} has no code for SM {sm}, only for {held}", remedy="give another --sm"
                )
            pruned[path.name] = {
                "kept_bytes": found.kept_bytes,
                "zeroed_bytes": found.zeroed_bytes,
                "num_fat_binaries": found.num_fat_binaries,
                "num_without_code": found.num_without_code,
            }
            typer.echo(f"{path.name}: kept {found.kept_bytes / 1e6:.1f} MB, zeroed {found.zeroed_bytes / 1e6:.1f} MB")
    return Site(folder, wheel.name.split("-")[1], pruned)


def collect_wheels(source: Path | None, python: str, folder: Path) -> list[dict[str, str]]:
    """Put the wheels into `folder`; return file, distribution, version and least version of each.

    Raises:
        UsageError: One is missing in `source`, or cannot be fetched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if source is None:
        typer.echo(f"fetching {', '.join(WHEELS)}")
        fetch([f"{name}{wanted}" for name, (_, wanted) in WHEELS.items()], python, folder)
    else:
        for path in sorted(source.glob("*.whl")):
            if _distribution(path) in WHEELS:
                shutil.copyfile(path, folder / path.name)
    found = {_distribution(path): path.name for path in sorted(folder.glob("*.whl"))}
    missing = sorted(set(WHEELS) - set(found))
    if missing:
        raise UsageError(
            f"no wheels of {', '.join(missing)} in {source or folder}", remedy="put them there, or leave --wheels out"
        )
    return [
        {"distribution": name, "file": file, "version": file.split("-")[1], "least": WHEELS[name][0]}
        for name, file in found.items()
    ]


def fetch(requirements: Sequence[str], python: str, folder: Path) -> None:
    """Fetch wheels for another Python through pip, without what they need themselves.

    Raises:
        UsageError: pip is missing, or finds none.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--dest", str(folder)]
    for platform in _PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UsageError(
            f"pip does not fetch {', '.join(requirements)} for Python {python}: {last[0]}",
            remedy="fetch them elsewhere and give --onnxruntime WHEEL and --wheels DIR",
        )


def _distribution(path: Path) -> str:
    return path.name.split("-")[0].lower().replace("_", "-")

"""Compile the library of own kernels as setup.py does, from a folder of sources that a test may have changed."""

from __future__ import annotations

import platform
import shutil
import subprocess
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import ROOT


def changed_sources(folder: Path, *changes: tuple[str, str, str]) -> Path:
    """Copy `native/` into a folder, with texts replaced: file, old text, which must be there once, and new text."""
    sources = folder / "native"
    shutil.copytree(ROOT / "native", sources)
    for name, old, new in changes:
        text = (sources / name).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} holds {old!r} {text.count(old)} times"
        (sources / name).write_text(text.replace(old, new), encoding="utf-8")
    return sources


def compile_native(sources: Path, library: Path, *flags: str) -> Path:
    """Compile a library without optimisation, or skip the test where there is no g++.

    Args:
        sources: Folder like `native/`.
        library: What is written.
        flags: Added to those of `build.toml`.
    """
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    build = tomllib.loads((sources / "build.toml").read_text(encoding="utf-8"))
    own_flags = {**build["sources"], **build.get(platform.machine(), {})}

    def compile_one(name: str) -> str:
        output = library.with_name(f"{name}.o")
        command = ["g++", *build["flags"], *own_flags[name], "-O0", "-w", *flags, "-c", sources / name, "-o", output]
        subprocess.run(command, check=True)
        return str(output)

    with ThreadPoolExecutor(2) as threads:
        objects = list(threads.map(compile_one, own_flags))
    subprocess.run(["g++", "-shared", *flags, *objects, "-o", library], check=True)
    return library

"""Compile `native/` into a folder of a test: with sanitizers, for another processor, or with a mistake put in."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import ROOT

SOURCES = ROOT / "native"
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


def build_library(
    folder: Path, *, flags: Sequence[str] = (), edits: Mapping[str, tuple[str, str]] | None = None, only: str = ""
) -> Path:
    """Compile and link the library, and return its path.

    Args:
        folder: Where a copy of the sources, the objects and the library go.
        flags: More flags of the compiler and the linker, after those of build.toml.
        edits: By the name of a file, a text that it holds once and what stands there instead.
        only: The one instruction set, beside the portable code, to compile, such as "avx2"; the others keep their names
            and lose their functions, which saves most of the time. Empty: all.
    """
    copy = folder / "native"
    shutil.copytree(SOURCES, copy)
    for name, (old, new) in (edits or {}).items():
        text = (copy / name).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} holds {text.count(old)} times: {old}"
        (copy / name).write_text(text.replace(old, new), encoding="utf-8")
    build = tomllib.loads((copy / "build.toml").read_text(encoding="utf-8"))
    for name in build.get(platform.machine(), {}):
        if only and name != f"isa_{only}.cpp" and (copy / name).exists():
            _drop_functions(copy / name)
    own_flags = {**build["sources"], **build.get(platform.machine(), {})}
    tasks = [[*build["flags"], *own, *flags, "-w", "-c", str(copy / name)] for name, own in own_flags.items()]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(lambda task: _compiled(task, copy), tasks))
    library = folder / "libqwen3vl_cpu.so"
    _run([str(COMPILER), "-shared", *flags, *objects, "-o", str(library)])
    return library


def with_library(folder: Path, library: Path) -> Path:
    """Return a folder with a copy of the packages, whose runtime has this library, for `run_python`."""
    for name in ("configs", "engines", "qwen3_vl", "qwen3vl_export", "runtime"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(library, folder / "runtime" / "native" / "libqwen3vl_cpu.so")
    return folder


def run_python(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run Python, by another program if `before` is given, with a folder's packages and all else of this checkout."""
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests")))
    everything = {**os.environ, "PYTHONPATH": path, **(environment or {})}
    command = [*before, sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=everything, capture_output=True, text=True, timeout=1800)


def run_tests(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run tests of tests/native with the packages of a folder, as `run_python`.

    Its runtime is imported first: pytest would find that of the checkout. Nothing is captured, since it would be lost
    with a process that a sanitizer ends.
    """
    code = "import sys, runtime.native, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-x", "-s", "-p", "no:cacheprovider", "--confcutdir", str(ROOT / "tests" / "native")]
    return run_python(folder, "-c", code, *options, *arguments, environment=environment, before=before)


def _drop_functions(source: Path) -> None:
    """Leave of the file of an instruction set the definition of its table, without functions."""
    (definition,) = [
        line for line in source.read_text(encoding="utf-8").splitlines() if line.startswith("const Kernels k")
    ]
    table = definition.split(",")[0] + "};"
    source.write_text(f'#include "kernels.h"\nnamespace qwen3vl {{\n{table}\n}}\n', encoding="utf-8")


def _compiled(arguments: list[str], folder: Path) -> str:
    target = str(folder / (Path(arguments[-1]).name + ".o"))
    _run([str(COMPILER), *arguments, "-o", target])
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""A mistake inside a kernel of ours is found before an engine is opened, whatever instruction set is in use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.native_build import build_library, needs_compiler
from helpers.own_kernels import needs_own_kernels
from runtime import native

pytestmark = [needs_own_kernels, needs_compiler, pytest.mark.portable]
SABOTAGE = {
    "activations.h": ("*scale = range / 127.0f;", "*scale = range / 120.0f;"),
    "look_up.h": ("static_cast<float>(code - zero_point)", "static_cast<float>(code - zero_point + 1)"),
    "attention_prepare.h": ("load_n(sin + h, n)", "load_n(cos + h, n)"),
}
PROVE = """
from runtime import native
from runtime.errors import EngineError
from runtime.kernels import needs_exact_products

for isa in native.isas():
    native.use(isa)
    for kernel in native.OPERATORS:
        try:
            needs_exact_products([kernel])
        except EngineError as error:
            print(kernel, isa, "computes wrong products" in error.message)
        else:
            print(kernel, isa, "passed")
"""


def test_every_sabotaged_kernel_is_found(tmp_path: Path) -> None:
    """In a copy of the package, whose library it is; that of the sources as they are passes (test_kernels.py)."""
    package = tmp_path / "runtime"
    shutil.copytree(ROOT / "runtime", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(build_library(tmp_path, flags=["-O0"], edits=SABOTAGE), package / "native" / native.LIBRARY.name)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "QWEN3VL_CPU_ISA")}
    command = [sys.executable, "-c", PROVE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    expected = [f"{kernel} {isa} True" for isa in native.isas() for kernel in native.OPERATORS]
    assert done.stdout.splitlines() == expected

"""The float lanes of every instruction set compute what `native/lanes.h` says, with the same bits.

`native/tests/lanes_check.cpp` compares them with float64 and the C library, and prints a hash of all results.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers import ROOT

NATIVE = ROOT / "native"
COMPILER = shutil.which("g++")
ARM_COMPILER, ARM_EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
AVX2 = ["avx2", "fma", "f16c"]
EXTENSIONS = {"portable": [], "avx2": AVX2, "avx512": [*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl"]}
# Of every processor: the driver's numbers are its own, and the results have the same bits everywhere.
HASH = "07da0d01bb1a9c23"

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


def cpu_flags() -> set[str]:
    """Return the names of the extensions that this processor has."""
    found = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return set(found[1].split()) if found else set()


def check(
    compiler: str, program: Path, flags: Sequence[str], emulator: Sequence[str] = (), folder: Path = NATIVE
) -> str:
    """Compile the driver for one instruction set and run it; return the last line that it prints."""
    own = tomllib.loads((NATIVE / "build.toml").read_text(encoding="utf-8"))["flags"]
    source = folder / "tests" / "lanes_check.cpp"
    # Optimised less than the library: compiling takes most of the time, and the bits are the same.
    subprocess.run([compiler, *own, "-O1", "-w", *flags, source, "-o", program, "-lm"], check=True, timeout=300)
    done = subprocess.run([*emulator, program], capture_output=True, text=True, timeout=300)
    return done.stdout.splitlines()[-1]


@needs_compiler
@pytest.mark.parametrize("isa", EXTENSIONS)
def test_results_and_bits(isa: str, tmp_path: Path) -> None:
    if missing := set(EXTENSIONS[isa]) - cpu_flags():
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    flags = [f"-m{name}" for name in EXTENSIONS[isa]] or ["-DTEST_PORTABLE"]
    assert check(str(COMPILER), tmp_path / "check", flags) == f"{isa}: 0 failures, hash {HASH}"


@pytest.mark.skipif(not (ARM_COMPILER and ARM_EMULATOR), reason="no compiler or no emulator for 64-bit ARM")
def test_arm(tmp_path: Path) -> None:
    line = check(str(ARM_COMPILER), tmp_path / "check", ["-static"], [str(ARM_EMULATOR)])
    assert line == f"neon: 0 failures, hash {HASH}"


@needs_compiler
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0x1.555824p-5f", "0x1.556824p-5f"),
        ("broadcast(-104.0f)", "broadcast(-80.0f)"),
    ],
    ids=["a coefficient", "the lowest argument"],
)
def test_a_mistake_is_found(tmp_path: Path, old: str, new: str) -> None:
    mistaken = tmp_path / "native"
    shutil.copytree(NATIVE, mistaken)
    text = (NATIVE / "lanes.h").read_text(encoding="utf-8")
    assert text.count(old) == 1
    (mistaken / "lanes.h").write_text(text.replace(old, new), encoding="utf-8")
    line = check(str(COMPILER), tmp_path / "check", ["-DTEST_PORTABLE"], folder=mistaken)
    assert re.fullmatch(r"portable: [1-9]\d* failures, hash \w+", line)

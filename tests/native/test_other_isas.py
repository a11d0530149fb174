"""Instruction sets that this processor lacks: compiled, and run with what stands in for them.

All are compared with plain C++, bit by bit, by `native/tests/isa_check.cpp`, without ONNX Runtime:
AVX-VNNI by the same instructions of AVX-512 VNNI, AMX by plain C++ for its few instructions, ARM under qemu-aarch64.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT

NATIVE = ROOT / "native"
DRIVER = NATIVE / "tests" / "isa_check.cpp"
COMPILER, OBJDUMP = shutil.which("g++"), shutil.which("objdump")
ARM_COMPILER, ARM_EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")

# Of a CPU with AVX-512 VNNI, the sources with the flags that make it run them.
STAND_INS = {
    "isa_portable.cpp": [],
    "isa_avx512_vnni.cpp": ["isa_avx512_vnni.cpp"],
    "isa_avx_vnni.cpp": ["isa_avx512_vnni.cpp"],
    "isa_amx_int8.cpp": ["isa_amx_int8.cpp", "-DQWEN3VL_EMULATED_AMX"],
}
TABLES = "&kAvx512Vnni,&kAvxVnni,&kAmxInt8"
# Of every processor: the driver's numbers are its own, and the results have the same bits everywhere.
HASH = "c80ceb62361ac450"


def build() -> dict[str, Any]:
    """Return how the library is compiled."""
    return tomllib.loads((NATIVE / "build.toml").read_text(encoding="utf-8"))


def cpu_flags() -> set[str]:
    """Return the names of the extensions that this processor has."""
    found = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return set(found[1].split()) if found else set()


def run(command: Sequence[str | Path]) -> str:
    """Run a command that must succeed; return what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compile_all(folder: Path, compiler: str, sources: Mapping[Path, Sequence[str]], tables: str) -> list[Path]:
    """Compile the driver and instruction sets, each with flags of its own; return the objects."""
    # Optimised less than the library: compiling takes most of the time, and the bits are the same.
    flags = [*build()["flags"], "-O1", "-w"]
    objects = [folder / f"{source.stem}.o" for source in (*sources, DRIVER)]
    tasks = [
        [compiler, *flags, *own, "-c", source, "-o", target]
        for (source, own), target in zip((sources | {DRIVER: [f"-DCHECKED={tables}"]}).items(), objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(run, tasks))
    return objects


def link(compiler: str, objects: Sequence[Path], program: Path, *flags: str) -> Path:
    """Link a program and return its path."""
    run([compiler, *flags, *objects, "-o", program, "-lm"])
    return program


def stand_ins() -> dict[Path, list[str]]:
    """Return the sources that run here, with their flags."""
    own = build().get("x86_64", {})
    return {NATIVE / name: [*own.get(use[0], []), *use[1:]] if use else [] for name, use in STAND_INS.items()}


def without_stand_ins() -> str:
    """Return why the instructions that stand in cannot be run here; empty if they can."""
    if COMPILER is None:
        return "g++ is not installed"
    return "" if "avx512_vnni" in cpu_flags() else "this processor has no AVX-512 VNNI to stand in with"


needs_stand_ins = pytest.mark.skipif(bool(without_stand_ins()), reason=without_stand_ins())


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return compile_all(tmp_path_factory.mktemp("objects"), str(COMPILER), stand_ins(), TABLES)


@needs_stand_ins
def test_the_bits_are_those_of_plain_code(objects: list[Path], tmp_path: Path) -> None:
    assert run([link(str(COMPILER), objects, tmp_path / "check")]).split()[-1] == HASH


@needs_stand_ins
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return part * height - first_row(part);", "return 0;"),
        ("int step = block < kStepBytes ? block : kStepBytes", "int step = 32"),
    ],
    ids=["rows counted twice", "tiles of another shape"],
)
def test_a_mistake_is_found(objects: list[Path], tmp_path: Path, old: str, new: str) -> None:
    source = NATIVE / "isa_amx_int8.cpp"
    text = source.read_text(encoding="utf-8")
    assert text.count(old) == 1
    mistaken = tmp_path / source.name
    mistaken.write_text(text.replace(old, new), encoding="utf-8")
    flags = [*build()["flags"], *stand_ins()[source], "-O1", "-w", f"-I{NATIVE}"]
    run([str(COMPILER), *flags, "-c", mistaken, "-o", tmp_path / "mistaken.o"])
    others = [path for path in objects if path.stem != source.stem]
    program = link(str(COMPILER), [*others, tmp_path / "mistaken.o"], tmp_path / "check")
    assert subprocess.run([program], capture_output=True, timeout=300).returncode != 0


@pytest.mark.skipif(COMPILER is None or OBJDUMP is None, reason="g++ or objdump is not installed")
@pytest.mark.parametrize(
    ("name", "instructions"),
    [
        ("isa_avx_vnni.cpp", ["{vex} vpdpbusd"]),
        ("isa_amx_int8.cpp", ["tdpbssd", "tdpbsud", "ldtilecfg", "tilerelease"]),
    ],
)
def test_what_is_shipped_holds_the_instructions_themselves(
    tmp_path: Path, name: str, instructions: Sequence[str]
) -> None:
    flags = build()
    if name not in flags.get("x86_64", {}) or os.uname().machine != "x86_64":
        pytest.skip("these are instructions of x86-64")
    library = tmp_path / "isa.o"
    run([str(COMPILER), *flags["flags"], *flags["x86_64"][name], "-O1", "-w", "-c", NATIVE / name, "-o", library])
    code = run([str(OBJDUMP), "-d", "--no-show-raw-insn", library])
    for instruction in instructions:
        assert instruction in code
    # The file of a processor without AVX-512 uses no register that only AVX-512 has.
    assert ("%zmm" in code) == ("amx" in name)


@pytest.mark.skipif(
    ARM_COMPILER is None, reason="aarch64-linux-gnu-g++ is not installed (Debian: g++-aarch64-linux-gnu)"
)
@pytest.mark.skipif(ARM_EMULATOR is None, reason="qemu-aarch64 is not installed (Debian: qemu-user)")
def test_64_bit_arm_under_an_emulator(tmp_path: Path) -> None:
    sources = {NATIVE / name: own for name, own in build()["aarch64"].items()} | {NATIVE / "isa_portable.cpp": []}
    objects = compile_all(tmp_path, str(ARM_COMPILER), sources, "&kNeonDotprod")
    program = link(str(ARM_COMPILER), objects, tmp_path / "check", "-static")
    assert run([str(ARM_EMULATOR), program]).split()[-1] == HASH

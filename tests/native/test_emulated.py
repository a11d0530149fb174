"""The tests of our own kernels on emulated processors: what these lack, the kernels do not run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.native_build import run_python, run_tests
from helpers.own_kernels import needs_own_kernels

EMULATOR = shutil.which("qemu-x86_64")
HERE = Path(__file__).parent
TESTS = [str(HERE / name) for name in ("test_products.py", "test_same_bits.py", "test_attention.py")]
# By the emulator's names, the instruction sets: with AVX2, and before it.
EXPECTED = {
    "Haswell": ["avx2", "portable"],
    "max": ["avx2", "portable"],
    "SandyBridge": ["portable"],
    "Nehalem": ["portable"],
}

pytestmark = [
    needs_own_kernels,
    pytest.mark.skipif(EMULATOR is None, reason="qemu-x86_64 is not installed (Debian: qemu-user)"),
]
READ = """
import json
import numpy as np
from helpers.native_attention import SUFFIXES, Call
from helpers.native_graphs import random_weight, whole_rows
from runtime import native

results = {}
for isa in native.isas():
    native.use(isa)
    arrays = []
    for bits in (4, 8):
        weight = random_weight(37, 200, 64, bits)
        for rows in (1, 5, 40):
            arrays.append(weight.multiply(whole_rows(rows, 200, 64)))
            arrays.append(weight.multiply(np.random.default_rng(rows).standard_normal((rows, 200)).astype(np.float32)))
    for suffix in SUFFIXES:
        arrays += [Call(suffix, pasts, num_new).run()[0] for pasts, num_new in (([300, 3], 1), ([5], 20))]
    results[isa] = [array.tobytes().hex() for array in arrays]
print(json.dumps(results))
"""


def emulated(cpu: str) -> list[str]:
    return [str(EMULATOR), "-cpu", cpu]


def results(before: list[str]) -> dict[str, list[str]]:
    done = run_python(ROOT, "-c", READ, before=before)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


PROVE = """
import json
from runtime import native
from runtime.kernels import needs_exact_products

for isa in native.isas():
    native.use(isa)
    needs_exact_products(native.OPERATORS)
print(json.dumps(native.isas()))
"""


def test_kernels_are_right_with_avx2_alone() -> None:
    done = run_python(ROOT, "-c", PROVE, before=emulated("Haswell"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == EXPECTED["Haswell"]


@pytest.mark.slow
@pytest.mark.parametrize("cpu", EXPECTED)
def test_results_are_the_same_bits_as_here(cpu: str) -> None:
    here, there = results([]), results(emulated(cpu))
    assert list(there) == EXPECTED[cpu]
    assert all(each == here["portable"] for each in there.values())


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["Haswell", "SandyBridge"])
def test_all_tests(cpu: str) -> None:
    # Fences are left out: the emulated process ends there with AVX2, which the processor itself does not.
    done = run_tests(ROOT, *TESTS, "-k", "not beside", before=emulated(cpu))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout

"""The tests of our own kernels again, with a library that watches every address and every conversion.

AddressSanitizer and UndefinedBehaviorSanitizer of g++; without optimisation, which compiles fastest and hides nothing.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from helpers.native_build import COMPILER, build_library, needs_compiler, run_tests, with_library
from helpers.own_kernels import needs_own_kernels

HERE = Path(__file__).parent
FLAGS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TESTS = [str(HERE / name) for name in ("test_products.py", "test_same_bits.py", "test_attention.py", "test_refused.py")]
TESTS.append(str(HERE / "test_attention_same_bits.py"))
# A few of every kind.
QUICK = "[portable and (ends or of_any_number_of_rows or any_number_of_tokens or addresses or looked_up)"


def runtime_path(name: str) -> str:
    """Return the file of a library of the compiler."""
    done = subprocess.run([str(COMPILER), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def has_sanitizers() -> bool:
    return COMPILER is not None and Path(runtime_path("libasan.so")).is_absolute()


pytestmark = [
    needs_own_kernels,
    needs_compiler,
    pytest.mark.skipif(not has_sanitizers(), reason="the compiler has no sanitizers"),
]


def environment() -> dict[str, str]:
    """What a process with such a library needs: the sanitizers come first, and Python's memory is the C library's."""
    preload = " ".join(runtime_path(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"))
    return {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }


def test_portable_code_in_short(tmp_path: Path) -> None:
    folder = with_library(tmp_path, build_library(tmp_path / "build", flags=FLAGS, only="portable"))
    done = run_tests(folder, *TESTS[:3], "-k", QUICK, environment=environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_every_instruction_set(tmp_path: Path) -> None:
    folder = with_library(tmp_path, build_library(tmp_path / "build", flags=FLAGS))
    done = run_tests(folder, *TESTS, environment=environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize(
    ("edit", "report"),
    [
        # One more number of the last block than there is.
        (("k < block; k += 16) largest", "k <= block; k += 16) largest"), "AddressSanitizer: heap-buffer-overflow"),
        # A code beyond what a byte holds.
        (("*sum = reduce_add(total);", "*sum = reduce_add(total); codes[0] = (int8_t)(block << 30);"), "runtime error"),
    ],
    ids=["address", "undefined"],
)
@pytest.mark.slow
def test_a_mistake_is_found(edit: tuple[str, str], report: str, tmp_path: Path) -> None:
    library = build_library(tmp_path / "build", flags=FLAGS, only="portable", edits={"activations.h": edit})
    test = f"{TESTS[0]}::test_products_of_any_number_of_rows"
    done = run_tests(with_library(tmp_path, library), test, "-k", "[portable", environment=environment())
    assert done.returncode != 0 and report in done.stderr, done.stdout[-3000:] + done.stderr[-3000:]

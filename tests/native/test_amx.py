"""AMX is taken where the processor has it and the system grants it: in all threads and forked processes, on every core.

The system grants it to a process once, so each case is a process of its own. All give the bits of plain C++.
"""

from __future__ import annotations

import ctypes

import pytest

from helpers import ROOT
from helpers.native_build import run_python
from helpers.own_kernels import needs_own_kernels
from runtime.machine import processor

AMX, NEXT = "amx_int8", "avx512_vnni"
pytestmark = [needs_own_kernels, pytest.mark.portable]
needs_amx = pytest.mark.skipif(AMX not in processor()[1], reason="this processor has no AMX")


def grants_amx() -> bool:
    """Return whether the processor has AMX and the system grants it, asked as Linux wants it and not by the library."""
    request, arch_prctl, tile_data = 0x1023, 158, 18
    return AMX in processor()[1] and ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


needs_granted_amx = pytest.mark.skipif(not grants_amx(), reason="this processor has no AMX, or the system refuses it")

# ONNX Runtime asks for AMX, too, where it is imported: what has to come before is put before this.
# A product with more tiles than threads, by few rows and by many.
BEGIN = """
import functools, os, sys
import numpy as np
from helpers.native_graphs import random_weight, same_bits
from runtime import native
from runtime.errors import UsageError

weight = random_weight(1123, 300, 64, 4)
x = np.random.default_rng(1).standard_normal((200, 300)).astype(np.float32)

def multiply(threads=1):
    return [weight.multiply(x[:rows].copy(), threads=threads) for rows in (1, 7, 40, 200)]

def check(found):
    isa = native.isa()
    native.use("portable")
    right = multiply()
    native.use(isa)
    assert all(map(same_bits, found, right))
"""

# A thread that runs what it is given.
THREAD = """
from concurrent.futures import ThreadPoolExecutor

thread = ThreadPoolExecutor(1)
thread.submit(int).result()
"""

# A stack for signals that holds what AVX-512 needs, and not what AMX does.
SMALL_STACK = """
import ctypes, os

class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

memory = ctypes.create_string_buffer(8192)

def take_small_stack():
    stack = Stack(ctypes.addressof(memory), 0, len(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.sigaltstack(ctypes.byref(stack), None) == 0, os.strerror(ctypes.get_errno())
"""


def run(source: str, *, before: str = "", isa: str = "") -> str:
    """Run a text in a process of its own, which must succeed; return what it prints.

    Args:
        source: What follows BEGIN.
        before: What precedes it.
        isa: QWEN3VL_CPU_ISA; empty: none.
    """
    done = run_python(ROOT, "-c", before + BEGIN + source, environment={"QWEN3VL_CPU_ISA": isa})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_best_that_can_be_used_is_taken() -> None:
    found = run("print(native.isa(), *native.isas())").split()
    assert found[0] == found[1]


@needs_granted_amx
def test_amx_is_the_best() -> None:
    assert run("check(multiply()); print(native.isa())").split() == [AMX]


@needs_granted_amx
def test_threads_that_were_there_before_it_was_granted() -> None:
    run("check(thread.submit(multiply).result())\nassert native.isa() == 'amx_int8'", before=THREAD)


@needs_granted_amx
def test_threads_of_sessions_that_ran_with_another_instruction_set() -> None:
    source = """
many = functools.partial(multiply, threads=4)
check(many())
assert native.isa() == "avx512_vnni"
native.use("amx_int8")
for _ in range(5):
    check(many())
"""
    run(source, isa=NEXT)


@needs_granted_amx
@pytest.mark.parametrize("before", ["native.isa()", "multiply()"], ids=["unused", "used"])
def test_forked_processes(before: str) -> None:
    """And those that they fork."""
    source = f"""
{before}

def fork(depth):
    child = os.fork()
    if child == 0:
        assert native.isa() == "amx_int8"
        check(multiply())
        if depth > 1:
            fork(depth - 1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

fork(2)
check(multiply())
"""
    run(source)


@needs_granted_amx
def test_a_process_that_may_use_one_core_and_then_another() -> None:
    source = """
for core in os.sched_getaffinity(0):
    os.sched_setaffinity(0, [core])
    check(multiply())
    check(multiply(threads=3))
print(native.isa())
"""
    assert run(source).split() == [AMX]


@needs_amx
@pytest.mark.parametrize(
    "before",
    ["take_small_stack()", THREAD + "thread.submit(take_small_stack).result()"],
    ids=["of the thread itself", "of another thread"],
)
def test_where_the_system_refuses_it_the_next_is_taken(before: str) -> None:
    """It does so while a thread has too small a stack for signals. Then nothing offers AMX."""
    source = """
check(multiply())
print(native.isa(), *native.isas())
try:
    native.use("amx_int8")
except UsageError as error:
    print(error)
"""
    first, second = run(source, before=SMALL_STACK + before).splitlines()[:2]
    assert first.split()[:2] == [NEXT, NEXT] and AMX not in first
    assert "'amx_int8': the system refuses it to this process; it runs avx512_vnni, " in second


@needs_amx
def test_targets_says_what_is_used_where_the_system_refuses_it() -> None:
    source = """
from qwen3vl_export.cli.run import main
sys.argv = ["qwen3vl", "targets"]
main()
"""
    said = run(source, before=SMALL_STACK + "take_small_stack()")
    assert f"own kernels  {NEXT}; this processor also runs " in said and "also runs amx" not in said


@needs_amx
def test_what_was_asked_for_and_is_refused_is_an_error() -> None:
    said = run("print(native.problem())", before=SMALL_STACK + "take_small_stack()", isa=AMX)
    assert "QWEN3VL_CPU_ISA: 'amx_int8': the system refuses it to this process; it runs avx512_vnni, " in said

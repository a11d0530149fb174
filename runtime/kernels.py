"""Prove, on the machine at hand, the kernels that an engine of ONNX Runtime's CPU provider multiplies with.

Which machine code a kernel runs depends on the processor. On x86 with AVX2 or AVX-512 but neither VNNI nor AMX, ONNX
Runtime multiplies uint8 activations and int8 weights by `vpmaddubsw`, which adds two products in 16 bits and cuts off
what they do not hold: products are wrong, in silence, by up to a half. The library's own remedy is the option
`session.x64quantprecision`: when a graph is opened, weights become uint8 around 128, which exact kernels read. It
costs time where it is not needed (with VNNI a product takes 2.5 times as long), so it is set where a test of the kernel
says that it is, whatever the processor calls itself.

Each kernel has a small graph in `runtime/kernel_tests` (written by scripts/write_kernel_tests.py) with inputs at the
ends of their ranges; its output is the largest error, as a share of the largest product. A test runs once in a process.
Our own kernels (`runtime.native`) are proven by the same kind of graphs, in the folder `own`, once for each instruction
set that is in use.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime import native
from runtime.cache_types import code_bits
from runtime.errors import EngineError
from runtime.machine import processor
from runtime.manifest import Manifest
from runtime.settings import CPU_ISA_VARIABLE

EXACT_PRODUCTS = ("session.x64quantprecision", "1")
"""Session option: int8 weights of products become uint8 when a graph is opened."""

KERNEL_TESTS = Path(__file__).with_name("kernel_tests")
OWN_KERNEL_TESTS = KERNEL_TESTS / "own"

# The kernels that the option changes.
_BYTE_PRODUCTS = frozenset({"DynamicQuantizeMatMul", "MatMulIntegerToFloat"})
# Right kernels are exact or, after a softmax, off by 1e-6; one that saturates is off by 0.1 and more.
_TOLERANCE = 0.01
# Ours were off by 7e-7 with every instruction set; a zero point of 8 bits that is wrong by 1, by 1e-3.
_OWN_TOLERANCE = 1e-5


def kernels_of(manifest: Manifest) -> list[str]:
    """Return the kernels of quantised numbers that an engine uses: all that have a test, if its manifest names none."""
    capabilities = manifest.capabilities
    has_own = "custom_ops" in capabilities
    kernels = set(capabilities.get("kernels", [*known_kernels(), *(native.OPERATORS if has_own else ())]))
    for bits in code_bits(capabilities):
        kernels.add(f"DecodeAttentionInt{bits}" if has_own else f"GroupQueryAttention.{bits}")
    return sorted(kernels)


def known_kernels() -> list[str]:
    """Return the kernels of ONNX Runtime that have a test: operator and, where it has several, bits of its codes."""
    return sorted(path.stem for path in KERNEL_TESTS.glob("*.onnx"))


def needs_exact_products(kernels: Collection[str], tests: Path = KERNEL_TESTS) -> bool:
    """Return whether an engine with these kernels must be opened with `EXACT_PRODUCTS` on this machine.

    Args:
        kernels: Names of kernels.
        tests: Folder of the tests, one `NAME.onnx` for each; those of our own kernels in its folder `own`.

    Raises:
        EngineError: A kernel is wrong here, with that option, too; or it has no test; or it is one of our own, and
            their library cannot be used.
    """
    own = set(kernels) & set(native.OPERATORS)
    theirs = set(kernels) - own
    unknown = sorted(theirs - set(known_kernels()))
    if unknown:
        raise EngineError(
            f"the engine uses kernels that this version cannot test: {', '.join(unknown)}",
            remedy="open it with the version that built it, or build it again",
        )
    exact = any(_error(tests / f"{kernel}.onnx", False) > _TOLERANCE for kernel in _BYTE_PRODUCTS & theirs)
    for kernel in sorted(theirs):
        _check(
            f"{kernel} of ONNX Runtime {ort.__version__}",
            _error(tests / f"{kernel}.onnx", exact and kernel in _BYTE_PRODUCTS),
            _TOLERANCE,
            "install another release of onnxruntime, or build the engine for ort-cpu-fp32, which multiplies in float32",
        )
    for kernel in sorted(own):
        isa = native.isa()
        _check(
            f"our own kernel {kernel} ({isa})",
            _error(tests / OWN_KERNEL_TESTS.name / f"{kernel}.onnx", False, isa),
            _OWN_TOLERANCE,
            _remedy(isa),
        )
    return exact


def _remedy(isa: str) -> str:
    """Return what helps where our own kernels are wrong with an instruction set."""
    others = ", ".join(each for each in native.isas() if each != isa)
    other = f"choose another instruction set ({CPU_ISA_VARIABLE}: {others}), or " if others else ""
    return f"{other}build the library again (make native), or the engine with qwen3vl-export --kernels ort"


def _check(kernel: str, error: float, tolerance: float, remedy: str) -> None:
    if not error <= tolerance:
        raise EngineError(
            f"{kernel} computes wrong products on this processor: relative error {error:.2g}; instruction sets: "
            f"{', '.join(processor()[1]) or 'unknown'}",
            remedy=remedy,
        )


@functools.cache
def _error(test: Path, exact: bool, isa: str | None = None) -> float:
    """Return the largest relative error of a test here; infinite if ONNX Runtime does not run it.

    Args:
        test: Its graph.
        exact: Open it with `EXACT_PRODUCTS`.
        isa: For own kernels, the instruction set in use; else None.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is told by the error that follows
    options.intra_op_num_threads = 1
    if exact:
        options.add_session_config_entry(*EXACT_PRODUCTS)
    if isa is not None:
        native.register(options)
    try:
        session = ort.InferenceSession(str(test), options, providers=["CPUExecutionProvider"])
        (error,) = session.run(["error"], {"zero": np.zeros((), np.float32)})
    except Exception:  # onnxruntime raises classes of its own binding, without a common base
        return float("inf")
    return float("inf") if np.isnan(error) else float(error)

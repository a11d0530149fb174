"""Prove, on the machine at hand, the kernels that an engine of ONNX Runtime's CPU provider multiplies with.

Which machine code a kernel runs depends on the processor. On x86 with AVX2 or AVX-512 but neither VNNI nor AMX, ONNX
Runtime multiplies uint8 activations and int8 weights by `vpmaddubsw`, which adds two products in 16 bits and cuts off
what they do not hold: products are wrong, in silence, by up to a half. The library's own remedy is the option
`session.x64quantprecision`: when a graph is opened, weights become uint8 around 128, which exact kernels read. It
costs time where it is not needed (with VNNI a product takes 2.5 times as long), so it is set where a test of the kernel
says that it is, whatever the processor calls itself.

Each kernel has a small graph in `runtime/kernel_tests` (written by scripts/write_kernel_tests.py) with inputs at the
ends of their ranges; its output is the largest error, as a share of the largest product. A test runs once in a process.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime.errors import EngineError
from runtime.machine import processor
from runtime.manifest import Manifest

EXACT_PRODUCTS = ("session.x64quantprecision", "1")
"""Session option: int8 weights of products become uint8 when a graph is opened."""

KERNEL_TESTS = Path(__file__).with_name("kernel_tests")

# The kernels that the option changes.
_BYTE_PRODUCTS = frozenset({"DynamicQuantizeMatMul", "MatMulIntegerToFloat"})
# Right kernels are exact or, after a softmax, off by 1e-6; one that saturates is off by 0.1 and more.
_TOLERANCE = 0.01


def kernels_of(manifest: Manifest) -> list[str]:
    """Return the kernels of quantised numbers that an engine uses: all that have a test, if its manifest names none."""
    kernels = set(manifest.capabilities.get("kernels", known_kernels()))
    bits = manifest.capabilities.get("cache_bits")
    return sorted(kernels if bits is None else {*kernels, f"GroupQueryAttention.{bits}"})


def known_kernels() -> list[str]:
    """Return the names of all kernels that have a test: operator and, where it has several, bits of its codes."""
    return sorted(path.stem for path in KERNEL_TESTS.glob("*.onnx"))


def needs_exact_products(kernels: Collection[str], tests: Path = KERNEL_TESTS) -> bool:
    """Return whether an engine with these kernels must be opened with `EXACT_PRODUCTS` on this machine.

    Args:
        kernels: Names of kernels.
        tests: Folder of the tests, one `NAME.onnx` for each.

    Raises:
        EngineError: A kernel is wrong here, with that option, too; or it has no test.
    """
    unknown = sorted(set(kernels) - set(known_kernels()))
    if unknown:
        raise EngineError(
            f"the engine uses kernels that this version cannot test: {', '.join(unknown)}",
            remedy="open it with the version that built it, or build it again",
        )
    exact = any(_error(tests / f"{kernel}.onnx", False) > _TOLERANCE for kernel in _BYTE_PRODUCTS & set(kernels))
    for kernel in kernels:
        error = _error(tests / f"{kernel}.onnx", exact and kernel in _BYTE_PRODUCTS)
        if not error <= _TOLERANCE:
            raise EngineError(
                f"{kernel} of ONNX Runtime {ort.__version__} computes wrong products on this processor: relative error "
                f"{error:.2g}; instruction sets: {', '.join(processor()[1]) or 'unknown'}",
                remedy="install another release of onnxruntime, or build the engine for ort-cpu-fp32, which multiplies "
                "in float32",
            )
    return exact


@functools.cache
def _error(test: Path, exact: bool) -> float:
    """Return the largest relative error of a test here; infinite if ONNX Runtime does not run it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails is told by the error that follows
    options.intra_op_num_threads = 1
    if exact:
        options.add_session_config_entry(*EXACT_PRODUCTS)
    try:
        session = ort.InferenceSession(str(test), options, providers=["CPUExecutionProvider"])
        (error,) = session.run(["error"], {"zero": np.zeros((), np.float32)})
    except Exception:  # onnxruntime raises classes of its own binding, without a common base
        return float("inf")
    return float("inf") if np.isnan(error) else float(error)

"""What the machine can do at most: reading memory, and matrix products in float32 and int8; a process of its own.

Roofline: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.measure import seconds

_READ_BYTES = 3 << 30  # server processors show caches of up to half a gigabyte
_M, _K, _N = 512, 2048, 6144  # a prompt of 512 tokens at the 2B model's up projection
_REPEATS = 7


def measure(threads: int) -> dict[str, float]:
    """Return bytes/s of reading memory, and operations/s of float32 and int8 matrix products, the best of several."""
    return {
        "memory_bytes_per_s": _READ_BYTES / _best(_reader(threads)),
        "fp32_operations_per_s": 2 * _M * _K * _N / _best(_product(threads, quantized=False)),
        "int8_operations_per_s": 2 * _M * _K * _N / _best(_product(threads, quantized=True)),
    }


def _best(call: Callable[[], object]) -> float:
    call()
    return min(seconds(call) for _ in range(_REPEATS))


def _reader(threads: int) -> Callable[[], object]:
    import numpy as np

    # The greatest value of integers: one vector instruction a load, so that memory is the limit. numpy releases the
    # interpreter's lock in reductions.
    parts = np.array_split(np.ones(_READ_BYTES // 8, np.int64), threads)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.max, parts))


def _product(threads: int, *, quantized: bool) -> Callable[[], object]:
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((_K, _N), np.float32)}
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    if quantized:
        weights = {"w": random.integers(-127, 127, (_K, _N)).astype(np.int8), "scale": np.ones(_N, np.float32)}
        node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "scale"], ["y"], domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [_M, _K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [_M, _N])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs: dict[str, Any] = {"x": random.standard_normal((_M, _K), np.float32)}
    return lambda: session.run(None, inputs)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(int(sys.argv[1]))), encoding="utf-8")

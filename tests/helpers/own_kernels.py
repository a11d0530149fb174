"""Graphs of one product by our own kernels, with the weight in a file beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from runtime import native

needs_own_kernels = pytest.mark.skipif(
    native.problem() != "", reason=f"the own kernels cannot be used: {native.problem()}"
)


def write_product(
    folder: Path, tiles: NDArray[np.uint8], *, num_columns: int, num_rows: int, block: int, bits: int, offset: int = 0
) -> Path:
    """Write `product.onnx`, x [M, K] -> y [M, N], and its weight `product.onnx.data` from a byte `offset` on."""
    path = folder / "product.onnx"
    path.with_name("product.onnx.data").write_bytes(bytes(offset) + tiles.tobytes())
    weight = TensorProto(name="weight", data_type=TensorProto.UINT8, dims=tiles.shape)
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "product.onnx.data"), ("offset", offset), ("length", tiles.nbytes)):
        weight.external_data.add(key=key, value=str(value))
    sizes = {"K": num_columns, "N": num_rows, "block_size": block}
    node = helper.make_node(f"MatMulInt{bits}", ["x", "weight"], ["y"], domain=native.DOMAIN, **sizes)
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", size])
        for name, size in (("x", num_columns), ("y", num_rows))
    ]
    graph = helper.make_graph([node], "product", values[:1], values[1:], [weight])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(native.DOMAIN, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def open_graph(path: Path) -> ort.InferenceSession:
    """Open a graph that uses our own operators."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    native.register(options)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

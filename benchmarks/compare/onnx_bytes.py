"""Weights that one decode step of an ONNX graph reads."""

from __future__ import annotations

from pathlib import Path

_PRODUCTS = {"DynamicQuantizeMatMul", "FusedMatMul", "Gemm", "MatMul", "MatMulInteger", "MatMulNBits"}
_EXPERTS = {"MoE", "QMoE"}


def bytes_of_products(path: Path) -> int:
    """Return the bytes of the initializers that matrix products read, scales and zero points included.

    A table that the head shares with the embedding counts once; rotary tables and embeddings, of which a step looks
    up single rows, do not count. A product reads an initializer directly or through one Transpose or Reshape. Of the
    experts of a layer a token reads as many as it goes through.
    """
    import math

    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    views = {node.output[0]: node.input[0] for node in graph.node if node.op_type in ("Reshape", "Transpose")}
    read = {views.get(name, name) for node in graph.node if node.op_type in _PRODUCTS for name in node.input}
    experts = [node for node in graph.node if node.op_type in _EXPERTS]
    chosen = {name: onnx.helper.get_node_attr_value(node, "k") for node in experts for name in node.input[2:]}
    total = 0
    for tensor in graph.initializer:
        stored = _stored_bytes(tensor.data_type, math.prod(tensor.dims))
        if tensor.name in chosen:
            total += stored * chosen[tensor.name] // tensor.dims[0]
        elif tensor.name in read:
            total += stored
    return total


def _stored_bytes(data_type: int, elements: int) -> int:
    import onnx

    if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return (elements + 1) // 2
    return int(elements * onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)

"""Initializers of a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def add_initializer(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    """Return the initializer of that tensor's name; the tensor becomes one if there is none yet."""
    existing = model.graph.initializers.get(str(tensor.name))
    if existing is not None:
        return existing
    value = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def add_integers(model: ir.Model, name: str, values: list[int]) -> ir.Value:
    """Return an int64 initializer [len(values)]."""
    return add_initializer(model, ir.Tensor(np.asarray(values, np.int64), name=name))

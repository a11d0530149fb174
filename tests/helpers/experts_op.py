"""Inputs of `MixtureOfExperts`, and a model of one such node.

Shapes: E experts, D hidden.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from engines.onnx_text import DOMAIN, parse_function
from engines.quantize.tensors import ProducedTensor
from engines.weights import StackedTensor
from qwen3vl_export.ops import mixture_of_experts

E, D, WIDTH = 7, 24, 20
TOP_K = 3
Arrays = dict[str, np.ndarray[Any, Any]]


def random_inputs(num_tokens: tuple[int, int], seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "x": normal(*num_tokens, D),
        "router_weight": normal(E, D),
        "gate_up": normal(E, 2 * WIDTH, D),
        "down": normal(E, D, WIDTH),
    }


def with_ties(inputs: Arrays) -> Arrays:
    """Give experts 1, 2, 4 and 6 one router weight that beats all others, so that every token ties between four."""
    weight = np.zeros_like(inputs["router_weight"])
    weight[[1, 2, 4, 6], 0] = 1
    return {**inputs, "x": np.abs(inputs["x"]) + 0.5, "router_weight": weight}


def padded(inputs: Arrays, hidden: int = 32, width: int = 48) -> Arrays:
    """Widen D from 24 and the experts from 20, with other values, so that blocks of 16 divide both."""
    rng = np.random.default_rng(5)
    num_experts, num_columns = inputs["router_weight"].shape
    more = hidden - num_columns
    extra = rng.standard_normal((*inputs["x"].shape[:2], more)).astype(np.float32)
    router = np.pad(inputs["router_weight"], ((0, 0), (0, more)))
    return {
        "x": np.concatenate([inputs["x"], extra], -1),
        "router_weight": router,
        "gate_up": rng.standard_normal((num_experts, 2 * width, hidden)).astype(np.float32),
        "down": rng.standard_normal((num_experts, hidden, width)).astype(np.float32),
    }


def stacked(name: str, array: np.ndarray[Any, Any]) -> StackedTensor:
    parts = []
    for e, matrix in enumerate(array):
        flat = matrix.reshape(-1)
        # Two blocks, so that no consumer can count on one.
        parts.append(
            ProducedTensor(
                f"{name}.{e}", matrix.shape, ir.DataType.FLOAT, lambda flat=flat: iter((flat[:50], flat[50:]))
            )
        )
    return StackedTensor(name, parts)


def model_of(inputs: Arrays) -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape(["B", "S", inputs["x"].shape[2]]), type=ir.TensorType(ir.DataType.FLOAT))
    tensors = [
        ir.Tensor(inputs["router_weight"], name="mlp.gate.weight"),
        stacked("mlp.experts.gate_up_proj", inputs["gate_up"]),
        stacked("mlp.experts.down_proj", inputs["down"]),
    ]
    values = [
        ir.Value(name=t.name, shape=ir.Shape(t.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=t)
        for t in tensors
    ]
    node = ir.node("MixtureOfExperts", [x, *values], attributes={"top_k": TOP_K}, domain=DOMAIN, name="mlp")
    out = node.outputs[0]
    out.name, out.shape, out.type = "out", ir.Shape(x.shape), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [out], nodes=[node], initializers=values, opset_imports={"": 24, DOMAIN: 1}, name="g")
    return ir.Model(graph, ir_version=11, functions=[parse_function(mixture_of_experts.BODY)])

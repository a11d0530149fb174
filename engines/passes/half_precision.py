"""Compute in float16 or bfloat16, except where PyTorch computes in float32 whatever the weights' type."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from engines.initializers import add_initializer
from engines.onnx_text import MICROSOFT
from engines.passes.operator_types import output_types
from engines.weights import CastTensor, StreamedTensor

# The float32 places of the bundle's graphs, by op. Norms: `Qwen3VLTextRMSNorm` casts to float32 and back, torch's
# LayerNorm sums in float32. Rotary embedding: its tables are made in float32 (`Qwen3VLTextRotaryEmbedding`), and the
# vision tower also rotates in float32 (`apply_rotary_pos_emb_vision`). A router's softmax (`Qwen3VLMoeTextTopKRouter`).
# The softmax and the sums inside a fused attention are the kernel's own and float32 there.
FLOAT32_OPS = frozenset({"RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Cos", "Sin", "Softmax"})
# All that their operands are computed of is float32 too: an angle is a position times a frequency, and float16 holds no
# position beyond 2048 exactly.
_WITH_OPERANDS = frozenset({"Cos", "Sin"})
# These move elements and compute nothing, so they run in the type of what they are given.
_MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "GatherElements", "Identity", "Reshape", "Slice", "Split", "Squeeze"}
    | {"Pad", "Transpose", "Unsqueeze"}
)
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_ANY_TYPE = frozenset({"Shape", "Size"})
# Input of MatMulBlockQuantizedFp8Weight and GatherBlockQuantized.
_SCALES = 2
_CACHE_INPUTS, _CACHE_OUTPUTS = "past_key_values.", "present_key_values."


class HalfPrecisionPass(ir.passes.InPlacePass):
    """Convert a flat float32 graph to strong types: half where nothing demands float32.

    Inputs and outputs stay float32, except for the KV cache. Weights are cast while they are streamed. A value that is
    wanted in the other type goes through one Cast, shared by all that want it so.

    Args:
        dtype: FLOAT16 or BFLOAT16.
        float32_ops: Op types that compute in float32; kernels that take half and sum in float32 need not be listed.
    """

    def __init__(self, dtype: ir.DataType, float32_ops: frozenset[str] = FLOAT32_OPS) -> None:
        super().__init__()
        assert dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        self._half = dtype
        self._float32_ops = float32_ops

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert the main graph; functions must be inlined and nodes sorted."""
        assert not model.functions, "inline functions first"
        conversion = _Conversion(model, self._half, self._float32_ops | _WITH_OPERANDS)
        conversion.run()
        return ir.passes.PassResult(model, True)


class _Conversion:
    """One graph's conversion: the type of every value, and the casts made so far."""

    def __init__(self, model: ir.Model, half: ir.DataType, float32_ops: frozenset[str]) -> None:
        self._model, self._graph, self._half = model, model.graph, half
        self._types: dict[ir.Value, ir.DataType] = {}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._float32_nodes = {node for node in self._graph if node.op_type in float32_ops}
        self._float32_nodes |= _ancestors(node for node in self._graph if node.op_type in _WITH_OPERANDS)

    def run(self) -> None:
        declared = [value.dtype for value in self._graph.outputs]
        for value in self._graph.inputs:
            if str(value.name).startswith(_CACHE_INPUTS):
                value.type = ir.TensorType(self._half)
            assert value.dtype is not None
            self._types[value] = value.dtype
        for value in self._graph.initializers.values():
            assert value.dtype is not None
            self._types[value] = value.dtype
        for node in list(self._graph):
            self._convert(node)
        for index, value in enumerate(list(self._graph.outputs)):
            wanted = self._half if str(value.name).startswith(_CACHE_OUTPUTS) else declared[index]
            assert wanted is not None
            if self._types[value] != wanted:
                self._cast_output(index, value, wanted)
        self._remove_unused_weights()

    def _convert(self, node: ir.Node) -> None:
        wanted = self._wanted(node)
        for index, value in enumerate(node.inputs):
            if value is None or wanted is None or not self._is_float(value) or _is_scale_of_float8(node, index):
                continue
            if self._types[value] != wanted:
                node.replace_input_with(index, self._as(value, wanted))
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            target = ir.DataType.FLOAT if node in self._float32_nodes else self._half
            node.attributes["to"] = ir.AttrInt64("to", target)
        inputs = [None if value is None else self._types[value] for value in node.inputs]
        for value, dtype in zip(node.outputs, output_types(node, inputs, self._graph.opset_imports), strict=True):
            self._types[value] = dtype
            value.type = ir.TensorType(dtype)

    def _wanted(self, node: ir.Node) -> ir.DataType | None:
        """Return the float type that a node computes in, None if it takes any."""
        if node.op_type in _ANY_TYPE:
            return None
        if node in self._float32_nodes:
            return ir.DataType.FLOAT
        if node.op_type in _MOVES:
            given = {
                self._types[v] for v in node.inputs if v is not None and self._is_float(v) and not v.is_initializer()
            }
            if len(given) == 1:
                return given.pop()
        return self._half

    def _is_float(self, value: ir.Value) -> bool:
        return self._types[value] in (ir.DataType.FLOAT, self._half)

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return the value in another type: a cast weight, the source of a cast, or a new Cast after its producer."""
        known = self._casts.get((value, dtype))
        if known is not None:
            return known
        if value.is_initializer():
            cast = add_initializer(self._model, _cast_tensor(value, dtype))
        else:
            node = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=f"{value.name}/to_{dtype.name.lower()}")
            cast = node.outputs[0]
            cast.name, cast.shape, cast.type = f"{value.name}.{dtype.name.lower()}", value.shape, ir.TensorType(dtype)
            producer = value.producer()
            if producer is None:
                self._graph.insert_before(self._graph[0], node)
            else:
                self._graph.insert_after(producer, node)
        self._types[cast] = dtype
        self._casts[value, dtype] = cast
        return cast

    def _cast_output(self, index: int, value: ir.Value, dtype: ir.DataType) -> None:
        name = value.name
        value.name = f"{name}.{self._types[value].name.lower()}"
        cast = self._as(value, dtype)
        cast.name, cast.shape = name, value.shape
        self._graph.outputs[index] = cast

    def _remove_unused_weights(self) -> None:
        """Drop float32 weights that only their casts are used of.

        Casts take their names, which are checkpoint keys, and their places: scales are written after their codes, and
        until then held in memory.
        """
        casts = {
            value: cast
            for (value, _), cast in self._casts.items()
            if value.is_initializer() and not value.uses() and not value.is_graph_output()
        }
        moved = set(casts.values())
        kept = [value for value in self._graph.initializers.values() if value not in moved]
        self._graph.initializers.clear()
        for value in kept:
            if (cast := casts.get(value)) is not None:
                cast.name = value.name
                if cast.const_value is not None:
                    cast.const_value.name = value.name
            self._graph.register_initializer(cast or value)


def _is_scale_of_float8(node: ir.Node, index: int) -> bool:
    """Whether an input holds scales of float8 codes, which MatMulBlockQuantizedFp8Weight takes in float32 alone.

    A lookup in the same table reads the same scales, so it gives float32.
    """
    if index != _SCALES or node.domain != MICROSOFT:
        return False
    return any(value is not None and value.dtype == ir.DataType.FLOAT8E4M3FN for value in node.inputs[:index])


def stray_casts(model: ir.Model, float32_ops: frozenset[str] = FLOAT32_OPS) -> list[str]:
    """Return the names of Casts between float types that lead to no float32 op, or come from none.

    Moves in between do not count. What is computed for angles is float32 too, and so are inputs and outputs.
    """
    angles = _ancestors(node for node in model.graph if node.op_type in _WITH_OPERANDS)
    stray = []
    for node in model.graph:
        given, made = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Cast" or given is None or not {given.dtype, made.dtype} <= _FLOATS:
            continue
        if made.dtype == ir.DataType.FLOAT:
            is_asked = all(_leads_to(use, float32_ops) for use, _ in made.uses()) or made.is_graph_output()
        else:
            source = given.producer()
            while source is not None and source.op_type in _MOVES:
                source = next((v.producer() for v in source.inputs if v is not None and v.dtype == given.dtype), None)
            is_asked = source is None or source.op_type in float32_ops or source in angles
        if not is_asked:
            stray.append(str(node.name))
    return stray


def _leads_to(node: ir.Node, float32_ops: frozenset[str]) -> bool:
    if node.op_type not in _MOVES:
        return node.op_type in float32_ops
    return all(_leads_to(use, float32_ops) for output in node.outputs for use, _ in output.uses())


def _ancestors(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    waiting = list(nodes)
    while waiting:
        for value in waiting.pop().inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer not in found:
                found.add(producer)
                waiting.append(producer)
    return found


def _cast_tensor(value: ir.Value, dtype: ir.DataType) -> ir.TensorProtocol:
    tensor, name = value.const_value, f"{value.name}.{dtype.name.lower()}"
    assert tensor is not None
    if isinstance(tensor, StreamedTensor):
        return CastTensor(name, tensor, dtype)
    return ir.Tensor(np.asarray(tensor.numpy()).astype(dtype.numpy()), dtype=dtype, name=name)

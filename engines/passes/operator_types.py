"""Element types of a node's outputs, as the operator's ONNX schema implies them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

_PREFIX = "tensor("
_NAMES = {"float": "FLOAT", "double": "DOUBLE"}


def output_types(
    node: ir.Node, input_types: Sequence[ir.DataType | None], opset_imports: Mapping[str, int]
) -> list[ir.DataType]:
    """Return the element types of a node's outputs.

    ONNX's own operators are asked for their schema; those of ONNX Runtime give the type of their first float input.

    Args:
        node: A node of a flat graph.
        input_types: Type of each input; None for one that is left out.
        opset_imports: Versions of the domains.
    """
    import onnx.defs

    if node.domain:
        float_types = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        first = next(dtype for dtype in input_types if dtype in float_types)
        return [first] * len(node.outputs)
    schema = onnx.defs.get_schema(node.op_type, opset_imports[""], "")
    bound: dict[str, ir.DataType] = {}
    for index, dtype in enumerate(input_types):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        if dtype is not None:
            bound.setdefault(formal.type_str, dtype)
    for constraint in schema.type_constraints:
        if len(constraint.allowed_type_strs) == 1:
            bound.setdefault(constraint.type_param_str, _parse(constraint.allowed_type_strs[0]))
    if node.op_type == "Cast":
        return [ir.DataType(node.attributes["to"].as_int())]
    if node.op_type == "DequantizeLinear" and input_types[1] is not None:
        return [input_types[1]]  # unless output_dtype says otherwise, which nothing here does
    types = []
    for index in range(len(node.outputs)):
        formal = schema.outputs[min(index, len(schema.outputs) - 1)]
        types.append(bound[formal.type_str] if formal.type_str in bound else _parse(formal.type_str))
    return types


def _parse(type_str: str) -> ir.DataType:
    assert type_str.startswith(_PREFIX), f"{type_str}: an output type that the inputs do not imply"
    name = type_str[len(_PREFIX) : -1]
    return ir.DataType[_NAMES.get(name, name.upper())]

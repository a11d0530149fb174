"""Take a graph apart from its results backwards, refusing every operator, attribute and input that is not expected.

A graph that is read by what is found in it would be read wrongly if there is more in it: a bias, a window, a scale. So
each value is asked for its one producer, and each producer for all that it has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import onnx_ir as ir

from engines.kernels.launch import Unserved
from engines.onnx_text import MICROSOFT

_ONNX: Final = ""
_OF_EXPERTS: Final[Mapping[str, Any]] = {
    "k": 1,
    "activation_type": "relu",
    "activation_alpha": None,
    "activation_beta": None,
    "swiglu_fusion": 0,
    "normalize_routing_weights": 0,
    "use_sparse_mixer": 0,
}
# Attributes that an operator may have, with what they are if they are absent (operators' documents of ONNX and of ONNX
# Runtime 1.32); None if it then does something else, or must have it.
_OPERATORS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    **{
        name: (_ONNX, {})
        for name in ("Add", "Cos", "Expand", "GreaterOrEqual", "Mul", "Sigmoid", "Sin", "Sub", "Unsqueeze", "Where")
    },
    "Cast": (_ONNX, {"to": None, "saturate": 1}),
    "Gather": (_ONNX, {"axis": 0}),
    "GatherElements": (_ONNX, {"axis": 0}),
    "ReduceSum": (_ONNX, {"keepdims": 1, "noop_with_empty_axes": 0}),
    "Reshape": (_ONNX, {"allowzero": 0}),
    "RotaryEmbedding": (_ONNX, {"num_heads": 0, "interleaved": 0, "rotary_embedding_dim": 0}),
    "RMSNormalization": (_ONNX, {"axis": -1, "epsilon": 1e-5, "stash_type": 1}),
    "ScatterElements": (_ONNX, {"axis": 0, "reduction": "none"}),
    "Shape": (_ONNX, {"start": 0, "end": None}),
    "SimplifiedLayerNormalization": (_ONNX, {"axis": -1, "epsilon": 1e-5, "stash_type": 1}),
    "Split": (_ONNX, {"axis": 0}),
    "TopK": (_ONNX, {"axis": -1, "largest": 1, "sorted": 1}),
    "Transpose": (_ONNX, {"perm": None}),
    "FusedMatMul": (MICROSOFT, {"alpha": 1.0, "transA": 0, "transB": 0, "transBatchA": 0, "transBatchB": 0}),
    "GatherBlockQuantized": (MICROSOFT, {"bits": 4, "block_size": 128, "gather_axis": 0, "quantize_axis": 1}),
    "GroupQueryAttention": (
        MICROSOFT,
        {
            "num_heads": None,
            "kv_num_heads": None,
            "scale": None,
            "do_rotary": 0,
            "rotary_interleaved": 0,
            "local_window_size": -1,
            "softcap": 0.0,
        },
    ),
    "MatMulBlockQuantizedFp8Weight": (MICROSOFT, {"block_size": None}),
    "MatMulNBits": (MICROSOFT, {"K": None, "N": None, "bits": 4, "block_size": None, "accuracy_level": 0}),
    "MoE": (MICROSOFT, _OF_EXPERTS),
    "QMoE": (
        MICROSOFT,
        {
            **_OF_EXPERTS,
            "expert_weight_bits": 4,
            "fc2_expert_weight_bits": 0,  # the same
            "block_size": None,
            "accuracy_level": 0,
            "weights_prepacked": -1,
        },
    ),
    "SkipSimplifiedLayerNormalization": (MICROSOFT, {"epsilon": None}),
}
_FLOATS: Final = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_MAX_NUMBERS: Final = 1 << 16


def made_by(value: ir.Value | None, *operators: str, what: str, output: int = 0) -> ir.Node:
    """Return the node that makes a value.

    Args:
        value: The value.
        operators: What it may be.
        what: What the value is, for the message.
        output: Which result of the node it must be.

    Raises:
        Unserved: It is another operator, another result of it, or none makes it.
    """
    node = None if value is None else value.producer()
    if node is None or node.op_type not in operators or node.domain != _OPERATORS[node.op_type][0]:
        found = "nothing" if node is None else f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise Unserved(f"{what} ({_shown(value)}) is made by {found}, expected {' or '.join(operators)}")
    if value is not result(node, output):
        raise Unserved(f"{what} ({_shown(value)}) is another result of {node.op_type} than expected")
    return node


def is_made_by(value: ir.Value | None, operator: str) -> bool:
    """Return whether a value is the result of an operator of this name, of any domain."""
    node = None if value is None else value.producer()
    return node is not None and node.op_type == operator


def result(node: ir.Node, place: int) -> ir.Value | None:
    """Return a result of a node; None if it has fewer."""
    return node.outputs[place] if place < len(node.outputs) else None


def attributes(node: ir.Node, *, free: Collection[str] = (), **expected: Any) -> dict[str, Any]:
    """Return all attributes of a node, with the values that absent ones stand for.

    Args:
        node: Made by one of the operators that `made_by` knows.
        free: Attributes that may be any number.
        expected: Attributes that must have this one; others must be as if they were absent.

    Raises:
        Unserved: An attribute has another value, or is not known.
    """
    known = _OPERATORS[node.op_type][1]
    found = dict(known)
    for name, attribute in node.attributes.items():
        if name not in known:
            raise Unserved(f"{_named(node)}: has {name}, which no kernel heeds")
        found[name] = attribute.value
    for name, value in found.items():
        wanted = expected.get(name, known[name])
        plain = list(value) if isinstance(value, list | tuple) else value
        if name in free:
            if not isinstance(value, int | float):
                raise Unserved(f"{_named(node)}: {name} is {value}, expected a number")
        elif plain != wanted:
            raise Unserved(f"{_named(node)}: {name} is {value}, expected {wanted}")
    return found


def inputs(node: ir.Node, *allowed: Iterable[int]) -> list[ir.Value | None]:
    """Return the inputs of a node, up to the last that is there.

    Args:
        node: The node.
        allowed: Places of those that are there; one of these must be so.

    Raises:
        Unserved: There are others, such as a bias, or fewer.
    """
    places = {place for place, value in enumerate(node.inputs) if value is not None}
    if places not in [set(each) for each in allowed]:
        surplus = sorted(places - {place for each in allowed for place in each})
        problem = (
            f"has inputs {surplus}, which no kernel heeds" if surplus else f"has the inputs {sorted(places)} alone"
        )
        raise Unserved(f"{_named(node)}: {problem}")
    return list(node.inputs[: max(places, default=-1) + 1])


def taken(node: ir.Node, count: int, *, free: Collection[str] = (), **expected: Any) -> list[ir.Value]:
    """Return the inputs of a node that has exactly so many, and the attributes that `attributes` accepts.

    Raises:
        Unserved: It has others.
    """
    attributes(node, free=free, **expected)
    return [value for value in inputs(node, range(count)) if value is not None]


def stored(value: ir.Value | None, what: str) -> ir.Value:
    """Return a value that is an initializer, which no caller can replace.

    Raises:
        Unserved: It is computed or given, so that its bytes are not those of a file.
    """
    if value is None or not value.is_initializer() or value.is_graph_input() or not value.name:
        raise Unserved(f"{what} ({_shown(value)}) is no stored weight")
    return value


def check_stored(value: ir.Value, shape: tuple[int, ...], dtype: ir.DataType) -> None:
    """Raise unless an initializer has a shape and type.

    Raises:
        Unserved: It has others.
    """
    found = shape_of(value)
    if found != shape or value.dtype != dtype:
        raise Unserved(f"{value.name}: {value.dtype} {found}, expected {dtype} {shape}")


def shape_of(value: ir.Value) -> tuple[int, ...] | None:
    """Return the shape of a value; None if a size of it is not known."""
    if value.shape is None or not all(isinstance(size, int) for size in value.shape.dims):
        return None
    return tuple(int(size) for size in value.shape.numpy())


def numbers(value: ir.Value | None, what: str) -> list[Any]:
    """Return the elements of a small initializer.

    Raises:
        Unserved: It is none, or large.
    """
    tensor = stored(value, what).const_value
    if tensor is None or tensor.size > _MAX_NUMBERS:
        raise Unserved(f"{what} ({_shown(value)}) is no small constant")
    return list(tensor.numpy().ravel().tolist())


def check_numbers(value: ir.Value | None, expected: list[int], what: str) -> None:
    """Raise unless a value is a constant of these numbers.

    Raises:
        Unserved: It is another one, or none.
    """
    found = numbers(value, what)
    if found != expected:
        raise Unserved(f"{what} ({_shown(value)}) is {found[:8]}, expected {expected}")


def check_same(found: ir.Value | None, expected: ir.Value | None, what: str) -> None:
    """Raise unless two values are one.

    Raises:
        Unserved: They are not.
    """
    if found is None or found is not expected:
        raise Unserved(f"{what} is {_shown(found)}, expected {_shown(expected)}")


def check_input(value: ir.Value | None, name: str, what: str) -> None:
    """Raise unless a value is the graph's input of this name.

    Raises:
        Unserved: It is not.
    """
    if value is None or not value.is_graph_input() or value.is_initializer() or value.name != name:
        raise Unserved(f"{what} is {_shown(value)}, expected the input {name}")


def before_cast(value: ir.Value | None, what: str) -> ir.Value | None:
    """Return what a value was before it was rounded to another type of floats, or itself.

    Raises:
        Unserved: It was cast to something else.
    """
    if not is_made_by(value, "Cast"):
        return value
    node = made_by(value, "Cast", what=what)
    found = cast_type(node)
    if found not in _FLOATS:
        raise Unserved(f"{what} ({_shown(value)}) is cast to {found}")
    return inputs(node, range(1))[0]


def cast_type(node: ir.Node) -> ir.DataType:
    """Return the type that a Cast makes."""
    return ir.DataType(int(attributes(node, free=("to",))["to"]))


def _named(node: ir.Node) -> str:
    return f"{node.op_type} {node.name}" if node.name else node.op_type


def _shown(value: ir.Value | None) -> str:
    return "none" if value is None else str(value.name)

"""Cut a graph between its layers, so that each layer can be given another input than what the layer before it made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qwen3vl_export.parity.sections import ATTENDED
from runtime.errors import ParityError

if TYPE_CHECKING:
    import onnx

_GIVEN = "given to those after "
# Fused kernels that give a sum and its norm: the norm belongs to the next section.
_SUM_AND_NORM = "SkipSimplifiedLayerNormalization"
_SUM_OUTPUT = 3


def given_name(cut: str) -> str:
    """Return the input that stands for the value of a cut in all that comes after it."""
    return _GIVEN + cut


def cut(graph: onnx.GraphProto, cuts: Sequence[str]) -> dict[str, str]:
    """Cut a graph in place: each value at a cut becomes an output, and all that read it read an input instead.

    The inputs are `given_name` of the cuts, float32; they take the type of the value that they stand for.

    Args:
        graph: A lowered graph.
        cuts: Names of the cuts in the order of computation; see `qwen3vl_export.parity.sections`.

    Returns:
        The names of the outputs, by cut. A cut inside of a layer that cannot be told is left out: kernels may compute a
        layer as a whole.

    Raises:
        ParityError: The graph lacks a value between two layers.
    """
    import onnx

    made = {name for node in graph.node for name in node.output}
    if missing := [name for name in cuts if name not in made and not name.endswith(ATTENDED)]:
        raise ParityError(
            f"the {graph.name} graph has no value {missing[0]!r}, so it cannot be cut between its layers",
            remedy="export it with this version; a pass of your own must keep the values between two layers",
        )
    values = {}
    for before, name, after in zip(["", *cuts], cuts, [*cuts[1:], ""], strict=False):
        value = name if name in made else _between(graph, before, after)
        if value is not None:
            values[name] = value
    of_value = {value: name for name, value in values.items()}
    inserted: dict[int, list[onnx.NodeProto]] = {}
    renamed: dict[str, str] = {}
    for index, node in enumerate(graph.node):
        for value in (name for name in node.output if name in of_value):
            given = given_name(of_value[value])
            new = [onnx.helper.make_node("CastLike", [given, value], [f"{given}, cast"])]
            renamed[value] = f"{given}, cast"
            others = [name for name in node.output if name and name != value]
            if others:
                new += _norm_of_given(node, value, f"{given}, cast", renamed)
            inserted[index] = new
            graph.input.append(onnx.helper.make_tensor_value_info(given, onnx.TensorProto.FLOAT, None))
            graph.output.append(onnx.ValueInfoProto(name=value))  # of a type that the runtime finds
    for node in graph.node:
        _rename(node, renamed)
    nodes = [each for index, node in enumerate(graph.node) for each in (node, *inserted.get(index, ()))]
    del graph.node[:]
    graph.node.extend(nodes)
    return values


def _norm_of_given(node: onnx.NodeProto, value: str, given: str, renamed: dict[str, str]) -> Iterator[onnx.NodeProto]:
    """Yield nodes that compute of the given value what a fused kernel computes of its own sum.

    Raises:
        ParityError: It is not known what that is.
    """
    import onnx

    if node.op_type != _SUM_AND_NORM or node.output[_SUM_OUTPUT] != value:
        raise ParityError(
            f"{node.op_type} gives {value!r} and more at once, so the graph cannot be cut there",
            remedy="teach qwen3vl_export/parity/cuts.py what it computes",
        )
    zeros, normed = f"{given}, zeros", f"{given}, normed"
    yield onnx.helper.make_node("Sub", [given, given], [zeros])
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = f"{node.name} of what is given"
    copy.input[:] = [given, zeros, node.input[2]]
    copy.output[:] = [normed]
    renamed[node.output[0]] = normed
    yield copy


def _between(graph: onnx.GraphProto, start: str, end: str) -> str | None:
    """Return the one value that all ways from one value to another lead through; None if there is none, or several.

    In a layer it is the sum after attention. Of a fused kernel that gives the sum and its norm, it is the sum.
    """
    after_start, before_end = {start}, {end}
    for node in graph.node:
        if after_start.intersection(_reads(node)):
            after_start.update(filter(None, node.output))
    for node in reversed(graph.node):
        if before_end.intersection(node.output):
            before_end.update(_reads(node))
    on_the_way = after_start & before_end
    last_read = {
        name: index
        for index, node in enumerate(graph.node)
        if on_the_way.intersection(node.output)
        for name in _reads(node)
    }
    found, awaited = [], {start}
    for index, node in enumerate(graph.node):
        given = on_the_way.intersection(node.output) - {start}
        if end in given:
            break
        if given:
            awaited = {name for name in awaited | given if last_read[name] > index}
            if awaited <= given and (node.op_type == _SUM_AND_NORM or len(awaited) == 1):
                found.append(node.output[_SUM_OUTPUT] if node.op_type == _SUM_AND_NORM else next(iter(awaited)))
    return found[0] if len(found) == 1 else None


def _reads(node: onnx.NodeProto) -> set[str]:
    """Return the names that a node reads, in its inner graphs too."""
    inner = (each for attribute in node.attribute for graph in (attribute.g, *attribute.graphs) for each in graph.node)
    return {name for name in node.input if name}.union(*map(_reads, inner))


def _rename(node: onnx.NodeProto, renamed: dict[str, str]) -> None:
    for index, name in enumerate(node.input):
        node.input[index] = renamed.get(name, name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                _rename(inner, renamed)

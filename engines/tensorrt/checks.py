"""What a parsed network must be before minutes are spent on building it, and what the plan weighs afterwards.

A plan cannot be opened without a GPU, so this is the proof that the network is the graph: as many attention layers as
the model has, every weight in the type it was lowered to, and no conversion between float types but those of the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.bundle import DECODER
from engines.passes.half_precision import stray_casts
from runtime.errors import TargetError
from runtime.model_config import ModelConfig

# Weights of this many elements and more are held by name and type; scalars and axes are the parser's business.
_SMALLEST_WEIGHT = 64
# ONNX's names of element types, by TensorRT's.
TYPES = {"FLOAT": "FLOAT", "HALF": "FLOAT16", "BF16": "BFLOAT16", "INT4": "INT4", "FP8": "FLOAT8E4M3FN"}
TYPES |= {"FP4": "FLOAT4E2M1", "INT8": "INT8", "INT64": "INT64", "INT32": "INT32", "BOOL": "BOOL"}
_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
# A plan holds the weights once, in the layout of its kernels, and code for its shapes.
_CODE_BYTES = 64 << 20
_LOWERING = "a pass of this target is wrong: look at its graph with --no-compile, and report this"
_PARSER = "this release of the library changes the graph when it reads it: install another one, and report this"


@dataclass(frozen=True)
class GraphFacts:
    """What the lowered graph says of itself.

    Attributes:
        weights: Element type of each initializer, by name.
        casts: Names of the Cast nodes between float types.
        attentions: Attention nodes.
        cache_updates: TensorScatter nodes.
        quantizations: QuantizeLinear nodes.
        dequantizations: DequantizeLinear nodes.
        stray_casts: Casts between float types that no float32 place, input or output asks for.
        weight_bytes: Bytes of all weights.
    """

    weights: Mapping[str, str]
    casts: frozenset[str]
    attentions: int
    cache_updates: int
    weight_bytes: int
    quantizations: int = 0
    dequantizations: int = 0
    stray_casts: tuple[str, ...] = ()


def check_graph(facts: GraphFacts, config: ModelConfig, place: str) -> None:
    """Compare the lowered graph with the model: its attention layers, and its casts with the float32 places.

    Raises:
        TargetError: A layer was lost or doubled on the way, or a Cast stands where nothing asks for float32.
    """
    layers = config.text.num_layers if place == DECODER else config.vision.depth
    for what, found, expected in (
        ("Attention", facts.attentions, layers),
        ("TensorScatter", facts.cache_updates, 2 * layers if place == DECODER else 0),
    ):
        if found != expected:
            raise TargetError(
                f"{place}: the lowered graph has {found} nodes {what}, the model asks for {expected}", remedy=_LOWERING
            )
    if facts.stray_casts:
        raise TargetError(
            f"{place}: {', '.join(facts.stray_casts)} convert where no float32 place begins or ends", remedy=_LOWERING
        )


def check_network(trt: Any, network: Any, facts: GraphFacts, place: str) -> None:
    """Compare a parsed network with the graph that it was parsed from.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        network: What the parser filled.
        facts: What is known of the graph.
        place: Names the graph in messages.

    Raises:
        TargetError: They differ; the message says in what.
    """
    kinds: Counter[str] = Counter()
    found: dict[str, str] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kinds[layer.type.name] += 1
        if layer.type == trt.LayerType.CONSTANT:
            output = layer.get_output(0)
            found[layer.name] = TYPES.get(output.dtype.name, output.dtype.name)
        elif layer.type == trt.LayerType.CAST:
            given, made = (TYPES.get(t.dtype.name, t.dtype.name) for t in (layer.get_input(0), layer.get_output(0)))
            is_conversion = {given, made} <= _FLOATS and given != made and not _is_scalar(layer.get_input(0))
            if is_conversion and layer.name not in facts.casts:
                raise TargetError(
                    f"{place}: {layer.name!r} converts {given} to {made}, which the graph does not", remedy=_PARSER
                )
    for kind, expected in (
        ("ATTENTION_INPUT", facts.attentions),
        ("KV_CACHE_UPDATE", facts.cache_updates),
        ("QUANTIZE", facts.quantizations),
        ("DEQUANTIZE", facts.dequantizations),
    ):
        if kinds[kind] != expected:
            raise TargetError(
                f"{place}: the network has {kinds[kind]} layers {kind}, the graph {expected}", remedy=_PARSER
            )
    for name, dtype in facts.weights.items():
        if found.get(name) != dtype:
            known = found.get(name, "missing")
            raise TargetError(f"{place}: weight {name} is {known} in the network, {dtype} in the graph", remedy=_PARSER)


def _is_scalar(tensor: Any) -> bool:
    """Say whether a tensor has one element: the parser converts constants of formulas, such as that of Gelu."""
    return all(dim == 1 for dim in tensor.shape)


def check_plan_size(num_bytes: int, facts: GraphFacts, place: str, *, stripped: bool) -> None:
    """Compare the bytes of a plan with those of its weights.

    Raises:
        TargetError: The plan holds the weights in a wider type than the graph, more than once, or not at all.
    """
    most = _CODE_BYTES + (0 if stripped else facts.weight_bytes * 5 // 4)
    least = 0 if stripped else facts.weight_bytes * 9 // 10
    if not least <= num_bytes <= most:
        raise TargetError(
            f"{place}: the plan has {num_bytes} bytes, its weights {facts.weight_bytes}: expected {least} to {most}",
            remedy="weights were widened, doubled or dropped: this version of the library lowers them differently",
        )


def graph_facts(model: Any) -> GraphFacts:
    """Read a lowered model (onnx_ir.Model, weights may be external)."""
    import math

    weights, num_bytes = {}, 0
    for name, value in model.graph.initializers.items():
        size = math.prod(value.shape.numpy())
        num_bytes += value.const_value.nbytes
        if size >= _SMALLEST_WEIGHT and value.uses():
            weights[name] = value.dtype.name
    types = {value: value.dtype for node in model.graph for value in node.outputs}
    casts = set()
    for node in model.graph:
        if node.op_type == "Cast":
            given = types.get(node.inputs[0], node.inputs[0].dtype)
            if given is not None and given.name in _FLOATS and node.outputs[0].dtype.name in _FLOATS:
                casts.add(node.name)
    count = Counter(node.op_type for node in model.graph)
    return GraphFacts(
        weights,
        frozenset(casts),
        count["Attention"],
        count["TensorScatter"],
        num_bytes,
        count["QuantizeLinear"],
        count["DequantizeLinear"],
        tuple(stray_casts(model)),
    )

"""Read out of a lowered decoder which weights a decode step takes, and how they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from engines.kernels.launch import FP8, HALF, INT4, INT8, Unserved, Weight
from engines.onnx_text import MICROSOFT
from runtime.model_config import ModelConfig

_PRODUCTS = ("FusedMatMul", "MatMulNBits", "MatMulBlockQuantizedFp8Weight")
_EXPERTS = ("MoE", "QMoE")
_NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization")
# What stands between a norm and the operator that takes its result.
_BETWEEN = ("Reshape", "Cast", "RotaryEmbedding", "Split", "Gather", "GatherElements")
_CODES = {4: INT4, 8: INT8}
_DTYPES: dict[ir.DataType | None, str] = {
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: the initializer of its gain, and its epsilon."""

    gain: str
    epsilon: float


@dataclass(frozen=True)
class Experts:
    """Router [E, K] and experts of one layer: gate and up [E, 2·I, K], whose rows take turns, and down [E, K, I]."""

    router: Weight
    gate_up: Weight
    down: Weight
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class Layer:
    """One decoder layer; either `gate_up` [2·I, K] and `down` [K, I], or `experts`."""

    attention_norm: Norm
    qkv: Weight
    q_norm: Norm
    k_norm: Norm
    scale: float
    output: Weight
    mlp_norm: Norm
    gate_up: Weight | None
    down: Weight | None
    experts: Experts | None


@dataclass(frozen=True)
class Decoder:
    """All weights of a decode step.

    Attributes:
        dtype: `float16` or `bfloat16`: of activations, KV cache and halves.
        num_heads, num_kv_heads, head_dim: Of attention.
        table: Embeddings, in whole rows of codes as GatherBlockQuantized reads them.
        layers: In order.
        final_norm, head: What makes the logits.
        constants: Values of the small initializers that the rotary embedding takes: `inv_freq`, `axis_of_frequency`.
    """

    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    table: Weight
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Weight
    constants: dict[str, np.ndarray]


def read_decoder(model: ir.Model, config: ModelConfig) -> Decoder:
    """Find the weights of a flat decoder graph of an ort-cuda target.

    Args:
        model: The lowered graph, sorted.
        config: Shape of the model, which the graph's products are compared with.

    Raises:
        Unserved: The graph is made of other operators, or its products of other shapes, than a plan is made of.
    """
    text = config.text
    queue = [node for node in model.graph if _is_product(node)]
    attention = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    if len(attention) != text.num_layers:
        raise Unserved(f"{len(attention)} nodes of attention for {text.num_layers} layers")
    nodes = iter(queue)
    layers = tuple(_layer(nodes, each, config, index) for index, each in enumerate(attention))
    head = _take(nodes, "the head")
    if next(nodes, None) is not None:
        raise Unserved("more products than the layers and the head have")
    tables = [node for node in model.graph if any(_is_input(value, "input_ids") for value in node.inputs)]
    if len(tables) != 1:
        raise Unserved(f"{len(tables)} lookups of token ids")
    cache_type = _cache_type(attention[0])
    if cache_type not in _DTYPES:
        raise Unserved(f"a KV cache of {cache_type}")
    return Decoder(
        dtype=_DTYPES[cache_type],
        num_heads=text.num_heads,
        num_kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        table=_table(tables[0], text.hidden_size),
        layers=layers,
        final_norm=_norm_before(head.inputs[0]),
        head=_weight(head, text.vocab_size, text.hidden_size),
        constants={name: _constant(model, name) for name in ("inv_freq", "axis_of_frequency")},
    )


def _layer(nodes: Iterator[ir.Node], attention: ir.Node, config: ModelConfig, index: int) -> Layer:
    text = config.text
    heads, kv_heads, width = text.num_heads, text.num_kv_heads, text.head_dim
    qkv, output = _take(nodes, "q, k and v"), _take(nodes, "attention's output")
    if _source(output.inputs[0], ("Reshape",)) is not attention:
        raise Unserved(f"{output.name}: not the product of attention's result: q, k and v are not one product")
    first = _take(nodes, "the feed-forward part")
    mlp_norm = _norm_before(first.inputs[0])
    gate_up = down = experts = None
    if text.experts_of(index) is None:
        _check_gate_is_first(first)
        gate_up = _weight(first, 2 * text.intermediate_size, text.hidden_size)
        down = _weight(_take(nodes, "down"), text.hidden_size, text.intermediate_size)
    else:
        experts = _experts(first, _take(nodes, "experts"), config)
    return Layer(
        attention_norm=_norm_before(qkv.inputs[0]),
        qkv=_weight(qkv, (heads + 2 * kv_heads) * width, text.hidden_size),
        q_norm=_norm_before(attention.inputs[0]),
        k_norm=_norm_before(attention.inputs[1]),
        scale=attention.attributes["scale"].as_float(),
        output=_weight(output, text.hidden_size, heads * width),
        mlp_norm=mlp_norm,
        gate_up=gate_up,
        down=down,
        experts=experts,
    )


def _check_gate_is_first(product: ir.Node) -> None:
    """Raise unless the first rows of a product of gate and up are those of the gate, which SiLU takes."""
    (split,) = product.outputs[0].consumers() or (None,)
    gate = split.outputs[0].consumers() if split is not None and split.op_type == "Split" else ()
    if not any(node.op_type == "Sigmoid" for node in gate):
        raise Unserved(f"{product.name}: gate and up are not one product")


def _experts(router: ir.Node, node: ir.Node, config: ModelConfig) -> Experts:
    text = config.text
    assert text.experts is not None
    count, inner = text.experts.num_experts, text.experts.intermediate_size
    if node.op_type not in _EXPERTS:
        raise Unserved(f"{node.name}: {node.op_type} where experts are expected")
    quantised = node.op_type == "QMoE"
    bits = node.attributes["expert_weight_bits"].as_int() if quantised else 0
    places = (2, 5) if quantised else (2, 4)
    weights = []
    for place, (rows, columns) in zip(places, ((2 * inner, text.hidden_size), (text.hidden_size, inner)), strict=True):
        data = _initializer(node, place)
        if not quantised:
            _expect(data, (count, rows, columns))
            weights.append(Weight(HALF, rows, columns, _name(data)))
            continue
        bits_here = bits
        if place == 5 and "fc2_expert_weight_bits" in node.attributes:
            bits_here = node.attributes["fc2_expert_weight_bits"].as_int() or bits
        _expect(data, (count, rows, columns * bits_here // 8))
        block = node.attributes["block_size"].as_int()
        scales = _initializer(node, place + 1)
        _expect(scales, (count, rows, columns // block))
        weights.append(Weight(_CODES[bits_here], rows, columns, _name(data), block, _name(scales)))
    gate_up, down = weights
    return Experts(_weight(router, count, text.hidden_size), gate_up, down, count, text.experts.top_k)


def _weight(node: ir.Node, rows: int, columns: int) -> Weight:
    """Return the weight of a product, once its shape is what the model's says.

    Raises:
        Unserved: It is another one.
    """
    data = _initializer(node, 1)
    if node.op_type == "FusedMatMul":
        _expect(data, (rows, columns))
        return Weight(HALF, rows, columns, _name(data))
    block = node.attributes["block_size"].as_int()
    blocks = -(-columns // block)
    scales = _initializer(node, 2)
    if node.op_type == "MatMulBlockQuantizedFp8Weight":
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            raise Unserved(f"{node.name}: activations in float8")
        _expect(data, (rows, columns))
        _expect(scales, (rows, blocks))
        return Weight(FP8, rows, columns, _name(data), block, _name(scales))
    bits = node.attributes["bits"].as_int()
    if bits not in _CODES:
        raise Unserved(f"{node.name}: codes of {bits} bits")
    _expect(data, (rows, blocks, block * bits // 8))
    if scales.shape is None or int(np.prod(scales.shape.numpy())) != rows * blocks:
        raise Unserved(f"{node.name}: scales {scales.shape}, expected {rows} x {blocks}")
    has_zeros = len(node.inputs) > 3 and node.inputs[3] is not None
    zero_points = _name(_initializer(node, 3)) if has_zeros else None
    return Weight(_CODES[bits], rows, columns, _name(data), block, _name(scales), zero_points)


def _table(node: ir.Node, columns: int) -> Weight:
    data = _initializer(node, 0)
    assert data.shape is not None
    rows = int(data.shape.numpy()[0])
    if node.op_type == "Gather":
        _expect(data, (rows, columns))
        return Weight(HALF, rows, columns, _name(data))
    if node.op_type != "GatherBlockQuantized" or data.dtype not in (ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN):
        raise Unserved(f"{node.name}: token ids are looked up by {node.op_type} in {data.dtype}")
    bits, block = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    if data.dtype == ir.DataType.FLOAT8E4M3FN:
        _expect(data, (rows, columns))
        return Weight(FP8, rows, columns, _name(data), block, _name(_initializer(node, 2)))
    _expect(data, (rows, columns * bits // 8))
    zero_points = _name(_initializer(node, 3)) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    return Weight(_CODES[bits], rows, columns, _name(data), block, _name(_initializer(node, 2)), zero_points)


def _is_product(node: ir.Node) -> bool:
    if node.domain != MICROSOFT or node.op_type not in (*_PRODUCTS, *_EXPERTS):
        return False
    return node.op_type != "FusedMatMul" or (len(node.inputs) > 1 and _is_weight(node.inputs[1]))


def _take(nodes: Iterator[ir.Node], what: str) -> ir.Node:
    node = next(nodes, None)
    if node is None:
        raise Unserved(f"no product for {what}")
    return node


def _norm_before(value: ir.Value | None) -> Norm:
    """Return the norm whose result reaches a value through reshapes, casts and the rotary embedding alone."""
    node = _source(value, _BETWEEN)
    if node is None or node.op_type not in _NORMS:
        raise Unserved(f"{value.name if value is not None else 'an input'}: no RMSNorm before it")
    place = 2 if node.op_type == "SkipSimplifiedLayerNormalization" else 1
    return Norm(_name(_initializer(node, place)), node.attributes["epsilon"].as_float())


def _source(value: ir.Value | None, through: Sequence[str]) -> ir.Node | None:
    """Return the node that a value comes of, looking through operators of some kinds."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in through:
        before = node.inputs[0]
        node = before.producer() if before is not None else None
    return node


def _initializer(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place] if place < len(node.inputs) else None
    # A cast of a stored half to float32, as bfloat16's norms may have, would be a copy of the weight.
    if value is None or not value.is_initializer():
        raise Unserved(f"{node.name}: input {place} is no stored weight")
    return value


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _expect(value: ir.Value, shape: tuple[int, ...]) -> None:
    found = None if value.shape is None else tuple(value.shape.numpy())
    if found != shape:
        raise Unserved(f"{value.name}: {found}, expected {shape}")


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _is_input(value: ir.Value | None, name: str) -> bool:
    return value is not None and value.is_graph_input() and value.name == name


def _cache_type(attention: ir.Node) -> ir.DataType | None:
    past = attention.inputs[3]
    return None if past is None else past.dtype


def _constant(model: ir.Model, name: str) -> np.ndarray:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise Unserved(f"the graph has no {name}")
    return value.const_value.numpy()

"""A decoder that computes anything else than a plan's kernels do is refused, never read as if it did not.

Each change is one that a checkpoint, a pass or a newer exporter could make; ONNX Runtime would heed it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import pytest

from engines import registry
from engines.bundle import DECODER, Bundle
from engines.decode_plan.graph import read_decoder
from engines.initializers import add_initializer
from engines.kernels.launch import Unserved
from engines.lower import lower
from engines.onnx_text import MICROSOFT

Change = Callable[[ir.Model], None]
PREFIX = "model.language_model.layers"


def the(model: ir.Model, operator: str, which: int = 0) -> ir.Node:
    return [node for node in model.graph if node.op_type == operator][which]


def number(model: ir.Model, value: float, dtype: ir.DataType = ir.DataType.FLOAT16, size: int = 1) -> ir.Value:
    return add_initializer(model, ir.Tensor(np.full(size, value, dtype.numpy()), name=f"new.{value}.{dtype}.{size}"))


def has(operator: str, which: int = 0, **values: float | str) -> Change:
    """Set attributes of a node."""

    def change(model: ir.Model) -> None:
        for name, value in values.items():
            kind = {int: ir.AttrInt64, float: ir.AttrFloat32, str: ir.AttrString}[type(value)]
            the(model, operator, which).attributes[name] = kind(name, value)

    return change


def gets(operator: str, place: int, which: int = 0, dtype: ir.DataType = ir.DataType.FLOAT16) -> Change:
    """Give a node one more input."""

    def change(model: ir.Model) -> None:
        node = the(model, operator, which)
        node.resize_inputs(max(place + 1, len(node.inputs)))
        node.replace_input_with(place, number(model, 1.0, dtype, 192))

    return change


def through(new: str, operator: str, place: int, which: int = 0, factor: float | None = None) -> Change:
    """Put a node before the input of another; with a factor it has that as second input."""

    def change(model: ir.Model) -> None:
        node = the(model, operator, which)
        before = node.inputs[place]
        others = [] if factor is None else [number(model, factor, before.dtype or ir.DataType.FLOAT16)]
        added = ir.node(new, [before, *others])
        added.outputs[0].dtype = before.dtype
        model.graph.insert_before(node, added)
        node.replace_input_with(place, added.outputs[0])

    return change


def swapped(operator: str, first: int, second: int, which: int = 0) -> Change:
    def change(model: ir.Model) -> None:
        node = the(model, operator, which)
        before = node.inputs[first], node.inputs[second]
        node.replace_input_with(first, before[1])
        node.replace_input_with(second, before[0])

    return change


def instead(operator: str, place: int, of: Callable[[ir.Model], ir.Value], which: int = 0) -> Change:
    """Replace an input of a node by another value."""

    def change(model: ir.Model) -> None:
        node = the(model, operator, which)
        value = of(model)
        assert value is not node.inputs[place]
        node.replace_input_with(place, value)

    return change


def becomes(operator: str, new: str, domain: str = "", which: int = 0) -> Change:
    def change(model: ir.Model) -> None:
        node = the(model, operator, which)
        node.op_type, node.domain = new, domain

    return change


def stored_as(name: str, dtype: ir.DataType, *shape: int) -> Change:
    """Replace a weight by one of another type, and perhaps shape."""

    def change(model: ir.Model) -> None:
        old = model.graph.initializers[name]
        assert old.shape is not None
        zeros = np.zeros(shape or old.shape.numpy(), dtype.numpy())
        new = add_initializer(model, ir.Tensor(zeros, name=f"{name}.other"))
        for node, place in list(old.uses()):
            node.replace_input_with(place, new)

    return change


def output_of(operator: str, place: int = 0, which: int = 0) -> Callable[[ir.Model], ir.Value]:
    return lambda model: the(model, operator, which).outputs[place]


def _replaceable_weight(model: ir.Model) -> None:
    model.graph.inputs.append(model.graph.initializers[f"{PREFIX}.0.mlp.down_proj.weight"])


def _one_more_output(model: ir.Model) -> None:
    model.graph.outputs.append(the(model, "Sigmoid").outputs[0])


def _capped_logits(model: ir.Model) -> None:
    cast = next(node for node in model.graph if node.outputs[0].name == "logits")
    capped = ir.node("Tanh", [cast.inputs[0]])
    capped.outputs[0].dtype = ir.DataType.FLOAT16
    model.graph.insert_before(cast, capped)
    cast.replace_input_with(0, capped.outputs[0])


def _table_of_its_own(model: ir.Model) -> None:
    """Let the second layer turn by other angles than the first."""
    cos = the(model, "Cos")
    other = ir.node("Cos", [cos.inputs[0]])
    model.graph.insert_before(cos, other)
    the(model, "RotaryEmbedding", 2).replace_input_with(1, other.outputs[0])


def _cache_of_8_bits(model: ir.Model) -> None:
    for value in model.graph.inputs:
        if str(value.name).startswith("past_key_values.1"):
            value.type = ir.TensorType(ir.DataType.INT8)  # its own, where a clone shares it


HALVES = "ort-cuda-fp16"
CODES = "ort-cuda-int4"
FLOAT8 = "ort-cuda-fp8"
QKV, DOWN, TABLE = f"{PREFIX}.0.self_attn.{{q_proj,k_proj,v_proj}}.weight", f"{PREFIX}.0.mlp.down_proj.weight", "Gather"
NORM, SUM, ATTENTION = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "GroupQueryAttention"

DENSE: Mapping[str, tuple[str, str, Change]] = {
    # Products
    "bias of qkv": (HALVES, "made by Add", through("Add", "Split", 0, factor=0.5)),
    "bias of attention's output": (HALVES, "made by Add", through("Add", SUM, 1, factor=0.5)),
    "bias of down": (HALVES, "made by Add", through("Add", "Add", 1, which=1, factor=0.5)),
    "bias of the head": (HALVES, "what the largest logits are chosen of", through("Add", "Cast", 0, -2, 0.5)),
    "bias inside a product of codes": (CODES, r"inputs \[5\]", gets("MatMulNBits", 5)),
    "factor of a product": (HALVES, "alpha is 0.5", has("FusedMatMul", alpha=0.5)),
    "transposed x": (HALVES, "transA is 1", has("FusedMatMul", transA=1)),
    "weight [K, N]": (HALVES, "transB is 0", has("FusedMatMul", transB=0)),
    "other domain": (HALVES, "is made by other::FusedMatMul", becomes("FusedMatMul", "FusedMatMul", "other")),
    "plain product": (HALVES, "is made by MatMul", becomes("FusedMatMul", "MatMul")),
    "computed weight": (HALVES, "no stored weight", through("Tanh", "FusedMatMul", 1)),
    "weight that callers may replace": (HALVES, "no stored weight", _replaceable_weight),
    "shape of a weight": (HALVES, "expected", stored_as(DOWN, ir.DataType.FLOAT16, 192, 511)),
    "type of a weight": (HALVES, "FLOAT .*expected FLOAT16", stored_as(DOWN, ir.DataType.FLOAT)),
    # Quantised weights
    "groups in another order": (CODES, r"inputs \[4\]", gets("MatMulNBits", 4, dtype=ir.DataType.INT32)),
    "codes of 2 bits": (CODES, "codes of 2 bits", has("MatMulNBits", bits=2)),
    "codes of 3 bits": (CODES, "codes of 3 bits", has("MatMulNBits", bits=3)),
    "K of a product of codes": (CODES, "K is 191", has("MatMulNBits", K=191)),
    "N of a product of codes": (CODES, "N is 639", has("MatMulNBits", N=639)),
    "block of codes": (CODES, "expected", has("MatMulNBits", block_size=64)),
    "block that is no power of two": (CODES, "blocks of 96", has("MatMulNBits", block_size=96)),
    "prepacked codes": (CODES, "weight_prepacked, which no kernel heeds", has("MatMulNBits", weight_prepacked=1)),
    "signed codes": (CODES, "INT8 .*expected UINT8", stored_as(f"{QKV}.q8", ir.DataType.INT8)),
    "scales of float32": (CODES, "FLOAT .*expected FLOAT16", stored_as(f"{QKV}.scales", ir.DataType.FLOAT)),
    "scales of another block": (CODES, "expected", stored_as(f"{QKV}.scales", ir.DataType.FLOAT16, 640, 3)),
    "zero points of half": (CODES, "expected UINT8", stored_as(f"{QKV}.zero_points", ir.DataType.FLOAT16)),
    "zero points of another block": (CODES, "expected", stored_as(f"{QKV}.zero_points", ir.DataType.UINT8, 640, 1)),
    "table of codes along the other axis": (CODES, "quantize_axis is 0", has("GatherBlockQuantized", quantize_axis=0)),
    "table of 2 bits": (CODES, "codes of 2 bits", has("GatherBlockQuantized", bits=2)),
    "activations in float8": (FLOAT8, r"inputs \[3\]", gets("MatMulBlockQuantizedFp8Weight", 3)),
    "bias of a float8 product": (FLOAT8, r"inputs \[4\]", gets("MatMulBlockQuantizedFp8Weight", 4)),
    "scales of float8 in half": (FLOAT8, "expected FLOAT ", stored_as(f"{QKV}.scales", ir.DataType.FLOAT16)),
    "other float8": (FLOAT8, "expected FLOAT8E4M3FN", stored_as(f"{QKV}.f8", ir.DataType.FLOAT8E5M2)),
    # Attention
    "window": (HALVES, "local_window_size is 128", has(ATTENTION, 1, local_window_size=128)),
    "capped scores": (HALVES, "softcap is 30", has(ATTENTION, softcap=30.0)),
    "attention sink": (HALVES, "smooth_softmax, which no kernel heeds", has(ATTENTION, smooth_softmax=1)),
    "sink of each head": (HALVES, r"inputs \[11\]", gets(ATTENTION, 11)),
    "bias of scores": (HALVES, r"inputs \[10\]", gets(ATTENTION, 10)),
    "rotary embedding inside": (HALVES, "do_rotary is 1", has(ATTENTION, do_rotary=1)),
    "no scale": (HALVES, "scores are scaled by 0", has(ATTENTION, scale=0.0)),
    "heads": (HALVES, "kv_num_heads is 3", has(ATTENTION, kv_num_heads=3)),
    "other attention": (HALVES, "is made by com.microsoft::Attention", becomes(ATTENTION, "Attention", MICROSOFT)),
    "keys as queries": (HALVES, "num_heads is 2, expected 6", swapped(ATTENTION, 0, 1)),
    "values as keys": (HALVES, "keys .*is made by Split", swapped(ATTENTION, 1, 2)),
    "gated attention": (HALVES, "is made by Mul", through("Mul", "FusedMatMul", 0, 1, factor=0.5)),
    "cache of another layer": (
        HALVES,
        r"expected the input past_key_values\.1\.key",
        instead(ATTENTION, 3, lambda model: the(model, ATTENTION).inputs[3], 1),
    ),
    "cache of 8 bits": (HALVES, "a KV cache of INT8", _cache_of_8_bits),
    "lengths without the new token": (
        HALVES,
        "the lengths .*is made by nothing",
        instead("Cast", 0, lambda model: the(model, "Add").inputs[0], 4),
    ),
    "lengths one less": (
        HALVES,
        "taken from the lengths",
        instead("Sub", 1, lambda m: number(m, 2, ir.DataType.INT64)),
    ),
    "sizes of queries, keys and values": (
        HALVES,
        "sizes of queries",
        instead("Split", 1, lambda m: add_initializer(m, ir.Tensor(np.array([256, 256, 128]), name="sizes"))),
    ),
    # Rotary embedding
    "part of a head turns": (HALVES, "rotary_embedding_dim is 32", has("RotaryEmbedding", rotary_embedding_dim=32)),
    "neighbours turn": (HALVES, "interleaved is 1", has("RotaryEmbedding", 1, interleaved=1)),
    "nothing turns": (
        HALVES,
        "queries .*is made by Reshape",
        instead(ATTENTION, 0, lambda model: the(model, "RotaryEmbedding").inputs[0]),
    ),
    "longer tables": (HALVES, "the cosines .*is made by Mul", through("Mul", "Cast", 0, which=1, factor=1.1)),
    "scaled positions": (HALVES, "is made by Mul", through("Mul", "Mul", 0, factor=0.5)),
    "sines of other angles": (HALVES, "what the sines are of", through("Neg", "Sin", 0)),
    "tables of one layer": (HALVES, "the cosines of the rotary embedding", _table_of_its_own),
    "axes of positions": (HALVES, "Gather node_index_select_1: axis is 1", has("Gather", axis=1)),
    # Norms
    "no norm": (HALVES, "expected SimplifiedLayer", instead("FusedMatMul", 0, lambda m: the(m, NORM).inputs[0])),
    "other norm": (HALVES, "is made by LayerNormalization", becomes(NORM, "LayerNormalization")),
    "norm of another axis": (HALVES, "axis is 1", has(NORM, axis=1)),
    "norm with a bias": (HALVES, r"inputs \[3\]", gets(SUM, 3)),
    "gain of float32": (
        HALVES,
        "expected FLOAT16",
        stored_as(f"{PREFIX}.0.self_attn.q_norm.weight", ir.DataType.FLOAT),
    ),
    "norm of all heads at once": (
        HALVES,
        "expected FLOAT16",
        stored_as(f"{PREFIX}.0.self_attn.q_norm.weight", ir.DataType.FLOAT16, 384),
    ),
    "norm of values": (HALVES, "the values .*is made by Tanh", through("Tanh", ATTENTION, 2)),
    "norm of other hidden states": (
        HALVES,
        "what is normalised for attention",
        instead(NORM, 0, output_of(SUM, 3), 3),
    ),
    # Residual
    "scaled branch": (HALVES, "is made by Mul", through("Mul", SUM, 1, factor=0.5)),
    "scaled residual": (HALVES, "what is normalised for attention", through("Mul", SUM, 0, factor=0.5)),
    "one more residual": (HALVES, "is made by Add", through("Add", "Add", 1, which=1, factor=0.5)),
    "norm after a branch": (HALVES, f"is made by {NORM}", through(NORM, SUM, 1, factor=1.0)),
    "branch before residual": (HALVES, "attention's output .*is made by Where", swapped(SUM, 0, 1)),
    # Feed-forward
    "other activation": (HALVES, "is made by Tanh", becomes("Sigmoid", "Tanh")),
    "sigmoid of up": (
        HALVES,
        "what the sigmoid of the gate is of",
        instead("Sigmoid", 0, lambda model: the(model, "Split", 1).outputs[1]),
    ),
    "up before the gate": (HALVES, "SiLU of the gate .*is made by Split", swapped("Mul", 0, 1, which=2)),
    "unequal gate and up": (
        HALVES,
        "sizes of gate and up",
        instead("Split", 1, lambda m: add_initializer(m, ir.Tensor(np.array([500, 524]), name="sizes")), 1),
    ),
    # Beginning and end
    "scaled embeddings": (HALVES, "the embeddings .*is made by Mul", through("Mul", "Where", 2, factor=13.9)),
    "shifted ids": (HALVES, "expected the input input_ids", through("Neg", "Gather", 1, which=3)),
    "text where images are": (HALVES, "the embeddings .*is no stored weight", swapped("Where", 1, 2)),
    "capped logits": (HALVES, "what the largest logits are chosen of", _capped_logits),
    "smallest logits": (HALVES, "largest is 0", has("TopK", largest=0)),
    "one more result": (HALVES, "results are not logits", _one_more_output),
    "no last norm": (
        HALVES,
        "is made by GatherElements",
        instead("FusedMatMul", 0, output_of("GatherElements"), -1),
    ),
}
EXPERTS: Mapping[str, tuple[str, str, Change]] = {
    "limit of the activation": (CODES, "swiglu_limit, which no kernel heeds", has("QMoE", swiglu_limit=7.0)),
    "slope of the activation": (CODES, "activation_alpha is 1.7", has("QMoE", activation_alpha=1.702)),
    "offset of up": (CODES, "activation_beta is 1", has("QMoE", activation_beta=1.0)),
    "other activation": (CODES, "activation_type is gelu", has("QMoE", activation_type="gelu")),
    "gate before up": (CODES, "swiglu_fusion is 2", has("QMoE", swiglu_fusion=2)),
    "shares of all experts": (CODES, "normalize_routing_weights is 0", has("QMoE", normalize_routing_weights=0)),
    "other number of experts": (CODES, "k is 3", has("QMoE", k=3)),
    "experts of 2 bits": (CODES, "codes of 2 bits", has("QMoE", expert_weight_bits=2)),
    "other bits of down": (CODES, "expected", has("QMoE", fc2_expert_weight_bits=4)),
    "block of experts": (CODES, "expected", has("QMoE", block_size=32)),
    "block that divides no row": (CODES, "blocks of 512, in rows of", has("QMoE", block_size=512)),
    "block of experts that is no power of two": (CODES, "blocks of 96, expected a power", has("QMoE", block_size=96)),
    "prepacked experts": (CODES, "weights_prepacked is 1", has("QMoE", weights_prepacked=1)),
    "other codes": (CODES, "quant_type, which no kernel heeds", has("QMoE", quant_type="wfp4afp8")),
    "bias of experts": (CODES, r"inputs \[4\]", gets("QMoE", 4)),
    "zero points of experts": (CODES, r"inputs \[11\]", gets("QMoE", 11)),
    "bias of experts in half": (HALVES, r"inputs \[3\]", gets("MoE", 3)),
    "bias of the router": (HALVES, "the router .*is made by Add", through("Add", "Reshape", 0, which=5, factor=0.5)),
    "sigmoid of the router": (HALVES, "what the shape of the experts' logits is of", through("Sigmoid", "TopK", 0)),
    "router of other hidden states": (
        HALVES,
        "what the router takes",
        instead("MoE", 0, lambda m: the(m, "MoE").inputs[0].producer().outputs[3]),
    ),
    "others keep a share": (HALVES, "have a share", instead("Expand", 0, lambda m: number(m, -4.0), 1)),
    "other number of logits": (
        HALVES,
        "number of chosen experts",
        instead("TopK", 1, lambda m: number(m, 3, ir.DataType.INT64)),
    ),
    "scaled experts": (HALVES, "is made by Mul", through("Mul", "Add", 1, which=1, factor=2.5)),
    "one more expert for all": (HALVES, "is made by Add", through("Add", "Add", 1, which=1, factor=0.5)),
}


@pytest.fixture(scope="module")
def lowered(demo_bundle: Bundle, demo_moe_bundle: Bundle) -> Callable[[Bundle, str], ir.Model]:
    """Lowers a bundle's decoder for a target, once; what it returns is a copy."""
    kept: dict[tuple[int, str], ir.Model] = {}

    def lowered_for(bundle: Bundle, name: str) -> ir.Model:
        if (id(bundle), name) not in kept:
            target = registry.get(name)
            graph = bundle.graphs[DECODER].clone()
            kept[id(bundle), name] = lower(graph, target, bundle.config, target.passes(target.formats))
        return kept[id(bundle), name].clone()

    return lowered_for


@pytest.mark.parametrize("name", DENSE)
def test_a_changed_decoder_is_refused(name: str, demo_bundle: Bundle, lowered: Callable[..., ir.Model]) -> None:
    target, message, change = DENSE[name]
    model = lowered(demo_bundle, target)
    read_decoder(model, demo_bundle.config)
    change(model)
    with pytest.raises(Unserved, match=message):
        read_decoder(model, demo_bundle.config)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_changed_mixture_is_refused(name: str, demo_moe_bundle: Bundle, lowered: Callable[..., ir.Model]) -> None:
    target, message, change = EXPERTS[name]
    model = lowered(demo_moe_bundle, target)
    read_decoder(model, demo_moe_bundle.config)
    change(model)
    with pytest.raises(Unserved, match=message):
        read_decoder(model, demo_moe_bundle.config)


def of_text(model: ir.Model) -> list[ir.Node]:
    """Return all nodes that a result depends on where no token is of an image."""
    found: dict[ir.Node, None] = {}
    waiting = [value.producer() for value in model.graph.outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found[node] = None
        # What Where takes for tokens of an image is its second input.
        waiting += [
            value.producer()
            for place, value in enumerate(node.inputs)
            if value is not None and not (node.op_type == "Where" and place == 1)
        ]
    return list(found)


@pytest.mark.parametrize("target", ["ort-cuda-fp16", "ort-cuda-bf16", CODES, FLOAT8])
@pytest.mark.parametrize("has_experts", [False, True], ids=["dense", "experts"])
def test_every_node_and_every_input_is_looked_at(
    target: str, has_experts: bool, demo_bundle: Bundle, demo_moe_bundle: Bundle, lowered: Callable[..., ir.Model]
) -> None:
    bundle = demo_moe_bundle if has_experts else demo_bundle
    model = lowered(bundle, target)
    nodes = of_text(model)
    assert len(nodes) > 80
    for node in nodes:
        node.attributes["of_a_later_version"] = ir.AttrInt64("of_a_later_version", 1)
        with pytest.raises(Unserved, match="of_a_later_version, which no kernel heeds"):
            read_decoder(model, bundle.config)
        del node.attributes["of_a_later_version"]
        for place, value in enumerate(node.inputs):
            if value is None or (node.op_type == "Where" and place == 1):
                continue
            other = ir.node("Identity", [value])
            other.outputs[0].dtype = value.dtype
            node.replace_input_with(place, other.outputs[0])
            with pytest.raises(Unserved):
                read_decoder(model, bundle.config)
            node.replace_input_with(place, value)
    read_decoder(model, bundle.config)


@pytest.mark.parametrize("has_experts", [False, True], ids=["dense", "experts"])
def test_every_constant_is_compared(
    has_experts: bool, demo_bundle: Bundle, demo_moe_bundle: Bundle, lowered: Callable[..., ir.Model]
) -> None:
    bundle = demo_moe_bundle if has_experts else demo_bundle
    model = lowered(bundle, HALVES)
    read = [model.graph.initializers[name] for name in ("axis_of_frequency", "top_k")]
    changed = 0
    for node in of_text(model):
        for place, value in enumerate(node.inputs):
            if value is None or value.dtype != ir.DataType.INT64 or not value.is_initializer() or value in read:
                continue
            other = add_initializer(model, ir.Tensor(value.const_value.numpy() + 3, name=f"other.{changed}"))
            node.replace_input_with(place, other)
            with pytest.raises(Unserved):
                read_decoder(model, bundle.config)
            node.replace_input_with(place, value)
            changed += 1
    assert changed > 20
    for value, changes in zip(read, ("constants", "top_k"), strict=True):
        before = getattr(read_decoder(model, bundle.config), changes)
        other = add_initializer(model, ir.Tensor(value.const_value.numpy()[::-1] // 2, name=f"other.{changes}"))
        for node, place in list(value.uses()):
            node.replace_input_with(place, other)
        assert str(getattr(read_decoder(model, bundle.config), changes)) != str(before)

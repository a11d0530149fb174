"""Products, lookups and attention of our own CPU kernels in the graphs: what is fused, what not, and that it is right.

The graphs run in numpy, by the definitions of `helpers.cpu_ops`, so the library is not needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from engines.bundle import DECODER, VISION, Bundle
from engines.external_data import write_model
from engines.initializers import add_initializer, add_integers
from engines.lower import lower
from engines.passes.fuse_cpu_products import FuseCpuProductsPass
from engines.passes.quantize_weights import QuantizeWeightsPass
from engines.passes.remove_split_concat import RemoveSplitConcatPass
from engines.passes.set_cache_type import SetCacheTypePass
from engines.passes.use_cpu_products import UseCpuProductsPass
from engines.quantised_kernels import kernels_of
from engines.quantize.blockwise import QuantizedBlocks, quantize_blocks
from engines.quantize.formats import WeightFormats
from engines.quantize.imported import GroupQuantizedTensor
from engines.registry import get
from engines.target import Target
from engines.weights import StreamedTensor
from helpers.cpu_ops import evaluate, rms_norm, round_rows, swiglu, weight_of_tiles
from helpers.targets import own

RNG = np.random.default_rng(3)
DIM = 48


class Rows(StreamedTensor):
    """An array as a streamed tensor."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        super().__init__(name, array.shape, ir.DataType.FLOAT)
        self._array = array.astype(np.float32)

    def blocks(self) -> Iterator[np.ndarray]:
        yield self._array.reshape(-1)


class Graph:
    """A graph of x [B, S, DIM] under construction; weights are random, by name."""

    def __init__(self) -> None:
        graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="products")
        self.model = ir.Model(graph, ir_version=11)
        self.arrays: dict[str, np.ndarray] = {}
        self.x = self.input("x", ["B", "S", DIM], ir.DataType.FLOAT)

    def input(self, name: str, dims: list[Any], dtype: ir.DataType) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))
        self.model.graph.inputs.append(value)
        return value

    def weight(self, name: str, *shape: int) -> ir.Value:
        self.arrays.setdefault(name, RNG.standard_normal(shape).astype(np.float32))
        return add_initializer(self.model, Rows(name, self.arrays[name]))

    def node(self, op_type: str, *inputs: ir.Value, num_outputs: int = 1, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, num_outputs=num_outputs)
        self.model.graph.append(node)
        return node.outputs[0]

    def product(self, x: ir.Value, name: str, num_outputs: int, num_inputs: int = DIM) -> ir.Value:
        transposed = self.node("Transpose", self.weight(name, num_outputs, num_inputs), perm=[1, 0])
        return self.node("MatMul", x, transposed)

    def norm(self, x: ir.Value, name: str = "norm", dim: int = DIM) -> ir.Value:
        self.arrays[name] = RNG.uniform(0.5, 2, dim).astype(np.float32)
        weight = add_initializer(self.model, ir.Tensor(self.arrays[name], name=name))
        return self.node("RMSNormalization", x, weight, axis=-1, epsilon=1e-5)

    def gate(self, joined: ir.Value, width: int) -> ir.Value:
        split = self.node("Split", joined, add_integers(self.model, "rows", [width, width]), num_outputs=2, axis=-1)
        up = split.producer().outputs[1]
        return self.node("Mul", self.node("Mul", split, self.node("Sigmoid", split)), up)

    def finish(self, *outputs: ir.Value) -> ir.Model:
        for i, value in enumerate(outputs):
            value.name, value.type = f"y{i}", ir.TensorType(ir.DataType.FLOAT)
            value.shape = ir.Shape([None] * 3)
            self.model.graph.outputs.append(value)
        return self.model

    def stored(self, name: str, num_outputs: int, num_inputs: int = DIM, bits: int = 8) -> np.ndarray:
        """Return what the tiles of a weight stand for; after the passes have run."""
        tiles = self.model.graph.initializers[f"{name}.t{bits}"].const_value.numpy()
        return weight_of_tiles(tiles, num_outputs, num_inputs, bits, 32)


def formats(bits: int = 8, block: int = 32) -> WeightFormats:
    return WeightFormats.from_rules([{"match": ["*"], "kind": "blockwise", "bits": bits, "block": block}])


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def fused(model: ir.Model) -> bool:
    """Use the kernels, fuse, and say whether something was fused."""
    assert UseCpuProductsPass(formats())(model).modified
    modified = FuseCpuProductsPass()(model).modified
    ir.passes.common.TopologicalSortPass()(model)
    return modified


def run(model: ir.Model, folder: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    write_model(model, folder / "model.onnx", with_weights=True)
    loaded = onnx.load(folder / "model.onnx")
    return list(evaluate(loaded, inputs).values())


def some_x(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape or (2, 3, DIM)).astype(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    return round_rows(x, 32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_one_node(bits: int, has_bias: bool, tmp_path: Path) -> None:
    graph = Graph()
    y = graph.product(graph.x, "w", 20)
    if has_bias:
        y = graph.node("Add", y, graph.weight("bias", 20))
    model = graph.finish(y)
    assert UseCpuProductsPass(formats(bits))(model).modified
    assert op_types(model) == [f"MatMulInt{bits}"]
    assert kernels_of(model) == {f"MatMulInt{bits}"}
    assert model.graph.opset_imports["qwen3vl.cpu"] == 1
    assert sorted(model.graph.initializers) == sorted([f"w.t{bits}"] + ["bias"] * has_bias)
    expected = rounded(x := some_x()) @ graph.stored("w", 20, bits=bits).T + graph.arrays.get("bias", 0)
    (found,) = run(model, tmp_path, x=x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    graph = Graph()
    ids = graph.input("ids", ["B", "S"], ir.DataType.INT64)
    rows = graph.node("Gather", graph.weight("embed", 30, DIM), ids)
    model = graph.finish(graph.product(graph.x, "embed", 30), rows)
    assert UseCpuProductsPass(formats(4, 128))(model).modified
    assert sorted(op_types(model)) == ["LookUpInt4", "MatMulInt4"]
    assert list(model.graph.initializers) == ["embed.t4"]
    # No block from 32 to 128 divides 48 columns: the format's is padded.
    assert {node.attributes["block_size"].as_int() for node in model.graph} == {128}
    chosen = np.array([[0, 29, 7]])
    _, found = run(model, tmp_path, x=some_x(), ids=chosen)
    tiles = np.fromfile(tmp_path / "model.onnx.data", np.uint8).reshape(2, -1)
    np.testing.assert_allclose(found, weight_of_tiles(tiles, 30, DIM, 4, 128)[chosen], rtol=1e-6)


def test_weights_without_a_format_and_other_gathers_stay() -> None:
    graph = Graph()
    columns = graph.node("Gather", graph.weight("w", 8, DIM), add_integers(graph.model, "i", [1]), axis=1)
    model = graph.finish(graph.product(graph.x, "v", 8), columns)
    assert not UseCpuProductsPass(WeightFormats(()))(model).modified
    assert UseCpuProductsPass(formats())(model).modified
    assert sorted(op_types(model)) == ["Gather", "MatMulInt8"]


class Held(GroupQuantizedTensor):
    """Codes of 4 bits in a block of 16, which our kernels do not read."""

    def quantized_rows(self) -> Iterator[QuantizedBlocks]:
        num_rows, num_columns = (int(n) for n in self.shape.numpy())
        yield quantize_blocks(some_x(num_rows, num_columns).reshape(-1, self.block), 4)


def test_codes_that_our_kernels_do_not_read_are_left_to_onnx_runtime() -> None:
    graph = Graph()
    held = add_initializer(graph.model, Held("held", (20, DIM), 4, 16))
    y = graph.node("MatMul", graph.x, graph.node("Transpose", held, perm=[1, 0]))
    model = graph.finish(y, graph.product(graph.x, "w", 20))
    rules = formats(4, 128)
    assert UseCpuProductsPass(rules)(model).modified and QuantizeWeightsPass(rules)(model).modified
    assert sorted(op_types(model)) == ["MatMulInt4", "MatMulNBits"]
    assert kernels_of(model) == {"MatMulInt4", "MatMulNBits.4"}
    (theirs,) = (node for node in model.graph if node.op_type == "MatMulNBits")
    assert theirs.attributes["block_size"].as_int() == 16  # the codes are kept


def test_a_norm_goes_into_all_products_of_it(tmp_path: Path) -> None:
    graph = Graph()
    normed = graph.norm(graph.x)
    model = graph.finish(graph.product(normed, "v", 20), graph.product(normed, "w", 7))
    assert fused(model)
    assert op_types(model) == ["MatMulInt8"] * 2
    x = some_x()
    f = rounded(rms_norm(x, graph.arrays["norm"], 1e-5))
    for found, name, rows in zip(run(model, tmp_path, x=x), "vw", (20, 7), strict=True):
        np.testing.assert_allclose(found, f @ graph.stored(name, rows).T, rtol=1e-5, atol=1e-5)


def test_a_norm_that_something_else_reads_stays() -> None:
    for other in (lambda graph, normed: graph.node("Gelu", normed), lambda graph, normed: normed):
        graph = Graph()
        normed = graph.norm(graph.x)
        model = graph.finish(graph.product(normed, "w", 20), other(graph, normed))
        assert not fused(model)
        assert "RMSNormalization" in op_types(model)


def test_a_gate_goes_into_the_product_after_it(tmp_path: Path) -> None:
    graph = Graph()
    joined = graph.product(graph.x, "gate_up", 80)
    model = graph.finish(graph.product(graph.gate(joined, 40), "down", DIM, 40))
    assert fused(model)
    assert op_types(model) == ["MatMulInt8"] * 2
    x = some_x()
    up = rounded(x) @ graph.stored("gate_up", 80).T
    (found,) = run(model, tmp_path, x=x)
    np.testing.assert_allclose(
        found, rounded(swiglu(up.astype(np.float32))) @ graph.stored("down", DIM, 40).T, rtol=1e-3
    )


def near_misses_of_a_gate() -> list[Callable[[Graph], ir.Value]]:
    def up_first(graph: Graph) -> ir.Value:
        split = graph.node("Split", graph.x, add_integers(graph.model, "rows", [24, 24]), num_outputs=2, axis=-1)
        gate = split.producer().outputs[1]
        return graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), split)

    def gate_is_used_elsewhere(graph: Graph) -> ir.Value:
        value = graph.gate(graph.x, 24)
        gate = next(node for node in graph.model.graph if node.op_type == "Split").outputs[0]
        graph.finish(graph.node("Gelu", gate))
        return value

    def other_axis(graph: Graph) -> ir.Value:
        sizes = add_integers(graph.model, "rows", [24, 24])
        transposed = graph.node("Transpose", graph.x, perm=[0, 2, 1])
        gate = graph.node("Split", transposed, sizes, num_outputs=2, axis=1)
        up = gate.producer().outputs[1]
        gated = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
        return graph.node("Transpose", gated, perm=[0, 2, 1])

    def another_activation(graph: Graph) -> ir.Value:
        split = graph.node("Split", graph.x, add_integers(graph.model, "rows", [24, 24]), num_outputs=2, axis=-1)
        return graph.node("Mul", graph.node("Mul", split, graph.node("Tanh", split)), split.producer().outputs[1])

    return [up_first, gate_is_used_elsewhere, other_axis, another_activation]


@pytest.mark.parametrize("gated", near_misses_of_a_gate(), ids=lambda each: each.__name__)
def test_what_is_no_gate_stays(gated: Callable[[Graph], ir.Value]) -> None:
    graph = Graph()
    model = graph.finish(graph.product(gated(graph), "down", DIM, 24))
    assert not fused(model)


@pytest.mark.parametrize("is_first", [False, True])
def test_a_residual_goes_into_the_product_before_it(is_first: bool, tmp_path: Path) -> None:
    graph = Graph()
    hidden = graph.product(graph.x, "v", DIM)
    y = graph.product(graph.norm(hidden), "w", DIM)
    total = graph.node("Add", *((hidden, y) if is_first else (y, hidden)))
    again = graph.node("Add", total, graph.product(graph.norm(total, "norm_2"), "u", DIM))
    model = graph.finish(again)
    assert fused(model)
    assert op_types(model) == ["MatMulInt8"] * 3
    x = some_x()
    h = rounded(x) @ graph.stored("v", DIM).T
    for norm, name in (("norm", "w"), ("norm_2", "u")):
        h = h + rounded(rms_norm(h.astype(np.float32), graph.arrays[norm], 1e-5)) @ graph.stored(name, DIM).T
    (found,) = run(model, tmp_path, x=x)
    np.testing.assert_allclose(found, h, rtol=1e-2, atol=0.05)


def test_a_value_that_might_broadcast_is_no_residual() -> None:
    """Shapes are not known inside the graph: what the product is not computed of stays."""
    graph = Graph()
    positions = graph.input("positions", ["S", DIM], ir.DataType.FLOAT)
    model = graph.finish(graph.node("Add", graph.product(graph.x, "w", DIM), graph.node("Gelu", positions)))
    assert not fused(model)


@pytest.mark.parametrize("case", ["other columns", "used elsewhere", "an output", "both sides"])
def test_near_misses_of_a_residual_stay(case: str) -> None:
    graph = Graph()
    columns = 1 if case == "other columns" else DIM
    y = graph.product(graph.norm(graph.x), "w", columns)
    total = graph.node("Add", y, y if case == "both sides" else graph.x)
    outputs = [total]
    if case == "used elsewhere":
        outputs.append(graph.node("Gelu", y))
    if case == "an output":
        outputs.append(y)
    fused(graph.finish(*outputs))
    assert "Add" in op_types(graph.model)


def test_a_value_is_not_cut_up_to_be_joined_again() -> None:
    def split_and_joined(order: tuple[int, ...], axis: int) -> ir.Model:
        graph = Graph()
        parts = graph.node("Split", graph.x, add_integers(graph.model, "rows", [16] * 3), num_outputs=3, axis=-1)
        outputs = parts.producer().outputs
        joined = graph.node("Concat", *(outputs[i] for i in order), axis=axis)
        return graph.finish(graph.node("Gelu", joined))

    model = split_and_joined((0, 1, 2), -1)
    assert RemoveSplitConcatPass()(model).modified
    assert op_types(model) == ["Gelu"]
    for order, axis in (((1, 0, 2), -1), ((0, 1), -1), ((0, 1, 2), 1)):
        assert not RemoveSplitConcatPass()(split_and_joined(order, axis)).modified


def lowered(bundle: Bundle, graph: str, target: Target) -> ir.Model:
    return lower(bundle.graphs[graph].clone(), target, bundle.config, target.passes(target.formats))


@pytest.mark.parametrize("name", ["ort-cpu-int8", "ort-cpu-int4"])
def test_a_layer_of_the_decoder_is_five_nodes(name: str, demo_bundle: Bundle) -> None:
    model = lowered(demo_bundle, DECODER, own(name))
    num_layers = demo_bundle.config.text.num_layers
    ours = Counter(node.op_type for node in model.graph if node.domain == "qwen3vl.cpu")
    assert sum(ours.values()) == 5 * num_layers + 2  # the table, and the head
    assert ours["DecodeAttention"] == num_layers
    # What is left computes positions, puts the rows of images in their places and picks those that get logits.
    assert len(model.graph) - sum(ours.values()) < 30
    assert not [node for node in model.graph if node.domain == "com.microsoft"]
    assert not {"RMSNormalization", "Sigmoid", "Split", "Concat"} & set(op_types(model))


def test_products_of_the_vision_tower_take_biases_and_residuals(demo_bundle: Bundle) -> None:
    model = lowered(demo_bundle, VISION, own("ort-cpu-int4"))
    products = [node for node in model.graph if node.op_type == "MatMulInt8"]
    assert all(node.inputs[2] is not None for node in products)
    residuals = [node for node in products if len(node.inputs) == 5 and node.inputs[4] is not None]
    assert len(residuals) == 2 * demo_bundle.config.vision.depth
    # Positions are the same for all images of a call, so their Add broadcasts.
    assert op_types(model).count("Add") == 1


def test_the_decoder_of_experts_keeps_experts_and_router(demo_moe_bundle: Bundle) -> None:
    model = lowered(demo_moe_bundle, DECODER, own("ort-cpu-int4"))
    found = Counter(op_types(model))
    config = demo_moe_bundle.config.text
    num_mixtures = sum(config.experts_of(i) is not None for i in range(config.num_layers))
    assert found["QMoE"] == found["FusedMatMul"] == num_mixtures
    assert found["DecodeAttention"] == config.num_layers
    assert found["RMSNormalization"] == found["Split"] == 0


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_cache_of_another_type(bits: int, demo_bundle: Bundle) -> None:
    model, text = lowered(demo_bundle, DECODER, own("ort-cpu-int4")), demo_bundle.config.text
    scales = RNG.uniform(0.1, 1, (text.num_layers, 2, text.num_kv_heads, text.head_dim)).astype(np.float32)
    assert SetCacheTypePass([bits] * text.num_layers, None if bits == 16 else scales)(model).modified
    suffix, dtype, row = {
        16: ("Float16", ir.DataType.FLOAT16, text.head_dim),
        8: ("Int8", ir.DataType.INT8, text.head_dim),
        4: ("Int4", ir.DataType.UINT8, text.head_dim // 2),
    }[bits]
    nodes = [node for node in model.graph if node.op_type == f"DecodeAttention{suffix}"]
    assert len(nodes) == text.num_layers
    for layer, node in enumerate(nodes):
        assert len(node.inputs) == (8 if bits == 16 else 10)
        for i, value in enumerate(node.inputs[8:]):
            np.testing.assert_array_equal(value.const_value.numpy(), scales[layer, i])
    caches = [each for each in (*model.graph.inputs, *model.graph.outputs) if "_key_values." in each.name]
    assert len(caches) == 4 * text.num_layers
    assert {(each.dtype, each.shape[-1]) for each in caches} == {(dtype, row)}
    assert f"DecodeAttention{suffix}" in kernels_of(model)
    assert not SetCacheTypePass([16])(lowered(demo_bundle, VISION, own("ort-cpu-int4"))).modified


class WholeGraph:
    """The demo's decoder, lowered for our own kernels in 8 bits, and its inputs."""

    def __init__(self, bundle: Bundle) -> None:
        self.text = bundle.config.text
        self.capacity, self.num_tokens = 12, 7
        self.ids = RNG.integers(0, self.text.vocab_size, (1, self.num_tokens))

    def inputs(self, start: int, end: int, caches: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        steps = np.arange(start, end)[None]
        return {
            "input_ids": self.ids[:, start:end],
            "position_ids": np.repeat(steps[None], 3, 0),
            "visual_rows": np.full((1, end - start), -1),
            "visual_embeds": np.zeros((3, 1, self.text.hidden_size), np.float32),
            "past_lengths": np.array([start]),
            "logits_positions": steps - start,
            **caches,
        }

    def empty(self, dtype: str, row: int) -> dict[str, np.ndarray]:
        shape = (1, self.text.num_kv_heads, self.capacity, row)
        names = [f"past_key_values.{i}.{kind}" for i in range(self.text.num_layers) for kind in ("key", "value")]
        return {name: np.zeros(shape, dtype) for name in names}

    def logits(self, path: Path, cuts: list[int], dtype: str, row: int) -> np.ndarray:
        """Return the logits of all tokens, run in pieces that end at `cuts`."""
        model, caches, found = onnx.load(path), self.empty(dtype, row), []
        for start, end in zip([0, *cuts], [*cuts, self.num_tokens], strict=True):
            outputs = evaluate(model, self.inputs(start, end, caches))
            found.append(outputs["logits"])
            caches = {name.replace("present", "past"): outputs[name] for name in outputs if "present" in name}
        return np.concatenate(found, 1)


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_the_decoder_computes_what_it_computed_before(bits: int, demo_bundle: Bundle, tmp_path: Path) -> None:
    whole = WholeGraph(demo_bundle)
    model = lowered(demo_bundle, DECODER, own("ort-cpu-int8"))
    dtype = {32: "float32", 16: "float16", 8: "int8"}[bits]
    if bits < 32:
        shape = (whole.text.num_layers, 2, whole.text.num_kv_heads, whole.text.head_dim)
        SetCacheTypePass([bits] * shape[0], np.full(shape, 0.1, np.float32) if bits == 8 else None)(model)
    write_model(model, tmp_path / "own.onnx", with_weights=True)
    portable = lower(demo_bundle.graphs[DECODER].clone(), without_kernels(), demo_bundle.config, ())
    write_model(portable, tmp_path / "float.onnx", with_weights=True)
    expected = whole.logits(tmp_path / "float.onnx", [], "float32", whole.text.head_dim)
    found = whole.logits(tmp_path / "own.onnx", [4, 5], dtype, whole.text.head_dim)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < {32: 0.02, 16: 0.02, 8: 0.1}[bits]
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def without_kernels() -> Target:
    """A target with the standard bodies of all operators."""
    import dataclasses

    return dataclasses.replace(get("ort-cpu-fp32"), native_ops={}, passes=lambda _: ())

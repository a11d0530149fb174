"""Quantised weights: codes, layouts and the kernels that read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from engines.external_data import write_model
from engines.initializers import add_initializer
from engines.passes.fuse_shared_input import FuseSharedInputPass
from engines.passes.quantize_weights import QuantizeWeightsPass
from engines.quantize.blockwise import QuantizedBlocks, pack_codes, quantize_blocks, quantize_rows_int8
from engines.quantize.formats import WeightFormat, WeightFormats
from engines.quantize.imported import GroupQuantizedTensor
from engines.quantize.tensors import BlockwiseWeight, row_chunks
from engines.quantize.transposed import RowwiseWeight
from engines.weights import StreamedTensor
from runtime.errors import BundleError, TargetError
from runtime.kernels import EXACT_PRODUCTS, known_kernels, needs_exact_products

RNG = np.random.default_rng(7)


class ArrayTensor(StreamedTensor):
    """An array as a streamed tensor, in blocks that end in the middle of rows."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        super().__init__(name, array.shape, ir.DataType.FLOAT)
        self._array = array.astype(np.float32)

    def blocks(self) -> Iterator[np.ndarray]:
        flat = self._array.reshape(-1)
        for start in range(0, flat.size, 1000):
            yield flat[start : start + 1000]


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def pages(tensor: StreamedTensor) -> int:
    return -(-tensor.nbytes // 4096) * 4096


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    parts = [(packed >> (i * bits)) & ((1 << bits) - 1) for i in range(8 // bits)]
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1)


def dequantized(weight: BlockwiseWeight, num_columns: int) -> np.ndarray:
    packed, scales, zeros = (t.numpy() for t in (weight.packed, weight.scales, weight.zero_points))
    codes = unpack(packed, weight.bits).reshape(*scales.shape, weight.block).astype(np.float32)
    zeros = unpack(zeros, weight.bits)[:, : scales.shape[1]].astype(np.float32)
    return ((codes - zeros[..., None]) * scales[..., None]).reshape(len(scales), -1)[:, :num_columns]


def formats_of(**values: Any) -> WeightFormats:
    return WeightFormats.from_rules([{"match": ["*"], **values}])


@pytest.mark.portable
def test_the_search_is_better_than_the_whole_range_and_never_far_from_a_fine_search() -> None:
    weights = normal(400, 128)

    def error(shrinks: tuple[float, ...]) -> float:
        return float(((quantize_blocks(weights, 4, shrinks=shrinks).dequantize() - weights) ** 2).mean())

    chosen = error((1.0, 0.9, 0.8, 0.7))
    assert chosen < 0.95 * error((1.0,))
    assert chosen < 1.03 * error(tuple(np.linspace(1, 0.5, 26)))


@pytest.mark.portable
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_round_to_the_nearest_step(bits: int) -> None:
    weights = normal(50, 32)
    quantized = quantize_blocks(weights, bits)
    inside = (quantized.codes > 0) & (quantized.codes < (1 << bits) - 1)
    distance = np.abs(quantized.dequantize() - weights) / quantized.scales[:, None]
    assert quantized.codes.max() <= (1 << bits) - 1
    assert inside.mean() > 0.8
    assert distance[inside].max() <= 0.5 + 1e-3


@pytest.mark.portable
def test_a_block_of_zeros_and_a_block_of_one_sign_are_exact_where_they_must() -> None:
    weights = np.zeros((2, 16), np.float32)
    weights[1] = np.arange(1, 17)
    result = quantize_blocks(weights, 4).dequantize()
    assert not result[0].any()
    assert np.abs(result[1] - weights[1]).max() <= 0.75


@pytest.mark.portable
def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    weights = normal(300, 64)
    importance = np.where(np.arange(64) < 8, 100, 1).astype(np.float32)
    plain, weighted = quantize_blocks(weights, 4), quantize_blocks(weights, 4, importance_G=importance)

    def weighted_error(blocks: Any) -> float:
        return float((((blocks.dequantize() - weights) ** 2) * importance).mean())

    assert weighted_error(weighted) < 0.97 * weighted_error(plain)


@pytest.mark.portable
def test_rows_in_int8_are_symmetric() -> None:
    weights = normal(5, 33)
    weights[2] = 0
    codes, scales = quantize_rows_int8(weights)
    negated, _ = quantize_rows_int8(-weights)
    assert np.array_equal(codes, -negated)
    assert np.abs(codes).max(1).tolist() == [127, 127, 0, 127, 127]
    assert np.abs(codes * scales[:, None] - weights).max() <= scales.max() / 2 + 1e-6


@pytest.mark.portable
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_keeps_the_first_code_low_and_pads_with_zeros(bits: int) -> None:
    codes = RNG.integers(0, 1 << bits, (3, 5)).astype(np.uint8)
    assert np.array_equal(unpack(pack_codes(codes, bits), bits)[:, :5], codes)


@pytest.mark.portable
def test_scales_read_before_the_codes_are_the_same() -> None:
    array = normal(40, 96)
    first, second = (BlockwiseWeight(ArrayTensor("w", array), 4, 32) for _ in range(2))
    scales = first.scales.numpy()
    assert np.array_equal(dequantized(first, 96), dequantized(second, 96))
    assert np.array_equal(scales, second.scales.numpy())


@pytest.mark.portable
def test_row_chunks_are_whole_rows_in_order() -> None:
    array = normal(2500, 700)
    assert np.array_equal(np.concatenate([c.copy() for c in row_chunks(ArrayTensor("w", array))]), array)


@pytest.mark.portable
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [lambda t: BlockwiseWeight(t, 4, 32).packed, lambda t: RowwiseWeight(t).transposed])
def test_a_weight_that_is_not_finite_is_named(bad: float, kind: Any) -> None:
    array = normal(3000, 700)
    array[2345, 678] = bad
    with pytest.raises(BundleError, match=f"layers.3.weight: {bad} at row 2345, column 678"):
        list(kind(ArrayTensor("layers.3.weight", array)).blocks())


@pytest.mark.portable
def test_a_format_that_no_kernel_reads_is_refused() -> None:
    with pytest.raises(TargetError, match="3 bits in blocks of 128"):
        WeightFormat("blockwise", 3, 128)
    with pytest.raises(TargetError, match="blocks of 48"):
        WeightFormat("blockwise", 4, 48)
    with pytest.raises(TargetError, match="weight format 'int4'"):
        formats_of(kind="int4")


@pytest.mark.portable
def test_the_first_rule_that_matches_counts() -> None:
    rules = [
        {"match": ["a.head.*", "b.*"], "kind": "rowwise"},
        {"match": ["a.*"], "kind": "blockwise", "bits": 4, "block": 32},
    ]
    formats = WeightFormats.from_rules(rules)
    assert str(formats.format_of("a.head.weight")) == "int8, one scale a row, activations by tensor"
    assert str(formats.format_of("a.tail.weight")) == "int4, block 32"
    assert str(formats.format_of("c.weight")) == "float32"


def product_model(weights: dict[str, np.ndarray], *, bias: np.ndarray | None = None, is_tied: bool = False) -> ir.Model:
    """x · Wᵀ (+ bias) for each weight, as the traced graphs have it; with `is_tied` x are rows of the first weight."""
    first = next(iter(weights.values()))
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="products")
    model = ir.Model(graph, ir_version=11)
    values = {name: add_initializer(model, ArrayTensor(name, array)) for name, array in weights.items()}
    if is_tied:
        x = ir.Value(name="ids", shape=ir.Shape(["M"]), type=ir.TensorType(ir.DataType.INT64))
        graph.inputs.append(x)
        node = ir.node("Gather", [next(iter(values.values())), x], name="lookup")
        graph.append(node)
        operand = node.outputs[0]
        operand.name = "rows"
        operand.shape, operand.type = ir.Shape(["M", first.shape[1]]), ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(operand)
    else:
        operand = ir.Value(name="x", shape=ir.Shape(["M", first.shape[1]]), type=ir.TensorType(ir.DataType.FLOAT))
        graph.inputs.append(operand)
    for name, value in values.items():
        transpose = ir.node("Transpose", [value], attributes={"perm": [1, 0]})
        nodes = [transpose, ir.node("MatMul", [operand, transpose.outputs[0]], name=f"product of {name}")]
        if bias is not None:
            added = add_initializer(model, ArrayTensor(f"{name}.bias", bias))
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], added]))
        graph.extend(nodes)
        output = nodes[-1].outputs[0]
        output.name, output.type = f"y.{name}", ir.TensorType(ir.DataType.FLOAT)
        output.shape = ir.Shape(["M", len(weights[name])])
        graph.outputs.append(output)
    return model


def run(model: ir.Model, folder: Path, x: np.ndarray) -> list[np.ndarray]:
    write_model(model, folder / "model.onnx", with_weights=True)
    options = ort.SessionOptions()
    if needs_exact_products(known_kernels()):
        options.add_session_config_entry(*EXACT_PRODUCTS)
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return [np.asarray(y) for y in session.run(None, {session.get_inputs()[0].name: x})]


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.portable
@pytest.mark.parametrize("num_columns", [96, 160, 128, 4304])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_blockwise_product_is_that_of_the_dequantised_weight(
    num_columns: int, bits: int, has_bias: bool, tmp_path: Path
) -> None:
    weight, x, bias = normal(24, num_columns), normal(3, num_columns), normal(24) if has_bias else None
    model = product_model({"w": weight}, bias=bias)
    assert QuantizeWeightsPass(formats_of(kind="blockwise", bits=bits, block=128))(model).modified
    (found,) = run(model, tmp_path, x)
    assert op_types(model) == ["MatMulNBits"]
    codes = BlockwiseWeight(ArrayTensor("w", weight), bits, 128)
    expected = x @ dequantized(codes, num_columns).T + (0 if bias is None else bias)
    # The kernel rounds each block of x to 8 bits: half a step of 1/127 of the block's largest value.
    assert relative_error(found, expected) < 0.01
    assert relative_error(expected, x @ weight.T + (0 if bias is None else bias)) < {4: 0.15, 8: 0.01}[bits]


@pytest.mark.portable
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_rowwise_product_is_near_the_float_product(has_bias: bool, tmp_path: Path) -> None:
    weight, x, bias = normal(24, 160), normal(5, 160), normal(24) if has_bias else None
    model = product_model({"w": weight}, bias=bias)
    assert QuantizeWeightsPass(formats_of(kind="rowwise"))(model).modified
    (found,) = run(model, tmp_path, x)
    assert op_types(model) == ["DynamicQuantizeMatMul"]
    assert relative_error(found, x @ weight.T + (0 if bias is None else bias)) < 0.02


@pytest.mark.portable
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_scale_per_token_keeps_a_huge_token_from_drowning_the_others(has_bias: bool, tmp_path: Path) -> None:
    weight, x, bias = normal(24, 160), normal(5, 160), normal(24) if has_bias else None
    x[0] *= 1000
    x[1] = 0
    expected = x @ weight.T + (0 if bias is None else bias)
    errors = {}
    for activations in ("token", "tensor"):
        model = product_model({"w": weight}, bias=bias)
        QuantizeWeightsPass(formats_of(kind="rowwise", activations=activations))(model)
        (found,) = run(model, tmp_path, x)
        errors[activations] = relative_error(found[2:], expected[2:])
        assert np.allclose(found[1], expected[1], atol=1e-6)
    assert errors["token"] < 0.02
    assert errors["tensor"] > 0.5


@pytest.mark.portable
@pytest.mark.parametrize("has_gelu", [False, True])
def test_a_scale_per_token_gives_a_row_the_same_bits_in_any_company(has_gelu: bool, tmp_path: Path) -> None:
    x = normal(16, 160) * np.logspace(-2, 3, 16, dtype=np.float32)[:, None]
    model = product_model({"w": normal(24, 160)}, bias=normal(24))
    if has_gelu:
        (product,) = (node for node in model.graph if node.op_type in ("MatMul", "Gemm"))
        gelu = ir.node("Gelu", [product.inputs[0]])
        product.replace_input_with(0, gelu.outputs[0])
        model.graph.insert_before(model.graph[0], gelu)
    QuantizeWeightsPass(formats_of(kind="rowwise", activations="token"))(model)
    (middle,) = (name for name in model.graph.initializers if name.startswith("quantize.middle"))
    assert middle == ("quantize.middle.32" if has_gelu else "quantize.middle.128")
    (together,) = run(model, tmp_path, x)
    for row in range(16):
        (alone,) = run(model, tmp_path, x[row : row + 1])
        assert alone[0].tobytes() == together[row].tobytes()


@pytest.mark.portable
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 32), (4, 128)])
def test_a_tied_table_is_stored_once(bits: int, block: int, tmp_path: Path) -> None:
    table, ids = normal(50, 96), np.array([3, 49, 0], np.int64)
    model = product_model({"embed.weight": table}, is_tied=True)
    assert QuantizeWeightsPass(formats_of(kind="blockwise", bits=bits, block=block))(model).modified
    rows, logits = run(model, tmp_path, ids)
    assert sorted(op_types(model)) == ["GatherBlockQuantized", "MatMulNBits"]
    # Blocks of a table have no padding: 128 does not divide 96, 32 does.
    weight = BlockwiseWeight(ArrayTensor("embed.weight", table), bits, 32)
    expected = dequantized(weight, 96)
    assert np.allclose(rows, expected[ids], atol=1e-6)
    assert relative_error(logits, rows @ expected.T) < 0.01
    stored = (tmp_path / "model.onnx.data").stat().st_size
    assert stored == pages(weight.packed) + pages(weight.scales) + weight.zero_points.nbytes


@pytest.mark.portable
def test_a_table_that_no_block_divides_is_refused() -> None:
    model = product_model({"embed.weight": normal(50, 40)}, is_tied=True)
    with pytest.raises(TargetError, match=r"embed\.weight: no block of .* divides its 40 columns"):
        QuantizeWeightsPass(formats_of(kind="blockwise", bits=4, block=32)).call(model)


@pytest.mark.portable
def test_weights_without_a_format_stay(tmp_path: Path) -> None:
    weight, x = normal(8, 32), normal(2, 32)
    model = product_model({"w": weight})
    assert not QuantizeWeightsPass(WeightFormats(()))(model).modified
    assert np.allclose(run(model, tmp_path, x)[0], x @ weight.T, atol=1e-5)


@pytest.mark.portable
def test_products_of_one_input_are_joined(tmp_path: Path) -> None:
    weights = {f"a.{name}.weight": normal(rows, 32) for name, rows in (("q", 16), ("k", 8), ("v", 8))}
    x = normal(3, 32)
    model = product_model(weights)
    assert FuseSharedInputPass()(model).modified
    assert op_types(model) == ["Transpose", "MatMul", "Split"]
    assert "a.{q,k,v}.weight" in model.graph.initializers
    for found, weight in zip(run(model, tmp_path, x), weights.values(), strict=True):
        assert np.allclose(found, x @ weight.T, atol=1e-5)


@pytest.mark.portable
def test_products_of_different_formats_stay_apart() -> None:
    model = product_model({"a.q.weight": normal(16, 32), "a.k.weight": normal(8, 32)})
    assert not FuseSharedInputPass(lambda key: "q" in key)(model).modified
    assert op_types(model).count("MatMul") == 2


class HeldTensor(GroupQuantizedTensor):
    """Codes that a checkpoint holds, of an array that blocks of 4 bits stand for exactly."""

    def __init__(self, name: str, array: np.ndarray, block: int) -> None:
        super().__init__(name, array.shape, 4, block)
        self.quantized = quantize_blocks(array.reshape(-1, block), 4)

    def quantized_rows(self) -> Iterator[QuantizedBlocks]:
        yield self.quantized


@pytest.mark.portable
@pytest.mark.parametrize("block", [32, 64])
def test_codes_that_a_checkpoint_holds_are_kept_in_their_own_blocks(block: int, tmp_path: Path) -> None:
    held = HeldTensor("w", normal(16, 128), block)
    model = product_model({"w": np.zeros((16, 128), np.float32)})
    model.graph.initializers["w"].const_value = held
    QuantizeWeightsPass(formats_of(kind="blockwise", bits=4, block=128))(model)
    (node,) = model.graph
    assert node.attributes["block_size"].as_int() == block
    packed = model.graph.initializers["w.q4"].const_value.numpy()
    assert np.array_equal(unpack(packed, 4).reshape(-1, block), held.quantized.codes)


@pytest.mark.portable
def test_weights_held_in_different_blocks_are_not_joined() -> None:
    model = product_model({f"a.{name}.weight": np.zeros((8, 64), np.float32) for name in "qk"})
    for name, block in (("q", 32), ("k", 64)):
        model.graph.initializers[f"a.{name}.weight"].const_value = HeldTensor(f"a.{name}.weight", normal(8, 64), block)
    assert not FuseSharedInputPass()(model).modified

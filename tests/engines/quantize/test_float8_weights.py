"""Weights in float8 for ONNX Runtime on CUDA: codes and scales, nodes, values on the CPU, the demo, wrong scales."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import configs
from engines import registry
from engines.build import build_engine
from engines.bundle import DECODER, Bundle
from engines.external_data import write_model
from engines.lower import lower
from engines.onnxruntime.storage import CPU_STORAGE
from engines.passes.half_precision import HalfPrecisionPass
from engines.passes.quantize_weights import QuantizeWeightsPass
from engines.quantize.calibration import needs_prompts
from engines.quantize.float8_blocks import Float8Weight, quantize_blocks_float8
from engines.quantize.formats import WeightFormat, WeightFormats
from engines.targets import ort_cuda
from engines.tensorrt.storage import TensorRtStorage
from engines.weights import StreamedTensor
from qwen3vl_export.demo.data import held_out
from qwen3vl_export.parity.lowered import open_graph, open_model
from qwen3vl_export.parity.verify import verify
from runtime.errors import BundleError, TargetError
from runtime.manifest import LOWERED_NAME, FileRecord, Manifest, sha256_of
from runtime.messages import user_message

FloatArray = NDArray[np.float32]
RNG = np.random.default_rng(18)
TARGET = registry.get("ort-cuda-fp8")
PRODUCT, LOOKUP = "MatMulBlockQuantizedFp8Weight", "GatherBlockQuantized"
FLOAT8 = ir.DataType.FLOAT8E4M3FN


class Streamed(StreamedTensor):
    def __init__(self, values: FloatArray) -> None:
        super().__init__("layer.weight", values.shape, ir.DataType.FLOAT)
        self._values = values

    def blocks(self) -> Iterator[NDArray[Any]]:
        yield self._values.reshape(-1)


def dequantized(codes_NK: NDArray[Any], scales_NJ: FloatArray, block: int) -> FloatArray:
    return codes_NK.astype(np.float32) * np.repeat(scales_NJ, block, 1)[:, : codes_NK.shape[1]]


def arrays(weight: Float8Weight) -> tuple[NDArray[Any], FloatArray]:
    """Codes and scales, in the order in which they are written."""
    return tuple(np.concatenate(list(t.blocks())).reshape(t.shape.numpy()) for t in weight.tensors)  # type: ignore[return-value]


# Codes and scales


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([16, 32, 64]), st.integers(-30, 30), st.integers(0, 999))
def test_each_block_reaches_448_and_rounds_to_the_nearest(
    num_rows: int, num_columns: int, block: int, exponent: int, seed: int
) -> None:
    values = np.random.default_rng(seed).normal(size=(num_rows, num_columns)).astype(np.float32) * 2.0**exponent
    codes, scales = quantize_blocks_float8(values, block)
    assert scales.shape == (num_rows, -(-num_columns // block)) and scales.dtype == np.float32
    for start in range(0, num_columns, block):
        part = np.abs(codes[:, start : start + block].astype(np.float32))
        assert (part.max(1) == 448).all()
    found = dequantized(codes, scales, block)
    # Half a step: 3 bits after the first, and below 2^-6 steps of 2^-9.
    half_steps = np.maximum(np.abs(codes.astype(np.float32)) * 2.0**-4, 2.0**-10)
    limit = half_steps * np.repeat(scales, block, 1)[:, :num_columns] * 1.001
    assert (np.abs(found - values) <= limit).all()


def test_a_block_of_zeros_is_zero_and_the_smallest_numbers_divide_nothing_by_zero() -> None:
    values = np.zeros((2, 32), np.float32)
    values[1, :16] = 1e-44
    codes, scales = quantize_blocks_float8(values, 16)
    assert scales[0].tolist() == [1, 1] and (scales > 0).all()
    assert not codes[0].astype(np.float32).any()
    assert np.isfinite(codes.astype(np.float32)).all()


def test_a_weight_is_streamed_in_parts_and_counts_its_scales_in_float32() -> None:
    values = RNG.normal(size=(6000, 200)).astype(np.float32)  # more than one part
    expected = quantize_blocks_float8(values, 128)
    weight = Float8Weight(Streamed(values), 128)
    codes, scales = arrays(weight)
    assert np.array_equal(codes.view(np.uint8), expected[0].view(np.uint8)) and np.array_equal(scales, expected[1])
    assert [(t.name, t.dtype) for t in weight.tensors] == [
        ("layer.weight.f8", FLOAT8),
        ("layer.weight.scales", ir.DataType.FLOAT),
    ]
    assert weight.num_bytes(2) == weight.num_bytes(4) == 6000 * 200 + 6000 * 2 * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    values = np.ones((4, 32), np.float32)
    values[2, 5] = bad
    with pytest.raises(BundleError, match=r"layer\.weight: (nan|inf) at row 2, column 5"):
        arrays(Float8Weight(Streamed(values), 16))


def test_formats_that_nothing_reads_are_refused() -> None:
    with pytest.raises(TargetError, match="float8 in blocks of 100: no kernel reads it"):
        WeightFormat("float8_weights", block=100)
    kept = WeightFormat("float8_weights", block=128)
    assert str(kept) == "float8 (E4M3), block 128"
    for storage in (CPU_STORAGE, TensorRtStorage()):
        with pytest.raises(TargetError, match=r"layer\.weight: float8 \(E4M3\), block 128"):
            storage.product(Streamed(np.ones((4, 32), np.float32)), kept, is_table=False)
    assert CPU_STORAGE.table(Streamed(np.ones((4, 32), np.float32)), kept) is None


# Nodes and their values


def product(values: FloatArray, block: int, *, bias: bool = False, lookup: bool = False) -> ir.Model:
    """A model of one product, and a lookup in the same weight, in float16 with the weight in float8."""
    rows, columns = values.shape
    numbers = ", ".join(str(i) for i in range(rows))
    model = ir.from_onnx_text(
        f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float[M,{columns}] x, int64[M] ids, float[{rows},{columns}] w) => (float[M,{rows}] y, float[M,{columns}] row)
        <float[{rows}] b = {{{numbers}}}> {{
            t = Transpose <perm = [1, 0]> (w)
            p = MatMul (x, t)
            y = {"Add (p, b)" if bias else "Identity (p)"}
            row = {"Gather <axis = 0> (w, ids)" if lookup else "Identity (x)"}
        }}"""
    )
    old = model.graph.inputs.pop()
    value = ir.Value(name="layer.weight", shape=ir.Shape((rows, columns)), type=ir.TensorType(ir.DataType.FLOAT))
    value.const_value = Streamed(values)
    model.graph.register_initializer(value)
    ir.convenience.replace_all_uses_with(old, value)
    formats = WeightFormats.from_rules([{"match": ["*"], "kind": "float8_weights", "block": block}])
    assert QuantizeWeightsPass(formats, ort_cuda.STORAGE)(model).modified
    HalfPrecisionPass(ir.DataType.FLOAT16, ort_cuda.FLOAT32_OPS["float16"])(model)
    return model


@pytest.mark.parametrize(("columns", "block"), [(192, 128), (40, 16), (24, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_cpu_computes_what_the_codes_stand_for(columns: int, block: int, bias: bool, tmp_path: Path) -> None:
    values = RNG.normal(size=(7, columns)).astype(np.float32)
    x, ids = RNG.normal(size=(3, columns)).astype(np.float32), np.int64([6, 0, 6])
    write_model(product(values, block, bias=bias, lookup=True), tmp_path / "m.onnx", with_weights=True)
    found, rows = open_graph(tmp_path / "m.onnx").run(["y", "row"], {"x": x, "ids": ids})
    table = dequantized(*quantize_blocks_float8(values, block), block)
    weights = table.astype(np.float16).astype(np.float32)
    expected = x.astype(np.float16).astype(np.float32) @ weights.T + (np.arange(7) if bias else 0)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=5e-3)
    # The weights as they were are further away.
    exact = x @ values.T + (np.arange(7) if bias else 0)
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(found - exact)
    assert np.array_equal(rows, table[ids])


def test_a_lookup_reads_the_tensors_of_the_product_and_scales_stay_float32() -> None:
    model = product(RNG.normal(size=(5, 192)).astype(np.float32), 128, bias=True, lookup=True)
    (multiply,) = (node for node in model.graph if node.op_type == PRODUCT)
    (lookup,) = (node for node in model.graph if node.op_type == LOOKUP)
    x, codes, scales, activations, bias = multiply.inputs
    assert activations is None and codes is lookup.inputs[0] and scales is lookup.inputs[2]
    assert [v.dtype for v in (x, codes, scales, bias) if v is not None] == [
        ir.DataType.FLOAT16,
        FLOAT8,
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
    ]
    assert [node.outputs[0].dtype for node in (multiply, lookup)] == [ir.DataType.FLOAT16, ir.DataType.FLOAT]
    assert multiply.attributes["block_size"].as_int() == lookup.attributes["block_size"].as_int() == 128
    assert "layer.weight" not in model.graph.initializers


# The demo


@pytest.fixture(scope="module")
def demo_float8(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float8") / "lowered"
    build_engine(demo_bundle, TARGET, folder, runnable=False)
    return folder


def test_every_product_of_the_decoder_has_float8_weights_and_the_table_is_stored_once(demo_float8: Path) -> None:
    graph = onnx.load(demo_float8 / "decoder.onnx", load_external_data=False).graph
    counts = {kind: sum(node.op_type == kind for node in graph.node) for kind in (PRODUCT, LOOKUP, "FusedMatMul")}
    # q, k and v; o; gate and up; down, in four layers; the head.
    assert counts == {PRODUCT: 17, LOOKUP: 1, "FusedMatMul": 0}
    stored = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    assert len(stored) == 17
    assert not needs_prompts(TARGET)


def test_the_demo_passes_within_its_own_tolerances_and_answers(demo_float8: Path) -> None:
    report = verify(demo_float8, "demo", max_new_tokens=4)
    assert report.passed, report.render()
    assert report.precision == "fp8_weights"
    # It is float8 that is compared, and not float16 by mistake.
    assert max(check.value for check in report.checks if check.name == "values") > 5 * 0.0016
    model = open_model(demo_float8)
    example = held_out(0)
    question, answer = example.tasks["read"]
    assert model.generate(user_message(question, [example.image]), max_new_tokens=24).text.strip() == answer


def next_block(scales_NJ: FloatArray) -> FloatArray:
    """Give each block of a row the scale of the one before it."""
    return np.roll(scales_NJ, 1, 1)


def next_in_memory(scales_NJ: FloatArray) -> FloatArray:
    """Begin to read the scales one too late."""
    return np.roll(scales_NJ.reshape(-1), 1)


@pytest.mark.parametrize("fault", [next_block, next_in_memory])
def test_scales_that_are_off_by_one_block_in_one_weight_fail_verify(
    fault: Callable[[FloatArray], FloatArray], demo_float8: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "broken"
    shutil.copytree(demo_float8, copy)
    graph = onnx.load(copy / "decoder.onnx", load_external_data=False).graph
    name = next(node.input[2] for node in graph.node if node.op_type == PRODUCT and "down_proj" in node.input[1])
    (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    data = np.memmap(copy / "decoder.onnx.data", np.uint8, "r+")
    scales = data[int(place["offset"]) :][: int(place["length"])].view(np.float32)
    scales[:] = fault(np.array(scales).reshape(tensor.dims)).reshape(-1)
    data.flush()
    manifest = Manifest.read(copy, LOWERED_NAME)
    path = copy / "decoder.onnx.data"
    record = FileRecord(path.stat().st_size, sha256_of(path))
    dataclasses.replace(manifest, files={**manifest.files, path.name: record}).write(copy, LOWERED_NAME)
    report = verify(copy, "demo", max_new_tokens=4)
    assert not report.passed
    limit = configs.load("tolerances")["fp8_weights"]["cache_relative"]
    assert max(check.value for check in report.checks if check.name == "values") > limit


def test_experts_have_eight_bit_integers(demo_moe_bundle: Bundle) -> None:
    model = lower(
        demo_moe_bundle.graphs[DECODER].clone(), TARGET, demo_moe_bundle.config, TARGET.passes(TARGET.formats)
    )
    experts = [node for node in model.graph if node.op_type == "QMoE"]
    assert [node.attributes["expert_weight_bits"].as_int() for node in experts] == [8] * 4
    # Attention and the head; routers multiply in half precision.
    assert sum(node.op_type == PRODUCT for node in model.graph) == 2 * 4 + 1
    assert all(value.dtype != FLOAT8 for name, value in model.graph.initializers.items() if ".mlp.gate." in name)

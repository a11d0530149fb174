"""Products in float8 and weights in nvfp4: codes against the formats' definitions, calibration, the lowered graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

import configs
from demo_training.prompts import training_prompts
from engines import registry
from engines.build import build_engine
from engines.build_options import BuildOptions
from engines.bundle import DECODER, VISION, Bundle
from engines.external_data import write_model
from engines.passes import dequantize_weights
from engines.passes.dequantize_weights import DequantizeWeightsPass
from engines.quantize import calibration, float8
from engines.quantize.calibration import calibrate
from engines.quantize.formats import FLOAT8, NVFP4, WeightFormats
from engines.quantize.input_ranges import RangedWeight, ranged_weights
from engines.quantize.products import products_by_input
from engines.quantize.transposed import Nvfp4Weight
from engines.weights import StreamedTensor
from helpers.command_line import call
from qwen3vl_export.cli import export
from qwen3vl_export.demo.data import held_out
from qwen3vl_export.parity.lowered import open_model
from qwen3vl_export.parity.metrics import difference
from runtime.errors import BundleError, ParityError, UsageError
from runtime.model import Qwen3VLModel

FloatArray = NDArray[np.float32]
RNG = np.random.default_rng(5)
OPTIONS = BuildOptions(max_context=256, prefill_chunk=64, patch_buckets=(256,))
E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])


class Streamed(StreamedTensor):
    def __init__(self, values: FloatArray) -> None:
        super().__init__("layer.weight", values.shape, ir.DataType.FLOAT)
        self._values = values

    def blocks(self) -> Iterator[NDArray[Any]]:
        yield self._values.reshape(-1)


def e4m3_values() -> NDArray[np.float64]:
    """Value of each code, by the definition: exponent bias 7, subnormals, no infinities, 0x7f is NaN."""
    codes = np.arange(256)
    exponents, fractions = (codes >> 3) & 15, codes & 7
    magnitudes = np.where(exponents > 0, (1 + fractions / 8) * 2.0 ** (exponents - 7), fractions / 8 * 2.0**-6)
    magnitudes[(codes & 127) == 127] = np.nan
    return np.where(codes >= 128, -magnitudes, magnitudes)


def nearest(values: FloatArray, magnitudes: NDArray[Any]) -> NDArray[np.int64]:
    """Index of the nearest magnitude, of two as near the even one."""
    distances = np.abs(np.abs(values.astype(np.float64))[..., None] - magnitudes)
    least = distances.min(-1, keepdims=True)
    index = np.argmax(distances == least, -1)
    has_two = (distances == least).sum(-1) == 2
    return np.where(has_two & (index % 2 == 1), index + 1, index)


def test_e4m3_is_rounded_to_nearest_even_and_saturates() -> None:
    magnitudes = e4m3_values()[:127]
    middles = ((magnitudes[1:] + magnitudes[:-1]) / 2).astype(np.float32)
    drawn = np.abs([*RNG.normal(0, 60, 4000), *RNG.normal(0, 0.01, 500)])
    values = np.concatenate([drawn, middles, [449, 1e6]]).astype(np.float32)
    codes = float8.to_e4m3(np.concatenate([values, -values])).view(np.uint8)
    expected = nearest(values, magnitudes)
    assert np.array_equal(codes, np.concatenate([expected, expected + 128]))
    assert float8.to_e4m3(np.float32([1e30, -1e30])).astype(float).tolist() == [448, -448]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-9, 1e4))
def test_rows_keep_three_bits_whatever_their_size(seed: int, size: float) -> None:
    weights = (np.random.default_rng(seed).normal(size=(4, 32)) * size).astype(np.float32)
    weights[1] = 0
    codes, scales = float8.quantize_rows_float8(weights)
    assert np.array_equal(scales, scales.astype(np.float16).astype(np.float32)) and scales[1] == 1
    found = codes.astype(np.float32) * scales[:, None]
    assert not found[1].any()
    # Half a step of 3 bits, or of the subnormals; and what float16 rounds off a scale, in which the largest saturates.
    limit = np.abs(weights) / 16 + scales[:, None] * 2.0**-10 + 2.0**-25 * 448
    assert (np.abs(found - weights) <= limit).all()


def test_nvfp4_is_the_best_of_the_scales_that_are_tried() -> None:
    weights = np.vstack([RNG.normal(0, 0.02, (300, 16)), RNG.normal(0, 1e-4, (20, 16)), np.zeros((2, 16))])
    weights_MG = weights.astype(np.float32)
    largest = np.abs(weights_MG).max()
    global_scale = float8.nvfp4_global_scale(float(largest))
    assert global_scale == np.float16(largest / (6 * 448))
    codes, scales = float8.quantize_blocks_nvfp4(weights_MG, global_scale)
    for row, code, scale in zip(weights_MG, codes, scales, strict=True):
        tried = []
        for stretch in (1.0, 1.5, 0.9):
            wanted = np.float32(np.abs(row).max() / np.float32(6) / np.float32(global_scale)) * np.float32(stretch)
            stored = np.float32(min(wanted, 448)).astype(ml_dtypes.float8_e4m3fn)
            step = np.float32(np.float16(np.float32(stored) * np.float32(global_scale)))
            chosen = nearest(row / step, E2M1) if step else np.zeros(16, np.int64)
            values = np.sign(row) * E2M1[chosen] * step
            tried.append((float(np.square(values - row).sum()), float(stored), values))
        _, stored, values = min(tried, key=lambda each: each[0])
        assert float(scale) == stored
        assert np.array_equal(code.astype(np.float32) * float8.nvfp4_steps(scale[None], global_scale), values)
    assert not codes[-2:].astype(np.float32).any() and np.isfinite(scales.astype(np.float32)).all()


def test_nvfp4_of_a_weight_that_is_all_zero_is_zero() -> None:
    weight = Nvfp4Weight(Streamed(np.zeros((3, 32), np.float32)))
    assert not np.concatenate(list(weight.codes.blocks())).any()
    assert next(weight.global_scale.blocks()).tolist() == [1]
    assert np.isfinite(next(weight.block_scales.blocks()).astype(np.float32)).all()


def product(values: FloatArray, kind: str, bias: bool, largest_input: float | None = None) -> ir.Model:
    """A model of one product, with the pass of that kind applied."""
    rows, columns = values.shape
    model = ir.from_onnx_text(
        f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float[M,{columns}] x, float[{rows},{columns}] w) => (float[M,{rows}] y)
        <float[{rows}] b = {{{", ".join(str(i) for i in range(rows))}}}> {{
            t = Transpose <perm = [1, 0]> (w)
            p = MatMul (x, t)
            {"y = Add (p, b)" if bias else "y = Identity (p)"}
        }}"""
    )
    old = model.graph.inputs.pop()
    tensor: StreamedTensor = Streamed(values)
    value = ir.Value(name="layer.weight", shape=ir.Shape((rows, columns)), type=ir.TensorType(ir.DataType.FLOAT))
    value.const_value = tensor if largest_input is None else RangedWeight(tensor, largest_input)
    model.graph.register_initializer(value)
    ir.convenience.replace_all_uses_with(old, value)
    assert DequantizeWeightsPass(WeightFormats.from_rules([{"match": ["*"], "kind": kind}]))(model).modified
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_onnx_runtime_computes_what_the_float8_codes_stand_for(bias: bool, tmp_path: Path) -> None:
    values, x = (RNG.normal(size=shape).astype(np.float32) for shape in ((7, 40), (3, 40)))
    x[0, :2] = [500, -500]  # beyond the range that calibration saw
    write_model(product(values, FLOAT8, bias, 4.0), tmp_path / "model.onnx", with_weights=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    codes, scales = float8.quantize_rows_float8(values)
    scale = dequantize_weights.input_scale(4.0)
    rounded = float8.to_e4m3(x / scale).astype(np.float32) * scale
    assert rounded[0, 0] == -rounded[0, 1] == 448 * scale < 500
    expected = rounded @ (codes.astype(np.float32) * scales[:, None]).T + (np.arange(7) if bias else 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(6, 64), (5, 24), (3, 40)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_reference_evaluator_computes_what_the_nvfp4_codes_stand_for(
    rows: int, columns: int, bias: bool, tmp_path: Path
) -> None:
    # 24 and 40 columns are no multiple of the block; 5 and 3 rows do not fill the bytes of a column.
    values, x = (RNG.normal(size=shape).astype(np.float32) for shape in ((rows, columns), (4, columns)))
    write_model(product(values, NVFP4, bias), tmp_path / "model.onnx", with_weights=True)
    model = onnx.load(tmp_path / "model.onnx")
    names = {node.op_type: node.output[0] for node in model.graph.node}
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(names["DequantizeLinear"]))
    found, dequantized = ReferenceEvaluator(model).run(None, {"x": x})
    padded = np.pad(values, ((0, 0), (0, -columns % 16)))
    global_scale = float8.nvfp4_global_scale(float(np.abs(values).max()))
    codes, scales = float8.quantize_blocks_nvfp4(padded.reshape(-1, 16), global_scale)
    # In float32, as the graph is here; in half precision, of which the search knows, the steps are rounded too.
    steps = scales.astype(np.float32) * np.float32(global_scale)
    expected = (codes.astype(np.float32) * steps[:, None]).reshape(padded.shape)
    assert np.array_equal(dequantized, expected.T)
    assert not expected[:, columns:].any()
    np.testing.assert_allclose(
        found, x @ expected[:, :columns].T + (np.arange(rows) if bias else 0), rtol=1e-4, atol=1e-4
    )
    assert np.square(expected[:, :columns] - values).mean() < 0.012 * np.square(values).mean()


@pytest.mark.parametrize("kind", [FLOAT8, NVFP4])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(kind: str, bad: float, tmp_path: Path) -> None:
    values = np.ones((4, 32), np.float32)
    values[2, 5] = bad
    model = product(values, kind, False, 1.0)
    with pytest.raises(BundleError, match=r"layer\.weight: (nan|inf) at row 2, column 5"):
        write_model(model, tmp_path / "model.onnx", with_weights=True)


# The demo.


def calibrated(demo: Bundle, folder: Path, prompts: int = 16) -> Bundle:
    folder.mkdir()
    return calibrate(demo, registry.get("trt-fp8"), training_prompts(prompts), folder).applied_to(demo)


def lowered(bundle: Bundle, target: str, folder: Path) -> Path:
    build_engine(bundle, registry.get(target), folder, runnable=False, options=OPTIONS)
    return folder


def question(index: int) -> list[dict[str, Any]]:
    text, _ = held_out(index).tasks["read"]
    image = {"type": "image", "image": held_out(index).image}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def fp8(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    return lowered(calibrated(demo_bundle, folder / "work"), "trt-fp8", folder / "lowered")


def differences(found: Path, expected: Path) -> list[float]:
    model, reference = open_model(found), Qwen3VLModel.from_engine(expected)
    pairs = ((model.logits(question(i)), reference.logits(question(i))) for i in range(3))
    return [difference(*pair).scaled for pair in pairs]


def test_the_demo_in_float8_is_near_float32_and_answers(fp8: Path, demo_engine: Path) -> None:
    limit = configs.load("tolerances")["fp8"]["logits_scaled"]
    found = differences(fp8, demo_engine)
    # Above 0.01: it is float8 that is compared, and not float16 by mistake.
    assert 0.01 < max(found) <= limit
    model = open_model(fp8)
    for i in range(3):
        assert model.generate(question(i), max_new_tokens=24).text.strip() == held_out(i).tasks["read"][1]


def test_scales_that_are_ten_times_too_small_are_found(
    demo_bundle: Bundle, demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = dequantize_weights.input_scale
    monkeypatch.setattr(dequantize_weights, "input_scale", lambda largest: scale(largest / 10))
    found = differences(lowered(calibrated(demo_bundle, tmp_path / "w"), "trt-fp8", tmp_path / "fp8"), demo_engine)
    assert min(found) > configs.load("tolerances")["fp8"]["logits_scaled"]


def test_each_distinct_input_is_rounded_once(fp8: Path) -> None:
    counts = {}
    for name in (VISION, DECODER):
        graph = ir.load(fp8 / f"{name}.onnx").graph
        rounded = [node for node in graph if node.op_type == "QuantizeLinear"]
        assert len({node.inputs[0] for node in rounded}) == len(rounded)
        weights = [node for node in graph if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()]
        assert {node.inputs[0].dtype for node in weights} == {ir.DataType.FLOAT8E4M3FN}
        assert {node.inputs[1].dtype for node in (*rounded, *weights)} == {ir.DataType.FLOAT16}
        counts[name] = len(rounded), len(weights)
    # Four blocks of qkv, proj, fc1, fc2; layers 2 and 3 of q/k/v, o, gate/up, down.
    assert counts == {VISION: (16, 16), DECODER: (8, 14)}


def test_the_manifest_records_the_calibration(fp8: Path) -> None:
    record = open_model(fp8).manifest.source["calibration"]
    assert (record["method"], record["prompts"], len(record["sha256"])) == ("input ranges", 16, 64)


@pytest.mark.parametrize("max_bytes", [100_000, 1 << 30])
def test_ranges_are_the_largest_magnitudes_of_the_whole_graph(
    max_bytes: int, demo_bundle: Bundle, tmp_path: Path
) -> None:
    target, prompts = registry.get("trt-fp8"), training_prompts(3)
    samples = calibration.record_prompts(demo_bundle, prompts).images
    model, products = products_by_input(demo_bundle, VISION, target, FLOAT8)
    model.graph.outputs[:] = list(products)
    for x in products:
        x.dtype = ir.DataType.FLOAT
    write_model(model, tmp_path / "whole.onnx", with_weights=True)
    session = ort.InferenceSession(str(tmp_path / "whole.onnx"), providers=["CPUExecutionProvider"])
    runs = [session.run(None, dict(sample)) for sample in samples]
    expected = {
        found.key: max(np.abs(run[index]).max() for run in runs)
        for index, group in enumerate(products.values())
        for found in group
    }
    found = ranged_weights(demo_bundle, VISION, target, samples, tmp_path, max_bytes)
    ranges = {key: weight.largest_input for key, weight in found.items()}
    assert len(ranges) == 16
    assert ranges == pytest.approx(expected, rel=1e-5)


def test_an_input_that_overflows_is_named(demo_bundle: Bundle, tmp_path: Path) -> None:
    target = registry.get("trt-fp8")
    samples = calibration.record_prompts(demo_bundle, training_prompts(1)).images
    samples[0]["pixel_values"] = np.full_like(samples[0]["pixel_values"], np.nan)
    with pytest.raises(BundleError, match=r"blocks\.0\.attn\.qkv\.weight: its input is not finite"):
        ranged_weights(demo_bundle, VISION, target, samples, tmp_path, 1 << 30)


@pytest.mark.parametrize("target", ["trt-fp8", "trt-rtx-fp8"])
def test_missing_calibration_is_said_before_any_work(target: str, tmp_path: Path) -> None:
    more = ("--no-compile",) if target == "trt-fp8" else ()
    output = tmp_path / "engine"
    code, _, err = call(export.app, "no/such-model", "--target", target, "--output", str(output), *more)
    assert code == 2 and f"{target} needs calibration prompts" in err and "--calibration DIR" in err
    assert not output.exists()


def test_a_build_without_calibration_leaves_nothing(demo_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.weight: no calibration prompt has shown the range of its input"):
        lowered(demo_bundle, "trt-fp8", tmp_path / "lowered")
    assert not (tmp_path / "lowered").exists()


def test_text_alone_calibrates_no_vision_tower(demo_bundle: Bundle, tmp_path: Path) -> None:
    prompt = training_prompts(1)[0]
    text_only = dataclasses.replace(prompt, messages=[{"role": "user", "content": "digit"}])
    bundle = calibrate(demo_bundle, registry.get("trt-fp8"), [text_only], tmp_path).applied_to(demo_bundle)
    with pytest.raises(UsageError, match=r"model\.visual\.blocks\.0\..*no calibration prompt") as raised:
        lowered(bundle, "trt-fp8", tmp_path / "lowered")
    assert "with an image" in str(raised.value.remedy)


def test_calibration_would_not_change_nvfp4(demo_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="trt-nvfp4 stores no weights in blocks of integers"):
        calibrate(demo_bundle, registry.get("trt-nvfp4"), training_prompts(1), tmp_path)


def test_the_demo_in_nvfp4_has_the_codes_of_its_weights(demo_bundle: Bundle, tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider has no kernel for it, so each DequantizeLinear is evaluated alone."""
    folder = lowered(demo_bundle, "trt-nvfp4", tmp_path / "lowered")
    with pytest.raises(ParityError, match="kernel for DequantizeLinear"):
        open_model(folder)
    graph = ir.load(folder / "decoder.onnx").graph
    weights = {str(v.name): v.const_value for v in demo_bundle.graphs[DECODER].graph.initializers.values()}
    nodes = [node for node in graph if node.op_type == "DequantizeLinear" and node.inputs[1].producer() is not None]
    assert len(nodes) == 2 * 7 + 1  # layers 2 and 3, and the head
    for node in nodes:
        name = str(node.inputs[0].name).removesuffix(".f4")
        values = weights[name].numpy()
        scales_node = node.inputs[1].producer()
        found = evaluate(scales_node, node)
        assert found.dtype == np.float16
        global_scale = float8.nvfp4_global_scale(float(np.abs(values).max()))
        codes, scales = float8.quantize_blocks_nvfp4(values.reshape(-1, 16), global_scale)
        steps = float8.nvfp4_steps(scales, global_scale)
        expected = (codes.astype(np.float32) * steps[:, None]).astype(np.float16).reshape(values.shape)
        assert np.array_equal(found.T, expected), name
        error = np.square(expected.astype(np.float32) - values).mean() / np.square(values).mean()
        assert error < 0.01, name


def evaluate(*nodes: ir.Node | None) -> NDArray[Any]:
    """Return the output of the last of some nodes whose other inputs are initializers."""
    chain = [node for node in nodes if node is not None]
    inputs = {value for node in chain for value in node.inputs if value is not None and value.is_initializer()}
    tensors = [ir.to_proto(value.const_value) for value in inputs if value.const_value is not None]
    output = onnx.helper.make_empty_tensor_value_info(str(chain[-1].outputs[0].name))
    graph = onnx.helper.make_graph([ir.to_proto(node) for node in chain], "g", [], [output])
    for value, tensor in zip(inputs, tensors, strict=True):
        raw = onnx.helper.make_tensor(
            str(value.name), int(tensor.data_type), list(tensor.dims), value.const_value.tobytes(), raw=True
        )
        graph.initializer.append(raw)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=11)
    (found,) = ReferenceEvaluator(model).run(None, {})
    return np.asarray(found)

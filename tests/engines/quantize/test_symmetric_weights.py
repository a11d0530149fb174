"""4-bit weights without zero points after DequantizeLinear."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from engines.external_data import write_model
from engines.passes.dequantize_weights import DequantizeWeightsPass
from engines.quantize.blockwise import QuantizedBlocks, quantize_blocks
from engines.quantize.formats import WeightFormats
from engines.quantize.gptq import factorize, quantize_rows
from engines.quantize.imported import GroupQuantizedTensor
from engines.quantize.transposed import SymmetricWeight
from engines.weights import StreamedTensor
from runtime.errors import TargetError


class Streamed(StreamedTensor):
    def __init__(self, values: NDArray[np.float32]) -> None:
        super().__init__("layer.weight", values.shape, ir.DataType.FLOAT)
        self._values = values

    def blocks(self) -> Iterator[NDArray[Any]]:
        yield self._values.reshape(-1)


class Held(GroupQuantizedTensor):
    def __init__(self, shape: tuple[int, int], quantized: QuantizedBlocks) -> None:
        super().__init__("layer.weight", shape, 4, quantized.codes.shape[1])
        self._quantized = quantized

    def quantized_rows(self) -> Iterator[QuantizedBlocks]:
        yield self._quantized


def unpacked(weight: SymmetricWeight) -> NDArray[np.float32]:
    """What the codes and scales stand for, [N, J · G]."""
    num_padded, num_rows = weight.codes.shape.numpy()
    packed = np.concatenate(list(weight.codes.blocks()))
    nibbles = np.stack((packed & 15, packed >> 4), -1).reshape(-1)[: num_padded * num_rows]
    codes_KN = ((nibbles.astype(np.int8) ^ 8) - 8).reshape(num_padded, num_rows)
    scales_JN = np.concatenate(list(weight.scales.blocks())).reshape(weight.scales.shape.numpy())
    return (codes_KN * np.repeat(scales_JN, num_padded // len(scales_JN), 0)).T.astype(np.float32)


def product(values: NDArray[np.float32], block: int, bias: bool, x: NDArray[np.float32], folder: Any) -> Any:
    rows, columns = values.shape
    tensor = Streamed(values)
    add = "y = Add (p, b)" if bias else "y = Identity (p)"
    model = ir.from_onnx_text(
        f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float[M,{columns}] x, float[{rows},{columns}] w) => (float[M,{rows}] y)
        <float[{rows}] b = {{{", ".join(str(i) for i in range(rows))}}}> {{
            t = Transpose <perm = [1, 0]> (w)
            p = MatMul (x, t)
            {add}
        }}"""
    )
    old = model.graph.inputs.pop()
    value = ir.Value(name="layer.weight", shape=ir.Shape((rows, columns)), type=ir.TensorType(ir.DataType.FLOAT))
    value.const_value = tensor
    model.graph.register_initializer(value)
    ir.convenience.replace_all_uses_with(old, value)
    formats = WeightFormats.from_rules(
        [{"match": ["*"], "kind": "blockwise", "bits": 4, "block": block, "symmetric": True}]
    )
    result = DequantizeWeightsPass(formats)(model)
    assert result.modified and "DequantizeLinear" in {node.op_type for node in model.graph}
    path = folder / "model.onnx"
    write_model(model, path, with_weights=True)
    options = ort.SessionOptions()
    # Else DequantizeLinear and MatMul become MatMulNBits, which rounds x to 8 bits.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (y,) = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return y


@pytest.mark.portable
@pytest.mark.parametrize(("rows", "columns"), [(6, 256), (7, 192), (5, 96), (3, 160)])
@pytest.mark.parametrize("bias", [True, False])
def test_onnx_runtime_computes_what_the_codes_stand_for(rows: int, columns: int, bias: bool, tmp_path: Any) -> None:
    # 192, 96 and 160 columns are no multiple of the block; 7, 5 and 3 rows do not fill the bytes of a column.
    rng = np.random.default_rng(0)
    values, x = rng.normal(size=(rows, columns)).astype(np.float32), rng.normal(size=(4, columns)).astype(np.float32)
    stored = unpacked(SymmetricWeight(Streamed(values), 128))
    assert stored.shape == (rows, -(-columns // 128) * 128)
    assert not stored[:, columns:].any()
    expected = x @ stored[:, :columns].T + (np.arange(rows) if bias else 0)
    np.testing.assert_allclose(product(values, 128, bias, x, tmp_path), expected, rtol=1e-4, atol=1e-4)
    assert np.square(stored[:, :columns] - values).mean() < 0.02 * np.square(values).mean()


@pytest.mark.portable
def test_symmetric_blocks_have_the_middle_as_zero_and_scales_above_it() -> None:
    rng = np.random.default_rng(1)
    weights = np.vstack([rng.normal(size=(5, 64)), np.zeros((1, 64)), rng.uniform(3, 4, (1, 64))]).astype(np.float32)
    found = quantize_blocks(weights, 4, symmetric=True)
    assert (found.zero_points == 8).all() and (found.scales > 0).all()
    assert not found.dequantize()[5].any()
    # Half of the largest step, but where the range was narrowed.
    worst = np.abs(found.dequantize() - weights).max(1)
    assert (worst <= 0.5 * np.abs(weights).max(1) / 7 + 0.3 * np.abs(weights).max(1)).all()
    naive = np.clip(np.rint(weights[:5] / (np.abs(weights[:5]).max(1) / 7)[:, None]), -8, 7)
    naive_error = ((naive * (np.abs(weights[:5]).max(1) / 7)[:, None] - weights[:5]) ** 2).sum()
    assert ((found.dequantize()[:5] - weights[:5]) ** 2).sum() < naive_error


@pytest.mark.portable
def test_calibrated_rounding_is_symmetric_where_asked_and_better_than_none() -> None:
    rng = np.random.default_rng(2)
    weights = rng.normal(size=(16, 128)).astype(np.float32)
    inputs = rng.normal(size=(400, 128)) @ rng.normal(size=(128, 128))
    gram = (inputs.T @ inputs).astype(np.float32)
    found = quantize_rows(weights, factorize(gram, 64, symmetric=True), 4)
    assert (found.zero_points == 8).all()
    plain = quantize_blocks(weights.reshape(-1, 64), 4, symmetric=True)

    def cost(blocks: QuantizedBlocks) -> float:
        error = blocks.dequantize().reshape(weights.shape) - weights
        return float(np.einsum("nk,kl,nl->", error, gram, error))

    assert cost(found) < 0.7 * cost(plain)


@pytest.mark.portable
def test_codes_of_a_checkpoint_are_kept_if_they_have_no_zero_points_of_their_own() -> None:
    rng = np.random.default_rng(3)
    weights = rng.normal(1, 1, size=(4, 128)).astype(np.float32)
    symmetric, asymmetric = (quantize_blocks(weights.reshape(-1, 64), 4, symmetric=flag) for flag in (True, False))
    assert (asymmetric.zero_points != 8).any()
    kept = unpacked(SymmetricWeight(Held((4, 128), symmetric), 64))
    np.testing.assert_allclose(kept, symmetric.dequantize().reshape(4, 128), rtol=1e-6)
    rounded = unpacked(SymmetricWeight(Held((4, 128), asymmetric), 64))
    again = quantize_blocks(asymmetric.dequantize(), 4, symmetric=True)
    np.testing.assert_allclose(rounded, again.dequantize().reshape(4, 128), rtol=1e-6)


@pytest.mark.portable
@pytest.mark.parametrize("rule", [{"bits": 8, "block": 128}, {"bits": 4, "block": 32}])
def test_a_format_that_tensorrt_cannot_read_is_an_error(rule: dict[str, int], tmp_path: Any) -> None:
    tensor = Streamed(np.zeros((4, 128), np.float32))
    model = ir.from_onnx_text(
        """<ir_version: 11, opset_import: ["" : 24]>
        g (float[M,128] x, float[4,128] w) => (float[M,4] y) { t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t) }"""
    )
    old = model.graph.inputs.pop()
    value = ir.Value(name="layer.weight", shape=ir.Shape((4, 128)), type=ir.TensorType(ir.DataType.FLOAT))
    value.const_value = tensor
    model.graph.register_initializer(value)
    ir.convenience.replace_all_uses_with(old, value)
    formats = WeightFormats.from_rules([{"match": ["*"], "kind": "blockwise", "symmetric": True, **rule}])
    with pytest.raises(TargetError, match=r"layer\.weight"):
        DequantizeWeightsPass(formats)(model)

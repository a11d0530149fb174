"""The experts on ONNX Runtime's CPU kernels: float32 and few bits against the reference, ties, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import configs
from engines import registry
from engines.external_data import write_model
from engines.lower import lower
from engines.passes.choose_experts_kernel import ChooseExpertsKernelPass
from engines.quantize.blockwise import quantize_blocks
from engines.quantize.formats import WeightFormats
from engines.quantize.tensors import ProducedTensor
from helpers.experts_op import TOP_K, Arrays, model_of, padded, random_inputs, with_ties
from qwen3vl_export.ops import mixture_of_experts
from runtime.errors import TargetError
from runtime.model_config import ModelConfig


def lowered(inputs: Arrays, bits: int, block: int = 32) -> ir.Model:
    rules = [{"match": ["*"], "kind": "blockwise", "bits": bits, "block": block}] if bits else []
    config = ModelConfig.from_hf(configs.load("models/tiny-moe"))
    passes = [ChooseExpertsKernelPass(WeightFormats.from_rules(rules))]
    return lower(model_of(inputs), registry.get("ort-cpu-fp32"), config, passes)


def run(model: ir.Model, x: np.ndarray[Any, Any], folder: Path) -> np.ndarray[Any, Any]:
    write_model(model, folder / "m.onnx", with_weights=True)
    (found,) = ort.InferenceSession(folder / "m.onnx").run(None, {"x": x})
    return found


def rounded(weights: np.ndarray[Any, Any], bits: int, block: int) -> np.ndarray[Any, Any]:
    return quantize_blocks(weights.reshape(-1, block), bits).dequantize().reshape(weights.shape)


@pytest.mark.parametrize("num_tokens", [(1, 1), (3, 1), (2, 9)])
@pytest.mark.parametrize(("bits", "tolerance"), [(0, 1e-6), (8, 0.02), (4, 0.02)])
def test_kernels_equal_the_reference(tmp_path: Path, num_tokens: tuple[int, int], bits: int, tolerance: float) -> None:
    inputs = padded(random_inputs(num_tokens))
    found = run(lowered(inputs, bits), inputs["x"], tmp_path)
    # The block is 16, not 32: rows of 48 have no other.
    exact = {name: rounded(inputs[name], bits, 16) if bits else inputs[name] for name in ("gate_up", "down")}
    expected = mixture_of_experts.reference(**{**inputs, **exact}, top_k=TOP_K)
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)
    if bits == 4:  # the reference with the weights as they were is further away than the kernel's own rounding
        plain = mixture_of_experts.reference(**inputs, top_k=TOP_K)
        assert np.linalg.norm(found - plain) > 3 * tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("bits", [0, 8])
def test_the_lower_index_wins_a_tie(tmp_path: Path, bits: int) -> None:
    inputs = padded(with_ties(random_inputs((1, 5))))
    found = run(lowered(inputs, bits), inputs["x"], tmp_path)
    without_last = {**inputs, "down": inputs["down"].copy()}
    without_last["down"][6] = 0
    np.testing.assert_array_equal(run(lowered(without_last, bits), inputs["x"], tmp_path), found)
    for expert in (1, 2, 4):
        broken = {**inputs, "down": inputs["down"].copy()}
        broken["down"][expert] = 0
        assert np.abs(run(lowered(broken, bits), inputs["x"], tmp_path) - found).max() > 0.1


def test_weights_are_stored_once_and_in_few_bits() -> None:
    inputs = padded(random_inputs((1, 1)))
    model = lowered(inputs, 4)
    (node,) = (node for node in model.graph if node.op_type == "QMoE")
    shapes = {value.name: list(value.shape.numpy()) for value in node.inputs if value is not None and value.shape}
    assert shapes["mlp.experts.gate_up_proj.interleaved.q4"] == [7, 96, 16]
    assert shapes["mlp.experts.down_proj.scales"] == [7, 32, 3]
    assert shapes["mlp.experts.down_proj.zero_points"] == [7, 32, 2]
    streamed = [v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, ProducedTensor)]
    assert len(streamed) == 6


def test_what_no_kernel_reads_is_refused() -> None:
    with pytest.raises(TargetError, match=r"no block of 16, .* divides rows of 24 and 20"):
        lowered(random_inputs((1, 1)), 4)
    formats = WeightFormats.from_rules([{"match": ["*"], "kind": "rowwise"}])
    with pytest.raises(TargetError, match=r"gate_up_proj: int8, one scale a row.*no kernel"):
        lower(
            model_of(padded(random_inputs((1, 1)))),
            registry.get("ort-cpu-fp32"),
            ModelConfig.from_hf(configs.load("models/tiny-moe")),
            [ChooseExpertsKernelPass(formats)],
        )

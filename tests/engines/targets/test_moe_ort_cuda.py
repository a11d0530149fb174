"""Mixtures of experts for ONNX Runtime on CUDA: values and routing on the CPU, placement, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import configs
from engines import registry
from engines.build import build_engine
from engines.bundle import DECODER, Bundle
from engines.cuda_kernels import KernelListing, check_placement
from engines.external_data import write_model
from engines.lower import lower
from engines.passes.choose_experts_kernel import ChooseExpertsKernelPass
from engines.passes.half_precision import HalfPrecisionPass
from engines.quantize.blockwise import quantize_blocks
from engines.quantize.formats import WeightFormats
from engines.target import Target
from engines.targets import ort_cuda
from helpers.engines import build
from helpers.experts_op import TOP_K, Arrays, model_of, padded, random_inputs, with_ties
from helpers.host_device import CPU
from qwen3vl_export.demo.data import held_out
from qwen3vl_export.ops import mixture_of_experts
from qwen3vl_export.parity.lowered import open_graph
from qwen3vl_export.parity.verify import verify
from runtime.errors import TargetError
from runtime.manifest import Manifest
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.model_config import ModelConfig
from runtime.sessions.ort_cuda import OrtCudaSession

TARGETS = registry.load_family("ort_cuda")
HIDDEN, WIDTH, BLOCK = 64, 128, 64
# The largest relative error of the output that rounding every tensor to float16 makes; measured 1e-3.
FLOAT16_ERROR = 2e-3


def inputs_of(num_tokens: tuple[int, int]) -> Arrays:
    inputs = padded(random_inputs(num_tokens), HIDDEN, WIDTH)
    # Sums of about 1, as after a norm.
    return {**inputs, "gate_up": inputs["gate_up"] / np.sqrt(HIDDEN), "down": inputs["down"] / np.sqrt(WIDTH)}


def shape_of(inputs: Arrays) -> ModelConfig:
    config = ModelConfig.from_hf(configs.load("models/tiny-moe"))
    assert config.text.experts is not None
    chosen = dataclasses.replace(config.text.experts, num_experts=len(inputs["down"]), top_k=TOP_K)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, experts=chosen))


def lowered(inputs: Arrays, bits: int = 0) -> ir.Model:
    """Lower one op as ort-cuda-* does: float16, or blocks of 64 without zero points."""
    rules = [{"match": ["mlp.experts.*"], "kind": "blockwise", "bits": bits, "block": 128, "symmetric": True}]
    formats = WeightFormats.from_rules(rules if bits else [])
    passes = [
        ChooseExpertsKernelPass(formats, ort_cuda.STORAGE),
        HalfPrecisionPass(ir.DataType.FLOAT16, ort_cuda.FLOAT32_OPS["float16"]),
    ]
    return lower(model_of(inputs), registry.get("ort-cuda-fp16"), shape_of(inputs), passes)


def run(model: ir.Model, x: np.ndarray[Any, Any], folder: Path) -> np.ndarray[Any, Any]:
    write_model(model, folder / "m.onnx", with_weights=True)
    (found,) = open_graph(folder / "m.onnx").run(None, {"x": x})
    return found


def rounded(weights: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    found = quantize_blocks(weights.reshape(-1, BLOCK), bits, symmetric=True)
    # The kernel's scales have the type of the activations.
    found = dataclasses.replace(found, scales=found.scales.astype(np.float16).astype(np.float32))
    return found.dequantize().reshape(weights.shape)


def relative(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# Values


@pytest.mark.parametrize("num_tokens", [(1, 1), (3, 1), (2, 9)])
# In 8 bits the CPU's kernel also rounds the input to 8 bits; CUDA's does not.
@pytest.mark.parametrize(("bits", "tolerance"), [(0, FLOAT16_ERROR), (8, 0.02), (4, FLOAT16_ERROR)])
def test_nodes_equal_the_reference(tmp_path: Path, num_tokens: tuple[int, int], bits: int, tolerance: float) -> None:
    inputs = inputs_of(num_tokens)
    found = run(lowered(inputs, bits), inputs["x"], tmp_path)
    exact = {name: rounded(inputs[name], bits) if bits else inputs[name] for name in ("gate_up", "down")}
    expected = mixture_of_experts.reference(**{**inputs, **exact}, top_k=TOP_K)
    assert relative(found, expected) < tolerance
    if bits == 4:  # the weights as they were are further away
        assert relative(found, mixture_of_experts.reference(**inputs, top_k=TOP_K)) > 10 * tolerance


Weights = np.ndarray[Any, Any]


def halves(rows: Weights) -> Weights:
    """All of gate, then all of up."""
    return np.concatenate([rows[:, 0::2], rows[:, 1::2]], 1)


def swapped(rows: Weights) -> Weights:
    """Up before gate."""
    return rows.reshape(len(rows), -1, 2, rows.shape[2])[:, :, ::-1].reshape(rows.shape)


def moved(rows: Weights) -> Weights:
    """Each expert's weights in the place of the next one's."""
    return np.roll(rows, 1, 0)


def negated(codes: Weights) -> Weights:
    """Codes as two's complement, which is how DequantizeLinear stores int4."""
    return codes ^ np.uint8(0x88)


def high_first(codes: Weights) -> Weights:
    """The first of two codes in the high half of a byte."""
    return codes << np.uint8(4) | codes >> np.uint8(4)


FAULTS: list[tuple[int, tuple[str, ...], Callable[[Weights], Weights]]] = [
    (0, ("gate_up_proj.interleaved",), halves),
    (0, ("gate_up_proj.interleaved",), swapped),
    (0, ("gate_up_proj.interleaved", "down_proj"), moved),
    (0, ("down_proj",), moved),
    (4, ("gate_up_proj.interleaved.q4", "gate_up_proj.interleaved.scales"), halves),
    (4, ("gate_up_proj.interleaved.q4", "gate_up_proj.interleaved.scales"), swapped),
    (4, ("gate_up_proj.interleaved.scales",), moved),
    (4, ("down_proj.q4", "down_proj.scales"), moved),
    (4, ("gate_up_proj.interleaved.q4", "down_proj.q4"), negated),
    (4, ("gate_up_proj.interleaved.q4", "down_proj.q4"), high_first),
]


@pytest.mark.parametrize(("bits", "names", "fault"), FAULTS)
def test_a_wrong_layout_is_seen(
    tmp_path: Path, bits: int, names: tuple[str, ...], fault: Callable[[Weights], Weights]
) -> None:
    inputs = inputs_of((2, 9))
    expected = run(lowered(inputs, bits), inputs["x"], tmp_path)
    broken = lowered(inputs, bits)
    for name in names:
        value = broken.graph.initializers[f"mlp.experts.{name}"]
        assert value.const_value is not None
        array = fault(value.const_value.numpy())
        value.const_value = ir.Tensor(np.ascontiguousarray(array), name=value.name)
    assert relative(run(broken, inputs["x"], tmp_path), expected) > 100 * FLOAT16_ERROR


# Routing


def routed(inputs: Arrays, folder: Path) -> tuple[Weights, Weights]:
    """Return the logits that the graph computes, in float16, and those that it gives to MoE."""
    model = lowered(inputs)
    (node,) = (node for node in model.graph if node.op_type == "MoE")
    (top,) = (node for node in model.graph if node.op_type == "TopK")
    given = [top.inputs[0], node.inputs[1]]
    for value, name in zip(given, ("logits", "given"), strict=True):
        assert value is not None and value.dtype == ir.DataType.FLOAT16
        value.name = name
        model.graph.outputs.append(value)
    write_model(model, folder / "m.onnx", with_weights=True)
    logits, masked = open_graph(folder / "m.onnx").run(["logits", "given"], {"x": inputs["x"]})
    return logits, masked


def weights_of(logits: Weights) -> Weights:
    """What the router of MoE and QMoE on CUDA makes of half logits, by its source: all in float32, without a choice."""
    exponentials = np.exp(logits.astype(np.float32) - logits.max(-1, keepdims=True).astype(np.float32))
    return exponentials / exponentials.sum(-1, keepdims=True)


@pytest.mark.parametrize("ties", [False, True])
def test_the_choice_is_forced_and_its_weights_are_those_of_float32(tmp_path: Path, ties: bool) -> None:
    inputs = inputs_of((2, 50))
    if ties:
        inputs = with_ties(inputs)
    logits, given = routed(inputs, tmp_path)
    # A stable sort by falling logit: of equal ones the lower index first.
    order = np.argsort(-logits.astype(np.float32), axis=-1, kind="stable")[:, :TOP_K]
    chosen = np.zeros(logits.shape, bool)
    np.put_along_axis(chosen, order, True, -1)
    assert np.array_equal(given > np.float16(-60000), chosen)
    # What a kernel makes of the others is 0, so it has no other choice, and renormalising changes nothing.
    found = weights_of(given)
    assert (found[~chosen] == 0).all() and (found[chosen] > 0).all()
    expected = np.where(chosen, weights_of(logits), 0)
    np.testing.assert_allclose(found, expected / expected.sum(-1, keepdims=True), atol=1e-6)
    if ties:
        first_left = np.argsort(-logits.astype(np.float32), axis=-1, kind="stable")[:, TOP_K]
        last = np.take_along_axis(logits, order[:, -1:], -1)
        assert (last == np.take_along_axis(logits, first_left[:, None], -1)).any(), "no tie at the border"


def test_half_logits_move_the_weights_by_little(tmp_path: Path) -> None:
    """Against a router in float32: rounding x, the router's weights and the logits to float16."""
    inputs = inputs_of((2, 50))
    _, given = routed(inputs, tmp_path)
    exact = inputs["x"].reshape(-1, HIDDEN).astype(np.float64) @ inputs["router_weight"].T
    exact[given < -60000] = -np.inf
    found = weights_of(given) - weights_of(exact)
    # Logits have a standard deviation of 4.7 here. Measured: 1.1e-3 at most.
    assert 0 < np.abs(found).max() < 2.5e-3


@pytest.mark.parametrize("bits", [0, 4])
def test_the_lower_index_wins_a_tie(tmp_path: Path, bits: int) -> None:
    inputs = with_ties(inputs_of((1, 5)))
    found = run(lowered(inputs, bits), inputs["x"], tmp_path)
    for expert in range(len(inputs["down"])):
        without = {**inputs, "down": inputs["down"].copy()}
        without["down"][expert] = 0
        moved_by = np.abs(run(lowered(without, bits), inputs["x"], tmp_path) - found).max()
        # Experts 1, 2, 4 and 6 have the same logits, above all others, and three are chosen.
        assert moved_by > 0.01 if expert in (1, 2, 4) else moved_by == 0


# Weights and refusals


def test_codes_are_those_of_the_schema_without_zero_points() -> None:
    model = lowered(inputs_of((1, 1)), 4)
    (node,) = (node for node in model.graph if node.op_type == "QMoE")
    found = {value.name: (list(value.shape.numpy()), value.dtype) for value in node.inputs[2:] if value is not None}
    assert found == {
        "mlp.experts.gate_up_proj.interleaved.q4": ([7, 2 * WIDTH, HIDDEN // 2], ir.DataType.UINT8),
        "mlp.experts.gate_up_proj.interleaved.scales": ([7, 2 * WIDTH, 1], ir.DataType.FLOAT16),
        "mlp.experts.down_proj.q4": ([7, HIDDEN, WIDTH // 2], ir.DataType.UINT8),
        "mlp.experts.down_proj.scales": ([7, HIDDEN, 2], ir.DataType.FLOAT16),
    }
    attributes = {name: node.attributes[name].as_int() for name in ("block_size", "weights_prepacked", "swiglu_fusion")}
    assert attributes == {"block_size": BLOCK, "weights_prepacked": 0, "swiglu_fusion": 1}
    assert "fc2_expert_weight_bits" not in node.attributes


def test_rows_that_no_block_of_the_kernel_divides_are_refused() -> None:
    with pytest.raises(TargetError, match=r"no block of 64, 128 divides rows of 32 and 48"):
        lowered(padded(random_inputs((1, 1))), 4)


def test_rows_that_moe_cannot_read_are_refused() -> None:
    with pytest.raises(TargetError, match=r"gate_up_proj: rows of 32 and 20, the kernel takes multiples of 8"):
        lowered(padded(random_inputs((1, 1)), width=20))


# The shipped checkpoint


@pytest.fixture(scope="module")
def bundle(demo_moe_bundle: Bundle) -> Bundle:
    return demo_moe_bundle


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_node_has_a_kernel_and_no_value_crosses(target: Target, bundle: Bundle) -> None:
    model = lower(bundle.graphs[DECODER].clone(), target, bundle.config, target.passes(target.formats))
    placement = check_placement(model, KernelListing.load())
    assert sum(node.op_type in ("MoE", "QMoE") for node in placement.cuda) == 4
    assert {node.op_type for node in placement.cpu} == {"Cast"} and placement.copies == ()


def test_routers_keep_half_precision_beside_weights_of_few_bits(bundle: Bundle) -> None:
    target = registry.get("ort-cuda-int4")
    model = lower(bundle.graphs[DECODER].clone(), target, bundle.config, target.passes(target.formats))
    routers = [v for name, v in model.graph.initializers.items() if name.endswith(".mlp.gate.weight")]
    assert [value.dtype for value in routers] == [ir.DataType.FLOAT16] * 4
    bits = [n.attributes["expert_weight_bits"].as_int() for n in model.graph if n.op_type == "QMoE"]
    assert bits == [8, 8, 4, 4]


def test_lowered_graphs_agree_with_transformers(bundle: Bundle, tmp_path: Path) -> None:
    build_engine(bundle, registry.get("ort-cuda-fp16"), tmp_path / "lowered", runnable=False)
    report = verify(tmp_path / "lowered", "demo-moe", max_new_tokens=4)
    assert report.passed, report.render()
    cosines = [check.value for check in report.checks if check.name.endswith("logits cosine")]
    assert len(cosines) == 12 and min(cosines) > 0.99999


@pytest.mark.parametrize("name", ["ort-cuda-fp16", "ort-cuda-int4"])
def test_the_session_reads_a_held_out_picture(name: str, bundle: Bundle, tmp_path: Path) -> None:
    folder = build(bundle, name, tmp_path / "engine")

    def on_cpu(folder: Path, manifest: Manifest, _: object) -> OrtCudaSession:
        return OrtCudaSession(folder, manifest, device=CPU)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.sessions.ort_cuda.open_session", on_cpu)
        model = Qwen3VLModel.from_engine(folder)
    example = held_out(0)
    found = {
        task: model.generate(user_message(question, [example.image]), do_sample=False).text.strip()
        for task, (question, _) in example.tasks.items()
    }
    assert found == {task: truth for task, (_, truth) in example.tasks.items()}

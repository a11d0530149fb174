"""The mixture of experts as TensorRT gets it: blocks of rows, packed weights, and plans that are really built."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes import common

from benchmarks.synthetic import hf_config
from demo_training.prompts import training_prompts
from engines.build import build_engine
from engines.build_options import BuildOptions
from engines.bundle import Bundle
from engines.hardware import Gpu, Hardware
from engines.lower import lower
from engines.onnx_text import DOMAIN, parse_function
from engines.passes.pack_experts import PackExpertsPass
from engines.quantize.blockwise import quantize_blocks
from engines.quantize.calibration import calibrate
from engines.quantize.formats import WeightFormats
from engines.quantize.tensors import ProducedTensor
from engines.registry import get
from engines.targets import trt as trt_target
from engines.tensorrt.checks import check_network, graph_facts
from engines.tensorrt.experts import mixture_of_experts as body_in_blocks
from engines.weights import StackedTensor
from helpers.experts_op import Arrays
from helpers.lowered_fixtures import edit_graph
from qwen3vl_export.ops import mixture_of_experts
from qwen3vl_export.parity.verify import verify
from runtime.errors import TargetError
from runtime.manifest import Manifest
from runtime.model_config import ModelConfig

D, WIDTH = 32, 16
SMALL = BuildOptions(max_context=256, prefill_chunk=64, patch_buckets=(64, 256), max_batch=2)


def config_of(num_experts: int, top_k: int) -> ModelConfig:
    config = ModelConfig.from_hf(hf_config("tiny-moe"))
    assert config.text.experts is not None
    experts = dataclasses.replace(config.text.experts, num_experts=num_experts, top_k=top_k)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, hidden_size=D, experts=experts))


def arrays(num_tokens: int, num_experts: int, num_favoured: int, seed: int) -> Arrays:
    """Return inputs of which every token chooses among the first experts, as far as these suffice."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape).astype(np.float32)

    inputs = {
        "x": normal(1, num_tokens, D),
        "router_weight": normal(num_experts, D),
        "gate_up": normal(num_experts, 2 * WIDTH, D),
        "down": normal(num_experts, D, WIDTH),
    }
    inputs["x"][..., 0] = 1
    inputs["router_weight"][:num_favoured, 0] += 100
    return inputs


def run_body(inputs: Arrays, top_k: int, inner: Sequence[str] = ()) -> list[np.ndarray[Any, Any]]:
    """Run the body; return its output and values inside it."""
    function = parse_function(body_in_blocks(config_of(len(inputs["down"]), top_k)))
    values = [
        ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, array in inputs.items()
    ]
    node = ir.node(function.name, values, attributes={"top_k": top_k}, domain=DOMAIN)
    node.outputs[0].name, node.outputs[0].type = "out", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 24, DOMAIN: 1}, name="g")
    model = common.InlinePass()(ir.Model(graph, ir_version=11, functions=[function])).model
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model))
    known = {value.name: value for value in proto.graph.value_info}
    proto.graph.output.extend(known[name] for name in inner)
    return ort.InferenceSession(proto.SerializeToString()).run(None, inputs)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_blocks_equal_the_reference_for_every_choice(data: st.DataObject) -> None:
    """Few and many tokens, one expert for all of them or all experts: there are blocks enough, and not too many."""
    num_experts = data.draw(st.integers(1, 9), "experts")
    top_k = data.draw(st.integers(1, num_experts), "top_k")
    num_tokens = data.draw(st.integers(1, 40), "tokens")
    inputs = arrays(num_tokens, num_experts, data.draw(st.integers(0, num_experts)), data.draw(st.integers(0, 99)))
    expected = mixture_of_experts.reference(**inputs, top_k=top_k)
    found, x_NMD, experts_N = run_body(inputs, top_k, ["x_NMD", "block_expert_N"])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    num_pairs = num_tokens * top_k
    assert x_NMD.shape[0] * x_NMD.shape[1] <= 3 * num_pairs
    assert len(experts_N) <= max(1, 3 * num_experts / 2)


def test_a_step_gathers_the_chosen_experts_alone() -> None:
    inputs = arrays(1, 9, 0, 0)
    _, x_NMD, experts_N = run_body(inputs, 3, ["x_NMD", "block_expert_N"])
    assert x_NMD.shape == (3, 1, D)
    chosen, _ = mixture_of_experts.route(inputs["router_weight"] @ inputs["x"][0, 0], 3)
    assert sorted(chosen) == list(experts_N)


# Packed weights.


def stacked(array: np.ndarray[Any, Any], name: str) -> StackedTensor:
    return StackedTensor(
        name,
        [
            ProducedTensor(f"{name}.{e}", part.shape, ir.DataType.FLOAT, lambda part=part: iter([part.reshape(-1)]))
            for e, part in enumerate(array)
        ],
    )


def gather_graph(experts: StackedTensor) -> ir.Model:
    index = ir.Value(name="index", shape=ir.Shape(["N"]), type=ir.TensorType(ir.DataType.INT64))
    data = ir.Value(
        name=experts.name,
        shape=ir.Shape(experts.shape.numpy()),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=experts,
    )
    node = ir.node("Gather", [data, index], name="gather")
    node.outputs[0].name, node.outputs[0].type = "chosen", ir.TensorType(ir.DataType.FLOAT)
    return ir.Model(
        ir.Graph([index], node.outputs, nodes=[node], initializers=[data], opset_imports={"": 24}, name="g"),
        ir_version=11,
    )


def formats_of(**weight_format: Any) -> WeightFormats:
    return WeightFormats.from_rules([{"match": ["*"], **weight_format}])


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 64)])
def test_packed_experts_are_what_the_quantiser_chose(bits: int, block: int) -> None:
    weights = np.random.default_rng(0).standard_normal((5, 12, 192)).astype(np.float32)
    weights[:, :, 7] = -3  # codes of 0 and 15, so of either sign in the highest bits of an INT32
    model = gather_graph(stacked(weights, "layers.0.mlp.experts.down_proj"))
    # Blocks of 128 do not divide rows of 192: the largest that does is taken.
    asked = block if bits == 4 else 128
    result = PackExpertsPass(formats_of(kind="blockwise", bits=bits, block=asked, symmetric=True))(model)
    assert result.modified
    common.RemoveUnusedNodesPass()(model)
    (packed,) = (v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT32 and v.shape.rank() == 3)
    assert packed.shape == (5, 12, 192 * bits // 32)
    (found,) = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, {"index": np.array([3, 0, 3])})
    expected = quantize_blocks(weights.reshape(-1, block), bits, symmetric=True).dequantize().reshape(weights.shape)
    np.testing.assert_allclose(found, expected[[3, 0, 3]], rtol=1e-6)
    assert np.abs(found - weights[[3, 0, 3]]).max() < 0.5


@pytest.mark.parametrize(
    "weight_format",
    [
        {"kind": "blockwise", "bits": 4, "block": 128},
        {"kind": "float8"},
        {"kind": "blockwise", "bits": 4, "block": 32, "symmetric": True},
    ],
)
def test_a_format_without_a_meaning_is_refused_by_name(weight_format: dict[str, Any]) -> None:
    model = gather_graph(stacked(np.zeros((2, 4, 24), np.float32), "layers.7.mlp.experts.down_proj"))
    with pytest.raises(ir.passes.PassError) as caught:
        ir.passes.Sequential(PackExpertsPass(formats_of(**weight_format)))(model)
    assert isinstance(caught.value.__cause__, TargetError)
    assert "layers.7.mlp.experts.down_proj" in str(caught.value.__cause__)


# The shipped mixture of experts.


@pytest.fixture(scope="module")
def bundle(demo_moe_bundle: Bundle) -> Bundle:
    return demo_moe_bundle


@pytest.fixture(scope="module")
def lowered(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lowered") / "int4"
    build_engine(bundle, get("trt-rtx-int4"), folder, runnable=False)
    return folder


def test_lowered_graphs_agree_with_transformers(lowered: Path) -> None:
    report = verify(lowered, "demo-moe", max_new_tokens=4)
    assert report.passed, report.render()
    graph = onnx.load(lowered / "decoder.onnx", load_external_data=False).graph
    types = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    experts = {name: kind for name, kind in types.items() if ".experts." in name and not name.endswith(".scales")}
    assert set(experts.values()) == {"INT32"} and len(experts) == 8
    assert sum(name.endswith(".q8") for name in experts) == 4  # the first two layers
    assert {kind for name, kind in types.items() if ".mlp.gate." in name} == {"FLOAT16"}


def next_expert(graph: onnx.GraphProto) -> int:
    """Each block takes the expert after its own."""
    nodes = [node for node in graph.node if node.op_type == "LessOrEqual" and "is_before_NE" in node.output[0]]
    for node in nodes:
        node.op_type = "Less"
    return len(nodes)


def zero_point_wrong(graph: onnx.GraphProto) -> int:
    """Codes stand for -6 … 9 in place of -8 … 7."""
    for tensor in graph.initializer:
        if tensor.name == "unpack.zero_point_4":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.float16(6), tensor.name))
            return 1
    return 0


@pytest.mark.parametrize("sabotage", [next_expert, zero_point_wrong])
def test_verify_notices_a_fault_of_the_lowering(sabotage: Any, lowered: Path, tmp_path: Path) -> None:
    folder = edit_graph(lowered, tmp_path / "edited", "decoder.onnx", sabotage)
    report = verify(folder, "demo-moe", max_new_tokens=1)
    assert not report.passed


@pytest.mark.parametrize(
    "precision", ["int4", *(pytest.param(each, marks=pytest.mark.slow) for each in ("fp16", "fp8"))]
)
def test_it_becomes_plans(precision: str, bundle: Bundle, tmp_path: Path) -> None:
    """The network is held against the graph, and the plan's bytes against the weights': they stay packed."""
    pytest.importorskip("tensorrt_rtx")
    if precision == "fp8":
        bundle = calibrate(bundle, get("trt-rtx-fp8"), training_prompts(2), tmp_path).applied_to(bundle)
    engine = tmp_path / "engine"
    build_engine(bundle, get(f"trt-rtx-{precision}"), engine, options=SMALL)
    manifest = Manifest.read(engine)
    manifest.check(engine, full=True)
    assert {"vision.plan", "decoder.plan"} <= {path.name for path in engine.iterdir()}
    weights = manifest.capabilities["graph_weight_bytes"]["decoder"]
    # 4 layers of 8 experts of 3 · 192 · 128 weights: 4.7 MB in float16; two layers in 8 bits, two in 4, 1.8 MB.
    assert weights > 5e6 if precision == "fp16" else weights < 4.5e6


# TensorRT's own layer, on GPUs that have it.


@pytest.fixture
def blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("Test B200", "10.0", 180 << 30, 180 << 30, "590.1")
    monkeypatch.setattr(trt_target, "probe", lambda: Hardware("Abacus", (), 2, 1 << 30, gpus=(gpu,)))


@pytest.mark.usefixtures("blackwell")
def test_the_layer_gets_what_its_documentation_asks_for(bundle: Bundle, tmp_path: Path) -> None:
    """Parsed, not built: no library for these GPUs is here. Its formula on its weights is the op's."""
    trt = pytest.importorskip("tensorrt_rtx")
    build_engine(bundle, get("trt-fp16"), tmp_path / "lowered", runnable=False)
    path = tmp_path / "lowered" / "decoder.onnx"
    model = ir.load(path)
    layers = [node for node in model.graph if node.op_type == "TRT_MoE"]
    assert len(layers) == 4 and not any(node.op_type == "CumSum" for node in model.graph)
    assert [value.dtype.name for value in layers[0].inputs] == ["FLOAT16", "INT32", *["FLOAT16"] * 4]
    log = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(log).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, log).parse_from_file(str(path))
    check_network(trt, network, graph_facts(model), "decoder")
    kinds = [network.get_layer(i) for i in range(network.num_layers)]
    parsed = [layer for layer in kinds if layer.type == trt.LayerType.MOE]
    assert len(parsed) == 4
    for layer in parsed:
        layer.__class__ = trt.IMoELayer
        assert layer.activation_type == trt.MoEActType.SILU

    gate, up, down = (value.const_value.numpy().astype(np.float64) for value in layers[2].inputs[3:])
    initializers = bundle.graphs["decoder"].graph.initializers
    weights = {
        name: next(value.const_value for key, value in initializers.items() if key.endswith(name))
        for name in ("layers.2.mlp.gate.weight", "layers.2.mlp.experts.gate_up_proj", "layers.2.mlp.experts.down_proj")
    }
    router, gate_up, down_proj = (tensor.numpy() for tensor in weights.values())
    x = np.random.default_rng(0).standard_normal((1, 5, router.shape[1])).astype(np.float32)
    expected = mixture_of_experts.reference(x, router, gate_up, down_proj, top_k=2)
    found = np.zeros_like(expected)
    for t, token in enumerate(x[0].astype(np.float64)):
        for expert, weight in zip(*mixture_of_experts.route(router @ token, 2), strict=True):
            gated = token @ gate[expert]
            found[0, t] += weight * ((gated / (1 + np.exp(-gated)) * (token @ up[expert])) @ down[expert])
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.usefixtures("blackwell")
def test_few_bits_stay_in_blocks(bundle: Bundle) -> None:
    target = get("trt-int4")
    model = lower(bundle.graphs["decoder"].clone(), target, bundle.config, target.passes(target.formats))
    assert not any(node.op_type == "TRT_MoE" for node in model.graph)

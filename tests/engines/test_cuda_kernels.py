"""Placement of the nodes of ONNX Runtime's CUDA graphs: every node has a kernel, and no value is copied in a step."""

from __future__ import annotations

import dataclasses
import re

import onnx_ir as ir
import pytest

from engines import registry
from engines.bundle import DECODER, VISION, Bundle
from engines.cuda_kernels import CheckPlacementPass, Kernel, KernelListing, Placement, check_placement
from engines.lower import lower
from engines.quantize.formats import WeightFormats
from engines.target import Target
from helpers.targets import by_name
from runtime.errors import TargetError
from runtime.model_config import ModelConfig

TARGETS = registry.load_family("ort_cuda")


@pytest.fixture(scope="module")
def listing() -> KernelListing:
    return KernelListing.load()


def lowered(bundle: Bundle, name: str, target: Target) -> ir.Model:
    return lower(bundle.graphs[name].clone(), target, bundle.config, target.passes(target.formats))


@pytest.mark.parametrize("graph", [DECODER, VISION])
@pytest.mark.parametrize("target", TARGETS, ids=by_name)
def test_every_node_has_a_kernel_and_no_value_crosses(
    target: Target, graph: str, demo_bundle: Bundle, listing: KernelListing
) -> None:
    model = lowered(demo_bundle, graph, target)
    placement = check_placement(model, listing)
    assert len(placement.cuda) + len(placement.cpu) == len(model.graph)
    # Shapes alone: Concat of the vision tower's, Cast of the cache's capacity.
    assert {node.op_type for node in placement.cpu} == {"Cast" if graph == DECODER else "Concat"}
    assert placement.copies == ()


class ReplaceSigmoidPass(ir.passes.InPlacePass):
    """Put an operator in the graph that CUDA has no kernel for."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if node.op_type == "Sigmoid"]
        for node in found:
            node.op_type = "Atanh"
        return ir.passes.PassResult(model, bool(found))


def test_an_operator_without_a_kernel_stops_the_build(demo_bundle: Bundle) -> None:
    target = registry.get("ort-cuda-fp16")

    def passes(formats: WeightFormats) -> list[ir.passes.InPlacePass]:
        *others, check = target.passes(formats)
        assert isinstance(check, CheckPlacementPass)
        return [*others, ReplaceSigmoidPass(), check]

    with pytest.raises((TargetError, ir.passes.PassError)) as caught:
        lowered(demo_bundle, DECODER, dataclasses.replace(target, passes=passes))
    error = caught.value if isinstance(caught.value, TargetError) else caught.value.__cause__
    assert isinstance(error, TargetError)
    assert re.match(r"node '.+', Atanh: no kernel of that operator", error.message)


def test_a_copy_in_every_step_stops_the_build(demo_bundle: Bundle) -> None:
    target = registry.get("ort-cuda-fp16")

    def body(config: ModelConfig) -> str:
        # The length of the longest sequence, as the CPU target has it, is computed on the device and read on the host.
        text, capacity = target.native_ops["CausalAttention"](config), "Cast <to = 6> (capacity)"
        assert capacity in text
        return text.replace(capacity, "Cast <to = 6> (longest)").replace(
            "capacity = Shape <start = 2, end = 3> (past_key)", "longest = ReduceMax <keepdims = 0> (total)"
        )

    sabotaged = dataclasses.replace(target, native_ops={**target.native_ops, "CausalAttention": body})
    with pytest.raises((TargetError, ir.passes.PassError)) as caught:
        lowered(demo_bundle, DECODER, sabotaged)
    error = caught.value if isinstance(caught.value, TargetError) else caught.value.__cause__
    assert isinstance(error, TargetError)
    assert "'total_sequence_length' would be copied" in error.message


def test_a_graph_for_the_cpu_is_refused(demo_bundle: Bundle, listing: KernelListing) -> None:
    model = lowered(demo_bundle, VISION, registry.get("ort-cpu-int8"))
    # What no inference of types knows: the codes of activations are bytes, and products of them floats.
    types = {"QuantizeLinear": ir.DataType.UINT8}
    for node in model.graph:
        for value in node.outputs:
            value.type = value.type or ir.TensorType(types.get(node.op_type, ir.DataType.FLOAT))
    with pytest.raises(TargetError, match=r"com\.microsoft::MatMulIntegerToFloat: no kernel of that operator"):
        check_placement(model, listing)


def placed(text: str, listing: KernelListing) -> Placement:
    """Check a graph in ONNX's text form, whose values are all declared."""
    model = ir.from_onnx_text(text)
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
    return check_placement(model, listing)


HEADER = '<ir_version: 10, opset_import: ["" : 24]>'


def test_shapes_stay_on_the_cpu_until_a_kernel_reads_them(listing: KernelListing) -> None:
    placement = placed(
        HEADER
        + """
        g (float16[A, B] x, int64[1] one) => (float16[C, D] y) <int64[2] shape, int64[2] larger> {
            shape = Shape (x)
            larger = Add (shape, one)
            y = Expand (x, larger)
        }""",
        listing,
    )
    assert [node.op_type for node in placement.cpu] == ["Add"]
    assert [node.op_type for node in placement.cuda] == ["Shape", "Expand"]
    # A graph input that the CPU reads is no longer one that lies on the device.
    assert [value.name for value in placement.copies] == ["one"]


def test_values_that_cross_are_found(listing: KernelListing) -> None:
    placement = placed(
        HEADER
        + """
        g (float16[A, B] x, int64[2] shape) => (float16[C, D] y, int64[2] sum) <int64[2] own, int64[2] twice> {
            twice = Add (shape, shape)
            y = Expand (x, twice)
            own = Shape (x)
            sum = Mul (own, twice)
        }""",
        listing,
    )
    # `twice` is made on the device and read on the host; `own` is on the host and multiplied on the device.
    assert [value.name for value in placement.copies] == ["twice", "own"]


def test_an_element_type_without_a_kernel_is_named(listing: KernelListing) -> None:
    text = HEADER + "g (int16[N] x) => (int16[N] y) { y = Relu (x) }"
    with pytest.raises(TargetError, match=r"'Relu_0', Relu: no kernel of T = int16 among .* onnxruntime-gpu 1\.31\.1"):
        placed(text, listing)


def test_an_operator_without_a_kernel_is_named(listing: KernelListing) -> None:
    text = HEADER + "g (float[N, N] x) => (float y) { y = Det (x) }"
    with pytest.raises(TargetError, match="'Det_0', Det: no kernel of that operator"):
        placed(text, listing)


def test_zero_points_of_a_table_fill_whole_bytes(demo_bundle: Bundle) -> None:
    # 192 columns are three blocks of 64, whose 4-bit zero points end in the middle of a byte; CUDA's kernel would take
    # those of the second row from there, the CPU's from the next byte, so no run on the CPU would show it.
    blocks = {}
    for name in ("ort-cuda-int4", "ort-cpu-int4"):
        model = lowered(demo_bundle, DECODER, registry.get(name))
        (lookup,) = (node for node in model.graph if node.op_type == "GatherBlockQuantized")
        (product,) = (
            node for node in model.graph if node.op_type == "MatMulNBits" and node.inputs[2] is lookup.inputs[2]
        )
        blocks[name] = lookup.attributes["block_size"].as_int()
        num_rows, num_bytes = lookup.inputs[3].shape.numpy()
        if name == "ort-cuda-int4":
            assert 2 * num_rows * num_bytes * blocks[name] == num_rows * 192
            assert product.attributes["block_size"].as_int() == blocks[name]
    assert blocks == {"ort-cuda-int4": 32, "ort-cpu-int4": 64}


@pytest.mark.parametrize(
    ("text", "running", "not_running"),
    # An open range means the version it was written for: a later one may mean something else.
    [("13-", [13], [12, 14]), ("13-23", [13, 14, 23], [12, 24]), ("24-24", [24], [23, 25])],
)
def test_a_kernel_runs_the_versions_it_was_registered_for(
    text: str, running: list[int], not_running: list[int]
) -> None:
    kernel = Kernel.parse(f"{text} T=float,float16")
    assert all(kernel.runs(version) for version in running)
    assert not any(kernel.runs(version) for version in not_running)
    assert kernel.types == {"T": {"float", "float16"}}


def test_the_check_changes_nothing(demo_bundle: Bundle) -> None:
    model = lowered(demo_bundle, DECODER, registry.get("ort-cuda-fp16"))
    before = [node.name for node in model.graph]
    assert not CheckPlacementPass()(model).modified
    assert [node.name for node in model.graph] == before

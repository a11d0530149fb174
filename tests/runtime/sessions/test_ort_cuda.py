"""ONNX Runtime CUDA targets without a GPU: every node has a kernel, and the graphs are right on the CPU."""

from __future__ import annotations

import dataclasses
import gc
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from engines import registry
from engines.bundle import DECODER, VISION, Bundle
from engines.cuda_kernels import CheckPlacementPass, Kernel, KernelListing, Placement, check_placement
from engines.lower import lower
from engines.quantize.formats import WeightFormats
from engines.target import Target
from helpers import PICTURES
from runtime import generation
from runtime.contract import DecoderInputs, FloatArray, no_visual_embeds
from runtime.errors import EngineError, TargetError
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel
from runtime.model_config import ModelConfig
from runtime.session import SessionOptions
from runtime.sessions import ort_cuda
from runtime.sessions.ort_cuda import Device, OrtCudaSession, OrtDeviceCache
from tests.conftest import build

TARGETS = registry.load_family("ort_cuda")
# bfloat16 has no CPU kernels of Where and FusedMatMul, and ONNX Runtime casts for float16 alone.
ON_CPU = [target for target in TARGETS if target.cache_dtype == "float16"]
CPU = Device("CPUExecutionProvider", "cpu")
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": str(PICTURES / "held_out_0.png")},
            {"type": "text", "text": "Read the digits."},
        ],
    }
]

Models = Callable[[str], Qwen3VLModel]


def by_name(target: Target) -> str:
    return target.name


@pytest.fixture(scope="module")
def listing() -> KernelListing:
    return KernelListing.load()


@pytest.fixture(scope="module")
def models(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Models:
    opened: dict[str, Qwen3VLModel] = {}

    def model(name: str) -> Qwen3VLModel:
        if name not in opened:
            folder = build(demo_bundle, name, tmp_path_factory.mktemp("engine") / name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ort_cuda, "open_session", on_cpu)
                opened[name] = Qwen3VLModel.from_engine(folder)
        return opened[name]

    return model


def on_cpu(folder: Path, manifest: Manifest, options: SessionOptions) -> OrtCudaSession:
    return OrtCudaSession(folder, manifest, device=CPU)


def lowered(bundle: Bundle, name: str, target: Target) -> ir.Model:
    return lower(bundle.graphs[name].clone(), target, bundle.config, target.passes(target.formats))


def run(model: Qwen3VLModel, chunk: int = 512) -> tuple[FloatArray, FloatArray, list[tuple[FloatArray, FloatArray]]]:
    """Return the levels of a picture, the logits of its prompt, and the cache."""
    prepared = model.prepare(MESSAGES)
    ids = prepared.prompt.input_ids
    cache = model.session.new_cache(len(ids))
    embeds = model.encode_images(prepared.images)
    inputs = prepared.decoder_inputs(embeds, all_logits=True)
    logits = generation.prefill(model.session, cache, inputs, chunk=chunk)
    layers = [cache.layer(index) for index in range(model.config.text.num_layers)]
    return embeds, logits, [(key[:, :, : len(ids)], value[:, :, : len(ids)]) for key, value in layers]


def cosine(found: FloatArray, expected: FloatArray) -> float:
    a, b = found.ravel().astype(np.float64), expected.ravel().astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


# Placement


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
    for node in model.graph:
        for value in node.outputs:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    with pytest.raises(TargetError, match=r"com\.microsoft::DynamicQuantizeMatMul: no kernel of that operator"):
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


# Parity, on the CPU's kernels, which may compute float16 in float32


def test_float16_graphs_equal_the_float32_engine(models: Models) -> None:
    embeds, logits, cache = run(models("ort-cuda-fp16"))
    expected_embeds, expected_logits, expected_cache = run(models("ort-cpu-fp32"))
    pairs = [*zip(embeds, expected_embeds, strict=True), (logits, expected_logits)]
    pairs += [pair for layers in zip(cache, expected_cache, strict=True) for pair in zip(*layers, strict=True)]
    # Measured 0.9999997 at worst, of a level.
    assert min(cosine(found, expected) for found, expected in pairs) >= 0.99999
    assert np.array_equal(logits.argmax(-1), expected_logits.argmax(-1))
    # It is another computation, not the same one.
    assert not np.array_equal(logits, expected_logits)


def test_int4_graphs_are_near_the_float32_engine(models: Models) -> None:
    embeds, logits, _ = run(models("ort-cuda-int4"))
    expected_embeds, expected_logits, _ = run(models("ort-cpu-fp32"))
    # The vision tower keeps float16; measured 0.9998 for the logits of the 4-bit decoder.
    assert cosine(embeds, expected_embeds) >= 0.99999
    assert 0.9995 <= cosine(logits, expected_logits) < 0.99999
    moved = logits.argmax(-1) != expected_logits.argmax(-1)
    top_two = np.sort(expected_logits, axis=-1)[:, -2:]
    assert (top_two[moved, 1] - top_two[moved, 0] < 1.2).all(), "a token changed that was no near-tie"


@pytest.mark.parametrize("target", ON_CPU, ids=by_name)
def test_a_held_out_picture_is_read(target: Target, models: Models) -> None:
    assert models(target.name).generate(MESSAGES).text == "1654"


# The session, on the CPU


@pytest.mark.parametrize("target", ON_CPU, ids=by_name)
def test_chunks_give_the_logits_of_the_whole_prompt(target: Target, models: Models) -> None:
    whole, chunked = run(models(target.name))[1], run(models(target.name), chunk=5)[1]
    assert np.linalg.norm(whole - chunked) <= 0.01 * np.linalg.norm(whole)
    assert np.array_equal(whole.argmax(-1), chunked.argmax(-1))


def decode(session: OrtCudaSession, cache: OrtDeviceCache, ids: np.ndarray, past: np.ndarray) -> FloatArray:
    """Run text alone; logits of the last position."""
    return session.decode(inputs_of(session, ids, past), cache)


def inputs_of(session: OrtCudaSession, ids: np.ndarray, past: np.ndarray) -> DecoderInputs:
    last = np.full((len(ids), 1), ids.shape[1] - 1)
    return DecoderInputs.text(ids, past, no_visual_embeds(session._config), logits_positions=last)


@pytest.fixture(scope="module")
def folder(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(demo_bundle, "ort-cuda-fp16", tmp_path_factory.mktemp("session") / "engine")


@pytest.fixture()
def session(folder: Path) -> OrtCudaSession:
    """A session of its own, with nothing idle."""
    return OrtCudaSession(folder, Manifest.read(folder), device=CPU)


def test_a_batch_gives_what_its_sequences_give_alone(session: OrtCudaSession) -> None:
    ids = np.random.default_rng(0).integers(0, 100, (3, 6))
    batched = session.new_cache(8, batch=3)
    zero, six = np.zeros(3, np.int64), np.full(3, 6)
    first = decode(session, batched, ids, zero)
    second = decode(session, batched, ids[:, :1], six)
    for row in range(3):
        cache = session.new_cache(8)
        assert np.array_equal(decode(session, cache, ids[row : row + 1], zero[:1])[0], first[row])
        alone = decode(session, cache, ids[row : row + 1, :1], six[:1])[0]
        np.testing.assert_allclose(alone, second[row], atol=0.02)
        for one, several in zip(cache.layer(1), batched.layer(1), strict=True):
            np.testing.assert_allclose(one[0, :, :7], several[row, :, :7], atol=0.01)


def test_steps_of_an_answer_share_one_binding(session: OrtCudaSession) -> None:
    ids = np.arange(5)[None]
    cache = session.new_cache(16)
    decode(session, cache, ids, np.array([0]))
    assert cache.buffers.step is None, "several tokens are not what a step repeats"
    decode(session, cache, ids[:, :1], np.array([5]))
    step = cache.buffers.step
    decode(session, cache, ids[:, 1:2], np.array([6]))
    assert step is not None and cache.buffers.step is step


def test_a_step_gives_what_an_uncaptured_call_gives(session: OrtCudaSession) -> None:
    ids = np.array([[7, 8, 9, 10]])
    whole = decode(session, session.new_cache(16), ids, np.array([0]))
    cache = session.new_cache(16)
    for position in range(4):
        last = decode(session, cache, ids[:, position : position + 1], np.array([position]))
    np.testing.assert_allclose(last, whole, atol=0.02)


def test_idle_buffers_serve_the_next_cache_of_their_size(session: OrtCudaSession) -> None:
    ids = np.array([[3, 4, 5]])
    cache = session.new_cache(16)
    fresh = [decode(session, cache, ids, np.array([0])), decode(session, cache, ids[:, :1], np.array([3]))]
    for position in range(4, 12):  # leave something behind
        decode(session, cache, ids[:, :1], np.array([position]))
    buffers = cache.buffers
    other = session.new_cache(16)
    assert other.buffers is not buffers, "they are in use"
    del cache
    gc.collect()
    again = session.new_cache(9)
    assert again.buffers is buffers
    assert np.array_equal(decode(session, again, ids, np.array([0])), fresh[0])
    assert np.array_equal(decode(session, again, ids[:, :1], np.array([3])), fresh[1])


def test_a_cache_of_another_size_frees_the_idle_ones(session: OrtCudaSession) -> None:
    cache = session.new_cache(16)
    del cache
    gc.collect()
    larger = session.new_cache(1000)
    assert larger.capacity >= 1000
    assert sum(map(len, session._idle.values())) == 0


def test_the_largest_logits_are_those_of_the_whole(session: OrtCudaSession) -> None:
    k = min(TARGETS[0].top_k, session._config.text.vocab_size)
    ids = np.array([[3, 4, 5], [6, 7, 8]])
    past = np.zeros(2, np.int64)
    everything = decode(session, session.new_cache(8, batch=2), ids, past)
    top = session.decode_top(inputs_of(session, ids, past), session.new_cache(8, batch=2))
    for row in range(2):
        found = top[row][0]
        assert found.ids.shape == found.values.shape == (k,)
        assert np.array_equal(found.values, np.sort(everything[row, 0])[::-1][:k])
        assert np.array_equal(everything[row, 0, found.ids], found.values)
        assert np.array_equal(found.fetch(), everything[row, 0])


def test_bfloat16_is_read_as_the_upper_half_of_a_float32() -> None:
    buffers = ort_cuda.CacheBuffers(1, (1, 1, 2, 2), "bfloat16", "cpu")
    bits = np.array([0x3F80, 0xC000, 0x3F00, 0x0000], np.uint16).reshape(1, 1, 2, 2)
    buffers.values[0][0].update_inplace(bits.view(np.float16))
    key, value = buffers.layer(0)
    assert key.ravel().tolist() == [1.0, -2.0, 0.5, 0.0]
    assert value.ravel().tolist() == [0.0] * 4


# Errors


def test_without_the_provider_nothing_runs_on_the_cpu(folder: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    with pytest.raises(EngineError, match="has no CUDAExecutionProvider") as caught:
        Qwen3VLModel.from_engine(folder)
    assert "onnxruntime-gpu" in str(caught.value.remedy)

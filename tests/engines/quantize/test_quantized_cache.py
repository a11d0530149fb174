"""The KV cache in 8 and 4 bits: codes and attention of the kernel, scales from prompts, and what engines answer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from engines.bundle import Bundle
from engines.passes.quantize_cache import QuantizeCachePass
from engines.quantize.cache_ranges import MARGINS, cache_ranges, scales_of
from engines.quantize.calibration_data import read_prompts
from helpers.calibration import write_canvases
from helpers.command_line import call
from helpers.engines import build, requantized
from qwen3vl_export.cli import export, run
from qwen3vl_export.demo.data import held_out
from qwen3vl_export.parity.limits import wider_limits
from qwen3vl_export.parity.metrics import kl_divergence
from qwen3vl_export.parity.verify import verify
from runtime.cache_types import CacheType
from runtime.contract import DecoderInputs
from runtime.errors import UsageError
from runtime.generation import prefill
from runtime.manifest import Manifest
from runtime.memory import cache_bytes
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.sessions.ort_cpu import OrtKVCache

NUM_PROMPTS = 12
HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 4, 2, 16, 48


def attention(num_new: int, batch: int) -> ir.Model:
    """One GroupQueryAttention on a float cache."""
    widths = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    cache = [batch, KV_HEADS, CAPACITY, HEAD_DIM]
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, num_new, HEAD_DIM * heads])
              for name, heads in widths.items()}  # fmt: skip
    names = [f"{when}_key_values.0.{kind}" for when in ("past", "present") for kind in ("key", "value")]
    values |= {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, cache) for name in names}
    values["last"] = helper.make_tensor_value_info("last", TensorProto.INT32, [batch])
    values["total"] = helper.make_tensor_value_info("total", TensorProto.INT32, [])
    values["out"] = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    inputs, outputs = ["q", "k", "v", *names[:2], "last", "total"], ["out", *names[2:]]
    node = helper.make_node(
        "GroupQueryAttention",
        inputs,
        outputs,
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        scale=HEAD_DIM**-0.5,
    )
    graph = helper.make_graph([node], "attention", [values[n] for n in inputs], [values[n] for n in outputs])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def fill(cache: OrtKVCache, codes: list[np.ndarray]) -> None:
    """Write keys and values of one layer, as a graph does."""
    names = {kind: [f"{when}_key_values.0.{kind}" for when in ("past", "present")] for kind in ("key", "value")}
    element = helper.np_dtype_to_tensor_dtype(codes[0].dtype)
    made = {
        name: helper.make_tensor_value_info(name, element, codes[0].shape)
        for name in (*names, *itertools.chain.from_iterable(names.values()))
    }
    nodes = [helper.make_node("Identity", [kind], [present]) for kind, (_, present) in names.items()]
    inputs = [made[name] for name in (*names, *(past for past, _ in names.values()))]
    graph = helper.make_graph(nodes, "fill", inputs, [made[present] for _, present in names.values()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for kind, array in zip(names, codes, strict=True):
        binding.bind_cpu_input(kind, array)
    cache.bind(binding, 0, cache.batch)
    session.run_with_iobinding(binding)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("num_new", "lengths"), [(1, (20, 9)), (6, (17,)), (9, (0, 0))])
def test_codes_and_attention_are_those_of_numpy(bits: int, num_new: int, lengths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(bits)
    batch, largest = len(lengths), 2 ** (bits - 1) - 1
    scales = (rng.uniform(0.5, 2, (1, 2, KV_HEADS, HEAD_DIM)) / largest).astype(np.float32)
    model = attention(num_new, batch)
    QuantizeCachePass([bits], scales)(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    dtype, row = {8: ("int8", HEAD_DIM), 4: ("uint8", HEAD_DIM // 2)}[bits]
    cache = OrtKVCache([CacheType(dtype, bits)], (batch, KV_HEADS, CAPACITY, HEAD_DIM), scales)
    fill(cache, [rng.integers(0, 256, (batch, KV_HEADS, CAPACITY, row)).astype(np.uint8).view(dtype) for _ in "kv"])
    before = cache.layer(0)
    assert before[0].shape == (batch, KV_HEADS, CAPACITY, HEAD_DIM) and before[0].dtype == np.float32
    q, k, v = (rng.standard_normal((batch, num_new, n, HEAD_DIM), np.float32) for n in (HEADS, KV_HEADS, KV_HEADS))
    binding = session.io_binding()
    for name, array in (("q", q), ("k", k), ("v", v)):
        binding.bind_cpu_input(name, array.reshape(batch, num_new, -1))
    binding.bind_cpu_input("last", np.array(lengths, np.int32) + num_new - 1)
    binding.bind_cpu_input("total", np.array(max(lengths) + num_new, np.int32))
    binding.bind_output("out", "cpu")
    cache.bind(binding, 0, batch)
    session.run_with_iobinding(binding)
    out = binding.get_outputs()[0].numpy().reshape(batch, num_new, HEADS, HEAD_DIM)
    after = cache.layer(0)
    clipped = 0
    for b, past in enumerate(lengths):
        new = slice(past, past + num_new)
        for found, earlier, written, step in zip(after, before, (k, v), scales[0], strict=True):
            codes = np.rint(written[b].transpose(1, 0, 2) / step[:, None])
            clipped += int((codes > largest).sum() + (codes < -largest - 1).sum())
            np.testing.assert_allclose(found[b, :, new], np.clip(codes, -largest - 1, largest) * step[:, None], 1e-6)
            rest = np.arange(CAPACITY)[(np.arange(CAPACITY) < past) | (np.arange(CAPACITY) >= past + num_new)]
            np.testing.assert_array_equal(found[b][:, rest], earlier[b][:, rest])
        keys, values = (np.repeat(part[b], HEADS // KV_HEADS, axis=0) for part in after)
        for i in range(num_new):
            seen = past + i + 1
            scores = np.einsum("nh,nth->nt", q[b, i], keys[:, :seen]) * HEAD_DIM**-0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            wanted = np.einsum("nt,nth->nh", weights / weights.sum(-1, keepdims=True), values[:, :seen])
            np.testing.assert_allclose(out[b, i], wanted, rtol=1e-4, atol=1e-5)
    assert clipped > 0  # so that the ends of the codes were compared too


def test_margins_and_channels_that_were_always_zero() -> None:
    ranges = np.array([[[[4.0, 1.0, 0.0]]], [[[0.0, 0.0, 0.0]]]], np.float32)
    assert scales_of(ranges, 8) * 127 == pytest.approx(MARGINS[8] * np.array([[[[4, 1, 4]]], [[[1, 1, 1]]]]))
    assert scales_of(ranges, 4) * 7 == pytest.approx(MARGINS[4] * np.array([[[[4, 1, 4]]], [[[1, 1, 1]]]]))
    # 8 bits can spare a step for what calibration did not see; 4 bits cannot.
    assert MARGINS[8] > 1 >= MARGINS[4]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of conversations about canvases that are not held out."""
    return write_canvases(tmp_path_factory.mktemp("calibration"), NUM_PROMPTS)


@pytest.fixture(scope="module")
def engine_of_bits(demo_engine: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder, prompts = tmp_path_factory.mktemp("engines"), read_prompts(calibration)
    return {32: demo_engine} | {bits: requantized(demo_engine, folder / str(bits), bits, prompts) for bits in (8, 4)}


def test_the_command_makes_such_an_engine(calibration: Path, engine_of_bits: dict[int, Path], tmp_path: Path) -> None:
    output = tmp_path / "engine"
    arguments = (
        "demo",
        "--target",
        "ort-cpu-fp32",
        "--kv-cache",
        "int8",
        "--calibration",
        str(calibration),
        "--output",
        str(output),
    )
    code, _, err = call(export.app, *arguments)
    assert code == 0, err
    Manifest.read(output).check(output, full=True)
    found, wanted = (np.load(folder / "cache_scales.npy") for folder in (output, engine_of_bits[8]))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert {path.name for path in output.iterdir()} == {path.name for path in engine_of_bits[8].iterdir()}
    code, out, _ = call(run.app, "inspect", str(output), "--json")
    inspected = json.loads(out)
    shown = {name: inspected["capabilities"][name] for name in ("cache_dtype", "cache_bits", "cache_scales")}
    assert shown == {"cache_dtype": "int8", "cache_bits": 8, "cache_scales": "cache_scales.npy"}
    assert "cache_scales.npy" in inspected["files"]
    assert inspected["source"]["cache_calibration"] == {"prompts": NUM_PROMPTS}


@pytest.mark.parametrize(
    ("arguments", "message", "remedy"),
    [
        (("--kv-cache", "int8"), "--kv-cache int8 needs prompts", "add --calibration DIR"),
        (("--kv-cache", "fp8"), "--kv-cache fp8: unknown", "the kinds are float16, int8, int4, mixed"),
        (("--kv-cache", "mixed"), "--kv-cache mixed needs prompts", "add --calibration DIR"),
        (("--kv-cache", "int8", "--kv-cache-ratio", "0.4"), "--kv-cache int8 is one", "or give --kv-cache mixed"),
        (("--kv-cache-ratio", "0.4"), "--kv-cache-ratio is of --kv-cache mixed", "leave it out"),
        (("--kv-cache", "mixed", "--kv-cache-ratio", "0.2"), "must be in [0.25, 1]", "leave it out for 0.4"),
        (("--kv-cache", "int4", "--no-weights"), "--kv-cache has to run the engine", "leave --kv-cache out"),
    ],
)
def test_refused(arguments: tuple[str, ...], message: str, remedy: str, tmp_path: Path) -> None:
    code, out, err = call(export.app, "demo", *arguments, "--output", str(tmp_path / "engine"))
    assert (code, out, list(tmp_path.iterdir())) == (UsageError.exit_code, "", [])
    assert message in err and remedy in err


def logits_of(model: Qwen3VLModel, index: int, chunk: int = 512) -> tuple[np.ndarray, OrtKVCache]:
    """Return the logits and the cache of a held-out question and its true answer."""
    example = held_out(index)
    question, answer = list(example.tasks.values())[index % 4]
    messages = [*user_message(question, [example.image]), {"role": "assistant", "content": answer}]
    prepared = model.prepare(messages)
    ids = prepared.prompt.input_ids
    cache = model.session.new_cache(len(ids))
    embeds = model.encode_images(prepared.images)
    inputs = prepared.decoder_inputs(embeds, all_logits=True)
    logits = prefill(model.session, cache, inputs, chunk=chunk)
    assert isinstance(cache, OrtKVCache)
    return logits, cache


def test_engines_with_few_bits_stay_near_the_float_one(engine_of_bits: dict[int, Path]) -> None:
    models = {bits: Qwen3VLModel.from_engine(engine) for bits, engine in engine_of_bits.items()}
    kl: dict[int, list[float]] = {8: [], 4: []}
    for index in range(8):
        expected, float_cache = logits_of(models[32], index)
        for bits, values in kl.items():
            found, cache = logits_of(models[bits], index)
            values.append(float(kl_divergence(found, expected).mean()))
            assert cache.num_bytes * 32 == float_cache.num_bytes * bits
            # The first layer's keys and values come of the same input: only their own rounding is between them.
            steps = np.load(engine_of_bits[bits] / "cache_scales.npy")[0][..., None, :]
            largest = 2 ** (bits - 1) - 1
            for kept, exact, step in zip(cache.layer(0), float_cache.layer(0), steps, strict=True):
                error = np.abs(kept - np.clip(exact, -(largest + 1) * step, largest * step)) / step
                assert error.mean() > 0.1 and error.max() < 0.51
    # Measured on 100 held-out questions: 3.8e-5 and 5.5e-3.
    assert 0 < np.mean(kl[8]) < 4e-4
    assert 10 * np.mean(kl[8]) < np.mean(kl[4]) < 5e-2


def test_answers_of_the_8_bit_cache_are_those_of_the_float_one(engine_of_bits: dict[int, Path]) -> None:
    whole, few = (Qwen3VLModel.from_engine(engine_of_bits[bits]) for bits in (32, 8))
    for index in range(6):
        example = held_out(index)
        for question, _ in example.tasks.values():
            messages = user_message(question, [example.image])
            assert few.generate(messages).text == whole.generate(messages).text


def test_verify_passes_8_bits_and_refuses_far_too_wide_steps(
    engine_of_bits: dict[int, Path],
    demo_engine: Path,
    calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = verify(engine_of_bits[8], "demo", max_new_tokens=1)
    assert report.passed and report.precision == "fp32 with cache_int8"
    monkeypatch.setitem(MARGINS, 8, 8 * MARGINS[8])
    coarse = requantized(demo_engine, tmp_path / "coarse", 8, read_prompts(calibration))
    failed = {check.name for check in verify(coarse, "demo", max_new_tokens=1).checks if not check.passed}
    assert {"keys", "values"} <= failed


def test_verify_passes_weights_and_cache_in_few_bits_together(calibration: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    arguments = ("demo", "--target", "ort-cpu-int4", "--kv-cache", "int8", "--calibration", str(calibration))
    code, _, err = call(export.app, *arguments, "--output", str(output))
    assert code == 0, err
    report = verify(output, "demo", max_new_tokens=8)
    assert report.precision == "int4 with cache_int8"
    assert report.passed, [check for check in report.checks if not check.passed]


def test_the_wider_of_two_limits_counts() -> None:
    limits = {"logits_scaled": 0.1, "top1_agreement": 0.9, "pixel_levels": 1.0}
    assert wider_limits(limits, {"logits_scaled": 0.2, "top1_agreement": 1.0}) == {**limits, "logits_scaled": 0.2}
    assert wider_limits(limits, {"logits_scaled": 0.0, "top1_agreement": 0.5}) == {**limits, "top1_agreement": 0.5}


def test_chunks_see_the_same_cache_as_a_whole_prompt(engine_of_bits: dict[int, Path]) -> None:
    model = Qwen3VLModel.from_engine(engine_of_bits[8])
    whole, _ = logits_of(model, 0)
    chunked, _ = logits_of(model, 0, chunk=7)
    # A code on the edge between two may fall otherwise; a chunk that misread the cache would be off by whole logits.
    assert np.abs(whole - chunked).max() < 0.1 * whole.std()


def test_estimates_and_cache_agree(engine_of_bits: dict[int, Path]) -> None:
    for bits, engine in engine_of_bits.items():
        model = Qwen3VLModel.from_engine(engine)
        text = model.config.text
        per_token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * bits // 8
        found = cache_bytes(model.config, model.manifest.capabilities, 100)
        assert found == model.session.new_cache(100).num_bytes == 100 * per_token


def test_ranges_are_the_largest_of_all_prompts(demo_engine: Path, calibration: Path) -> None:
    prompts = read_prompts(calibration)[:3]
    manifest = Manifest.read(demo_engine)
    alone = [cache_ranges(demo_engine, manifest, [prompt]) for prompt in prompts]
    np.testing.assert_array_equal(cache_ranges(demo_engine, manifest, prompts), np.max(alone, axis=0))
    model = Qwen3VLModel.from_engine(demo_engine)
    prepared = model.prepare(prompts[0].messages)
    cache = model.session.new_cache(len(prepared.prompt.input_ids))
    embeds = model.encode_images(prepared.images)
    prefill(model.session, cache, prepared.decoder_inputs(embeds))
    values = cache.layer(2)[1][0]
    np.testing.assert_array_equal(alone[0][2, 1], np.abs(values).max(axis=1))


def test_a_second_decoder_shares_the_cache(demo_bundle: Bundle, calibration: Path, tmp_path: Path) -> None:
    engine = build(demo_bundle, "ort-cpu-int4p8", tmp_path / "float")
    quantized = requantized(engine, tmp_path / "int8", 8, read_prompts(calibration))
    for name in ("decoder", "prefill"):
        graph = ir.load(quantized / f"{name}.onnx").graph
        caches = [value for value in (*graph.inputs, *graph.outputs) if "_key_values." in str(value.name)]
        assert len(caches) == 16 and {value.dtype for value in caches} == {ir.DataType.INT8}
    whole, few = (Qwen3VLModel.from_engine(folder) for folder in (engine, quantized))
    expected, found = (logits_of(model, 0)[0] for model in (whole, few))
    assert 0 < kl_divergence(found, expected).mean() < 1e-2


def test_logits_outlive_the_next_call(demo_engine: Path) -> None:
    model = Qwen3VLModel.from_engine(demo_engine)
    session, embeds = model.session, model.encode_images(())
    cache = session.new_cache(4)

    def step(token: int, past: int) -> np.ndarray:
        return session.decode(DecoderInputs.text(np.array([[token]]), np.array([past]), embeds), cache)

    first = step(5, 0)
    kept = first.copy()
    second = step(7, 1)
    np.testing.assert_array_equal(first, kept)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(step(7, 1), second)

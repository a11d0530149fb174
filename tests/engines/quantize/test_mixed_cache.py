"""A KV cache whose layers differ: which bits each gets, what engines with it answer, what `verify` finds in them."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from engines.bundle import Bundle
from engines.quantize.cache_ranges import CacheQuantization, quantize_cache
from engines.quantize.cache_sensitivity import cache_sensitivity, choose_bits, rounded
from engines.quantize.calibration_data import read_prompts
from engines.registry import get
from helpers.calibration import write_canvases
from helpers.command_line import call
from helpers.engines import build, requantized
from helpers.own_kernels import needs_own_kernels
from qwen3vl_export.cli import run
from qwen3vl_export.demo.data import held_out
from qwen3vl_export.parity.verify import verify
from runtime.cache_types import CacheType, cache_types
from runtime.errors import EngineError, UsageError
from runtime.manifest import FileRecord, Manifest
from runtime.memory import cache_bytes
from runtime.messages import user_message
from runtime.model import Qwen3VLModel

NUM_PROMPTS = 12
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_canvases(tmp_path_factory.mktemp("calibration"), NUM_PROMPTS)


@pytest.fixture(scope="module")
def mixed_engine(demo_engine: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return requantized(demo_engine, tmp_path_factory.mktemp("mixed") / "engine", None, read_prompts(calibration))


@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.4, 0.55, 1.0])
def test_no_other_choice_of_that_size_loses_less(ratio: float) -> None:
    kinds = (16, 8, 4)
    losses = [dict(zip(kinds, sorted(RNG.random(3).tolist()), strict=True)) for _ in range(5)]

    def loss_of(chosen: tuple[int, ...]) -> float:
        return sum(each[bits] for each, bits in zip(losses, chosen, strict=True))

    chosen = choose_bits(losses, ratio)
    others = [each for each in itertools.product((16, 8, 4), repeat=5) if sum(each) <= ratio * 16 * 5]
    assert chosen in others
    assert loss_of(chosen) == pytest.approx(min(map(loss_of, others)))


def test_a_size_that_no_kind_has_is_refused() -> None:
    with pytest.raises(UsageError, match=r"takes 0\.5 of the bytes"):
        choose_bits([{16: 0.0, 8: 1.0}], 0.4)


def test_rounding_is_that_of_the_cache() -> None:
    values = np.array([[[[0.26, -9.0, 0.74], [0.25, 9.0, -0.76]]]], np.float32)
    scales = np.array([[0.5, 1.0, 0.5]], np.float32)
    found = rounded(values, 4, scales)
    np.testing.assert_array_equal(found, [[[[0.5, -8, 0.5], [0, 7, -1]]]])  # halves go to even codes
    np.testing.assert_array_equal(rounded(values, 16, scales), values.astype(np.float16))


def test_the_sensitivity_is_that_of_single_layers(demo_engine: Path, calibration: Path) -> None:
    manifest, prompts = Manifest.read(demo_engine), read_prompts(calibration)[:3]
    text = manifest.model.text
    scales = np.full((text.num_layers, 2, text.num_kv_heads, text.head_dim), 1e-4, np.float32)
    scales[2] = 4.0
    losses = cache_sensitivity(demo_engine, manifest, prompts, {8: scales}, (16, 8))
    assert len(losses) == text.num_layers
    # float16 costs nearly nothing; steps of 4 in one layer cost more than none, and all others are cut off at 0.0127.
    assert max(each[16] for each in losses) < 1e-5
    assert all(each[8] > 1e-3 for each in losses)
    fine = np.full_like(scales, 1.0)
    fine[2] = 0.1
    losses = cache_sensitivity(demo_engine, manifest, prompts, {8: fine}, (8,))
    assert losses[2][8] < min(losses[layer][8] for layer in (0, 1, 3))


def test_the_demo_keeps_its_first_layers_finer(mixed_engine: Path) -> None:
    manifest = Manifest.read(mixed_engine)
    capabilities, text = manifest.capabilities, manifest.model.text
    assert (capabilities["cache_dtype"], capabilities["cache_layer_bits"]) == ("mixed", [8, 8, 4, 4])
    assert "cache_bits" not in capabilities
    measured = manifest.source["cache_calibration"]
    assert measured["prompts"] == NUM_PROMPTS
    assert all(0 < each["8"] < each["4"] for each in measured["kl_by_layer"])
    model = Qwen3VLModel.from_engine(mixed_engine)
    cache = model.session.new_cache(100)
    assert cache.num_bytes == cache_bytes(model.config, capabilities, 100)
    in_float16 = 2 * text.num_layers * text.num_kv_heads * text.head_dim * 100 * 2
    assert cache.num_bytes <= 0.4 * in_float16
    graph = ir.load(mixed_engine / "decoder.onnx").graph
    types = {value.name: (value.dtype, value.shape[-1]) for value in graph.inputs if "past_key" in str(value.name)}
    for layer, bits in enumerate(capabilities["cache_layer_bits"]):
        wanted = {8: (ir.DataType.INT8, text.head_dim), 4: (ir.DataType.UINT8, text.head_dim // 2)}[bits]
        assert types[f"past_key_values.{layer}.key"] == types[f"past_key_values.{layer}.value"] == wanted


def test_answers_are_those_of_the_float_cache(mixed_engine: Path, demo_engine: Path) -> None:
    mixed, whole = (Qwen3VLModel.from_engine(engine) for engine in (mixed_engine, demo_engine))
    for index in range(6):
        example = held_out(index)
        for question, _ in example.tasks.values():
            messages = user_message(question, [example.image])
            assert mixed.generate(messages).text == whole.generate(messages).text


@needs_own_kernels
def test_own_kernels_mix_three_kinds(demo_bundle: Bundle, calibration: Path, tmp_path: Path) -> None:
    (own,) = get("ort-cpu-int8").other_kernels
    plain, folder = build(demo_bundle, own, tmp_path / "plain"), tmp_path / "engine"
    shutil.copytree(plain, folder)
    manifest = Manifest.read(folder)
    wanted = CacheQuantization(None, read_prompts(calibration), ratio=0.65)
    made = quantize_cache(folder, manifest, wanted, own)
    made.write(folder)
    bits = made.capabilities["cache_layer_bits"]
    assert 16 in bits and sum(bits) <= 0.65 * 16 * len(bits)
    kernels = {16: "DecodeAttentionFloat16", 8: "DecodeAttentionInt8", 4: "DecodeAttentionInt4"}
    found = {node.op_type for node in ir.load(folder / "decoder.onnx").graph if "Attention" in node.op_type}
    assert found - {"MultiHeadAttention"} == {kernels[each] for each in bits}
    mixed, whole = (Qwen3VLModel.from_engine(engine) for engine in (folder, plain))
    prompt = user_message("Read the digits.", [held_out(0).image])
    assert mixed.generate(prompt).text == whole.generate(prompt).text
    expected, logits = whole.logits(prompt), mixed.logits(prompt)
    assert 0 < np.abs(logits - expected).max() < 0.1 * expected.std()


def with_scales_of(engine: Path, output: Path, sources: tuple[int, ...], *, in_file: bool) -> Path:
    """Copy an engine and give each layer of its decoder the scales of another one."""
    shutil.copytree(engine, output)
    scales = np.load(engine / "cache_scales.npy")[list(sources)]
    model = ir.load(output / "decoder.onnx")
    for layer, kind in itertools.product(range(len(sources)), (0, 1)):
        value = model.graph.initializers[f"cache_scales.{layer}.{('key', 'value')[kind]}"]
        shape = value.const_value.numpy().shape
        value.const_value = ir.Tensor(scales[layer, kind].reshape(shape), name=value.name)
    ir.save(model, output / "decoder.onnx")
    if in_file:
        np.save(output / "cache_scales.npy", scales)
    manifest = Manifest.read(engine)
    records = {name: FileRecord.of(output / name) for name in ("decoder.onnx", "cache_scales.npy")}
    replace(manifest, files={**manifest.files, **records}).write(output)
    return output


def test_verify_passes_it(mixed_engine: Path) -> None:
    report = verify(mixed_engine, "demo", max_new_tokens=4)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.precision == "fp32 with cache_mixed"


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("sources", [(0, 1, 3, 2), pytest.param((0, 0, 2, 3), marks=pytest.mark.slow)])
def test_verify_finds_the_scales_of_another_layer(
    sources: tuple[int, ...], in_file: bool, mixed_engine: Path, tmp_path: Path
) -> None:
    engine = with_scales_of(mixed_engine, tmp_path / "engine", sources, in_file=in_file)
    report = verify(engine, "demo", max_new_tokens=1)
    wrong = {layer for layer, source in enumerate(sources) if layer != source}
    failed = {(check.name, check.layer) for check in report.checks if not check.passed}
    if in_file:  # codes and their reading agree, so the layers are only coarser than they need be
        assert {("keys beyond the codes", layer) for layer in wrong} <= failed
    else:
        assert {("values", layer) for layer in wrong} <= failed
    assert not {layer for _, layer in failed if layer is not None and layer < min(wrong)}


@pytest.mark.parametrize("bits", [[8, 8, 4], [8, 8, 4, 5], [8, 8, 4, True], "8844"])
def test_a_manifest_says_the_bits_of_each_layer(bits: object, mixed_engine: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(mixed_engine)
    replace(manifest, capabilities={**manifest.capabilities, "cache_layer_bits": bits}).write(tmp_path)
    with pytest.raises(EngineError, match="cache_layer_bits"):
        Manifest.read(tmp_path)


def test_a_manifest_of_one_kind_has_no_bits_of_layers(demo_engine: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(demo_engine)
    replace(manifest, capabilities={**manifest.capabilities, "cache_layer_bits": [8] * 4}).write(tmp_path)
    with pytest.raises(EngineError, match="cache_layer_bits"):
        Manifest.read(tmp_path)


def test_a_graph_of_other_kinds_is_refused(mixed_engine: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(mixed_engine, engine)
    manifest = Manifest.read(engine)
    replace(manifest, capabilities={**manifest.capabilities, "cache_layer_bits": [8, 4, 8, 4]}).write(engine)
    with pytest.raises(EngineError, match=r"of tensor\(int8\), engine\.json says uint8 of layer 1"):
        Qwen3VLModel.from_engine(engine)


def test_types_of_layers() -> None:
    assert cache_types({"cache_dtype": "uint8", "cache_bits": 4}, 2) == (CacheType("uint8", 4),) * 2
    assert cache_types({"cache_dtype": "bfloat16"}, 1) == (CacheType("bfloat16", 16),)
    mixed = cache_types({"cache_dtype": "mixed", "cache_layer_bits": [16, 4]}, 2)
    assert mixed == (CacheType("float16", 16), CacheType("uint8", 4))
    assert [each.row_elements(64) for each in mixed] == [64, 32]


def test_inspect_shows_the_bits(mixed_engine: Path) -> None:
    code, out, _ = call(run.app, "inspect", str(mixed_engine), "--json")
    assert code == 0
    assert json.loads(out)["capabilities"]["cache_layer_bits"] == [8, 8, 4, 4]

"""Graphs without weights, filled and opened as an engine: values, manifest, times, agreement with PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import fill, first_token, measure, speed, torch_step
from benchmarks.gpu.values import Values
from benchmarks.gpu_pack_graphs import describe, fan_in_of, kind_of
from engines.build import build_engine
from engines.bundle import Bundle
from engines.registry import get
from helpers.host_device import CPU
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel
from runtime.preparation import Preparation
from runtime.session import SessionOptions
from runtime.sessions.ort_cuda import OrtCudaSession

# Long enough for the embeddings of the demo's shape, and a prime.
BLOCK = 131_101
TINY = speed.Sizes(batches=(1, 2), past=8, long_past=16, prefills=(8,), grids=((4, 4), (4, 8)), repeats=2)


def on_host(folder: Path, manifest: Manifest, options: SessionOptions) -> OrtCudaSession:
    return OrtCudaSession(folder, manifest, options, device=CPU)


@pytest.fixture(scope="module")
def graphs(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Filled engines of the demo's shape by precision."""
    work = tmp_path_factory.mktemp("graphs")
    folders = {}
    for precision in ("fp16", "int4"):
        folder = work / f"demo-ort-cuda-{precision}"
        manifest = build_engine(demo_bundle, get(f"ort-cuda-{precision}"), folder, with_weights=False)
        layout = describe(folder, manifest)
        assert not (folder / "engine.json").exists()
        fill.write_weights(folder, layout, blocks=fill.Blocks(BLOCK), threads=2)
        fill.write_manifest(folder)
        folders[precision] = folder
    return folders


def stored(folder: Path, name: str) -> np.ndarray:
    tensors = json.loads((folder / measure.LAYOUT).read_text())["decoder.onnx.data"]["tensors"]
    (tensor,) = [each for each in tensors if each["name"] == name]
    data = (folder / "decoder.onnx.data").read_bytes()[tensor["offset"] : tensor["offset"] + tensor["num_bytes"]]
    return np.frombuffer(data, tensor["dtype"]).reshape(tensor["shape"])


def test_weights_have_the_spread_of_their_kind_and_no_two_rows_are_equal(graphs: dict[str, Path]) -> None:
    table = stored(graphs["fp16"], "model.language_model.embed_tokens.weight").astype(np.float64)
    std = table.shape[1] ** -0.5
    assert abs(table.std() - std) < 0.05 * std and abs(table.mean()) < 0.05 * std
    assert len(np.unique(table, axis=0)) == len(table)
    assert (stored(graphs["fp16"], "model.language_model.norm.weight") == 1).all()


def test_codes_of_few_bits_lie_around_their_zero_point(graphs: dict[str, Path]) -> None:
    tensors = json.loads((graphs["int4"] / measure.LAYOUT).read_text())["decoder.onnx.data"]["tensors"]
    names = {each["name"] for each in tensors}
    kinds = {each["kind"] for each in tensors}
    assert {"codes4", "codes8", "norm"} <= kinds and any(kind.startswith("scales") for kind in kinds)
    codes = next(name for name in sorted(names) if name.endswith(".q4"))
    weight = codes.removesuffix(".q4")
    packed = stored(graphs["int4"], codes).astype(np.int64)
    scales = stored(graphs["int4"], f"{weight}.scales").astype(np.float64)
    values = np.stack([packed & 15, packed >> 4], -1).reshape(*scales.shape, -1) - 8
    std = (values.shape[-1] * scales.shape[-1]) ** -0.5
    assert abs((values * scales[..., None]).std() - std) < 0.05 * std


def test_zero_points_of_eight_bits_are_those_of_eight_bits() -> None:
    names = {"a.q8", "a.scales", "a.zero_points", "b.q4", "b.scales", "b.zero_points"}
    assert kind_of("a.zero_points", "uint8", names) == "zero_points8"
    assert kind_of("b.zero_points", "uint8", names) == "zero_points4"
    assert kind_of("a.scales", "float16", names) == "scales8"
    for kind, byte in (("zero_points8", 0x80), ("zero_points4", 0x88)):
        assert fill.Blocks(7).get({"kind": kind, "dtype": "uint8", "fan_in": 0}).tolist() == [byte] * 7


def test_a_weight_knows_of_how_many_inputs_it_makes_a_sum() -> None:
    shapes = {
        "a": [8, 256, 192],
        **{"b.q4": [640, 6, 16], "b.scales": [640, 6]},
        **{"c.q8": [8, 256, 192], "c.scales": [8, 256, 3]},
        **{"d.f8": [192, 512], "d.scales": [192, 4]},
    }
    kinds = {"a": "weight", "b.scales": "scales4", "c.scales": "scales8", "d.scales": "scales_float8"}
    found = {name: fan_in_of(name, kind, shapes) for name, kind in kinds.items()}
    assert found == {"a": 192, "b.scales": 192, "c.scales": 192, "d.scales": 512}
    assert fan_in_of("b.q4", "codes4", shapes) == 0


def test_the_same_weights_come_out_whatever_the_number_of_threads(graphs: dict[str, Path], tmp_path: Path) -> None:
    layout = json.loads((graphs["fp16"] / measure.LAYOUT).read_text())
    fill.write_weights(tmp_path, layout, blocks=fill.Blocks(BLOCK), threads=1)
    for name in layout:
        assert (tmp_path / name).read_bytes() == (graphs["fp16"] / name).read_bytes()


def test_a_bfloat16_is_the_upper_half_of_a_float32() -> None:
    values = np.array([1.0, -2.5, 0.02], np.float32)
    halves = fill.to_dtype(values, "bfloat16")
    assert halves.dtype == np.uint16
    assert np.allclose((halves.astype(np.uint32) << 16).view(np.float32), values, rtol=2**-7)


def test_a_float8_is_the_nearest() -> None:
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.FLOAT8E4M3FN)
    values = np.array([0.0, 1.0, -1.0, 0.0019, 3.3, -447.0, 1e6, 17.4], np.float32)
    assert fill.to_float8(values).view(dtype).astype(np.float32).tolist() == [0, 1, -1, 2**-9, 3.25, -448, 448, 18]


def test_float8_weights_have_the_spread_of_products(demo_bundle: Bundle, tmp_path: Path) -> None:
    import onnx

    folder = tmp_path / "demo-ort-cuda-fp8"
    layout = describe(folder, build_engine(demo_bundle, get("ort-cuda-fp8"), folder, with_weights=False))
    fill.write_weights(folder, layout, blocks=fill.Blocks(BLOCK), threads=2)
    weight = "model.language_model.layers.0.self_attn.o_proj.weight"
    tensors = {each["name"]: each for each in layout["decoder.onnx.data"]["tensors"]}
    data = (folder / "decoder.onnx.data").read_bytes()

    def read(name: str, dtype: Any) -> np.ndarray:
        each = tensors[name]
        return np.frombuffer(data[each["offset"] : each["offset"] + each["num_bytes"]], dtype).reshape(each["shape"])

    float8 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.FLOAT8E4M3FN)
    codes = read(f"{weight}.f8", float8).astype(np.float64)
    scales = np.repeat(read(f"{weight}.scales", np.float32), 128, 1)
    std = codes.shape[1] ** -0.5
    assert abs((codes * scales).std() - std) < 0.05 * std


def test_the_folder_is_an_engine(graphs: dict[str, Path]) -> None:
    for precision, folder in graphs.items():
        manifest = Manifest.read(folder)
        manifest.check(folder)
        assert (manifest.target, manifest.session) == (f"ort-cuda-{precision}", "ort_cuda")
        assert manifest.weight_bytes == sum(path.stat().st_size for path in folder.glob("*.data"))


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_every_figure_is_measured_through_the_session(graphs: dict[str, Path], precision: str, tmp_path: Path) -> None:
    values, told = Values(tmp_path / "values.json"), []
    engine = speed.Engine(graphs[precision], opener=on_host)
    speed.measure(engine, values, lambda what, cache: told.append((what, cache.batch)), TINY, decode_only=False)
    assert told == [("step", 1)]
    assert values["finite"] is True
    assert set(values["decode"]) == {"1", "2"} and set(values["vision"]) == {"16", "32"}
    assert set(values["prefill"]) == {"8"} and values["first_token"]["n"] == TINY.few
    assert values["decode_long"]["n"] == TINY.repeats
    assert values["first_token_prompt_tokens"] > 32 // 4  # visual tokens, and text around them
    assert json.loads((tmp_path / "values.json").read_text()) == values


def test_the_time_to_the_first_token_and_its_parts_are_measured(graphs: dict[str, Path], tmp_path: Path) -> None:
    folder, values = graphs["fp16"], Values(tmp_path / "values.json")
    manifest = Manifest.read(folder)
    session = on_host(folder, manifest, SessionOptions())
    preparation = Preparation.from_folder(folder, manifest.model).for_engine(manifest.capabilities)
    model = Qwen3VLModel(manifest, session, preparation, 512, 1 << 34)
    engine = speed.Engine(folder, opener=lambda *_: session)
    first_token.measure(model, engine, values, (4, 8), repeats=2)
    assert [values[name]["n"] for name in ("session", "vision", "prefill", "model")] == [2] * 4
    assert values["prompt_tokens"] > 32 // 4
    # Each request runs its prompt and its image anew.
    counts = model.statistics()
    assert counts["vision_calls"] == counts["prefill_chunks"] == 5


def test_without_its_plan_only_steps_are_timed(graphs: dict[str, Path], tmp_path: Path) -> None:
    values = Values(tmp_path / "values.json")
    asked: list[SessionOptions] = []

    def opener(folder: Path, manifest: Manifest, options: SessionOptions) -> OrtCudaSession:
        asked.append(options)
        return on_host(folder, manifest, options)

    engine = speed.Engine(graphs["fp16"], with_plan=False, opener=opener)
    assert asked == [SessionOptions(decode_plan=False)] and engine.plan_problem == ""
    speed.measure(engine, values, lambda what, cache: None, TINY, decode_only=True)
    assert set(values) == {"finite", "decode_kernels", "decode", "decode_long"}


def test_plain_pytorch_computes_the_same_logits_from_the_same_file(graphs: dict[str, Path]) -> None:
    import torch

    folder, ids = graphs["fp16"], [5, 17, 200, 3, 91, 8]
    config = Manifest.read(folder).model
    with torch.inference_mode():
        theirs = torch_step.prompt_logits(
            torch_step.Step(torch_step.read_weights(folder, "cpu"), config, 1, "cpu"), ids
        )
    ours = torch_step.session_logits(folder, ids, on_host)
    found = torch_step.compare(ours, theirs)
    assert found["same_first"] and found["cosine"] > 0.9999
    # The comparison sees it when one token is another one.
    other = torch_step.session_logits(folder, [*ids[:2], 201, *ids[3:]], on_host)
    assert torch_step.compare(other, theirs)["cosine"] < 0.999


def test_bytes_of_a_step_are_those_of_the_decoder_and_of_the_cache(graphs: dict[str, Path]) -> None:
    folder = graphs["fp16"]
    config = Manifest.read(folder).model
    assert config.text.tie_word_embeddings
    tensors = json.loads((folder / measure.LAYOUT).read_text())["decoder.onnx.data"]["tensors"]
    weights = sum(each["num_bytes"] for each in tensors)
    text = config.text
    row = 2 * text.num_layers * text.num_kv_heads * text.head_dim * 2
    assert speed.step_bytes(folder, config, 3, 100) == weights + 300 * row


def test_weights_twice_on_the_device_are_a_problem() -> None:
    memory = {"weight_bytes": 4 << 30, "cache_bytes": 1 << 28, "taken_at_step_bytes": (9 << 29) + (1 << 28)}
    assert speed.weights_problem(memory) == ""
    memory["taken_at_step_bytes"] += 4 << 30
    assert "expected them once" in speed.weights_problem(memory)

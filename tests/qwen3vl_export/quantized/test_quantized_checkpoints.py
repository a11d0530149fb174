"""Import of quantised checkpoints: the weights are those of other implementations, and other forms are refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from engines.quantize.imported import GroupQuantizedTensor
from engines.quantize.tensors import BlockwiseWeight
from engines.weights import ConcatenatedTensor, StreamedTensor
from helpers import ROOT, judge
from helpers import quantized_fixtures as fixtures
from helpers.quantized_fixtures import FORMS, Form
from qwen3vl_export.checkpoint import EMBEDDING_KEY, HEAD_KEY, Checkpoint
from qwen3vl_export.export import export
from qwen3vl_export.parity.verify import verify
from qwen3vl_export.quantized import compressed_tensors, fp8, join_parts, parts
from qwen3vl_export.request import ExportRequest
from qwen3vl_export.safetensors_reader import read_header
from runtime.errors import CheckpointError
from runtime.messages import user_message
from runtime.model import Qwen3VLModel

LAYERS = ROOT / "tests" / "data" / "quantized_layers.safetensors"
PACKED_BY_OTHERS = (
    *("awq", "gptq_v1", "gptq_v2", "gptq_act_order", "gptq_int8"),
    *("pack_int4", "pack_int4_sym", "pack_int8", "pack_int8_channel", "pack_act_order"),
)


def layer(folder: Path) -> StreamedTensor:
    config = json.loads((folder / "config.json").read_text())
    entries = join_parts(read_header(folder / "model.safetensors").tensors, config, folder)
    assert set(entries) == {"layer.weight"}
    return entries["layer.weight"].tensor("layer.weight")


@pytest.mark.parametrize("name", PACKED_BY_OTHERS)
def test_layers_packed_by_the_formats_own_packages(name: str) -> None:
    # 32×64 layers with zero points of 0 and of the largest code, packed by AutoAWQ 0.2.9 (WQLinear_GEMM.from_linear),
    # GPTQModel 7.7.0 (TorchLinear) and compressed-tensors 0.20.0 (0.12.2 for g_idx); `reference` is what the same
    # package dequantises, in the scales' 16 bits: the exact product, rounded once.
    import torch
    from safetensors import safe_open

    with safe_open(LAYERS, "pt") as file:
        form = json.loads(file.metadata()["forms"])[name]
        expected = file.get_tensor(f"{name}.reference")
    entries = {
        key: entry
        for key, entry in read_header(LAYERS).tensors.items()
        if key.startswith(f"{name}.") and not key.endswith(".reference")
    }
    joined = join_parts(entries, {"quantization_config": form["config"]}, LAYERS.parent)
    found = joined[f"{name}.weight"].tensor("weight").numpy()
    assert torch.equal(torch.from_numpy(found).to(expected.dtype), expected)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("shape", [(40, 64), (160, 288)])
def test_weights_equal_the_naive_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form, shape: tuple[int, int]
) -> None:
    expected = fixtures.write_layer(tmp_path, form, shape)
    np.testing.assert_array_equal(layer(tmp_path).numpy(), expected)
    # In many small bands and chunks; neither divides the rows.
    monkeypatch.setattr(parts, "BAND_BYTES", shape[1] * 4 * 3)
    for module in (parts, compressed_tensors, fp8):
        monkeypatch.setattr(module, "CHUNK_WEIGHTS", shape[1] * 7)
    blocks = [block.copy() for block in layer(tmp_path).blocks()]
    assert len(blocks) >= (shape[0] // 128 + 1 if form.name == "fp8" else shape[0] // 8)
    np.testing.assert_array_equal(np.concatenate(blocks).reshape(shape), expected)


def test_fp8_values_are_those_of_torch() -> None:
    import torch

    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(fp8.e4m3_values(), expected)


@pytest.mark.parametrize(
    ("form", "shape", "block"),
    [
        (Form("awq", group=32), (40, 96), 32),
        (Form("gptq", group=48), (16, 96), 16),
        (Form("gptq", group=64), (16, 96), 64),  # the last group of a row is short
        (Form("gptq_v2", bits=8, group=16), (16, 64), 16),
        (Form("pack", group=96), (24, 96), 32),
        (Form("pack", group=512), (8, 512), 256),
    ],
)
def test_codes_are_handed_on_unchanged(tmp_path: Path, form: Form, shape: tuple[int, int], block: int) -> None:
    expected = fixtures.write_layer(tmp_path, form, shape)
    tensor = layer(tmp_path)
    assert isinstance(tensor, GroupQuantizedTensor)
    assert (tensor.bits, tensor.block) == (form.bits, block)
    rows = []
    for quantized in tensor.quantized_rows():
        assert quantized.codes.max() < 1 << form.bits
        rows.append(quantized.dequantize().reshape(-1, -(-shape[1] // block) * block))
    found = np.concatenate(rows)
    np.testing.assert_array_equal(found[:, : shape[1]], expected)
    assert not found[:, shape[1] :].any()


@pytest.mark.parametrize("form", [Form("gptq", act_order=True), Form("awq", group=24), Form("fp8")])
def test_what_is_in_no_blocks_is_dequantised(tmp_path: Path, form: Form) -> None:
    fixtures.write_layer(tmp_path, form, (16, 96))
    assert not isinstance(layer(tmp_path), GroupQuantizedTensor)


def reference_logits(checkpoint: Path, model: Qwen3VLModel, messages: Any, weights: dict[str, np.ndarray]) -> Any:
    """Logits of transformers with the given weights."""
    import torch

    values = json.loads((checkpoint / "config.json").read_text())
    values.pop("quantization_config")
    reference = judge.new_model(values)
    state = {key: torch.from_numpy(value) for key, value in weights.items()}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    return judge.logits_of(reference, model.prepare(messages))


@pytest.mark.judge
def test_engine_equals_transformers_on_the_dequantised_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    # One form: the others give the same graph, with the weights that the next test compares.
    folder = tmp_path / "checkpoint"
    weights = fixtures.quantize_checkpoint(tiny_checkpoint, folder, FORMS["awq"])
    export(ExportRequest(str(folder), "ort-cpu-fp32", tmp_path / "engine"))
    model = Qwen3VLModel.from_engine(tmp_path / "engine", threads=2)
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    messages = user_message("Read the digits.", [picture])
    expected = reference_logits(folder, model, messages, weights)
    found = model.logits(messages)
    np.testing.assert_allclose(found, expected, atol=1e-3 * max(1.0, float(expected.std())))
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_verify_passes_on_the_dequantised_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    fixtures.quantize_checkpoint(tiny_checkpoint, folder, FORMS["awq"])
    export(ExportRequest(str(folder), "ort-cpu-fp32", tmp_path / "engine"))
    report = verify(tmp_path / "engine", str(folder), max_new_tokens=2)
    assert report.passed, report.render()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_checkpoint_has_the_keys_and_weights_of_the_unquantised(
    tiny_checkpoint: Path, tmp_path: Path, form: Form
) -> None:
    weights = fixtures.quantize_checkpoint(tiny_checkpoint, tmp_path / "c", form)
    checkpoint = Checkpoint.open(str(tmp_path / "c"))
    assert set(checkpoint.entries) == set(weights)
    assert sum(map(fixtures.is_quantized, weights)) == 35
    for key, expected in weights.items():
        np.testing.assert_array_equal(checkpoint.tensor(key, expected.shape).numpy(), expected)
    checkpoint.check_keys(weights)


def test_fp8_equals_the_dequantisation_of_the_locked_release(tmp_path: Path) -> None:
    # from_pretrained(…, quantization_config=FineGrainedFP8Config(dequantize=True)) goes through this class, but asks
    # for accelerate, which nothing else here needs.
    import torch
    from safetensors.torch import load_file
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    fixtures.write_layer(tmp_path, FORMS["fp8"], (256, 384))
    stored = {key.removeprefix("layer."): tensor for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    expected = Fp8Dequantize(None).convert(stored)["weight"]
    assert expected.dtype == torch.float32
    np.testing.assert_array_equal(layer(tmp_path).numpy(), expected.numpy())


PACK = FORMS["pack int4"].config


def scheme(**values: Any) -> dict[str, Any]:
    group = PACK["config_groups"]["group_0"]
    return PACK | {"config_groups": {"group_0": group | values}}


def weights(**values: Any) -> dict[str, Any]:
    return scheme(weights=PACK["config_groups"]["group_0"]["weights"] | values)


AWQ, GPTQ, FP8 = (FORMS[name].config for name in ("awq", "gptq v1", "fp8"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AWQ | {"version": "gemv"}, 'version is "gemv"'),
        (AWQ | {"version": "marlin"}, 'version is "marlin"'),
        (AWQ | {"version": "exllama"}, 'version is "exllama"'),
        (AWQ | {"version": None, "format": "gemv_fast"}, 'version is "gemv_fast"'),
        (AWQ | {"bits": 8}, "bits is 8, expected 4"),
        (AWQ | {"group_size": 0}, "group_size is 0"),
        (GPTQ | {"bits": 2}, "bits is 2, expected 4 or 8"),
        (GPTQ | {"bits": 3}, "bits is 3, expected 4 or 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, 'checkpoint_format is "marlin"'),
        (GPTQ | {"is_marlin_format": True}, 'checkpoint_format is "marlin"'),
        (GPTQ | {"pack_dtype": "int16"}, 'pack_dtype is "int16"'),
        (PACK | {"format": "int-quantized"}, 'format of group_0 is "int-quantized"'),
        (PACK | {"format": "float-quantized"}, 'format of group_0 is "float-quantized"'),
        (PACK | {"format": "marlin-24"}, 'format of group_0 is "marlin-24"'),
        (PACK | {"sparsity_config": {"format": "sparse-24-bitmask"}}, 'sparsity_config.format is "sparse-24-bitmask"'),
        (PACK | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is"),
        (scheme(format="nvfp4-pack-quantized"), 'format of group_0 is "nvfp4-pack-quantized"'),
        (scheme(input_activations={"num_bits": 8}), "activations of group_0"),
        (weights(num_bits=3), "weights of group_0 is .*3 bits"),
        (weights(type="float"), "weights of group_0 is .*float"),
        (weights(strategy="tensor"), 'strategy of group_0 is "tensor"'),
        (scheme(weights="W4A16"), 'weights of group_0 is "W4A16", expected an object'),
        (GPTQ | {"dynamic": {"+:(": {"bits": 8}}}, "is not a regular expression"),
        (GPTQ | {"bits": [4]}, r"bits is \[4\], expected 4 or 8"),
        (FP8 | {"weight_block_size": None}, "weight_block_size is null"),
        (FP8 | {"weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\]"),
        (FP8 | {"activation_scheme": "static"}, 'activation_scheme is "static"'),
        (FP8 | {"scale_fmt": "ue8m0"}, 'scale_fmt is "ue8m0"'),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 'quant_method is "bitsandbytes", expected one of awq'),
        ({}, "quant_method is null"),
        ([], r"is \[\], expected an object"),
    ],
)
def test_other_forms_are_refused(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        join_parts({}, {"quantization_config": config}, tmp_path)
    assert error.value.remedy is not None and "quantization_config" in error.value.message


Tensors = dict[str, Any]


@pytest.mark.parametrize(
    ("name", "change", "config", "message"),
    [
        ("awq", lambda t: t.pop("layer.scales"), {}, "layer.scales is missing"),
        ("awq", lambda t: t.pop("layer.qweight"), {}, "layer.qweight is missing"),
        ("awq", lambda t: None, {"group_size": 32}, r"layer.qzeros has shape \[4, 5\], expected \[2, 5\]"),
        ("awq", lambda t: None, {"group_size": 48}, "64 columns, which groups of 48 do not divide"),
        ("awq", lambda t: t["layer.scales"][1].fill_(float("nan")), {}, "scales of layer are not finite"),
        (
            "awq",
            lambda t: t.update({"layer.weight": t["layer.scales"].clone()}),
            {},
            "layer.weight is unquantised",
        ),
        ("gptq v1", lambda t: None, {"bits": 8}, r"layer.qzeros has shape \[4, 5\], expected \[2, 10\]"),
        ("gptq v1", lambda t: t["layer.g_idx"].fill_(4), {}, "names groups 4 to 4, expected 0 to 3"),
        ("gptq act-order", lambda t: t.pop("layer.g_idx"), {}, "layer.g_idx is missing"),
        ("pack int4", lambda t: t.pop("layer.weight_zero_point"), {}, "layer.weight_zero_point is missing"),
        ("pack int4", lambda t: t["layer.weight_shape"].fill_(64), {}, r"weight_packed has shape \[40, 8\], expected"),
        ("pack int4", lambda t: t.update({"layer.weight_packed": t["layer.weight_packed"].float()}), {}, "is F32"),
        ("fp8", lambda t: t.pop("layer.weight_scale_inv"), {}, "layer.weight_scale_inv is missing"),
        ("fp8", lambda t: t.update({"layer.weight": t["layer.weight"].float()}), {}, "layer.weight is unquantised"),
        ("fp8", lambda t: t.clear(), {}, 'says "fp8", no weight is stored in that format'),
    ],
)
def test_damaged_parts_are_named(
    tmp_path: Path, name: str, change: Callable[[Tensors], None], config: Tensors, message: str
) -> None:
    from safetensors.torch import load_file, save_file

    fixtures.write_layer(tmp_path, FORMS[name], (40, 64))
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    fixtures.change_config(tmp_path, FORMS[name].config | config)
    with pytest.raises(CheckpointError, match=message) as error:
        for _ in layer(tmp_path).blocks():
            pass
    assert error.value.remedy is not None


def test_parts_without_a_quantization_config_are_an_error(tmp_path: Path) -> None:
    fixtures.write_layer(tmp_path, FORMS["awq"], (40, 64))
    fixtures.change_config(tmp_path, None)
    with pytest.raises(CheckpointError, match=r"layer\.qweight is of a quantised weight, but"):
        layer(tmp_path)


def test_schemes_and_overrides_go_by_module_name(tmp_path: Path) -> None:
    expected = fixtures.write_layer(tmp_path, FORMS["pack int4"], (40, 64))
    group = PACK["config_groups"]["group_0"]
    eight = group | {"weights": group["weights"] | {"num_bits": 8}}
    for targets, other in ((["re:lay.*"], ["Linear"]), (["layer"], ["re:.*"])):
        groups = {"group_0": eight | {"targets": other}, "group_1": group | {"targets": targets}}
        fixtures.change_config(tmp_path, PACK | {"config_groups": groups})
        np.testing.assert_array_equal(layer(tmp_path).numpy(), expected)
    fixtures.change_config(tmp_path, scheme(targets=["re:other"]))
    with pytest.raises(CheckpointError, match="no target of config_groups is layer"):
        layer(tmp_path)
    expected = fixtures.write_layer(tmp_path, FORMS["gptq v1"], (40, 64))
    fixtures.change_config(tmp_path, GPTQ | {"group_size": 32, "dynamic": {"+:lay": {"group_size": 16}}})
    np.testing.assert_array_equal(layer(tmp_path).numpy(), expected)


def test_wrong_shapes_and_stray_parts_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, key = tmp_path / "c", "model.language_model.layers.0.mlp.gate_proj"
    fixtures.quantize_checkpoint(tiny_checkpoint, folder, FORMS["awq"])
    checkpoint = Checkpoint.open(str(folder))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight has shape \[80, 48\], config.json implies \[88, 48\]"):
        checkpoint.tensor(f"{key}.weight", (88, 48))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight is quantised, expected it unquantised"):
        checkpoint.tensor(f"{key}.weight", (80, 48), view=(40, 96))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"extra.qweight": tensors[f"{key}.qweight"].clone()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"extra is quantised, but extra\.qzeros is missing"):
        _ = Checkpoint.open(str(folder)).entries
    extra = {f"extra.{name}": tensors[f"{key}.{name}"].clone() for name in ("qweight", "qzeros", "scales")}
    save_file(tensors | extra, folder / "model.safetensors")
    checkpoint = Checkpoint.open(str(folder))
    with pytest.raises(CheckpointError, match=r"1 keys belong to no part of the model: extra\.weight"):
        checkpoint.check_keys(set(checkpoint.entries) - {"extra.weight"})


def test_a_tied_head_may_be_stored_again_in_another_dtype(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_checkpoint, tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    tensors[EMBEDDING_KEY] = tensors[EMBEDDING_KEY].to(torch.bfloat16)
    for change, ties in ((0.0, True), (1e-3, False)):
        head = tensors[EMBEDDING_KEY].float()
        head[7, 5] += change
        save_file(tensors | {HEAD_KEY: head}, tmp_path / "c" / "model.safetensors")
        checkpoint = Checkpoint.open(str(tmp_path / "c"))
        with contextlib.nullcontext() if ties else pytest.raises(CheckpointError, match="differs from"):
            checkpoint.check_keys(set(tensors))


@pytest.mark.parametrize(
    "form", [Form("awq", group=32), Form("gptq", group=64), Form("gptq_v2", bits=8, group=32), Form("pack", group=32)]
)
def test_a_blockwise_target_multiplies_with_the_stored_codes(tmp_path: Path, form: Form) -> None:
    layers, expected = [], []
    for i, num_rows in enumerate((40, 16)):
        expected.append(fixtures.write_layer(tmp_path / str(i), form, (num_rows, 96)))
        layers.append(layer(tmp_path / str(i)))
    weight = BlockwiseWeight(ConcatenatedTensor("joined", layers), form.bits, form.group)
    tensors = (weight.packed, weight.scales, weight.zero_points)
    found = product_of_identity(*(tensor.numpy() for tensor in tensors), bits=form.bits, block=form.group)
    np.testing.assert_array_equal(found, np.concatenate(expected).T)


def product_of_identity(
    packed: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, *, bits: int, block: int
) -> np.ndarray:
    """What ONNX Runtime's kernel multiplies by, [K, N]."""
    num_columns = 96
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [num_columns, num_columns])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    sizes = {"K": num_columns, "N": len(packed), "bits": bits, "block_size": block, "accuracy_level": 0}
    node = onnx.helper.make_node("MatMulNBits", ["x", "q", "s", "z"], ["y"], domain="com.microsoft", **sizes)
    arrays = {"q": packed, "s": scales, "z": zero_points}
    initializers = [onnx.numpy_helper.from_array(np.array(array), name) for name, array in arrays.items()]
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph([node], "product", [x], [y], initializers)
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(num_columns, dtype=np.float32)})[0]

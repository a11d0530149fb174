"""Checkpoint to bundle to engine: contract, strict keys, equality with untouched transformers."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from damage import altered, rewrite

from engines import registry
from engines.build import build_engine
from engines.bundle import DECODER_INPUTS, VISION_INPUTS
from qwen3vl_export.checkpoint import HEAD_KEY, Checkpoint
from qwen3vl_export.export import make_bundle
from runtime.errors import CapacityError, CheckpointError, EngineError, TargetError, UsageError
from runtime.generation import prefill
from runtime.messages import user_message
from runtime.model import Qwen3VLModel


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path):
    import torch
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(2)
    return AutoModelForImageTextToText.from_pretrained(
        tiny_checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def reference_logits(reference, prepared) -> np.ndarray:
    import torch

    ids = torch.tensor([prepared.prompt.input_ids])
    marks = torch.zeros_like(ids, dtype=torch.int32)
    for start, length in prepared.prompt.spans:
        marks[0, start : start + length] = 1
    images = {}
    if prepared.images:
        images = {
            "pixel_values": torch.from_numpy(np.concatenate([i.pixel_values for i in prepared.images])),
            "image_grid_thw": torch.tensor([i.grid_thw for i in prepared.images]),
        }
    with torch.no_grad():
        return (
            reference(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=marks, **images)
            .logits[0]
            .numpy()
        )


@pytest.mark.parametrize("sizes", [[], [(96, 64)], [(96, 64), (33, 200), (64, 64)]])
def test_logits_equal_transformers(tiny_engine: Path, reference, sizes: list[tuple[int, int]]) -> None:
    model = Qwen3VLModel.from_engine(tiny_engine, threads=2)
    messages = user_message("Read the digits.", [picture(*size, seed=i) for i, size in enumerate(sizes)])
    prepared = model.prepare(messages)
    expected = reference_logits(reference, prepared)
    found = model.logits(messages)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-3 * max(1.0, float(expected.std())))
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_chunks_equal_whole_prefill(tiny_engine: Path) -> None:
    model = Qwen3VLModel.from_engine(tiny_engine, threads=2)
    prepared = model.prepare(user_message("Count.", [picture(96, 64)]))
    embeds = model.encode_images(prepared.images)
    ids = prepared.prompt.input_ids

    def run(chunk: int) -> np.ndarray:
        cache = model.session.new_cache(len(ids) + 3)
        return prefill(model.session, cache, ids, prepared.positions, embeds, all_logits=True, chunk=chunk)

    np.testing.assert_allclose(run(3), run(len(ids)), atol=1e-4)


def test_greedy_equals_transformers(tiny_engine: Path, reference) -> None:
    import torch

    model = Qwen3VLModel.from_engine(tiny_engine, threads=2)
    messages = user_message("Where is the 7?", [picture(96, 64)])
    prepared = model.prepare(messages)
    ids = torch.tensor([prepared.prompt.input_ids])
    marks = (ids == model.config.image_token_id).int()
    expected = reference.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=marks,
        pixel_values=torch.from_numpy(prepared.images[0].pixel_values),
        image_grid_thw=torch.tensor([prepared.images[0].grid_thw]),
        do_sample=False,
        max_new_tokens=64,
        min_new_tokens=64,
    )[0, ids.shape[1] :].tolist()
    found = model.generate(messages, max_new_tokens=64)
    assert found.token_ids == expected
    assert found.finish_reason == "length"


def test_bundle_passes_the_checker_and_runs_unlowered(tiny_checkpoint: Path, tiny_engine: Path, tmp_path: Path) -> None:
    make_bundle(Checkpoint.open(str(tiny_checkpoint))).write(tmp_path)
    sessions = {}
    for name, inputs in (("vision", VISION_INPUTS), ("decoder", DECODER_INPUTS)):
        onnx.checker.check_model(str(tmp_path / f"{name}.onnx"), full_check=True)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        sessions[name] = ort.InferenceSession(str(tmp_path / f"{name}.onnx"), options)
        assert tuple(value.name for value in sessions[name].get_inputs())[: len(inputs)] == inputs
    model = Qwen3VLModel.from_engine(tiny_engine, threads=2)
    prepared = model.prepare(user_message("Count.", [picture(96, 64)]))
    embeds = model.encode_images(prepared.images)
    num_tokens, text = len(prepared.prompt.input_ids), model.config.text
    empty = np.zeros((1, text.num_kv_heads, num_tokens, text.head_dim), np.float32)
    feeds = {
        "input_ids": np.array([prepared.prompt.input_ids]),
        "position_ids": prepared.positions.position_ids,
        "visual_rows": prepared.positions.visual_rows,
        "visual_embeds": embeds,
        "past_lengths": np.array([0]),
        "logits_positions": np.arange(num_tokens)[None],
    } | {f"past_key_values.{i}.{kind}": empty for i in range(text.num_layers) for kind in ("key", "value")}
    logits = sessions["decoder"].run(["logits"], feeds)[0][0]
    expected = model.logits(user_message("Count.", [picture(96, 64)]))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.visual.blocks.1.norm1.bias"), "norm1.bias is missing"),
        (lambda t: t.update({"model.extra.weight": np.zeros(3, np.float32)}), "model.extra.weight"),
        (
            lambda t: t.update({"model.language_model.norm.weight": np.ones(7, np.float32)}),
            r"norm.weight has shape \[7\]",
        ),
        (lambda t: t.update({"model.language_model.norm.weight": np.ones(48, np.int64)}), "I64"),
        (lambda t: t.update({HEAD_KEY: np.zeros((480, 48), np.float32)}), "differs from"),
    ],
)
def test_wrong_tensors_are_named(tiny_checkpoint: Path, tmp_path: Path, change, message: str) -> None:
    folder = altered(tiny_checkpoint, tmp_path / "c")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        make_bundle(Checkpoint.open(str(folder)))


def test_equal_tied_head_is_accepted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = altered(tiny_checkpoint, tmp_path / "c")
    rewrite(folder, lambda t: t.update({HEAD_KEY: t["model.language_model.embed_tokens.weight"].copy()}))
    make_bundle(Checkpoint.open(str(folder)))


def test_damaged_checkpoints_are_errors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    cut = altered(tiny_checkpoint, tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="the file has"):
        make_bundle(Checkpoint.open(str(cut)))
    (cut / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        make_bundle(Checkpoint.open(str(cut)))
    (cut / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-00001\.safetensors: missing"):
        make_bundle(Checkpoint.open(str(cut)))
    with pytest.raises(CheckpointError, match="model_type"):
        make_bundle(Checkpoint.open(str(altered(tiny_checkpoint, tmp_path / "moe", model_type="qwen3_vl_moe"))))


def test_unknown_target_lists_the_known() -> None:
    with pytest.raises(TargetError, match="ort-cpu-fp32"):
        registry.get("ort-cpu-fp33")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_build_leaves_what_was_there(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    import engines.external_data

    output = tmp_path / "engine"
    bundle = make_bundle(Checkpoint.open(str(tiny_checkpoint)))
    output.mkdir()
    (output / "engine.json").write_text("before")

    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(engines.external_data.os, "write", fail)
    with pytest.raises(CapacityError if isinstance(error, OSError) else KeyboardInterrupt):
        build_engine(bundle, registry.get("ort-cpu-fp32"), output)
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    assert (output / "engine.json").read_text() == "before"


def test_foreign_output_is_refused(tmp_path: Path) -> None:
    from engines.build import output_folder

    (tmp_path / "thesis.txt").write_text("x")
    (tmp_path / "engine.json").write_text("{}")
    with pytest.raises(UsageError, match="not overwritten"), output_folder(tmp_path, 0):
        pass
    with pytest.raises(CapacityError, match="GB are needed"), output_folder(tmp_path / "new", 1 << 60):
        pass


def test_damaged_engines_are_errors(tiny_engine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    shutil.copytree(tiny_engine, folder)
    data = folder / "decoder.onnx.data"
    contents = bytearray(data.read_bytes())
    contents[1000] ^= 1
    data.write_bytes(contents)
    Qwen3VLModel.from_engine(folder)  # weights are compared by size alone
    with pytest.raises(EngineError, match="SHA-256"):
        Qwen3VLModel.from_engine(folder, check=True)
    data.write_bytes(contents[:-1])
    with pytest.raises(EngineError, match="bytes, expected"):
        Qwen3VLModel.from_engine(folder)
    data.write_bytes(contents)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(EngineError, match="missing"):
        Qwen3VLModel.from_engine(folder)
    manifest = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(EngineError, match="format version 2"):
        Qwen3VLModel.from_engine(folder)

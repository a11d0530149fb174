"""Checkpoint to bundle to engine: contract, strict keys, equality with untouched transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from helpers import judge
from helpers.damage import altered, edit_json
from qwen3vl_export.checkpoint import EMBEDDING_KEY, HEAD_KEY, Checkpoint
from qwen3vl_export.export import export, make_bundle
from qwen3vl_export.request import ExportRequest
from runtime.contract import DECODER_INPUTS, VISION_INPUTS
from runtime.generation import prefill
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.vision_inputs import vision_inputs


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Any:
    return judge.load(tiny_checkpoint)


@pytest.mark.judge
@pytest.mark.parametrize("sizes", [[], [(96, 64)], [(96, 64), (33, 200), (64, 64)]])
def test_logits_equal_transformers(tiny_engine: Path, reference: Any, sizes: list[tuple[int, int]]) -> None:
    model = Qwen3VLModel.from_engine(tiny_engine, threads=2)
    messages = user_message("Read the digits.", [picture(*size, seed=i) for i, size in enumerate(sizes)])
    prepared = model.prepare(messages)
    expected = judge.logits_of(reference, prepared)
    found = model.logits(messages)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-3 * max(1.0, float(expected.std())))
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.portable
def test_chunks_equal_whole_prefill(tiny_engine: Path) -> None:
    model = Qwen3VLModel.from_engine(tiny_engine, threads=2)
    prepared = model.prepare(user_message("Count.", [picture(96, 64)]))
    embeds = model.encode_images(prepared.images)
    ids = prepared.prompt.input_ids

    def run(chunk: int) -> np.ndarray:
        cache = model.session.new_cache(len(ids) + 3)
        return prefill(model.session, cache, prepared.decoder_inputs(embeds, all_logits=True), chunk=chunk)

    np.testing.assert_allclose(run(3), run(len(ids)), atol=1e-4)


@pytest.mark.judge
def test_greedy_equals_transformers(tiny_engine: Path, reference: Any) -> None:
    model = Qwen3VLModel.from_engine(tiny_engine, threads=2)
    messages = user_message("Where is the 7?", [picture(96, 64)])
    prepared = model.prepare(messages)
    expected, _ = judge.greedy(reference, judge.prompt_inputs(prepared), 64)
    found = model.generate(messages, max_new_tokens=64)
    assert found.token_ids == expected
    assert found.finish_reason == "length"


@pytest.mark.portable
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
    (image,) = prepared.images
    inputs = vision_inputs(image.pixel_values, image.grid_thw, model.config.vision)
    (found,) = sessions["vision"].run(["visual_embeds"], inputs.arrays())
    np.testing.assert_allclose(found, embeds, atol=1e-4)
    num_tokens, text = len(prepared.prompt.input_ids), model.config.text
    empty = np.zeros((1, text.num_kv_heads, num_tokens, text.head_dim), np.float32)
    feeds = prepared.decoder_inputs(embeds, all_logits=True).arrays() | {
        f"past_key_values.{i}.{kind}": empty for i in range(text.num_layers) for kind in ("key", "value")
    }
    logits = sessions["decoder"].run(["logits"], feeds)[0][0]
    expected = model.logits(user_message("Count.", [picture(96, 64)]))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.judge
def test_shards_and_an_untied_head_equal_transformers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Three shards with an index, lm_head apart from the embedding, and the template of a Thinking model."""
    from safetensors.numpy import load_file, save_file

    folder = altered(tiny_checkpoint, tmp_path / "checkpoint", tie_word_embeddings=False)
    edit_json(folder / "config.json", lambda values: values["text_config"].update(tie_word_embeddings=False))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shape = tensors[EMBEDDING_KEY].shape
    tensors[HEAD_KEY] = np.random.default_rng(1).normal(0, 0.15, shape).astype(np.float32)
    weight_map = {key: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        part = {key: tensors[key] for key in tensors if weight_map[key] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    template = (folder / "chat_template.jinja").read_text()
    opening = "'<|im_start|>assistant\\n'"
    assert template.count(opening) == 1
    thinking = template.replace(opening, opening[:-1] + "<think>\\n'")
    (folder / "chat_template.jinja").write_text(thinking)

    output = tmp_path / "engine"
    export(ExportRequest(str(folder), "ort-cpu-fp32", output))
    untied = judge.load(folder)
    np.testing.assert_array_equal(untied.lm_head.weight.detach().numpy(), tensors[HEAD_KEY])
    np.testing.assert_array_equal(untied.get_input_embeddings().weight.detach().numpy(), tensors[EMBEDDING_KEY])

    model = Qwen3VLModel.from_engine(output, check=True, threads=2)
    assert model.manifest.model.text.tie_word_embeddings is False
    assert set(model.manifest.source["weight_files"]) == set(weight_map.values())
    messages = user_message("Read the digits.", [picture(96, 64)])
    prepared = model.prepare(messages)
    assert model.tokenizer.decode(prepared.prompt.input_ids).endswith("assistant\n<think>\n")
    expected = judge.logits_of(untied, prepared)
    found = model.logits(messages)
    np.testing.assert_allclose(found, expected, atol=1e-3 * max(1.0, float(expected.std())))
    assert (found.argmax(-1) == expected.argmax(-1)).all()

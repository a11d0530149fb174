"""Random weights of a GPU pack keep hidden states in range, however deep a model is and however it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks.gpu import fill
from benchmarks.gpu_pack_graphs import describe
from engines.build import build_engine
from engines.bundle import Bundle
from engines.registry import get
from helpers.random_checkpoints import write_random
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.export import make_bundle
from runtime.contract import past_names
from runtime.model_config import ModelConfig

# More layers than the largest shape has.
NUM_LAYERS = 96
TEXT = {"num_hidden_layers": NUM_LAYERS, "hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 384}
NUM_TOKENS = 12
BLOCK = 131_101


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("deep")
    vision = {"out_hidden_size": TEXT["hidden_size"]}
    return make_bundle(Checkpoint.open(str(write_random(folder, text_config=TEXT, vision_config=vision))))


def filled(bundle: Bundle, precision: str, folder: Path, blocks: fill.Blocks | None = None) -> Path:
    layout = describe(folder, build_engine(bundle, get(f"ort-cuda-{precision}"), folder, with_weights=False))
    fill.write_weights(folder, layout, blocks=blocks or fill.Blocks(BLOCK), threads=2)
    return folder


def hidden_states(folder: Path, config: ModelConfig) -> list[np.ndarray]:
    """Return what each layer leaves of a prompt, [S, D], as the CPU computes the decoder."""
    path = folder / "decoder.onnx"
    model = onnx.load(path, load_external_data=False)
    names = [f"model.language_model.layers.{i}/hidden_states_out" for i in range(config.text.num_layers)]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    onnx.save(model, path)
    text = config.text
    empty = np.zeros((1, text.num_kv_heads, 32, text.head_dim), np.float16)
    feeds: dict[str, Any] = {
        "input_ids": np.random.default_rng(0).integers(0, text.vocab_size, (1, NUM_TOKENS)),
        "position_ids": np.broadcast_to(np.arange(NUM_TOKENS), (3, 1, NUM_TOKENS)),
        "visual_rows": np.full((1, NUM_TOKENS), -1),
        "visual_embeds": np.zeros((config.num_visual_levels, 1, text.hidden_size), np.float32),
        "past_lengths": np.zeros(1, np.int64),
        "logits_positions": np.array([[NUM_TOKENS - 1]]),
        **dict.fromkeys(past_names(text.num_layers), empty),
    }
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [np.asarray(each[0], np.float64) for each in session.run(names, feeds)]


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_the_spread_of_hidden_states_grows_as_the_root_of_the_depth(
    deep: Bundle, precision: str, tmp_path: Path
) -> None:
    folder = filled(deep, precision, tmp_path / "engine")
    states = hidden_states(folder, deep.config)
    assert len(states) == NUM_LAYERS
    for i, state in enumerate(states):
        # A layer adds at most its attention's mean of values and its MLP, whose deviations are at most 1 each; half as
        # much again for a sample of so few numbers. A weight that does nothing would leave the embedding's 1 / √D.
        assert 0.2 < state.std() < 1.5 * np.sqrt(2 * (i + 1)), i
        assert np.abs(state).max() < 100, i


class Shifted(fill.Blocks):
    """Codes 0 … 15 around 8, whose mean is half a step below 0."""

    def get(self, tensor: Mapping[str, Any]) -> fill.Bytes:
        if tensor["kind"] != "codes4":
            return super().get(tensor)
        return np.random.default_rng(0).integers(0, 256, BLOCK, np.uint8)


def test_a_mean_that_is_not_zero_takes_hidden_states_out_of_range(deep: Bundle, tmp_path: Path) -> None:
    shifted = hidden_states(filled(deep, "int4", tmp_path / "engine", Shifted(BLOCK)), deep.config)
    assert shifted[-1].std() > 1.5 * np.sqrt(2 * NUM_LAYERS)


def test_codes_are_spread_equally_far_to_both_sides() -> None:
    blocks = fill.Blocks(BLOCK)

    def get_block(kind: str) -> np.ndarray:
        return blocks.get({"kind": kind, "dtype": "uint8", "fan_in": 0}).astype(np.int64)

    packed = get_block("codes4")
    four = np.stack([packed & 15, packed >> 4]) - 8
    eight = get_block("codes8") - 128
    for codes, largest, deviation in ((four, 7, 4.32), (eight, 127, 73.6)):
        assert (codes.min(), codes.max()) == (-largest, largest)
        assert abs(codes.mean()) < 0.01 * deviation
        assert abs(codes.std() - deviation) < 0.01 * deviation

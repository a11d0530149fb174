"""OpenVINO: the models that optimum-intel writes for openvino-genai.

The phases run the compiled models as openvino-genai chains them; the image goes through its `VLMPipeline`. Precisions
are OpenVINO's own choice for the processor: bfloat16 where it has the instructions, an 8-bit cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from benchmarks.compare.driver import IMAGE_MODE, Call, Driver, FirstToken
from benchmarks.compare.workloads import IMAGE_TOKENS, PROMPT_TOKENS, TOKEN
from runtime.vision_inputs import patch_coordinates, position_interpolation

_ROPE_THETA = 10000.0
_LOGITS_START = "logits_start"
_MODELS = ("language", "text_embeddings", "vision_embeddings", "vision_embeddings_pos", "vision_embeddings_merger")


class OpenVinoDriver(Driver):
    """A folder of optimum-intel: the single models, or the pipeline for the image."""

    libraries = ("openvino", "openvino-genai", "optimum-intel", "nncf")

    def __init__(self, folder: Path, threads: int, mode: str) -> None:
        self._folder = folder
        self._config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if mode == IMAGE_MODE:
            import openvino_genai

            self._pipeline = openvino_genai.VLMPipeline(str(folder), "CPU", **properties)
            return
        core = ov.Core()
        models = {name: core.read_model(folder / f"openvino_{name}_model.xml") for name in _MODELS}
        _slice_logits(models["language"])
        self._requests = {
            name: core.compile_model(model, "CPU", properties).create_infer_request() for name, model in models.items()
        }

    def vision(self, height: int, width: int) -> Call:
        """Prepare random pixels; positions are made in the call, as openvino-genai does."""
        vision = self._config["vision_config"]
        patch = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
        pixels = np.random.default_rng(0).standard_normal((height * width, patch), np.float32)
        side, merge = round(vision["num_position_embeddings"] ** 0.5), vision["spatial_merge_size"]
        indices_P4, weights_P4 = position_interpolation(height, width, side, merge)
        angles = _angles(height, width, vision["hidden_size"] // vision["num_heads"], merge)
        mask = np.zeros((1, height * width, height * width), np.float32)

        def call() -> None:
            hidden = self._run("vision_embeddings", [pixels])
            rows = self._run("vision_embeddings_pos", [np.ascontiguousarray(indices_P4.T)])
            hidden = hidden.reshape(height * width, -1) + (rows * weights_P4.T[:, :, None]).sum(0)
            self._requests["vision_embeddings_merger"].infer(
                {"hidden_states": hidden, "attention_mask": mask, "rotary_pos_emb": angles}
            )

        return call

    def prefill(self, batch: int, length: int) -> Call:
        """Prepare a first prefill."""
        ids = np.random.default_rng(0).integers(0, self._config["text_config"]["vocab_size"], (batch, length))

        def call() -> None:
            self._requests["language"].reset_state()
            self._decode(ids, 0)

        return call

    def decode(self, batch: int, past: int) -> Call:
        """Prepare a step; the cache grows by one position with each call."""
        self._requests["language"].reset_state()
        if past:
            self._decode(np.full((batch, 1), TOKEN), 0)  # makes the states, whose values are then replaced
            text = self._config["text_config"]
            zeros = np.zeros((batch, text["num_key_value_heads"], past, text["head_dim"]), np.float32)
            for state in self._requests["language"].query_state():
                if len(state.state.shape) == zeros.ndim:
                    state.state = ov.Tensor(zeros)
        ids, length = np.full((batch, 1), TOKEN), past

        def call() -> None:
            nonlocal length
            self._decode(ids, length)
            length += 1

        return call

    def first_token(self, image: str, prompt: str) -> FirstToken:
        """Answer with one token."""
        from PIL import Image

        pixels = ov.Tensor(np.asarray(Image.open(image).convert("RGB"))[None])
        self._pipeline.generate(prompt, images=[pixels], max_new_tokens=1)
        return FirstToken(round((IMAGE_TOKENS + PROMPT_TOKENS) * self.cache_token_bytes()))

    def logits(self, input_ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Run one prefill."""
        self._requests["language"].reset_state()
        return self._decode(np.asarray([input_ids]), 0, all_logits=True)[0]

    def decoder_bytes(self) -> int:
        """Return the size of the language model's weights; the embedding is a model of its own."""
        return (self._folder / "openvino_language_model.bin").stat().st_size

    def cache_token_bytes(self) -> float:
        """Count keys and values in 8 bits, each head's row with a float32 scale and zero point."""
        text = self._config["text_config"]
        return float(2 * text["num_hidden_layers"] * text["num_key_value_heads"] * (text["head_dim"] + 8))

    def _decode(self, ids_BS: Any, past: int, *, all_logits: bool = False) -> np.ndarray[Any, Any]:
        batch, length = ids_BS.shape
        embeds = self._run("text_embeddings", [np.ascontiguousarray(ids_BS, np.int64)])
        levels = len(self._config["vision_config"]["deepstack_visual_indexes"])
        request = self._requests["language"]
        request.infer(
            {
                "inputs_embeds": embeds,
                "attention_mask": np.ones((batch, past + length), np.int64),
                "position_ids": np.broadcast_to(np.arange(past, past + length), (3, batch, length)).copy(),
                "visual_pos_masks": np.zeros((batch, length), bool),
                "deepstack_visual_embeds": np.zeros((levels, batch * length, embeds.shape[2]), np.float32),
                "beam_idx": np.arange(batch, dtype=np.int32),
                _LOGITS_START: np.array([0 if all_logits else -1], np.int64),
            }
        )
        logits: np.ndarray[Any, Any] = request.get_tensor("logits").data
        return logits.copy()

    def _run(self, name: str, inputs: list[Any]) -> np.ndarray[Any, Any]:
        request = self._requests[name]
        request.infer(inputs)
        output: np.ndarray[Any, Any] = request.get_output_tensor(0).data
        return output


DRIVER = OpenVinoDriver


def _slice_logits(model: ov.Model) -> None:
    """Give the head an input that says from which position on there are logits.

    openvino-genai edits the model in the same place, so that a prompt costs the head one position.
    """
    from openvino import opset13 as ops

    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    start = ops.parameter([1], np.int64, name=_LOGITS_START)
    start.output(0).set_names({_LOGITS_START})
    stop, step, axis = (np.array([value], np.int64) for value in (np.iinfo(np.int64).max, 1, 1))
    rows = ops.slice(node.input_value(0), start, stop, step, axis)
    node.input(0).replace_source_output(rows.output(0))
    model.add_parameters([start])
    model.validate_nodes_and_infer_types()


def _angles(height: int, width: int, head_dim: int, merge_size: int) -> np.ndarray[Any, Any]:
    """Return the rotary angles of each patch, float32 [P, head_dim / 2]: rows in the first half, columns after."""
    row_P, column_P = patch_coordinates(height, width, merge_size)
    frequencies = _ROPE_THETA ** -(np.arange(0, head_dim // 2, 2) / (head_dim // 2))
    parts = [coordinate[:, None] * frequencies for coordinate in (row_P, column_P)]
    return np.concatenate(parts, axis=1).astype(np.float32)

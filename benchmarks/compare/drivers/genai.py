"""onnxruntime-genai: the graph that its builder writes, run by ONNX Runtime as genai runs it.

genai's own generator gives no times of single calls and no logits of a whole prompt. Its graph is plain ONNX, so this
binds it as genai does with `past_present_share_buffer`: one buffer is past and present of a layer. The builder exports
no vision tower.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.compare.driver import Call, Driver, FirstToken
from benchmarks.compare.onnx_bytes import bytes_of_products
from benchmarks.compare.workloads import IMAGE_TOKENS, PROMPT_TOKENS, TOKEN

Cache = dict[str, ort.OrtValue]


class GenaiDriver(Driver):
    """The decoder in a folder of the builder; `is_pruned` as its option `prune_lm_head`."""

    libraries = ("onnxruntime-genai", "onnxruntime")

    def __init__(self, folder: Path, threads: int, mode: str, is_pruned: bool = False) -> None:
        self._is_pruned = is_pruned
        self._path = folder / "model.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])
        decoder = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        self._kv_heads, self._head_size = decoder["num_key_value_heads"], decoder["head_size"]
        names = [value.name for value in self._session.get_inputs()]
        self._cache_names = [name for name in names if name.startswith("past_key_values.")]
        self._vocab_size = int(self._session.get_outputs()[0].shape[2])

    def prefill(self, batch: int, length: int) -> Call:
        """Prepare a first prefill; without a pruned head the graph computes the logits of all positions."""
        ids = np.random.default_rng(0).integers(0, self._vocab_size, (batch, length))
        cache = self._new_cache(batch, length)
        return lambda: self._run(ids, 0, cache)

    def decode(self, batch: int, past: int) -> Call:
        """Prepare a step that writes row `past` of the cache again and again."""
        ids = np.full((batch, 1), TOKEN)
        cache = self._new_cache(batch, past + 1)
        return lambda: self._run(ids, past, cache)

    def first_token(self, image: str, prompt: str) -> FirstToken:
        """Answer a text as long as image and prompt are."""
        cache = self._new_cache(1, IMAGE_TOKENS + PROMPT_TOKENS)
        self._run(np.full((1, IMAGE_TOKENS + PROMPT_TOKENS), TOKEN), 0, cache)
        return FirstToken(round((IMAGE_TOKENS + PROMPT_TOKENS) * self.cache_token_bytes()), has_vision=False)

    def logits(self, input_ids: Sequence[int]) -> np.ndarray[Any, Any] | None:
        """Run one prefill; a pruned head gives the logits of the last position alone."""
        if self._is_pruned:
            return None
        return self._run(np.asarray([input_ids]), 0, self._new_cache(1, len(input_ids)))[0]

    def decoder_bytes(self) -> int:
        """Sum the weights of the graph's products."""
        return bytes_of_products(self._path)

    def cache_token_bytes(self) -> float:
        """Count keys and values in float32."""
        return 4.0 * self._kv_heads * self._head_size * len(self._cache_names)

    def _new_cache(self, batch: int, capacity: int) -> Cache:
        shape_BKTH = (batch, self._kv_heads, capacity, self._head_size)
        return {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape_BKTH, np.float32)) for name in self._cache_names}

    def _run(self, ids_BS: Any, past: int, cache: Cache) -> np.ndarray[Any, Any]:
        batch, length = ids_BS.shape
        positions = np.broadcast_to(np.arange(past, past + length), (3, batch, length))
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids_BS, np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((batch, past + length), np.int64))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions, np.int64))
        binding.bind_output("logits", "cpu")
        for name, value in cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        self._session.run_with_iobinding(binding)
        logits: np.ndarray[Any, Any] = binding.get_outputs()[0].numpy()  # outputs come in the order they were bound
        return logits


DRIVER = GenaiDriver

"""Our engines: the session for the phases, the whole model for the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare.driver import Call, Driver, FirstToken
from benchmarks.compare.onnx_bytes import bytes_of_products
from runtime.contract import DecoderInputs, no_visual_embeds
from runtime.image_config import NUM_CHANNELS
from runtime.model import Qwen3VLModel
from runtime.patches import PixelScale, normalised
from runtime.vision_inputs import takes_grey_levels, vision_inputs

_CACHE_POSITIONS = 128


class EngineDriver(Driver):
    """An engine folder; what `huge_pages` takes is in the load time."""

    libraries = ("onnxruntime", "onnxruntime-gpu")

    def __init__(self, folder: Path, threads: int, mode: str, huge_pages: bool = False) -> None:
        self._folder = folder
        self._model = Qwen3VLModel.from_engine(folder, threads=threads, huge_pages=huge_pages, tuned=False)
        self._no_visual = no_visual_embeds(self._model.config)

    def vision(self, height: int, width: int) -> Call:
        """Prepare random pixels."""
        vision = self._model.config.vision
        levels = np.random.default_rng(0).integers(0, 256, (height * width, vision.patch_elements), np.uint8)
        scale = PixelScale((127.5,) * NUM_CHANNELS, (127.5,) * NUM_CHANNELS, 1.0)
        if takes_grey_levels(self._model.manifest.capabilities):
            inputs = vision_inputs(levels, (1, height, width), vision, scale)
        else:
            inputs = vision_inputs(normalised(levels, scale), (1, height, width), vision)
        return lambda: self._model.session.vision(inputs)

    def prefill(self, batch: int, length: int) -> Call:
        """Prepare a first prefill, with the logits of the last token."""
        ids = np.random.default_rng(0).integers(0, self._model.config.text.vocab_size, (batch, length))
        cache = self._model.session.new_cache(length, batch)
        inputs = self._inputs(ids, 0, np.full((batch, 1), length - 1))
        return lambda: self._model.session.prefill(inputs, cache)

    def decode(self, batch: int, past: int) -> Call:
        """Prepare a step that writes row `past` of the cache again and again, each time for another token.

        The token decides which experts of a mixture are read: those of the same one again would be in the caches.
        """
        random = np.random.default_rng(0)
        vocab_size = self._model.config.text.vocab_size
        cache = self._model.session.new_cache(past + 1, batch)
        last = np.zeros((batch, 1), np.int64)
        return lambda: self._model.session.decode(
            self._inputs(random.integers(0, vocab_size, (batch, 1)), past, last), cache
        )

    def first_token(self, image: str, prompt: str) -> FirstToken:
        """Answer with one token."""
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        answer = self._model.generate([{"role": "user", "content": content}], max_new_tokens=1, do_sample=False)
        return FirstToken(answer.stats.peak_cache_bytes)

    def logits(self, input_ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Run one prefill that asks for all logits."""
        cache = self._model.session.new_cache(len(input_ids))
        inputs = self._inputs(np.asarray([input_ids]), 0, np.arange(len(input_ids))[None])
        return self._model.session.prefill(inputs, cache)[0]

    def decoder_bytes(self) -> int:
        """Sum the weights of the decoder graph."""
        return bytes_of_products(self._folder / "decoder.onnx")

    def cache_token_bytes(self) -> float:
        """Divide the bytes of a cache, which may be packed, by its capacity."""
        cache = self._model.session.new_cache(_CACHE_POSITIONS)
        return cache.num_bytes / cache.capacity

    def _inputs(self, ids_BS: Any, past: int, asked_BL: Any) -> DecoderInputs:
        pasts_B = np.full(len(ids_BS), past)
        return DecoderInputs.text(ids_BS, pasts_B, self._no_visual, logits_positions=asked_BL)


DRIVER = EngineDriver

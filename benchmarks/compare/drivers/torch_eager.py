"""PyTorch: transformers' own model, eager, attention by `scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from benchmarks.compare.driver import Call, Driver, FirstToken
from benchmarks.compare.workloads import TOKEN


class TorchDriver(Driver):
    """A checkpoint in one dtype, a name in torch."""

    libraries = ("torch", "transformers")

    def __init__(self, folder: Path, threads: int, mode: str, dtype: str) -> None:
        torch.set_num_threads(threads)
        self._dtype = getattr(torch, dtype)
        self._model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=self._dtype, attn_implementation="sdpa"
        ).eval()
        self._model.requires_grad_(False)
        self._text = self._model.config.text_config
        self._processor = AutoProcessor.from_pretrained(folder)

    def vision(self, height: int, width: int) -> Call:
        """Prepare random pixels."""
        vision = self._model.config.vision_config
        pixels = torch.randn(
            height * width, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2, dtype=self._dtype
        )
        grid = torch.tensor([[1, height, width]])
        return lambda: self._model.model.get_image_features(pixels, grid)

    def prefill(self, batch: int, length: int) -> Call:
        """Prepare a first prefill, with the logits of the last token."""
        ids = torch.randint(0, self._text.vocab_size, (batch, length))
        return lambda: self._model(
            input_ids=ids, position_ids=_positions(0, length, batch), use_cache=True, logits_to_keep=1
        )

    def decode(self, batch: int, past: int) -> Call:
        """Prepare a step; the cache grows by one position with each call."""
        cache = DynamicCache(config=self._text)
        if past:
            empty = torch.zeros(batch, self._text.num_key_value_heads, past, self._text.head_dim, dtype=self._dtype)
            for layer in range(self._text.num_hidden_layers):
                cache.update(empty.clone(), empty.clone(), layer)
        ids = torch.full((batch, 1), TOKEN)
        return lambda: self._model(
            input_ids=ids,
            position_ids=_positions(cache.get_seq_length(), 1, batch),
            past_key_values=cache,
            use_cache=True,
        )

    def first_token(self, image: str, prompt: str) -> FirstToken:
        """Answer with one token."""
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        answer = self._model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
        layers = answer.past_key_values.layers
        return FirstToken(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))

    def logits(self, input_ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Run one prefill."""
        ids = torch.tensor([input_ids])
        logits: np.ndarray[Any, Any] = self._model(input_ids=ids, use_cache=False).logits[0].float().numpy()
        return logits

    def decoder_bytes(self) -> int:
        """Sum the parameters of the language model; an untied head, read whole, is as large as the embedding."""
        return sum(parameter.nbytes for parameter in self._model.model.language_model.parameters())

    def cache_token_bytes(self) -> float:
        """Count keys and values in the model's dtype."""
        text = self._text
        elements = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        return float(elements * self._dtype.itemsize)


DRIVER = TorchDriver


def _positions(start: int, length: int, batch: int) -> torch.Tensor:
    return torch.arange(start, start + length).expand(3, batch, length)

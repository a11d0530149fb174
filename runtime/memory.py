"""Estimate what a request needs before any work, and refuse what exceeds the limit.

The estimates are those of ONNX Runtime's CPU engine in float32, measured as growth of the peak resident memory
(onnxruntime 1.32, 2B shape, 2 threads). After opening, 8.34 GB of anonymous memory hold 8.51 GB of weights; another
1.25 GB are mapped pages of the weight files, which the kernel may drop, so the weights count once. With our own kernels
(docs/cpu_kernels.md) all weights are mapped and nothing holds another copy: 2B in 4 bits, after an image of 3072
patches and 2244 tokens, has 1.36 GB of such pages, and 0.68 GB of anonymous memory, 0.52 of them the KV cache.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.cache_types import cache_types
from runtime.cgroup import memory_limits
from runtime.errors import CapacityError
from runtime.generation import PREFILL_CHUNK
from runtime.model_config import ModelConfig
from runtime.vision_inputs import VISION_PATCHES

# Parts of an estimate, each with the option that shrinks it.
WEIGHTS, CACHE, PREFILL, VISION, LOGITS = "weights", "KV cache", "prefill", "vision", "logits"
EMBEDS = "kept embeddings"
_REMEDIES = {
    CACHE: "lower max_context, or max_sequences",
    EMBEDS: "lower vision_cache_bytes",
    PREFILL: "lower max_context",
    VISION: "lower max_pixels",
    LOGITS: "shorten the prompt",
}
_FLOAT_BYTES = 4


def machine_bytes(limits: Sequence[int] | None = None) -> int:
    """Return the memory of the machine, or of a container if that is less.

    Args:
        limits: In bytes; those of the process's control groups by default.
    """
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([whole, *(memory_limits() if limits is None else limits)])


def cache_bytes(config: ModelConfig, capabilities: Mapping[str, Any], capacity: int) -> int:
    """Return the bytes of a KV cache of one sequence: keys and values of all layers.

    Args:
        config: Shape of the model.
        capabilities: Those of the engine's manifest, or of a target.
        capacity: Tokens that it holds.
    """
    text = config.text
    bits = sum(each.bits for each in cache_types(capabilities, text.num_layers))
    return 2 * text.num_kv_heads * text.head_dim * capacity * bits // 8


def prefill_bytes(config: ModelConfig, num_tokens: int, chunk: int = PREFILL_CHUNK) -> int:
    """Estimate the decoder's workspace for the last chunk of a prompt: activations, and scores against all tokens.

    Measured for a chunk of 512: 0.10 GB without a past, 0.20 GB after 3000 tokens; estimated 0.10 and 0.20.

    Args:
        config: Shape of the model.
        num_tokens: Of the prompt.
        chunk: Most of them in one call.
    """
    text = config.text
    chunk = min(num_tokens, chunk)
    per_token = 4 * text.intermediate_size + 8 * text.hidden_size + text.num_heads * num_tokens
    return _FLOAT_BYTES * chunk * per_token


def vision_bytes(config: ModelConfig, patches_of_images: Sequence[int]) -> int:
    """Estimate what images take until the decoder has read them: pixels and rows of all, workspace of the largest.

    Attention works in tiles, so nothing grows with the square of the patches. Measured for one image of 784, 3072 and
    12288 patches: 0.10, 0.38 and 1.48 GB; estimated 0.10, 0.41 and 1.64.
    """
    vision = config.vision
    workspace = 3 * vision.intermediate_size + 15 * vision.hidden_size
    # Twice, because the rows of the images are joined into one array.
    rows = 2 * config.num_visual_levels * config.text.hidden_size // vision.patches_per_token
    # Images of one grid share a call.
    largest = max(patches_of_images, default=0)
    in_a_call = max(largest, min(sum(patches_of_images), VISION_PATCHES))
    num_values = in_a_call * workspace + sum(patches_of_images) * (vision.patch_elements + rows)
    return _FLOAT_BYTES * num_values


def logits_bytes(config: ModelConfig, num_tokens: int) -> int:
    """Return the bytes of the logits of a whole prompt: its chunks, and the array they are joined into."""
    return 2 * _FLOAT_BYTES * num_tokens * config.text.vocab_size


def check_fits(needed: Mapping[str, int], limit_bytes: int) -> None:
    """Raise if the parts together exceed the limit; `needed` maps parts named in this module, weights among them.

    Raises:
        CapacityError: They do not fit; the message lists the parts, the remedy names the option that shrinks the
            largest part but the weights.
    """
    total = sum(needed.values())
    if total <= limit_bytes:
        return
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needed.items() if size)
    remedy = "use a smaller model"
    if needed[WEIGHTS] <= limit_bytes:
        remedy = _REMEDIES[max((name for name in needed if name in _REMEDIES), key=lambda name: needed[name])]
    raise CapacityError(
        f"about {total / 1e9:.2f} GB of memory are needed ({parts}), the limit is {limit_bytes / 1e9:.2f} GB",
        remedy=f"{remedy}, or raise max_memory if the machine has more",
    )

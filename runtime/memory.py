"""The memory of the machine, the bytes of a KV cache and of logits, and the refusal of what exceeds a limit.

What an engine takes in all is `runtime.memory_plan`'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.cache_types import cache_types
from runtime.cgroup import memory_limits
from runtime.errors import CapacityError
from runtime.model_config import ModelConfig

# Parts of a plan, each with the option that shrinks it.
WEIGHTS, CACHE, PREFILL, VISION, LOGITS = "weights", "KV cache", "prefill", "vision", "logits"
EMBEDS, LIBRARIES, STAGING = "kept embeddings", "libraries", "staging"
_REMEDIES = {
    CACHE: "lower max_context or window, or max_sequences",
    EMBEDS: "lower vision_cache_bytes",
    PREFILL: "lower max_context or window",
    STAGING: "lower max_context",
    VISION: "lower max_pixels",
    LOGITS: "shorten the prompt",
}
_FLOAT_BYTES = 4
STAGING_ROW_BYTES = "staging_row_bytes"
"""Capability of engines that work together: bytes of a row of the cache in which prompts run (`runtime.route`)."""
OF_OTHERS = "of_others"
"""Capability of engines that work together: what memory depends on of the engine that runs a part, by that part."""


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


def sink_bytes(config: ModelConfig, num_sinks: int) -> int:
    """Return the bytes of the keys of a sequence's sinks that a window keeps beside its rows, to turn them."""
    text = config.text
    return _FLOAT_BYTES * text.num_layers * text.num_kv_heads * text.head_dim * num_sinks


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
    if needed[WEIGHTS] + needed.get(LIBRARIES, 0) <= limit_bytes:
        remedy = _REMEDIES[max((name for name in needed if name in _REMEDIES), key=lambda name: needed[name])]
    raise CapacityError(
        f"about {total / 1e9:.2f} GB of memory are needed ({parts}), the limit is {limit_bytes / 1e9:.2f} GB",
        remedy=f"{remedy}, or raise max_memory if the machine has more",
    )

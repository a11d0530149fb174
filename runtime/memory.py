"""Estimate what a request needs before any work, and refuse what the machine cannot hold."""

from __future__ import annotations

import os

from runtime.errors import CapacityError
from runtime.model_config import ModelConfig


def physical_bytes() -> int:
    """Return the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cache_bytes(config: ModelConfig, capacity: int, itemsize: int) -> int:
    """Return the bytes of a KV cache of one sequence: keys and values of all layers."""
    text = config.text
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * capacity * itemsize


def vision_bytes(config: ModelConfig, num_patches: int) -> int:
    """Estimate the vision tower's workspace for one segment: pixels, the widest layer twice, and q, k, v, in float32.

    Attention works in tiles, so nothing grows with the square of the patches.
    """
    vision = config.vision
    per_patch = vision.patch_elements + 2 * vision.intermediate_size + 8 * vision.hidden_size
    return 4 * num_patches * per_patch


def check_fits(needed: dict[str, int], limit_bytes: int) -> None:
    """Raise if the parts together exceed the limit; `needed` maps a part and the option that shrinks it to bytes.

    Raises:
        CapacityError: They do not fit; the message lists the parts and names the option of the largest adjustable one.
    """
    total = sum(needed.values())
    if total <= limit_bytes:
        return
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needed.items())
    adjustable = {name: size for name, size in needed.items() if name != "weights"}
    option = {"KV cache": "max_context", "vision": "max_pixels"}[max(adjustable, key=lambda name: adjustable[name])]
    raise CapacityError(
        f"about {total / 1e9:.2f} GB are needed ({parts}), the limit is {limit_bytes / 1e9:.2f} GB",
        remedy=f"lower {option}, or use a machine with more memory",
    )

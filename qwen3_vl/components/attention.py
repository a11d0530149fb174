"""Attention of the decoder and of the vision tower, in torch, which needs the extra [export]; what it need not see.

`slide` drops rows of a KV cache as a sliding window does, and `moved_keys` turns keys to other positions.
Modules of the eager model and on PyTorch's flash kernel, and the operators that the graphs are made of, each with its
plain form, numpy reference and ONNX body: `causal_attention.plain(q, k, v, …)`. The choice of the visual tokens that
stay in a prompt is numpy alone: `choose_visual_tokens(embeds, num_kept)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from qwen3vl_export.flash_attention import FlashAttention2, VisionFlashAttention2, use_flash_attention
    from qwen3vl_export.modeling import CausalAttention, VisionAttention
    from qwen3vl_export.ops import causal_attention, vision_attention
    from runtime.cache_eviction import choose_rows, pool_scores, window_scores
    from runtime.rotary import moved_keys
    from runtime.sliding_window import slide
    from runtime.visual_pruning.choice import choose_visual_tokens, num_kept_tokens
    from runtime.visual_pruning.diversity import diverse_rows
    from runtime.visual_pruning.frames import changed_tokens, pixel_changes

__all__ = [
    "CausalAttention",
    "FlashAttention2",
    "VisionAttention",
    "VisionFlashAttention2",
    "causal_attention",
    "changed_tokens",
    "choose_rows",
    "choose_visual_tokens",
    "diverse_rows",
    "moved_keys",
    "num_kept_tokens",
    "pixel_changes",
    "pool_scores",
    "slide",
    "use_flash_attention",
    "vision_attention",
    "window_scores",
]

_SOURCES = {
    "qwen3vl_export.flash_attention": ["FlashAttention2", "VisionFlashAttention2", "use_flash_attention"],
    "qwen3vl_export.modeling": ["CausalAttention", "VisionAttention"],
    "qwen3vl_export.ops": ["causal_attention", "vision_attention"],
    "runtime.rotary": ["moved_keys"],
    "runtime.sliding_window": ["slide"],
    "runtime.visual_pruning.choice": ["choose_visual_tokens", "num_kept_tokens"],
    "runtime.visual_pruning.diversity": ["diverse_rows"],
    "runtime.visual_pruning.frames": ["changed_tokens", "pixel_changes"],
    "runtime.cache_eviction": ["choose_rows", "pool_scores", "window_scores"],
}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)

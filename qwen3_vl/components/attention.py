"""Attention of the decoder and of the vision tower, in torch, which needs the extra [export]; and rows to keep of it.

Modules of the eager model and on PyTorch's flash kernel, and the operators that the graphs are made of, each with its
plain form, numpy reference and ONNX body: `causal_attention.plain(q, k, v, …)`. In numpy: which rows of a KV cache the
last tokens of a prompt attend to, `window_scores`, `pool_scores` and `choose_rows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from qwen3vl_export.flash_attention import FlashAttention2, VisionFlashAttention2, use_flash_attention
    from qwen3vl_export.modeling import CausalAttention, VisionAttention
    from qwen3vl_export.ops import causal_attention, vision_attention
    from runtime.cache_eviction import choose_rows, pool_scores, window_scores

__all__ = [
    "CausalAttention",
    "FlashAttention2",
    "VisionAttention",
    "VisionFlashAttention2",
    "causal_attention",
    "choose_rows",
    "pool_scores",
    "use_flash_attention",
    "vision_attention",
    "window_scores",
]

_SOURCES = {
    "qwen3vl_export.flash_attention": ["FlashAttention2", "VisionFlashAttention2", "use_flash_attention"],
    "qwen3vl_export.modeling": ["CausalAttention", "VisionAttention"],
    "qwen3vl_export.ops": ["causal_attention", "vision_attention"],
    "runtime.cache_eviction": ["choose_rows", "pool_scores", "window_scores"],
}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)

"""Attention of the decoder and of the vision tower, in torch; needs the extra [export], but for functions on arrays.

`slide` drops rows of a KV cache as a sliding window does, and `moved_keys` turns keys to other positions.
Modules of the eager model and on PyTorch's flash kernel, and the operators that the graphs are made of, each with its
plain form, numpy reference and ONNX body: `causal_attention.plain(q, k, v, …)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from qwen3vl_export.flash_attention import FlashAttention2, VisionFlashAttention2, use_flash_attention
    from qwen3vl_export.modeling import CausalAttention, VisionAttention
    from qwen3vl_export.ops import causal_attention, vision_attention
    from runtime.rotary import moved_keys
    from runtime.sliding_window import slide

__all__ = [
    "CausalAttention",
    "FlashAttention2",
    "VisionAttention",
    "VisionFlashAttention2",
    "causal_attention",
    "moved_keys",
    "slide",
    "use_flash_attention",
    "vision_attention",
]

_SOURCES = {
    "qwen3vl_export.flash_attention": ["FlashAttention2", "VisionFlashAttention2", "use_flash_attention"],
    "qwen3vl_export.modeling": ["CausalAttention", "VisionAttention"],
    "qwen3vl_export.ops": ["causal_attention", "vision_attention"],
    "runtime.rotary": ["moved_keys"],
    "runtime.sliding_window": ["slide"],
}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)

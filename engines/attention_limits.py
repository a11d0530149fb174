"""Shapes that a kernel of attention takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.errors import TargetError

if TYPE_CHECKING:
    from runtime.model_config import ModelConfig

_HEAD_DIM_MULTIPLE = 8


def check_grouped_query_attention(config: ModelConfig) -> None:
    """Raise unless ONNX Runtime's GroupQueryAttention takes the heads of a model; it says so at the first token only.

    Raises:
        TargetError: `head_dim` is no multiple of 8 (onnxruntime 1.32, group_query_attention_helper.h).
    """
    head_dim = config.text.head_dim
    if head_dim % _HEAD_DIM_MULTIPLE:
        raise TargetError(
            f"config.json: text_config.head_dim is {head_dim}, expected a multiple of {_HEAD_DIM_MULTIPLE}: ONNX "
            "Runtime's GroupQueryAttention takes no other",
            remedy="every published Qwen3-VL has 128; --bundle writes the graphs without a target's kernels",
        )

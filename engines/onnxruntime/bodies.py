"""Bodies of custom ops that call ONNX Runtime's own operators; those of experts stand with their provider."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from runtime.errors import TargetError

if TYPE_CHECKING:
    from runtime.model_config import ModelConfig

    Body = Callable[[ModelConfig], str]

_HEAD_DIM_MULTIPLE = 8
EXPERTS = """com.microsoft.MoE <k: int = @top_k, activation_type = "swiglu", activation_alpha = 1.0,
        activation_beta = 0.0, swiglu_fusion = 1, normalize_routing_weights = 1>"""
"""MoE, whose inputs are x, logits of all experts, gate and up, a bias and down.

Its own router breaks ties either way, so the bodies of `MixtureOfExperts` give it the logits of the experts that TopK
chose, and of all others a number whose exponential is 0: what it then chooses, and its softmax, are the op's.
"""


def check_heads(config: ModelConfig) -> None:
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


def native_ops(norm: str, lengths: str, experts: Body) -> dict[str, Body]:
    """Return the bodies of all custom ops.

    Args:
        norm: Operator that normalises the heads of q and k.
        lengths: Nodes that compute `seqlens_k` [B], valid positions less one with the new ones, and the scalar
            `total_sequence_length`, both int32, of `cos`, `past_lengths` and `past_key`. All layers share `cos` and
            the lengths, so that these are computed once.
        experts: Makes the body of `MixtureOfExperts`.
    """
    return {
        "CausalAttention": partial(_causal_attention, norm, lengths),
        "VisionAttention": _vision_attention,
        "MixtureOfExperts": experts,
    }


def _causal_attention(norm: str, lengths: str, config: ModelConfig) -> str:
    """Return a body with GroupQueryAttention, which has no norm and no such rotary embedding."""
    heads, kv_heads, head_dim = config.text.num_heads, config.text.num_kv_heads, config.text.head_dim
    return f"""
<domain: "qwen3vl", opset_import: ["" : 24, "com.microsoft" : 1]>
CausalAttention <scale: float, epsilon: float>
    (q, k, v, q_norm, k_norm, cos, sin, past_key, past_value, past_lengths) => (out, present_key, present_value)
{{
    split_heads = Constant <value_ints = [0, 0, -1, {head_dim}]> ()
    join_heads = Constant <value_ints = [0, 0, -1]> ()
    q_BSNH = Reshape (q, split_heads)
    k_BSKH = Reshape (k, split_heads)
    q_normed = {norm} <axis = -1, epsilon: float = @epsilon> (q_BSNH, q_norm)
    k_normed = {norm} <axis = -1, epsilon: float = @epsilon> (k_BSKH, k_norm)
    q_joined = Reshape (q_normed, join_heads)
    k_joined = Reshape (k_normed, join_heads)
    q_rotated = RotaryEmbedding <num_heads = {heads}> (q_joined, cos, sin)
    k_rotated = RotaryEmbedding <num_heads = {kv_heads}> (k_joined, cos, sin)
{lengths}
    out, present_key, present_value = com.microsoft.GroupQueryAttention
        <num_heads = {heads}, kv_num_heads = {kv_heads}, do_rotary = 0, scale: float = @scale>
        (q_rotated, k_rotated, v, past_key, past_value, seqlens_k, total_sequence_length)
}}
"""


def _vision_attention(config: ModelConfig) -> str:
    return """
<domain: "qwen3vl", opset_import: ["" : 24, "com.microsoft" : 1]>
VisionAttention <num_heads: int, scale: float> (q, k, v, cos, sin) => (out)
{
    num_segments = Shape <start = 0, end = 1> (q)
    table_shape = Shape (cos)
    batched_shape = Concat <axis = 0> (num_segments, table_shape)
    cos_IPH = Expand (cos, batched_shape)
    sin_IPH = Expand (sin, batched_shape)
    q_rotated = RotaryEmbedding <num_heads: int = @num_heads> (q, cos_IPH, sin_IPH)
    k_rotated = RotaryEmbedding <num_heads: int = @num_heads> (k, cos_IPH, sin_IPH)
    out = com.microsoft.MultiHeadAttention <num_heads: int = @num_heads, scale: float = @scale>
        (q_rotated, k_rotated, v)
}
"""

"""`CausalAttention`: per-head RMSNorm, rotary embedding, cache update and grouped-query causal attention.

Shapes: B batch, S new tokens, T cache capacity, N query heads, K key/value heads, H head dim.

    inputs   q [B, S, N·H]   k, v [B, S, K·H]   q_norm, k_norm [H]   cos, sin [B, S, H/2]
             past_key, past_value [B, K, T, H]   past_lengths [B] int64
    outputs  out [B, S, N·H]   present_key, present_value [B, K, T, H]
    attrs    scale (of the scores), epsilon (of the norms)

Row s of a sequence sits at cache position past_lengths + s and sees the positions up to its own.
Source: `Qwen3VLTextAttention.forward` of transformers 5.23.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qwen3vl_export.ops import rms_norm
from qwen3vl_export.ops.onnx_form import node_of
from qwen3vl_export.ops.rotary import rotate, rotate_heads

NAME = "CausalAttention"

BODY = """
<domain: "qwen3vl", opset_import: ["" : 24]>
CausalAttention <scale: float, epsilon: float>
    (q, k, v, q_norm, k_norm, cos, sin, past_key, past_value, past_lengths) => (out, present_key, present_value)
{
    head_dim = Shape (q_norm)
    keep_two = Constant <value_ints = [0, 0]> ()
    infer = Constant <value_ints = [-1]> ()
    split_heads = Concat <axis = 0> (keep_two, infer, head_dim)
    q_BSNH = Reshape (q, split_heads)
    k_BSKH = Reshape (k, split_heads)
    v_BSKH = Reshape (v, split_heads)
    q_normed = RMSNormalization <axis = -1, epsilon: float = @epsilon> (q_BSNH, q_norm)
    k_normed = RMSNormalization <axis = -1, epsilon: float = @epsilon> (k_BSKH, k_norm)
    q_BNSH = Transpose <perm = [0, 2, 1, 3]> (q_normed)
    k_BKSH = Transpose <perm = [0, 2, 1, 3]> (k_normed)
    v_BKSH = Transpose <perm = [0, 2, 1, 3]> (v_BSKH)
    q_rotated = RotaryEmbedding (q_BNSH, cos, sin)
    k_rotated = RotaryEmbedding (k_BKSH, cos, sin)
    present_key = TensorScatter <axis = -2> (past_key, k_rotated, past_lengths)
    present_value = TensorScatter <axis = -2> (past_value, v_BKSH, past_lengths)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    num_new = Shape <start = 1, end = 2> (q)
    capacity = Shape <start = 2, end = 3> (past_key)
    axis_0 = Constant <value_ints = [0]> ()
    num_new_scalar = Squeeze (num_new, axis_0)
    capacity_scalar = Squeeze (capacity, axis_0)
    new_positions = Range (zero, num_new_scalar, one)
    key_positions = Range (zero, capacity_scalar, one)
    axis_1 = Constant <value_ints = [1]> ()
    past_B1 = Unsqueeze (past_lengths, axis_1)
    last_visible_BS = Add (past_B1, new_positions)
    axes_1_3 = Constant <value_ints = [1, 3]> ()
    last_visible = Unsqueeze (last_visible_BS, axes_1_3)
    mask_B1ST = LessOrEqual (key_positions, last_visible)
    out_BNSH = Attention <scale: float = @scale> (q_rotated, present_key, present_value, mask_B1ST)
    out_BSNH = Transpose <perm = [0, 2, 1, 3]> (out_BNSH)
    join_heads = Constant <value_ints = [0, 0, -1]> ()
    out = Reshape (out_BSNH, join_heads)
}
"""


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    scale: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the op with PyTorch's own attention; the presents are new tensors."""
    q_BNSH, k_BKSH, v_BKSH = rotated_heads(q, k, v, q_norm, k_norm, cos, sin, epsilon)
    rows_B1S1 = cache_rows(past_lengths, q.shape[1])
    present_key, present_value = with_rows(past_key, k_BKSH, rows_B1S1), with_rows(past_value, v_BKSH, rows_B1S1)
    visible_B1ST = torch.arange(past_key.shape[2], device=q.device) <= rows_B1S1
    keys, values = present_key.to(q.dtype), present_value.to(q.dtype)
    return attend(q_BNSH, keys, values, scale, visible_B1ST), present_key, present_value


def cache_rows(past_lengths: Tensor, num_new: int) -> Tensor:
    """Return the rows of the cache that the new tokens take, [B, 1, S, 1]."""
    return (past_lengths[:, None] + torch.arange(num_new, device=past_lengths.device))[:, None, :, None]


def with_rows(past_BKTH: Tensor, new_BKSH: Tensor, rows_B1S1: Tensor) -> Tensor:
    """Return a copy of one half of a cache with the new rows in their places, in the type of the cache."""
    return past_BKTH.scatter(2, rows_B1S1.expand(new_BKSH.shape), new_BKSH.to(past_BKTH.dtype))


def rotated_heads(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Split into heads, normalise and rotate: [B, N, S, H], [B, K, S, H], [B, K, S, H]."""
    q_BSNH, k_BSKH, v_BSKH = (x.unflatten(-1, (-1, q_norm.shape[0])) for x in (q, k, v))
    q_BSNH = rotate_heads(rms_norm.plain(q_BSNH, q_norm, epsilon), cos, sin)
    k_BSKH = rotate_heads(rms_norm.plain(k_BSKH, k_norm, epsilon), cos, sin)
    return q_BSNH.transpose(1, 2), k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2)


def attend(q_BNSH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """Attend where `visible` [broadcast to B, N, S, T] is true, or causally without it; [B, S, N·H]."""
    out_BNSH = F.scaled_dot_product_attention(
        q_BNSH, k_BKTH, v_BKTH, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=True
    )
    return out_BNSH.transpose(1, 2).flatten(2)


OP = torch.library.custom_op("qwen3vl::causal_attention", plain, mutates_args=())


@OP.register_fake
def _(q: Tensor, *others: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    past_key, past_value = others[6:8]
    return torch.empty_like(q), torch.empty_like(past_key), torch.empty_like(past_value)


def apply(*tensors: Tensor, scale: float, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the op; one node where a trace runs. The tensors are the inputs in the file's head, in their order."""
    compute = OP if torch.compiler.is_exporting() else plain
    out, present_key, present_value = compute(*tensors, scale, epsilon)
    return out, present_key, present_value


def translation(*arguments: Any) -> Any:
    """Write the ONNX node."""
    inputs = ("q", "k", "v", "q_norm", "k_norm", "cos", "sin", "past_key", "past_value", "past_lengths")
    outputs = ("out", "present_key", "present_value")
    return node_of(NAME, inputs, outputs, ("scale", "epsilon"), integers=("past_lengths",))(*arguments)


def reference(
    q: np.ndarray[Any, Any],
    k: np.ndarray[Any, Any],
    v: np.ndarray[Any, Any],
    q_norm: np.ndarray[Any, Any],
    k_norm: np.ndarray[Any, Any],
    cos: np.ndarray[Any, Any],
    sin: np.ndarray[Any, Any],
    past_key: np.ndarray[Any, Any],
    past_value: np.ndarray[Any, Any],
    past_lengths: np.ndarray[Any, Any],
    *,
    scale: float,
    epsilon: float,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Compute the op in float64, one query row at a time: slow, and nothing but the definition."""
    (B, S, _), (K, H) = q.shape, (past_key.shape[1], past_key.shape[3])
    q_BSNH = rotate(_rms_norm(q.reshape(B, S, -1, H), q_norm, epsilon), cos, sin)
    k_BSKH = rotate(_rms_norm(k.reshape(B, S, K, H), k_norm, epsilon), cos, sin)
    v_BSKH = v.reshape(B, S, K, H)
    present_key, present_value = past_key.astype(np.float64), past_value.astype(np.float64)
    group = q_BSNH.shape[2] // K
    out_BSNH = np.empty(q_BSNH.shape)
    for b in range(B):
        start = int(past_lengths[b])
        present_key[b, :, start : start + S] = k_BSKH[b].transpose(1, 0, 2)
        present_value[b, :, start : start + S] = v_BSKH[b].transpose(1, 0, 2)
        for s in range(S):
            for n in range(q_BSNH.shape[2]):
                visible = slice(0, start + s + 1)
                scores = present_key[b, n // group, visible] @ q_BSNH[b, s, n] * scale
                weights = np.exp(scores - scores.max())
                out_BSNH[b, s, n] = weights / weights.sum() @ present_value[b, n // group, visible]
    return out_BSNH.reshape(B, S, -1), present_key, present_value


def _rms_norm(x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any], epsilon: float) -> np.ndarray[Any, Any]:
    x = x.astype(np.float64)
    return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight)

"""`VisionAttention`: rotary embedding and bidirectional attention, batched over segments.

Shapes: I segments of one grid, P patches of a segment, N heads, H head dim.

    inputs   q, k, v [I, P, N·H]   cos, sin [P, H/2]
    outputs  out [I, P, N·H]
    attrs    num_heads, scale (of the scores)

A segment attends only to itself, as `cu_seqlens` of transformers repeats h·w, t times; so no mask exists.
Source: `Qwen3VLVisionAttention.forward` of transformers 5.23.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3vl_export.ops.rotary import rotate

if TYPE_CHECKING:
    import torch

NAME = "VisionAttention"

BODY = """
<domain: "qwen3vl", opset_import: ["" : 24]>
VisionAttention <num_heads: int, scale: float> (q, k, v, cos, sin) => (out)
{
    num_segments = Shape <start = 0, end = 1> (q)
    table_shape = Shape (cos)
    batched_shape = Concat <axis = 0> (num_segments, table_shape)
    cos_IPH = Expand (cos, batched_shape)
    sin_IPH = Expand (sin, batched_shape)
    q_rotated = RotaryEmbedding <num_heads: int = @num_heads> (q, cos_IPH, sin_IPH)
    k_rotated = RotaryEmbedding <num_heads: int = @num_heads> (k, cos_IPH, sin_IPH)
    out = Attention <q_num_heads: int = @num_heads, kv_num_heads: int = @num_heads, scale: float = @scale>
        (q_rotated, k_rotated, v)
}
"""


def emit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    num_heads: int,
    scale: float,
) -> torch.Tensor:
    """Emit one node into a running trace; shapes as in the file's head."""
    import torch

    (out,) = torch.onnx.ops.symbolic_multi_out(
        f"qwen3vl::{NAME}",
        [q, k, v, cos, sin],
        {"num_heads": num_heads, "scale": scale},
        dtypes=[q.dtype],
        shapes=[list(q.shape)],
        version=1,
    )
    return out


def reference(
    q: np.ndarray[Any, Any],
    k: np.ndarray[Any, Any],
    v: np.ndarray[Any, Any],
    cos: np.ndarray[Any, Any],
    sin: np.ndarray[Any, Any],
    *,
    num_heads: int,
    scale: float,
) -> np.ndarray[Any, Any]:
    """Compute the op in float64, one segment and head at a time."""
    shape_IPNH = (*q.shape[:2], num_heads, -1)
    q_IPNH, k_IPNH = (rotate(x.reshape(shape_IPNH).astype(np.float64), cos, sin) for x in (q, k))
    v_IPNH = v.reshape(shape_IPNH).astype(np.float64)
    out_IPNH = np.empty(v_IPNH.shape)
    for i in range(q.shape[0]):
        for n in range(num_heads):
            scores = q_IPNH[i, :, n] @ k_IPNH[i, :, n].T * scale
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out_IPNH[i, :, n] = weights / weights.sum(-1, keepdims=True) @ v_IPNH[i, :, n]
    return out_IPNH.reshape(q.shape)

"""`VisionAttention`: rotary embedding and bidirectional attention, batched over segments.

Shapes: I segments of one grid, P patches of a segment, N heads, H head dim.

    inputs   q, k, v [I, P, N·H]   cos, sin [P, H/2]
    outputs  out [I, P, N·H]
    attrs    num_heads, scale (of the scores)

A segment attends only to itself, as `cu_seqlens` of transformers repeats h·w, t times; so no mask exists.
Source: `Qwen3VLVisionAttention.forward` of transformers 5.23.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qwen3vl_export.ops.onnx_form import node_of
from qwen3vl_export.ops.rotary import rotate, rotate_heads

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


def plain(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_heads: int, scale: float) -> Tensor:
    """Compute the op with PyTorch's own attention; the rotation is float32 whatever the inputs' type."""
    q_IPNH, k_IPNH, v_IPNH = (x.unflatten(-1, (num_heads, -1)) for x in (q, k, v))
    q_IPNH, k_IPNH = (rotate_heads(x.float(), cos.float(), sin.float()).to(x.dtype) for x in (q_IPNH, k_IPNH))
    heads = (x.transpose(1, 2) for x in (q_IPNH, k_IPNH, v_IPNH))
    return F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2).flatten(2)


OP = torch.library.custom_op("qwen3vl::vision_attention", plain, mutates_args=())


@OP.register_fake
def _(q: Tensor, *_: Tensor | float) -> Tensor:
    return torch.empty_like(q)


def apply(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, scale: float) -> Tensor:
    """Compute the op; one node where a trace runs. Shapes as in the file's head."""
    compute = OP if torch.compiler.is_exporting() else plain
    return compute(q, k, v, cos, sin, num_heads, scale)


def translation(*arguments: Any) -> Any:
    """Write the ONNX node."""
    inputs = ("q", "k", "v", "cos", "sin")
    return node_of(NAME, inputs, ("out",), ("num_heads", "scale"), integers=("num_heads",))(*arguments)


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

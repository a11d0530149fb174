"""Bodies and passes of the graphs that TensorRT parses, and what the records of its targets share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from engines.quantize.formats import WeightFormats
from engines.target import GPU, numbers_of
from engines.tensorrt.experts import gathered_bytes, mixture_of_experts
from engines.tensorrt.storage import TensorRtStorage

if TYPE_CHECKING:
    import onnx_ir as ir

    from runtime.model_config import ModelConfig

# Candidates of the next token that a step brings back from the device; Qwen3-VL's own sampling takes 20.
_TOP_K = 64

PRECISIONS = {
    "fp16": "float16; norms and rotary embedding in float32",
    "bf16": "bfloat16; norms and rotary embedding in float32",
    "fp8": "float16, with float8 products; activations by calibration",
    "int4": "float16, with a decoder of 4-bit weights in symmetric blocks of 128",
    "nvfp4": "float16, with a decoder of 4-bit float weights in blocks of 16",
}


def causal_attention(config: ModelConfig) -> str:
    """Return the portable cell with a mask that all layers share.

    The number of new tokens comes from cos, which every layer has in common, so that one mask is left when equal nodes
    are joined. TensorRT's parser takes Attention with four-dimensional operands, an explicit mask and one output.
    """
    heads, kv_heads, head_dim = config.text.num_heads, config.text.num_kv_heads, config.text.head_dim
    return f"""
<domain: "qwen3vl", opset_import: ["" : 24]>
CausalAttention <scale: float, epsilon: float>
    (q, k, v, q_norm, k_norm, cos, sin, past_key, past_value, past_lengths) => (out, present_key, present_value)
{{
    split_q = Constant <value_ints = [0, 0, {heads}, {head_dim}]> ()
    split_kv = Constant <value_ints = [0, 0, {kv_heads}, {head_dim}]> ()
    q_BSNH = Reshape (q, split_q)
    k_BSKH = Reshape (k, split_kv)
    v_BSKH = Reshape (v, split_kv)
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
    num_new = Shape <start = 1, end = 2> (cos)
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
    join_heads = Constant <value_ints = [0, 0, {heads * head_dim}]> ()
    out = Reshape (out_BSNH, join_heads)
}}
"""


NATIVE_OPS = {"CausalAttention": causal_attention, "MixtureOfExperts": mixture_of_experts}


def passes(dtype: str, formats: WeightFormats) -> Sequence[ir.passes.InPlacePass]:
    """Return the passes after the bodies, for activations of a half type."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    from engines.passes.add_top_k import AddTopKPass
    from engines.passes.dequantize_weights import DequantizeWeightsPass
    from engines.passes.fold_static_shapes import FoldStaticShapesPass
    from engines.passes.half_precision import HalfPrecisionPass
    from engines.passes.pack_experts import PackExpertsPass
    from engines.passes.split_experts import SplitExpertsPass

    return [
        FoldStaticShapesPass(),
        common.CommonSubexpressionEliminationPass(),
        PackExpertsPass(formats),
        SplitExpertsPass(),
        DequantizeWeightsPass(formats),
        AddTopKPass(_TOP_K),
        HalfPrecisionPass(ir.DataType[dtype.upper()]),
    ]


def record(family: str, precision: str) -> dict[str, Any]:
    """Return the fields that the targets of both libraries share; bfloat16 for `bf16`, float16 for all others."""
    dtype = "bfloat16" if precision == "bf16" else "float16"
    return {
        "precision": precision,
        "session": "tensorrt",
        "cache_dtype": dtype,
        "native_ops": NATIVE_OPS,
        "passes": partial(passes, dtype),
        "storage": TensorRtStorage(),
        "float_dtype": dtype,
        "device": GPU,
        "top_k": _TOP_K,
        "prefill_workspace": gathered_bytes,
        **numbers_of("tensorrt", precision),
        **numbers_of(family, precision),
    }

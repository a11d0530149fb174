"""ONNX Runtime's CPU provider.

The standard body of CausalAttention costs capacity, not length: past 300, one layer at T = 16384 takes 17.7 ms,
GroupQueryAttention 0.13 ms. It normalises on CUDA and WebGPU only, and its rotary embedding wants tables
as long as the sequence, so norm and rotary embedding stay before it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import configs
from engines.attention_limits import check_grouped_query_attention
from engines.quantize.formats import WeightPlan
from engines.target import Availability, Target
from runtime.installation import how_to_install

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from runtime.model_config import ModelConfig


def _causal_attention(config: ModelConfig) -> str:
    heads, kv_heads, head_dim = config.text.num_heads, config.text.num_kv_heads, config.text.head_dim
    # The lengths come from cos, which all layers share, so that they are computed once.
    return f"""
<domain: "qwen3vl", opset_import: ["" : 24, "com.microsoft" : 1]>
CausalAttention <scale: float, epsilon: float>
    (q, k, v, q_norm, k_norm, cos, sin, past_key, past_value, past_lengths) => (out, present_key, present_value)
{{
    split_heads = Constant <value_ints = [0, 0, -1, {head_dim}]> ()
    join_heads = Constant <value_ints = [0, 0, -1]> ()
    q_BSNH = Reshape (q, split_heads)
    k_BSKH = Reshape (k, split_heads)
    q_normed = SimplifiedLayerNormalization <axis = -1, epsilon: float = @epsilon> (q_BSNH, q_norm)
    k_normed = SimplifiedLayerNormalization <axis = -1, epsilon: float = @epsilon> (k_BSKH, k_norm)
    q_joined = Reshape (q_normed, join_heads)
    k_joined = Reshape (k_normed, join_heads)
    q_rotated = RotaryEmbedding <num_heads = {heads}> (q_joined, cos, sin)
    k_rotated = RotaryEmbedding <num_heads = {kv_heads}> (k_joined, cos, sin)
    num_new = Shape <start = 1, end = 2> (cos)
    one = Constant <value_ints = [1]> ()
    last_new = Sub (num_new, one)
    last_positions = Add (past_lengths, last_new)
    seqlens_k = Cast <to = 6> (last_positions)
    longest_past = ReduceMax <keepdims = 0> (past_lengths)
    axis_0 = Constant <value_ints = [0]> ()
    num_new_scalar = Squeeze (num_new, axis_0)
    total = Add (longest_past, num_new_scalar)
    total_sequence_length = Cast <to = 6> (total)
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


def _mixture_of_experts(config: ModelConfig) -> str:
    # MoE's own router breaks ties either way. It is given the logits of the chosen experts, and of all others a number
    # whose exponential is 0: what it then chooses, and its softmax, are the op's.
    return """
<domain: "qwen3vl", opset_import: ["" : 24, "com.microsoft" : 1]>
MixtureOfExperts <top_k: int> (x, router_weight, gate_up, down) => (out)
{
    hidden = Shape <start = 2, end = 3> (x)
    infer = Constant <value_ints = [-1]> ()
    axis_0 = Constant <value_ints = [0]> ()
    token_shape = Concat <axis = 0> (infer, hidden)
    x_TD = Reshape (x, token_shape)
    router_DE = Transpose <perm = [1, 0]> (router_weight)
    logits_TE = MatMul (x_TD, router_DE)
    probabilities_TE = Softmax <axis = -1> (logits_TE)
    k_scalar = Constant <value_int: int = @top_k> ()
    k = Unsqueeze (k_scalar, axis_0)
    largest_Tk, expert_Tk = TopK <axis = -1> (probabilities_TE, k)
    chosen_Tk = GatherElements <axis = -1> (logits_TE, expert_Tk)
    logits_shape = Shape (logits_TE)
    none_TE = ConstantOfShape <value = float[1] {-1e30}> (logits_shape)
    masked_TE = ScatterElements <axis = -1> (none_TE, expert_Tk, chosen_Tk)
    out_TD = com.microsoft.MoE <k: int = @top_k, activation_type = "swiglu", activation_alpha = 1.0,
        activation_beta = 0.0, swiglu_fusion = 1, normalize_routing_weights = 1> (x_TD, masked_TE, gate_up, "", down)
    x_shape = Shape (x)
    out = Reshape (out_TD, x_shape)
}
"""


def _passes(plan: WeightPlan) -> Sequence[ir.passes.InPlacePass]:
    from engines.passes.choose_experts_kernel import ChooseExpertsKernelPass
    from engines.passes.fuse_residual_norm import FuseResidualNormPass
    from engines.passes.fuse_shared_input import FuseSharedInputPass
    from engines.passes.fuse_transposed_matmul import FuseTransposedMatMulPass
    from engines.passes.quantize_weights import QuantizeWeightsPass

    return [
        FuseSharedInputPass(plan.format_of),
        ChooseExpertsKernelPass(plan),
        QuantizeWeightsPass(plan),
        FuseTransposedMatMulPass(),
        FuseResidualNormPass(),
    ]


def _cache_pass(bits: int, scales_L2KH: NDArray[np.float32]) -> ir.passes.InPlacePass:
    from engines.passes.quantize_cache import QuantizeCachePass

    return QuantizeCachePass(bits, scales_L2KH)


def _availability() -> Availability:
    runs = importlib.util.find_spec("onnxruntime") is not None
    # An engine is built of what torch traces, although nothing here imports it.
    builds = all(importlib.util.find_spec(name) is not None for name in ("onnx_ir", "onnxscript", "torch"))
    missing = [extra for extra, found in (("cpu", runs), ("export", builds)) if not found]
    reason = how_to_install(*missing) if missing else ""
    return Availability(can_build=builds, can_run=runs, reason=reason)


def _target(precision: str, description: str) -> Target:
    settings = configs.load("targets/ort_cpu").get(precision, {})
    plan = WeightPlan.from_rules(settings.get("weights", []))
    prefill_plan = WeightPlan.from_rules(settings.get("prefill_weights", []))
    return Target(
        name=f"ort-cpu-{precision}",
        precision=precision,
        description=description,
        session="ort_cpu",
        cache_dtype="float32",
        updates_cache_in_place=True,
        batched_chunks=False,
        native_ops={
            "CausalAttention": _causal_attention,
            "VisionAttention": _vision_attention,
            "MixtureOfExperts": _mixture_of_experts,
        },
        passes=lambda: _passes(plan),
        prefill_passes=(lambda: _passes(prefill_plan)) if prefill_plan.rules else None,
        prefill_min_tokens=settings.get("prefill_min_tokens", 0),
        cache_pass=_cache_pass,
        libraries=("onnx-ir",),
        check_model=check_grouped_query_attention,
        availability=_availability,
    )


TARGETS = (
    _target("fp32", "ONNX Runtime, CPU, float32: the reference of all other targets"),
    _target("int8", "ONNX Runtime, CPU, 8-bit weights in blocks of 128"),
    _target("int4", "ONNX Runtime, CPU, 4-bit decoder in blocks of 128, 8-bit vision tower"),
    _target("int4p8", "as int4, and the decoder once more in 8 bits for prompts: fast on AMX, more memory"),
)

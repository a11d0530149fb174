"""ONNX Runtime's CUDA provider, in half precision.

Built and checked without a GPU: every node is held against the kernels that the wheel registers, see
`engines.cuda_kernels`. The KV cache is written in place by GroupQueryAttention. Its CUDA kernel could also normalise
queries and keys, which the one for the CPU cannot; they are normalised before it, so that the CPU can execute these
graphs and show that they are right.

What sums in float32 although it is given halves, in ONNX Runtime's source: LayerNormalization, RMSNormalization and
SimplifiedLayerNormalization (registered with U = float), attention (softmax and sums of the flash kernels), and
SkipSimplifiedLayerNormalization only with the provider's `enable_skip_layer_norm_strict_mode`, which the session sets:
without, its kernel adds up the squares in the input's own type. MoE and QMoE take the router's logits in half and make
their softmax and its sums in float32.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import configs
from engines.attention_limits import check_grouped_query_attention
from engines.quantize.formats import WeightPlan
from engines.target import Availability, Target
from runtime.installation import how_to_install

if TYPE_CHECKING:
    import onnx_ir as ir

    from runtime.model_config import ModelConfig

_TOP_K = 64
# What has no kernel that sums in float32, see above. RotaryEmbedding computes in the type of its input. In float16 that
# moves a vector by 2.7e-4 of its length, where rounding the exact result moves it by 2.1e-4, and the cosine of no
# output of the demo by more than 2e-7; float32 would cost four casts a layer. bfloat16 has an eighth of that precision.
_FLOAT32_OPS = {
    "float16": frozenset({"Softmax"}),
    "bfloat16": frozenset({"RotaryEmbedding", "Softmax"}),
}
# The CUDA kernel knows no other way; on the CPU it keeps the input in half precision too.
_PLAIN_PRODUCTS = 0
# Blocks that the grouped products of QMoE take on every GPU (docs/contrib_ops/cuda/moe_qmoe.md of ONNX Runtime).
_EXPERT_BLOCKS = (64, 128)
# Half numbers in the 16 bytes that MoE reads at once.
_EXPERT_MULTIPLE = 8


def _causal_attention(config: ModelConfig) -> str:
    heads, kv_heads, head_dim = config.text.num_heads, config.text.num_kv_heads, config.text.head_dim
    # total_sequence_length is read on the host, seqlens_k on the device, and neither may cost a copy between them: a
    # step with copies cannot be captured as a CUDA graph. So the first is the capacity, a shape, and the number of new
    # tokens in the second is a sum of ones on the device. The kernel masks by seqlens_k; by a total beyond the new
    # tokens it knows that there is a past, and then takes one sequence if there are several new tokens.
    # The number of new tokens comes from cos, which all layers share, so that seqlens_k is computed once.
    return f"""
<domain: "qwen3vl", opset_import: ["" : 24, "com.microsoft" : 1]>
CausalAttention <scale: float, epsilon: float>
    (q, k, v, q_norm, k_norm, cos, sin, past_key, past_value, past_lengths) => (out, present_key, present_value)
{{
    split_heads = Constant <value_ints = [0, 0, -1, {head_dim}]> ()
    join_heads = Constant <value_ints = [0, 0, -1]> ()
    q_BSNH = Reshape (q, split_heads)
    k_BSKH = Reshape (k, split_heads)
    q_normed = RMSNormalization <axis = -1, epsilon: float = @epsilon> (q_BSNH, q_norm)
    k_normed = RMSNormalization <axis = -1, epsilon: float = @epsilon> (k_BSKH, k_norm)
    q_joined = Reshape (q_normed, join_heads)
    k_joined = Reshape (k_normed, join_heads)
    q_rotated = RotaryEmbedding <num_heads = {heads}> (q_joined, cos, sin)
    k_rotated = RotaryEmbedding <num_heads = {kv_heads}> (k_joined, cos, sin)
    shape_BS = Shape <start = 0, end = 2> (cos)
    one = Constant <value_ints = [1]> ()
    ones_BS = Expand (one, shape_BS)
    num_new = ReduceSum <keepdims = 0> (ones_BS, one)
    total = Add (past_lengths, num_new)
    last_positions = Sub (total, one)
    seqlens_k = Cast <to = 6> (last_positions)
    capacity = Shape <start = 2, end = 3> (past_key)
    total_sequence_length = Cast <to = 6> (capacity)
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
    # MoE's own router takes the lower index of a tie on CUDA, either one on the CPU. It is given the logits of the
    # experts that TopK chose, and of all others the lowest number of float16, whose exponential is 0. So both choose
    # what the op chooses, and the graph can be proven on the CPU. A softmax before TopK would not change the order.
    experts = config.text.experts
    assert experts is not None
    return f"""
<domain: "qwen3vl", opset_import: ["" : 24, "com.microsoft" : 1]>
MixtureOfExperts <top_k: int> (x, router_weight, gate_up, down) => (out)
{{
    router_DE = Transpose <perm = [1, 0]> (router_weight)
    logits_BSE = MatMul (x, router_DE)
    token_shape = Constant <value_ints = [-1, {experts.num_experts}]> ()
    logits_TE = Reshape (logits_BSE, token_shape)
    k = Constant <value_ints = [{experts.top_k}]> ()
    chosen_Tk, expert_Tk = TopK <axis = -1> (logits_TE, k)
    none = Constant <value_float = -65504.0> ()
    logits_shape = Shape (logits_TE)
    none_TE = Expand (none, logits_shape)
    masked_TE = ScatterElements <axis = -1> (none_TE, expert_Tk, chosen_Tk)
    out = com.microsoft.MoE <k: int = @top_k, activation_type = "swiglu", activation_alpha = 1.0,
        activation_beta = 0.0, swiglu_fusion = 1, normalize_routing_weights = 1> (x, masked_TE, gate_up, "", down)
}}
"""


def _passes(dtype: str, plan: WeightPlan) -> Sequence[ir.passes.InPlacePass]:
    import onnx_ir as ir
    from onnx_ir.passes import common

    from engines.cuda_kernels import CheckPlacementPass
    from engines.passes.add_top_k import AddTopKPass
    from engines.passes.choose_experts_kernel import ChooseExpertsKernelPass
    from engines.passes.fuse_residual_norm import FuseResidualNormPass
    from engines.passes.fuse_shared_input import FuseSharedInputPass
    from engines.passes.fuse_transposed_matmul import FuseTransposedMatMulPass
    from engines.passes.half_precision import HalfPrecisionPass
    from engines.passes.quantize_weights import QuantizeWeightsPass

    return [
        FuseSharedInputPass(plan.format_of),
        ChooseExpertsKernelPass(plan, _PLAIN_PRODUCTS, blocks=_EXPERT_BLOCKS, float_multiple=_EXPERT_MULTIPLE),
        QuantizeWeightsPass(plan, _PLAIN_PRODUCTS, table_in_whole_bytes=True),
        AddTopKPass(_TOP_K),
        HalfPrecisionPass(ir.DataType[dtype.upper()], _FLOAT32_OPS[dtype]),
        FuseTransposedMatMulPass(),
        FuseResidualNormPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
        CheckPlacementPass(),
    ]


def _availability() -> Availability:
    from engines.hardware import has_gpu

    builds = all(importlib.util.find_spec(name) is not None for name in ("onnx_ir", "onnxscript", "torch"))
    if not builds:
        return Availability(False, False, how_to_install("export", "cuda"))
    if not has_gpu():
        return Availability(True, False, "builds here; needs an NVIDIA GPU to run")
    if not _has_provider():
        return Availability(
            True,
            False,
            f"ONNX Runtime for CUDA has to take the place of that for the CPU: uninstall onnxruntime, then "
            f"{how_to_install('cuda')}",
        )
    return Availability(True, True)


def _has_provider() -> bool:
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _target(precision: str, dtype: str, description: str) -> Target:
    settings = configs.load("targets/ort_cuda").get(precision, {})
    plan = WeightPlan.from_rules(settings.get("weights", []))
    return Target(
        name=f"ort-cuda-{precision}",
        precision=precision,
        description=description,
        session="ort_cuda",
        cache_dtype=dtype,
        updates_cache_in_place=True,
        batched_chunks=False,
        native_ops={
            "CausalAttention": _causal_attention,
            "VisionAttention": _vision_attention,
            "MixtureOfExperts": _mixture_of_experts,
        },
        passes=lambda: _passes(dtype, plan),
        libraries=("onnx-ir",),
        check_model=check_grouped_query_attention,
        availability=_availability,
        device="gpu",
        top_k=_TOP_K,
    )


TARGETS = (
    _target("fp16", "float16", "ONNX Runtime, CUDA, float16"),
    _target("bf16", "bfloat16", "ONNX Runtime, CUDA, bfloat16"),
    _target("int4", "float16", "ONNX Runtime, CUDA, float16 with a decoder of 4-bit weights in blocks of 128"),
)

"""ONNX Runtime's CPU provider.

The standard body of CausalAttention costs capacity, not length: past 300, one layer at T = 16384 takes 17.7 ms,
GroupQueryAttention 0.13 ms. It normalises on CUDA and WebGPU only, and its rotary embedding wants tables
as long as the sequence, so norm and rotary embedding stay before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from engines.kernel_sets import ORT, OWN
from engines.onnxruntime import bodies
from engines.onnxruntime.own_kernels import with_own_kernels
from engines.onnxruntime.storage import CPU_STORAGE
from engines.quantize.formats import WeightFormats
from engines.target import Target, numbers_of

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from runtime.model_config import ModelConfig

_LENGTHS = """
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
"""


def _mixture_of_experts(config: ModelConfig) -> str:
    return f"""
<domain: "qwen3vl", opset_import: ["" : 24, "com.microsoft" : 1]>
MixtureOfExperts <top_k: int> (x, router_weight, gate_up, down) => (out)
{{
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
    none_TE = ConstantOfShape <value = float[1] {{-1e30}}> (logits_shape)
    masked_TE = ScatterElements <axis = -1> (none_TE, expert_Tk, chosen_Tk)
    out_TD = {bodies.EXPERTS} (x_TD, masked_TE, gate_up, "", down)
    x_shape = Shape (x)
    out = Reshape (out_TD, x_shape)
}}
"""


def _passes(formats: WeightFormats) -> Sequence[ir.passes.InPlacePass]:
    from engines.passes.choose_experts_kernel import ChooseExpertsKernelPass
    from engines.passes.fuse_residual_norm import FuseResidualNormPass
    from engines.passes.fuse_shared_input import FuseSharedInputPass
    from engines.passes.fuse_transposed_matmul import FuseTransposedMatMulPass
    from engines.passes.quantize_weights import QuantizeWeightsPass

    return [
        FuseSharedInputPass(formats.format_of),
        ChooseExpertsKernelPass(formats),
        QuantizeWeightsPass(formats),
        FuseTransposedMatMulPass(),
        FuseResidualNormPass(),
    ]


def _cache_pass(bits_L: Sequence[int], scales_L2KH: NDArray[np.float32] | None) -> ir.passes.InPlacePass:
    from engines.passes.quantize_cache import QuantizeCachePass

    assert scales_L2KH is not None, "GroupQueryAttention has no cache of float16 on the CPU"
    return QuantizeCachePass(bits_L, scales_L2KH)


def _target(precision: str, description: str) -> Target:
    target = Target(
        name=f"ort-cpu-{precision}",
        precision=precision,
        description=description,
        session="ort_cpu",
        library="onnxruntime",
        extra="cpu",
        cache_dtype="float32",
        native_ops=bodies.native_ops("SimplifiedLayerNormalization", _LENGTHS, _mixture_of_experts),
        passes=_passes,
        storage=CPU_STORAGE,
        cache_pass=_cache_pass,
        supports_kv_scores=True,
        check_model=bodies.check_heads,
        **numbers_of("ort_cpu", precision),
    )
    own = numbers_of("ort_cpu", f"{precision}-{OWN}")
    if not own:
        return target
    return replace(target, kernels=ORT, other_kernels=(with_own_kernels(target, **own),))


TARGETS = tuple(
    _target(precision, description)
    for precision, description in {
        "fp32": "ONNX Runtime, CPU, float32: the reference of all other targets",
        "int8": "ONNX Runtime, CPU, 8-bit weights in blocks of 128",
        "int4": "ONNX Runtime, CPU, 4-bit decoder in blocks of 128, 8-bit vision tower",
        "int4p8": "as int4 by ONNX Runtime's kernels, and the decoder once more in 8 bits for prompts: more memory",
    }.items()
)

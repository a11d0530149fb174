"""Targets of ONNX Runtime's CPU provider with our own kernels (docs/cpu_kernels.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engines.kernel_sets import OWN
from engines.onnxruntime.packed_storage import PACKED_STORAGE
from engines.quantize.formats import WeightFormats
from engines.target import Target
from runtime import native
from runtime.errors import TargetError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from runtime.model_config import ModelConfig

# Of kMaxHeadDim in native/attention_plan.h, and of the widest vector.
_HEAD_DIM_MULTIPLE, _MAX_HEAD_DIM = 16, 256


def with_own_kernels(target: Target, **changes: Any) -> Target:
    """Return a target of ONNX Runtime's CPU provider with our own kernels.

    Experts and the attention of the vision tower stay with ONNX Runtime's.

    Args:
        target: The target with ONNX Runtime's kernels.
        **changes: Further fields, such as formats.
    """
    return replace(
        target,
        kernels=OWN,
        other_kernels=(),
        check_kernels=_problem,
        kernels_drawback=_drawback,
        custom_ops=native.DOMAIN,
        native_ops={**target.native_ops, "CausalAttention": _causal_attention},
        calibration_ops=target.native_ops,
        passes=_passes,
        storage=PACKED_STORAGE,
        batched_chunks=True,
        cache_pass=_cache_pass,
        supports_half_cache=True,
        check_model=_check_heads,
        **changes,
    )


def _problem() -> str:
    error = native.failure()
    if isinstance(error, UsageError):
        raise error  # a setting that the user gave: nothing to build around
    return "" if error is None else error.message


def _drawback() -> str:
    # Not the one in use: QWEN3VL_CPU_ISA may name portable code for this process, which says nothing of the processor.
    return "this processor runs their portable code alone" if native.isas() == (native.PORTABLE,) else ""


def _causal_attention(config: ModelConfig) -> str:
    """Return a body that joins q, k and v, which RemoveSplitConcatPass undoes where one product made them."""
    text = config.text
    return f"""
<domain: "qwen3vl", opset_import: ["" : 24, "{native.DOMAIN}" : 1]>
CausalAttention <scale: float, epsilon: float>
    (q, k, v, q_norm, k_norm, cos, sin, past_key, past_value, past_lengths) => (out, present_key, present_value)
{{
    qkv = Concat <axis = -1> (q, k, v)
    out, present_key, present_value = {native.DOMAIN}.DecodeAttention
        <num_heads = {text.num_heads}, kv_num_heads = {text.num_kv_heads}, scale: float = @scale,
         epsilon: float = @epsilon>
        (qkv, q_norm, k_norm, cos, sin, past_key, past_value, past_lengths)
}}
"""


def _passes(formats: WeightFormats) -> Sequence[ir.passes.InPlacePass]:
    from engines.passes.choose_experts_kernel import ChooseExpertsKernelPass
    from engines.passes.fuse_cpu_products import FuseCpuProductsPass
    from engines.passes.fuse_residual_norm import FuseResidualNormPass
    from engines.passes.fuse_shared_input import FuseSharedInputPass
    from engines.passes.fuse_transposed_matmul import FuseTransposedMatMulPass
    from engines.passes.quantize_weights import QuantizeWeightsPass
    from engines.passes.remove_split_concat import RemoveSplitConcatPass
    from engines.passes.use_cpu_products import UseCpuProductsPass

    return [
        FuseSharedInputPass(formats.format_of),
        ChooseExpertsKernelPass(formats, PACKED_STORAGE.others),
        UseCpuProductsPass(formats),
        QuantizeWeightsPass(formats, PACKED_STORAGE.others),
        RemoveSplitConcatPass(),
        FuseCpuProductsPass(),
        FuseTransposedMatMulPass(),
        FuseResidualNormPass(),
    ]


def _cache_pass(bits_L: Sequence[int], scales_L2KH: NDArray[np.float32] | None) -> ir.passes.InPlacePass:
    from engines.passes.set_cache_type import SetCacheTypePass

    return SetCacheTypePass(bits_L, scales_L2KH)


def _check_heads(config: ModelConfig) -> None:
    head_dim = config.text.head_dim
    if head_dim % _HEAD_DIM_MULTIPLE or head_dim > _MAX_HEAD_DIM:
        raise TargetError(
            f"config.json: text_config.head_dim is {head_dim}, expected a multiple of {_HEAD_DIM_MULTIPLE} up to "
            f"{_MAX_HEAD_DIM}: our own attention takes no other",
            remedy="every published Qwen3-VL has 128; --kernels ort takes multiples of 8",
        )

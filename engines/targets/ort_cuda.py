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
from functools import partial
from typing import TYPE_CHECKING

from engines.onnxruntime import bodies
from engines.onnxruntime.storage import OrtStorage
from engines.quantize.formats import WeightFormats
from engines.target import GPU, Target, numbers_of
from runtime.installation import how_to_install

if TYPE_CHECKING:
    import onnx_ir as ir

    from runtime.model_config import ModelConfig

_TOP_K = 64
# What has no kernel that sums in float32, see above. RotaryEmbedding computes in the type of its input. In float16 that
# moves a vector by 2.7e-4 of its length, where rounding the exact result moves it by 2.1e-4, and the cosine of no
# output of the demo by more than 2e-7; float32 would cost four casts a layer. bfloat16 has an eighth of that precision.
FLOAT32_OPS = {
    "float16": frozenset({"Softmax"}),
    "bfloat16": frozenset({"RotaryEmbedding", "Softmax"}),
}
STORAGE = OrtStorage(
    # The CUDA kernel knows no other way; on the CPU it keeps the input in half precision too.
    accuracy_level=0,
    # Blocks that the grouped products of QMoE take on every GPU (docs/contrib_ops/cuda/moe_qmoe.md of ONNX Runtime).
    expert_blocks=(64, 128),
    # Half numbers in the 16 bytes that MoE reads at once.
    expert_multiple=8,
    table_in_whole_bytes=True,
    reads_float8=True,
)
# total_sequence_length is read on the host, seqlens_k on the device, and neither may cost a copy between them: a step
# with copies cannot be captured as a CUDA graph. So the first is the capacity, a shape, and the number of new tokens in
# the second is a sum of ones on the device. The kernel masks by seqlens_k; by a total beyond the new tokens it knows
# that there is a past, and then takes one sequence if there are several new tokens.
_LENGTHS = """
    shape_BS = Shape <start = 0, end = 2> (cos)
    one = Constant <value_ints = [1]> ()
    ones_BS = Expand (one, shape_BS)
    num_new = ReduceSum <keepdims = 0> (ones_BS, one)
    total = Add (past_lengths, num_new)
    last_positions = Sub (total, one)
    seqlens_k = Cast <to = 6> (last_positions)
    capacity = Shape <start = 2, end = 3> (past_key)
    total_sequence_length = Cast <to = 6> (capacity)
"""


def _mixture_of_experts(config: ModelConfig) -> str:
    # The lowest number of float16 has 0 as exponential. A softmax before TopK would not change the order.
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
    out = {bodies.EXPERTS} (x, masked_TE, gate_up, "", down)
}}
"""


def _passes(dtype: str, formats: WeightFormats) -> Sequence[ir.passes.InPlacePass]:
    import onnx_ir as ir
    from onnx_ir.passes import common

    from engines.cuda_kernels import CheckPlacementPass
    from engines.passes.add_top_k import AddTopKPass
    from engines.passes.choose_experts_kernel import ChooseExpertsKernelPass
    from engines.passes.fuse_residual_norm import FuseResidualNormPass
    from engines.passes.fuse_shared_input import FuseSharedInputPass
    from engines.passes.fuse_transposed_matmul import FuseTransposedMatMulPass
    from engines.passes.half_precision import HalfPrecisionPass
    from engines.passes.normalise_pixels import NormalisePixelsPass
    from engines.passes.quantize_weights import QuantizeWeightsPass

    return [
        FuseSharedInputPass(formats.format_of),
        ChooseExpertsKernelPass(formats, STORAGE),
        QuantizeWeightsPass(formats, STORAGE),
        AddTopKPass(_TOP_K),
        HalfPrecisionPass(ir.DataType[dtype.upper()], FLOAT32_OPS[dtype]),
        FuseTransposedMatMulPass(),
        FuseResidualNormPass(),
        NormalisePixelsPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
        CheckPlacementPass(),
    ]


def _check_library() -> str:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        how = f"uninstall onnxruntime, then {how_to_install('cuda')}"
        return f"onnxruntime-gpu has to take the place of onnxruntime: {how}"
    # The session moves rows of the KV cache by it.
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return f"cuda-bindings is missing: {how_to_install('cuda')}"
    return ""


# Where they are not named as the target: the fp8 targets of TensorRT round activations, too.
_TOLERANCES = {"fp8": "fp8_weights"}
TARGETS = tuple(
    Target(
        name=f"ort-cuda-{precision}",
        precision=_TOLERANCES.get(precision, precision),
        description=f"ONNX Runtime, CUDA, {description}",
        session="ort_cuda",
        library="onnxruntime",
        extra="cuda",
        cache_dtype=dtype,
        native_ops=bodies.native_ops("RMSNormalization", _LENGTHS, _mixture_of_experts),
        passes=partial(_passes, dtype),
        storage=STORAGE,
        float_dtype=dtype,
        device=GPU,
        top_k=_TOP_K,
        decode_plan=True,
        normalises_pixels=True,
        check_model=bodies.check_heads,
        check_library=_check_library,
        **numbers_of("ort_cuda", precision),
    )
    for precision, dtype, description in (
        ("fp16", "float16", "float16"),
        ("bf16", "bfloat16", "bfloat16"),
        ("fp8", "float16", "float16 with a decoder of float8 weights in blocks of 128"),
        ("int4", "float16", "float16 with a decoder of 4-bit weights in blocks of 128"),
    )
)

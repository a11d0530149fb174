"""The mixture of experts in operators that TensorRT has: one product of blocks of rows, each with one expert's weights.

The pairs (token, expert) are sorted by expert into N blocks of M rows; a block belongs to one expert, whose weights are
gathered for it, and all blocks are one batched product. With P = T · k pairs and E experts

    M = max(1, 2 · floor(P / E))        N = min(P, floor(3 · E / 2))

is enough for every choice: experts with p_e pairs fill Σ ceil(p_e / M) ≤ (P - E) / M + E < 3 · E / 2 blocks, or P of
them where M is 1. So at most 3 · P rows are computed, where all experts for all tokens would be P · E / k, and at most
3 · E / 2 experts are gathered. A step has few pairs, so M = 1: each pair gathers its expert and multiplies one row.
Both sizes grow with T, so the largest shape of a profile needs the most memory.

Rows that no pair fills compute the first token once more, and nothing reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.model_config import ModelConfig


_BODY = """
<domain: "qwen3vl", opset_import: ["" : 24]>
MixtureOfExperts <top_k: int> (x, router_weight, gate_up, down) => (out)
{{
    last = Constant <value_ints = [-1]> ()
    axis_0 = Constant <value_ints = [0]> ()
    axis_1 = Constant <value_ints = [1]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    one_1 = Constant <value_ints = [1]> ()
    two_1 = Constant <value_ints = [2]> ()
    num_experts = Constant <value_int = {count}> ()
    num_experts_1 = Constant <value_ints = [{count}]> ()
    hidden = Constant <value_ints = [{hidden}]> ()
    rows_of_x = Constant <value_ints = [-1, {hidden}]> ()
    k_scalar = Constant <value_int: int = @top_k> ()
    k = Unsqueeze (k_scalar, axis_0)

    x_TD = Reshape (x, rows_of_x)
    router_DE = Transpose <perm = [1, 0]> (router_weight)
    logits_TE = MatMul (x_TD, router_DE)
    chosen_Tk, expert_Tk = TopK <axis = -1> (logits_TE, k)
    weight_Tk = Softmax <axis = -1> (chosen_Tk)

    num_tokens = Shape <start = 0, end = 1> (x_TD)
    num_pairs = Mul (num_tokens, k)
    mean_pairs = Div (num_pairs, num_experts_1)
    twice_mean = Mul (mean_pairs, two_1)
    block_rows = Max (twice_mean, one_1)
    most_blocks = Constant <value_ints = [{most_blocks}]> ()
    num_blocks = Min (num_pairs, most_blocks)
    num_rows = Mul (num_blocks, block_rows)

    expert_E = Range (zero, num_experts, one)
    expert_Tk1 = Unsqueeze (expert_Tk, last)
    is_chosen_TkE = Equal (expert_Tk1, expert_E)
    chosen_TkE = Cast <to = 7> (is_chosen_TkE)
    pairs_TE = ReduceSum <keepdims = 0> (chosen_TkE, axis_1)
    before_TE = CumSum <exclusive = 1> (pairs_TE, zero)
    place_Tk = GatherElements <axis = 1> (before_TE, expert_Tk)
    pairs_E = ReduceSum <keepdims = 0> (pairs_TE, axis_0)
    rows_less_1 = Sub (block_rows, one_1)
    pairs_up_E = Add (pairs_E, rows_less_1)
    blocks_E = Div (pairs_up_E, block_rows)
    end_E = CumSum (blocks_E, zero)
    start_E = Sub (end_E, blocks_E)
    start_Tk = Gather (start_E, expert_Tk)
    first_row_Tk = Mul (start_Tk, block_rows)
    row_Tk = Add (first_row_Tk, place_Tk)

    num_blocks_scalar = Squeeze (num_blocks, axis_0)
    block_N = Range (zero, num_blocks_scalar, one)
    block_N1 = Unsqueeze (block_N, axis_1)
    is_before_NE = LessOrEqual (end_E, block_N1)
    before_NE = Cast <to = 7> (is_before_NE)
    ended_N = ReduceSum <keepdims = 0> (before_NE, axis_1)
    last_expert = Constant <value_int = {last_expert}> ()
    block_expert_N = Min (ended_N, last_expert)

    num_tokens_scalar = Squeeze (num_tokens, axis_0)
    token_T = Range (zero, num_tokens_scalar, one)
    token_T1 = Unsqueeze (token_T, axis_1)
    pairs_shape = Concat <axis = 0> (num_tokens, k)
    token_Tk = Expand (token_T1, pairs_shape)
    token_P = Reshape (token_Tk, last)
    row_P = Reshape (row_Tk, last)
    first_token_R = Expand (zero, num_rows)
    token_R = ScatterElements <axis = 0> (first_token_R, row_P, token_P)
    x_RD = Gather (x_TD, token_R)
    blocks_shape = Concat <axis = 0> (num_blocks, block_rows, hidden)
    x_NMD = Reshape (x_RD, blocks_shape)

    gate_up_NID = Gather (gate_up, block_expert_N)
    gate_up_NDI = Transpose <perm = [0, 2, 1]> (gate_up_NID)
    both_NMI = MatMul (x_NMD, gate_up_NDI)
    gate_NMI, up_NMI = Split <axis = -1, num_outputs = 2> (both_NMI)
    sigmoid_NMI = Sigmoid (gate_NMI)
    silu_NMI = Mul (gate_NMI, sigmoid_NMI)
    inner_NMI = Mul (silu_NMI, up_NMI)
    down_NDI = Gather (down, block_expert_N)
    down_NID = Transpose <perm = [0, 2, 1]> (down_NDI)
    out_NMD = MatMul (inner_NMI, down_NID)

    out_RD = Reshape (out_NMD, rows_of_x)
    out_TkD = Gather (out_RD, row_Tk)
    weight_Tk1 = Unsqueeze (weight_Tk, last)
    weighted_TkD = Mul (out_TkD, weight_Tk1)
    out_TD = ReduceSum <keepdims = 0> (weighted_TkD, axis_1)
    x_shape = Shape (x)
    out = Reshape (out_TD, x_shape)
}}
"""


def mixture_of_experts(config: ModelConfig) -> str:
    """Return the body of `MixtureOfExperts`.

    The largest logits are chosen, and their softmax is that of all experts renormalised: both fall with the logit, and
    the sum over all experts cancels. TensorRT does not say which of equal logits its TopK takes.

    Letters beside those of the op: P pairs, N blocks, M rows of a block, R = N · M rows.
    """
    experts = config.text.experts
    assert experts is not None
    count = experts.num_experts
    return _BODY.format(count=count, hidden=config.text.hidden_size, most_blocks=3 * count // 2, last_expert=count - 1)


def gathered_bytes(config: ModelConfig, num_tokens: int) -> int:
    """Return the bytes of the experts that one layer gathers for a call, in half precision; 0 of a dense model.

    Half precision is what the product reads. What expands few bits needs besides is not counted: no GPU was measured.
    """
    experts = config.text.experts
    if experts is None:
        return 0
    num_blocks = min(num_tokens * experts.top_k, 3 * experts.num_experts // 2)
    return 2 * num_blocks * 3 * experts.intermediate_size * config.text.hidden_size


MOE_LAYER_COMPUTE_CAPABILITIES = ("10.0", "10.3", "11.0")
"""GPUs that have TensorRT's own layer for experts (its documentation of IMoELayer, read in November 2026)."""


def mixture_of_experts_layer(config: ModelConfig) -> str:
    """Return the body of `MixtureOfExperts` with TensorRT's own layer, for GPUs that have it.

    Inputs and attributes of TRT_MoE are those that the parser of tensorrt_rtx 1.7.1 asks for; the weights take their
    places in `SplitExpertsPass`. Its `activation_type` 1 is SiLU.
    """
    return """
<domain: "qwen3vl", opset_import: ["" : 24, "trt" : 1]>
MixtureOfExperts <top_k: int> (x, router_weight, gate_up, down) => (out)
{
    axis_0 = Constant <value_ints = [0]> ()
    k_scalar = Constant <value_int: int = @top_k> ()
    k = Unsqueeze (k_scalar, axis_0)
    router_DE = Transpose <perm = [1, 0]> (router_weight)
    logits_BSE = MatMul (x, router_DE)
    chosen_BSk, expert_BSk = TopK <axis = -1> (logits_BSE, k)
    weight_BSk = Softmax <axis = -1> (chosen_BSk)
    expert = Cast <to = 6> (expert_BSk)
    out = trt.TRT_MoE <activation_type = 1> (x, expert, weight_BSk, gate_up, gate_up, down)
}
"""

"""`MixtureOfExperts`: each token goes through its `top_k` experts, whose outputs are summed by the router's weights.

Shapes: B batch, S new tokens, T = B·S tokens, D hidden, E experts, I width of an expert, k = top_k.

    inputs   x [B, S, D]   router_weight [E, D]   gate_up [E, 2·I, D] (gate first)   down [E, D, I]
    outputs  out [B, S, D]
    attrs    top_k

Softmax over all experts' logits, the top_k largest, divided by their sum; each expert computes
down · (silu(gate · x) ∘ (up · x)). Among equal probabilities the expert of the lower index wins, as in ONNX TopK;
PyTorch leaves that open. Softmax and sum are float32 whatever the weights' type.
Source: `Qwen3VLMoeTextSparseMoeBlock.forward` of transformers 5.23, which renormalises always.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qwen3vl_export.ops.onnx_form import node_of

NAME = "MixtureOfExperts"

# A loop over the experts in use: work grows with the tokens, memory with one expert's weights. Gathering the weights
# of every token would take T · k times that, computing every expert E / k times the work.
BODY = """
<domain: "qwen3vl", opset_import: ["" : 24]>
MixtureOfExperts <top_k: int> (x, router_weight, gate_up, down) => (out)
{
    hidden = Shape <start = 2, end = 3> (x)
    infer = Constant <value_ints = [-1]> ()
    axis_0 = Constant <value_ints = [0]> ()
    axis_1 = Constant <value_ints = [1]> ()
    token_shape = Concat <axis = 0> (infer, hidden)
    x_TD = Reshape (x, token_shape)
    router_DE = Transpose <perm = [1, 0]> (router_weight)
    logits_TE = MatMul (x_TD, router_DE)
    probabilities_TE = Softmax <axis = -1> (logits_TE)
    k_scalar = Constant <value_int: int = @top_k> ()
    k = Unsqueeze (k_scalar, axis_0)
    largest_Tk, expert_Tk = TopK <axis = -1> (probabilities_TE, k)
    sum_T1 = ReduceSum (largest_Tk, infer)
    weight_Tk = Div (largest_Tk, sum_T1)
    expert_N = Reshape (expert_Tk, infer)
    in_use = Unique (expert_N)
    num_in_use = Size (in_use)
    tokens_shape = Shape (x_TD)
    zeros = ConstantOfShape (tokens_shape)
    zeros_TD = CastLike (zeros, x_TD)
    always = Constant <value = bool {1}> ()
    out_TD = Loop (num_in_use, always, zeros_TD) <
        body = one_expert (int64 turn, bool go_on, sum_TD) => (bool go_on_again, next_TD) {
            go_on_again = Identity (go_on)
            e = Gather (in_use, turn)
            gate_up_ID = Gather (gate_up, e)
            down_DI = Gather (down, e)
            is_chosen_Tk = Equal (expert_Tk, e)
            chosen_2M = NonZero (is_chosen_Tk)
            chosen_M2 = Transpose <perm = [1, 0]> (chosen_2M)
            token_M1 = Slice (chosen_M2, axis_0, axis_1, axis_1)
            x_MD = GatherND (x_TD, token_M1)
            gate_up_DI = Transpose <perm = [1, 0]> (gate_up_ID)
            both_MI = MatMul (x_MD, gate_up_DI)
            gate_MI, up_MI = Split <axis = -1, num_outputs = 2> (both_MI)
            sigmoid_MI = Sigmoid (gate_MI)
            silu_MI = Mul (gate_MI, sigmoid_MI)
            inner_MI = Mul (silu_MI, up_MI)
            down_ID = Transpose <perm = [1, 0]> (down_DI)
            out_MD = MatMul (inner_MI, down_ID)
            weight_M = GatherND (weight_Tk, chosen_M2)
            weight_M1 = Unsqueeze (weight_M, axis_1)
            weighted_MD = Mul (out_MD, weight_M1)
            next_TD = ScatterND <reduction = "add"> (sum_TD, token_M1, weighted_MD)
        }
    >
    x_shape = Shape (x)
    out = Reshape (out_TD, x_shape)
}
"""


def plain(x: Tensor, router_weight: Tensor, gate_up: Tensor, down: Tensor, top_k: int) -> Tensor:
    """Compute the op in torch, one expert in use after the other."""
    weight_Tk, expert_Tk = choose(F.linear(x.flatten(0, 1), router_weight), top_k)
    return mix(x, weight_Tk, expert_Tk, gate_up, down)


def choose(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the weights [T, k] of the experts that the router's logits choose, and the experts [T, k]."""
    largest_Tk, expert_Tk = torch.topk(logits_TE.softmax(-1, dtype=torch.float32), top_k, dim=-1)
    return (largest_Tk / largest_Tk.sum(-1, keepdim=True)).to(logits_TE.dtype), expert_Tk


def mix(x: Tensor, weight_Tk: Tensor, expert_Tk: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Send each token through its experts and add up what they give, by their weights; float32 sums."""
    x_TD = x.flatten(0, 1)
    out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for expert in expert_Tk.unique().tolist():
        token_M, place_M = (expert_Tk == expert).nonzero(as_tuple=True)
        gate_MI, up_MI = F.linear(x_TD[token_M], gate_up[expert]).chunk(2, -1)
        out_MD = F.linear(F.silu(gate_MI) * up_MI, down[expert])
        out_TD = out_TD.index_add(0, token_M, (out_MD * weight_Tk[token_M, place_M, None]).float())
    return out_TD.to(x.dtype).view_as(x)


OP = torch.library.custom_op("qwen3vl::mixture_of_experts", plain, mutates_args=())


@OP.register_fake
def _(x: Tensor, *_: Tensor | int) -> Tensor:
    return torch.empty_like(x)


def translation(*arguments: Any) -> Any:
    """Write the ONNX node."""
    inputs = ("x", "router_weight", "gate_up", "down")
    return node_of(NAME, inputs, ("out",), ("top_k",), integers=("top_k",))(*arguments)


def reference(
    x: np.ndarray[Any, Any],
    router_weight: np.ndarray[Any, Any],
    gate_up: np.ndarray[Any, Any],
    down: np.ndarray[Any, Any],
    *,
    top_k: int,
) -> np.ndarray[Any, Any]:
    """Compute the op in float64, one token and expert at a time."""
    x_TD = x.reshape(-1, x.shape[-1]).astype(np.float64)
    out_TD = np.zeros_like(x_TD)
    for t, token in enumerate(x_TD):
        chosen, weights = route(router_weight.astype(np.float64) @ token, top_k)
        for expert, weight in zip(chosen, weights, strict=True):
            gate, up = np.split(gate_up[expert].astype(np.float64) @ token, 2)
            out_TD[t] += weight * (down[expert].astype(np.float64) @ (gate / (1 + np.exp(-gate)) * up))
    return out_TD.reshape(x.shape)


def route(logits: np.ndarray[Any, Any], top_k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the experts [..., k] that logits [..., E] choose, largest first, lower index first, and their weights."""
    chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    largest = np.take_along_axis(exponentials, chosen, -1)
    return chosen, largest / largest.sum(-1, keepdims=True)

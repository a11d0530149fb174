"""Swap the forwards of a few transformers modules by emitters of single ONNX ops while a trace runs.

transformers applies norms and rotary embedding before it asks its attention registry, so the registry cannot give one
op for one attention: a text layer traced through it has 159 nodes, with these swaps 22.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def emitting() -> Iterator[None]:
    """Trace with the emitters in place; the classes of transformers are as before afterwards."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl as dense
    from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as moe

    swaps: list[tuple[type, Any]] = [(moe.Qwen3VLMoeTextSparseMoeBlock, _experts)]
    # transformers writes every class once more for the models with experts.
    for modeling, prefix in ((dense, "Qwen3VL"), (moe, "Qwen3VLMoe")):
        for name, forward in _FORWARDS.items():
            swaps.append((getattr(modeling, prefix + name), forward))
    with contextlib.ExitStack() as stack:
        for module, forward in swaps:
            stack.enter_context(mock.patch.object(module, "forward", forward))
        yield


class CacheSlot:
    """Stand in for transformers' cache in one layer's trace: hand the past in, take the present out."""

    def __init__(self, past_key: torch.Tensor, past_value: torch.Tensor, past_lengths: torch.Tensor) -> None:
        self.past = (past_key, past_value, past_lengths)
        self.present: tuple[torch.Tensor, ...] = ()


def _rms_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    import torch

    (out,) = torch.onnx.ops.symbolic_multi_out(
        "RMSNormalization",
        [hidden_states, self.weight],
        {"epsilon": self.variance_epsilon, "axis": -1},
        dtypes=[hidden_states.dtype],
        shapes=[list(hidden_states.shape)],
    )
    return out


def _text_attention(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    past_key_values: CacheSlot,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    from qwen3vl_export.ops import causal_attention

    out, *present = causal_attention.emit(
        self.q_proj(hidden_states),
        self.k_proj(hidden_states),
        self.v_proj(hidden_states),
        self.q_norm.weight,
        self.k_norm.weight,
        *position_embeddings,
        *past_key_values.past,
        scale=self.scaling,
        epsilon=self.q_norm.variance_epsilon,
    )
    past_key_values.present = tuple(present)
    return self.o_proj(out), None


def _text_rotary(
    self: Any, position_ids: torch.Tensor, inv_freq: torch.Tensor, axis_of_frequency: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cos and sin [B, S, H/2] of positions [3, B, S]: each frequency turns with its own axis."""
    position_of_frequency = position_ids.index_select(0, axis_of_frequency).permute(1, 2, 0)
    angles = position_of_frequency.float() * inv_freq
    return angles.cos(), angles.sin()


def _vision_attention(
    self: Any, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
) -> torch.Tensor:
    from qwen3vl_export.ops import vision_attention

    qkv = self.qkv(hidden_states)
    # Slices, not chunk: chunk emits SplitToSequence (torch 2.13).
    q, k, v = (qkv[..., i * self.dim : (i + 1) * self.dim] for i in range(3))
    return self.proj(vision_attention.emit(q, k, v, *position_embeddings, num_heads=self.num_heads, scale=self.scaling))


def _patch_embed(self: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """The convolution's kernel covers the whole patch, so it is a product; its weight comes in as [D, C·Tp·p·p]."""
    import torch

    return torch.nn.functional.linear(pixel_values, self.proj.weight, self.proj.bias)


def _experts(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    from qwen3vl_export.ops import mixture_of_experts

    experts = self.experts
    return mixture_of_experts.emit(
        hidden_states, self.gate.weight, experts.gate_up_proj, experts.down_proj, top_k=self.gate.top_k
    )


_FORWARDS = {
    "TextRMSNorm": _rms_norm,
    "TextAttention": _text_attention,
    "TextRotaryEmbedding": _text_rotary,
    "VisionAttention": _vision_attention,
    "VisionPatchEmbed": _patch_embed,
}

"""Run the demo's model for training: batched images of one grid, several questions behind one image.

The weights are those of transformers' modules; only the order of work differs. transformers attends image by image and
question by question. Here the images of a batch share a grid, so vision attention is one batched call, and the
questions about an image share its prefix: a question's tokens see the prefix and their own question, and their
positions go on from the image's. `tests/test_demo_training.py` compares the result with transformers' own forward.

Shapes: B images, P patches, V = P/4 visual tokens, S tokens, D hidden, N heads, H head dim, L DeepStack levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration


def patchify(images_BHWC: np.ndarray) -> torch.Tensor:
    """Cut uint8 images into normalised patches [B, P, 768] in merge order (768 = C·p·p, one of two equal frames)."""
    b, h, w, _ = images_BHWC.shape
    x = torch.from_numpy(np.array(images_BHWC)).reshape(b, h // 32, 2, 16, w // 32, 2, 16, 3)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(b, h // 16 * (w // 16), 768)
    return x.float().mul_(2 / 255).sub_(1)


def expand_patches(patches_BPE: torch.Tensor) -> torch.Tensor:
    """Repeat the frame: [B, P, 768] to transformers' `pixel_values` [B·P, 1536]."""
    x = patches_BPE.reshape(-1, 3, 1, 256).expand(-1, 3, 2, 256)
    return x.reshape(-1, 1536)


@dataclass(frozen=True)
class Plan:
    """What all images of a batch share: the grid, the prompt's positions and its mask.

    Attributes:
        rows: Visual tokens per column.
        cols: Visual tokens per row.
        positions_3S: mRoPE positions (t, h, w) of every token.
        mask_SS: True where a token (row) sees another (column).
        visual: First and one-past-last index of the visual tokens.
    """

    rows: int
    cols: int
    positions_3S: torch.Tensor
    mask_SS: torch.Tensor
    visual: tuple[int, int]


def make_plan(rows: int, cols: int, num_before: int, segment_lengths: list[int], *, chained: bool = False) -> Plan:
    """Lay out `num_before` text tokens, the image, and the segments.

    Args:
        rows: Visual tokens per column.
        cols: Visual tokens per row.
        num_before: Text tokens before the first visual token.
        segment_lengths: Tokens of each segment; the first is the rest of the shared prefix.
        chained: True lets a segment see the ones before it (a conversation); otherwise only the prefix.
    """
    v = rows * cols
    start = num_before + max(rows, cols)
    before = torch.arange(num_before).expand(3, -1)
    grid_h = torch.arange(rows).repeat_interleave(cols) + num_before
    grid_w = torch.arange(cols).repeat(rows) + num_before
    image = torch.stack([torch.full((v,), num_before), grid_h, grid_w])
    prefix = num_before + v + segment_lengths[0]
    parts = [before, image]
    at = start
    for i, length in enumerate(segment_lengths):
        parts.append((torch.arange(length) + at).expand(3, -1))
        if i == 0 or chained:
            at += length
    positions = torch.cat(parts, 1)
    s = positions.shape[1]
    mask = torch.ones(s, s, dtype=torch.bool).tril()
    if not chained:
        owner = torch.cat(
            [torch.zeros(prefix, dtype=torch.long)]
            + [torch.full((n,), i + 1) for i, n in enumerate(segment_lengths[1:])]
        )
        mask &= (owner[:, None] == owner[None]) | (owner[None] == 0)
    return Plan(rows, cols, positions, mask, (num_before, num_before + v))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def vision_tables(visual: Any, rows: int, cols: int) -> tuple[torch.Tensor, ...]:
    """Return indices [P, 4] and weights [P, 4] of the position grid, and cos, sin [P, H] of the rotary embedding."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

    grid = torch.tensor([[1, 2 * rows, 2 * cols]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid,
        num_grid_per_side=visual.num_grid_per_side,
        mode="bilinear",
        align_corners=True,
        spatial_merge_size=2,
        kwargs={},
    )
    cos, sin = visual.rotary_pos_emb(weights, get_vision_position_ids(grid, 2, kwargs={}))
    return indices, weights, cos, sin


def vision_forward(visual: Any, patches_BPE: torch.Tensor, rows: int, cols: int) -> list[torch.Tensor]:
    """Return the merged tokens [B, V, D] and the DeepStack features of each level, in this order."""
    b, p, _ = patches_BPE.shape
    indices, weights, cos, sin = vision_tables(visual, rows, cols)
    proj = visual.patch_embed.proj
    # Both frames of an image are equal: their kernels add up, which halves the input.
    kernel = proj.weight.sum(2).reshape(proj.weight.shape[0], -1)
    x = F.linear(patches_BPE, kernel, proj.bias)
    x = x + (visual.pos_embed(indices) * weights[..., None]).sum(1)
    levels = []
    for i, block in enumerate(visual.blocks):
        attention = block.attn
        heads = attention.num_heads
        q, k, v = attention.qkv(block.norm1(x)).view(b, p, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        x = x + attention.proj(out.transpose(1, 2).reshape(b, p, -1))
        x = x + block.mlp(block.norm2(x))
        if i in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(i)]
            levels.append(merger(x.reshape(b * p, -1)).view(b, p // 4, -1))
    merged = visual.merger(x.reshape(b * p, -1)).view(b, p // 4, -1)
    return [merged, *levels]


def _norm(x: torch.Tensor, module: Any) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


def text_forward(
    model: Qwen3VLForConditionalGeneration, ids_BS: torch.Tensor, levels: list[torch.Tensor], plan: Plan
) -> torch.Tensor:
    """Return the last hidden states [B, S, D], normalised (multiply by the embedding for logits)."""
    text = model.model.language_model
    b, s = ids_BS.shape
    first, last = plan.visual
    x = text.embed_tokens(ids_BS)
    x = torch.cat([x[:, :first], levels[0], x[:, last:]], 1)
    cos, sin = text.rotary_emb(x, plan.positions_3S[:, None])
    mask = plan.mask_SS
    for i, layer in enumerate(text.layers):
        a = layer.self_attn
        h = _norm(x, layer.input_layernorm)
        q = _norm(a.q_proj(h).view(b, s, -1, a.head_dim), a.q_norm).transpose(1, 2)
        k = _norm(a.k_proj(h).view(b, s, -1, a.head_dim), a.k_norm).transpose(1, 2)
        v = a.v_proj(h).view(b, s, -1, a.head_dim).transpose(1, 2)
        groups = a.num_key_value_groups
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(
            q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), attn_mask=mask
        )
        x = x + a.o_proj(out.transpose(1, 2).reshape(b, s, -1))
        x = x + layer.mlp(_norm(x, layer.post_attention_layernorm))
        if i + 1 < len(levels):
            x = torch.cat([x[:, :first], x[:, first:last] + levels[i + 1], x[:, last:]], 1)
    return _norm(x, text.norm)

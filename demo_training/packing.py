"""Pack several questions after one image into a single sequence, so that a training step reads the image once.

A question's tokens see the prefix and their own question, and their positions go on from the image's, as if each
question stood in a prompt of its own. `tests/demo_training/test_demo_training.py` compares the logits with those that
transformers gives to such prompts.

Shapes: S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """What all sequences of a batch share.

    Attributes:
        positions_3S: mRoPE positions (t, h, w) of every token.
        visual_rows_S: Which of the image's visual tokens stands at a position, -1 for text.
        mask_SS: True where a token (row) sees another (column).
    """

    positions_3S: torch.Tensor
    visual_rows_S: torch.Tensor
    mask_SS: torch.Tensor


def pack(rows: int, cols: int, num_before: int, segment_lengths: list[int], *, chained: bool = False) -> Packing:
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
    visual_rows = torch.full((s,), -1)
    visual_rows[num_before : num_before + v] = torch.arange(v)
    mask = torch.ones(s, s, dtype=torch.bool).tril()
    if not chained:
        owner = torch.cat(
            [torch.zeros(prefix, dtype=torch.long)]
            + [torch.full((n,), i + 1) for i, n in enumerate(segment_lengths[1:])]
        )
        mask &= (owner[:, None] == owner[None]) | (owner[None] == 0)
    return Packing(positions, visual_rows, mask)

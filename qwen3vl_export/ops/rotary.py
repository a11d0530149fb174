"""The rotation that both attention ops share, in torch and for their references in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head [..., S, N, H] against each other by cos and sin [..., S, H/2], in their type."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotate(x: np.ndarray[Any, Any], cos: np.ndarray[Any, Any], sin: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rotate the halves of each head against each other, in float64.

    Args:
        x: [..., S, N, H].
        cos: [..., S, H/2].
        sin: [..., S, H/2].

    Source: `rotate_half` and `apply_rotary_pos_emb` of transformers (the not interleaved form).
    """
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    cos, sin = cos[..., None, :].astype(np.float64), sin[..., None, :].astype(np.float64)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

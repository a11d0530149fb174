"""Turn keys that carry their rotary embedding to other positions, so that they need not be computed again.

Shapes: R rows, H head dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.contract import FloatArray


def moved_keys(keys_RH: NDArray[Any], num_positions: int, theta: float) -> FloatArray:
    """Return keys as they would be so many positions later, float32 of the same shape.

    Rotations add up: R(p) R(s) = R(p + s) (Su et al. 2021, arXiv:2104.09864, section 3.2). Where all three axes of
    mRoPE move alike, so does each frequency, whatever axis turns it.

    Args:
        keys_RH: Rotated keys of any leading shape, halves side by side as `rotate_half` of transformers has them.
        num_positions: How far all of them move; negative for earlier positions.
        theta: Base of the frequencies (`TextConfig.rope_theta`).
    """
    head_dim = keys_RH.shape[-1]
    # The frequencies as the graphs have them, in float32; the angle in float64: of 10^5 positions, float32 has 1e-2.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    angles = num_positions * (1.0 / np.float32(theta) ** exponents).astype(np.float64)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = np.split(keys_RH.astype(np.float32), 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

"""`RMSNormalization`, ONNX's own: x / sqrt(mean(x²) + epsilon) · weight over the last axis.

The quotient is float32 whatever the type of x, and rounded to it before the weight multiplies.
Source: Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4; `Qwen3VLTextRMSNorm.forward` of transformers 5.23.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engines.onnx_text import OPSET_VERSION


def plain(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Normalise x [..., D] by weight [D]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


OP = torch.library.custom_op("qwen3vl::rms_norm", plain, mutates_args=())


@OP.register_fake
def _(x: Tensor, *_: Tensor | float) -> Tensor:
    return torch.empty_like(x)


def apply(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Normalise x [..., D] by weight [D], as one node where a trace runs."""
    return OP(x, weight, epsilon) if torch.compiler.is_exporting() else plain(x, weight, epsilon)


def translation(x: Any, weight: Any, epsilon: float) -> Any:
    """Write the ONNX node."""
    import onnxscript

    return onnxscript.values.Opset("", OPSET_VERSION).RMSNormalization(x, weight, axis=-1, epsilon=epsilon)

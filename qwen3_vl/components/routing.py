"""The mixture of experts, in torch; needs the extra [export].

`mixture_of_experts` is the operator, with its plain form, numpy reference and ONNX body.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from qwen3vl_export.modeling import MixtureOfExperts, Router
    from qwen3vl_export.ops import mixture_of_experts

__all__ = ["MixtureOfExperts", "Router", "mixture_of_experts"]

_SOURCES = {
    "qwen3vl_export.modeling": ["MixtureOfExperts", "Router"],
    "qwen3vl_export.ops": ["mixture_of_experts"],
}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)

"""Parse functions that are written in ONNX's own text syntax."""

from __future__ import annotations

import onnx_ir as ir

from runtime import native

DOMAIN = "qwen3vl"
DOMAIN_VERSION = 1
OPSET_VERSION = 24
MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
CPU_KERNELS = native.DOMAIN
"""Domain of the operators of our own kernels for CPUs."""
CPU_KERNELS_VERSION = 1


def parse_function(text: str) -> ir.Function:
    """Parse one function.

    Raises:
        onnx.parser.ParseError: The text is not valid; a bug of ours.
    """
    import onnx.parser

    return ir.serde.deserialize_function(onnx.parser.parse_function(text))

"""Read an RMSNorm out of a lowered decoder."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from engines.decode_plan.decoder import Norm
from engines.decode_plan.match import attributes, check_stored, inputs, made_by, result, stored
from engines.kernels.launch import Unserved

_NORMS: Final = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization")


def read_norm(value: ir.Value | None, width: int, half: ir.DataType, what: str) -> tuple[Norm, ir.Value | None]:
    """Return the RMSNorm that makes a value, and what it normalises: its input, or the sum that it makes too.

    Args:
        value: The norm's result.
        width: Elements that are normalised together.
        half: Type of the gain.
        what: What the value is, for messages.

    Raises:
        Unserved: It is no RMSNorm, or one with a bias, another axis or another gain.
    """
    node = made_by(value, *_NORMS, what=what)
    epsilon = float(attributes(node, free=("epsilon",))["epsilon"])
    source: ir.Value | None
    if node.op_type == "SkipSimplifiedLayerNormalization":
        gain, source = inputs(node, range(3))[2], result(node, 3)
    else:
        source, gain = inputs(node, range(2))
    if not 0 <= epsilon < 1:
        raise Unserved(f"{what}: an epsilon of {epsilon}")
    gain = stored(gain, what)
    check_stored(gain, (width,), half)
    return Norm(str(gain.name), epsilon), source

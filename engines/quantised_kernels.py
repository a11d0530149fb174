"""Name the kernels of quantised numbers that a graph uses, for the runtime to prove before it opens an engine."""

from __future__ import annotations

import onnx_ir as ir

from engines.onnx_text import CPU_KERNELS, MICROSOFT

# Operators, and the attributes that hold the bits of their codes.
BITS = {
    "DynamicQuantizeMatMul": (),
    "MatMulIntegerToFloat": (),
    "MatMulNBits": ("bits",),
    "GatherBlockQuantized": ("bits",),
    "QMoE": ("expert_weight_bits", "fc2_expert_weight_bits"),
}


def kernels_of(model: ir.Model) -> set[str]:
    """Return the names that `runtime.kernels` has tests for: operator and, where it has several, bits of its codes.

    Our own operators have their bits in their names.
    """
    names = set()
    for node in model.graph:
        if node.domain == CPU_KERNELS:
            names.add(node.op_type)
        if node.domain != MICROSOFT or node.op_type not in BITS:
            continue
        attributes = [node.attributes[name].as_int() for name in BITS[node.op_type] if name in node.attributes]
        names |= {f"{node.op_type}.{bits}" for bits in attributes} or {node.op_type}
    return names

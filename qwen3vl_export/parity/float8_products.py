"""Products with float8 weights, for which ONNX Runtime has a kernel on CUDA alone, in operators that the CPU runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_PRODUCT, _MICROSOFT = "MatMulBlockQuantizedFp8Weight", "com.microsoft"


def expand_float8_products(graph: onnx.GraphProto) -> None:
    """Replace each MatMulBlockQuantizedFp8Weight by DequantizeLinear, Cast and FusedMatMul, in place.

    For many rows the kernel does the same: it expands the weights [N, K] by float32 scales [N, ceil(K / block)] and
    rounds them to the type of x (`LaunchDequantizeBlockScaledFp8` in ONNX Runtime's source). For few rows it expands
    them in registers; how it rounds there cannot be seen on a CPU.
    """
    from onnx import helper

    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if (node.domain, node.op_type) != (_MICROSOFT, _PRODUCT):
            nodes.append(node)
            continue
        x, codes, scales, activation_scale, bias = (*node.input, "", "")[:5]
        assert not activation_scale, f"{node.name}: float8 activations"
        (block,) = (each.i for each in node.attribute if each.name == "block_size")
        (out,), name = node.output, node.name
        expanded, weight, product = f"{name}/expanded", f"{name}/weight", f"{name}/product" if bias else out
        nodes += [
            helper.make_node(
                "DequantizeLinear", [codes, scales], [expanded], f"{name}/expand", axis=1, block_size=block
            ),
            helper.make_node("Cast", [expanded], [weight], f"{name}/cast", to=types[x]),
            helper.make_node("FusedMatMul", [x, weight], [product], name, domain=_MICROSOFT, transB=1),
        ]
        if bias:
            nodes.append(helper.make_node("Add", [product, bias], [out], f"{name}/bias"))
    del graph.node[:]
    graph.node.extend(nodes)

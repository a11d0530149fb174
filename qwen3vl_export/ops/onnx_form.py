"""Say how torch.onnx writes a custom operator: one ONNX node, its inputs and attributes by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engines.onnx_text import DOMAIN, DOMAIN_VERSION


def node_of(
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    attributes: Sequence[str] = (),
    integers: Sequence[str] = (),
) -> Callable[..., Any]:
    """Return the function that a translation table of torch.onnx takes for an operator of domain `qwen3vl`.

    Args:
        name: Name of the ONNX operator.
        inputs: Names of the tensors, in the order of the torch operator.
        outputs: Names of the results.
        attributes: Names of the scalars after the tensors, in order; all are floats except those in `integers`.
        integers: Attributes that are int64, and tensors of int64.
    """
    import onnxscript
    from onnx.defs import OpSchema

    def parameter(tensor: str) -> OpSchema.FormalParameter:
        return OpSchema.FormalParameter(tensor, "tensor(int64)" if tensor in integers else "T")

    float_types = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    kinds = {name: OpSchema.AttrType.INT if name in integers else OpSchema.AttrType.FLOAT for name in attributes}
    schema = OpSchema(
        name,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[parameter(tensor) for tensor in inputs],
        outputs=[parameter(tensor) for tensor in outputs],
        type_constraints=[("T", float_types, "")],
        attributes=[OpSchema.Attribute(attribute, kind, "") for attribute, kind in kinds.items()],
    )
    operator = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION), name, schema)

    def translation(*arguments: Any) -> Any:
        tensors, scalars = arguments[: len(inputs)], arguments[len(inputs) :]
        return operator(*tensors, **dict(zip(attributes, scalars, strict=True)))

    return translation

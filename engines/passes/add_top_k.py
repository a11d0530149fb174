"""Let the device pick the candidates of the next token."""

from __future__ import annotations

import onnx_ir as ir

from engines.initializers import add_integers

LOGITS = "logits"


class AddTopKPass(ir.passes.InPlacePass):
    """Add outputs `top_logits` [B, L, k] and `top_ids` [B, L, k] int64 after `logits`, by falling logit.

    Of equal logits the lower id comes first, as ONNX's TopK demands. A graph without `logits` stays as it is.

    Args:
        num_candidates: k, or the size of the vocabulary if that is less.
    """

    def __init__(self, num_candidates: int) -> None:
        super().__init__()
        self._num_candidates = num_candidates

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the outputs."""
        graph = model.graph
        logits = next((value for value in graph.outputs if value.name == LOGITS), None)
        if logits is None:
            return ir.passes.PassResult(model, False)
        assert logits.shape is not None
        k = min(self._num_candidates, int(logits.shape[-1]))  # type: ignore[arg-type]
        count = add_integers(model, "top_k", [k])
        node = ir.node("TopK", [logits, count], attributes={"axis": -1}, num_outputs=2, name="top_k")
        graph.append(node)
        for value, name, dtype in zip(
            node.outputs, ("top_logits", "top_ids"), (ir.DataType.FLOAT, ir.DataType.INT64), strict=True
        ):
            value.name, value.shape, value.type = name, ir.Shape([*list(logits.shape)[:-1], k]), ir.TensorType(dtype)
        index = graph.outputs.index(logits)
        graph.outputs[index + 1 : index + 1] = list(node.outputs)
        return ir.passes.PassResult(model, True)

"""Let the decoder give the queries of the newest tokens, of which rows of the KV cache are judged.

Letters: B batch, W tokens of the window, L layers, N query heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from engines.initializers import add_initializer, add_integers
from engines.onnx_text import CPU_KERNELS, MICROSOFT
from runtime.contract import WINDOW_QUERIES
from runtime.model_config import ModelConfig

_OWN, _GROUP_QUERY = "DecodeAttention", "GroupQueryAttention"
_PAST_KEY = {_OWN: 5, _GROUP_QUERY: 3}
SCORES_WINDOW = 32
"""Tokens of the window: what the authors of SnapKV take (arXiv:2404.14469)."""
_LAST = np.iinfo(np.int64).max


class AddWindowQueriesPass(ir.passes.InPlacePass):
    """Add an output `window_queries` [B, W, L, N, H]: queries of the last tokens of a call, as attention takes them.

    After norm and rotary embedding, float32; of a call with fewer tokens, W is their number. GroupQueryAttention takes
    its queries so; our own attention norms and rotates them itself, so that this is done once more, for the window of
    all layers at once: a node a layer and a dozen beside them.

    Args:
        config: Shape of the model.
        window: Most tokens.
    """

    def __init__(self, config: ModelConfig, window: int) -> None:
        super().__init__()
        self._text, self._window = config.text, window

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the output; a graph without attention to a cache stays as it is."""
        nodes = sorted(filter(_is_attention, model.graph), key=_layer_of)
        if not nodes:
            return ir.passes.PassResult(model, False)
        assert len(nodes) == self._text.num_layers, "not all layers attend to a cache"
        build = _Builder(model)
        is_own = nodes[0].op_type == _OWN
        width = self._text.num_heads * self._text.head_dim
        # Of our own attention, the first input holds keys and values too.
        parts = [build.slice(_input(node, 0), 1, -self._window, width if is_own else None) for node in nodes]
        joined = build.op("Concat", parts, axis=2)
        shape = build.integers("window_queries.shape", [0, 0, len(nodes), self._text.num_heads, self._text.head_dim])
        queries = build.op("Reshape", [joined, shape])
        if is_own:
            queries = self._rotated(build, self._normed(build, queries, nodes), nodes[0])
        queries.name = WINDOW_QUERIES
        queries.type = ir.TensorType(ir.DataType.FLOAT)
        queries.shape = ir.Shape(["B", "W", len(nodes), self._text.num_heads, self._text.head_dim])
        model.graph.outputs.append(queries)
        return ir.passes.PassResult(model, True)

    def _normed(self, build: _Builder, queries: ir.Value, nodes: Sequence[ir.Node]) -> ir.Value:
        """Return RMSNorm of each head, by the weights of its layer."""
        squares = build.op("Mul", [queries, queries])
        mean = build.op("ReduceMean", [squares, build.integers("window_queries.last_axis", [-1])], keepdims=1)
        epsilon = build.floats("window_queries.epsilon", [nodes[0].attributes.get_float("epsilon")])
        norm = build.op("Sqrt", [build.op("Add", [mean, epsilon])])
        # Joined in the graph, once: weights are read when the engine is opened.
        weights = build.op("Concat", [_input(node, 1) for node in nodes], axis=0)
        shape = build.integers("window_queries.norm_shape", [len(nodes), 1, self._text.head_dim])
        return build.op("Mul", [build.op("Div", [queries, norm]), build.op("Reshape", [weights, shape])])

    def _rotated(self, build: _Builder, queries: ir.Value, node: ir.Node) -> ir.Value:
        """Return the rotary embedding of the two halves of each head; all layers have the tables of one."""
        axes = build.integers("window_queries.table_axes", [2, 3])
        cos, sin = (
            build.op("Unsqueeze", [build.slice(_input(node, place), 1, -self._window, None), axes]) for place in (3, 4)
        )
        first, second = build.split(queries)
        rotated = [
            build.op("Sub", [build.op("Mul", [first, cos]), build.op("Mul", [second, sin])]),
            build.op("Add", [build.op("Mul", [second, cos]), build.op("Mul", [first, sin])]),
        ]
        return build.op("Concat", rotated, axis=-1)


class _Builder:
    """Appends nodes to a graph."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model

    def op(self, op_type: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes)
        self._model.graph.append(node)
        return node.outputs[0]

    def split(self, value: ir.Value) -> Sequence[ir.Value]:
        """Return the two halves of the last axis."""
        node = ir.node("Split", [value], attributes={"axis": -1, "num_outputs": 2}, num_outputs=2)
        self._model.graph.append(node)
        return node.outputs

    def slice(self, value: ir.Value, axis: int, start: int, width: int | None) -> ir.Value:
        """Return the rest of an axis from `start` on, and the first `width` of the next one; None for all of it."""
        starts, ends = ([start], [_LAST]) if width is None else ([start, 0], [_LAST, width])
        names = ("starts", "ends", "axes")
        parts = (starts, ends, [axis, axis + 1][: len(starts)])
        kind = "rows" if width is None else "queries"
        bounds = [self.integers(f"window_queries.{kind}.{n}", part) for n, part in zip(names, parts, strict=True)]
        return self.op("Slice", [value, *bounds])

    def integers(self, name: str, values: list[int]) -> ir.Value:
        return add_integers(self._model, name, values)

    def floats(self, name: str, values: list[float]) -> ir.Value:
        return add_initializer(self._model, ir.Tensor(np.asarray(values, np.float32), name=name))


def _is_attention(node: ir.Node) -> bool:
    return (node.domain, node.op_type) in ((CPU_KERNELS, _OWN), (MICROSOFT, _GROUP_QUERY))


def _layer_of(node: ir.Node) -> int:
    return int(str(_input(node, _PAST_KEY[node.op_type]).name).split(".")[1])


def _input(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    assert value is not None
    return value

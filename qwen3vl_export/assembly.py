"""Stitch the traced pieces into the two graphs of a bundle, one function call for each layer of the model.

Shapes: B batch, S new tokens, T cache capacity, L logits positions, V visual rows, I segments, P patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from engines.onnx_text import DOMAIN, DOMAIN_VERSION, OPSET_VERSION, parse_function
from qwen3vl_export.checkpoint import EMBEDDING_KEY, HEAD_KEY, Checkpoint
from qwen3vl_export.ops import registry
from qwen3vl_export.tracing.pieces import Piece, Pieces
from runtime.contract import (
    DECODER_DTYPES,
    DECODER_OUTPUTS,
    TOKEN_SCORES,
    VISION_DTYPES,
    VISION_OUTPUTS,
    Dims,
    DType,
    cache_dims,
    decoder_dims,
    past_names,
    present_names,
    vision_dims,
)

_VISUAL = "model.visual"
_LANGUAGE = "model.language_model"
_IR_VERSION = 11


class GraphBuilder:
    """Build one graph of function calls whose weights are named by their checkpoint keys."""

    def __init__(self, name: str, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": OPSET_VERSION, DOMAIN: DOMAIN_VERSION})
        self._functions: dict[str, ir.Function] = {}

    def inputs(self, dims: Mapping[str, Dims], dtypes: Mapping[str, DType]) -> list[ir.Value]:
        """Add graph inputs in order, and return them."""
        types = {name: ir.TensorType(ir.DataType.from_numpy(np.dtype(dtypes[name]))) for name in dims}
        values = [ir.Value(name=name, shape=ir.Shape(each), type=types[name]) for name, each in dims.items()]
        self._graph.inputs.extend(values)
        return values

    def output(self, value: ir.Value, name: str, dims: Dims) -> None:
        """Make a value of float32 a graph output under a new name."""
        value.name, value.shape, value.type = name, ir.Shape(dims), ir.TensorType(ir.DataType.FLOAT)
        self._graph.outputs.append(value)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Add an initializer that no checkpoint holds."""
        return self._initializer(ir.Tensor(array, name=name))

    def call(
        self,
        piece: Piece,
        inputs: Sequence[ir.Value],
        scope: str,
        *,
        keys: Mapping[str, str] | None = None,
    ) -> Sequence[ir.Value]:
        """Call a piece with its parameters taken from the checkpoint.

        Args:
            piece: The function.
            inputs: Activations that it takes.
            scope: Name of the node, and prefix of the checkpoint keys.
            keys: Whole checkpoint keys of parameters that do not follow the prefix.
        """
        parameters = []
        for name, shape in piece.parameters.items():
            key = (keys or {}).get(name, f"{scope}.{name}")
            value = self._graph.initializers.get(key)
            if value is None:
                view = piece.views.get(name)
                whole = self._checkpoint.weights[key]
                value = self._initializer(whole if view is None else self._checkpoint.tensor(key, shape, view=view))
            parameters.append(value)
        function = piece.function
        self._functions[function.name] = function
        node = ir.node(
            function.name,
            [*inputs, *parameters],
            domain=DOMAIN,
            name=scope,
            num_outputs=len(function.outputs),
        )
        for value, output in zip(node.outputs, function.outputs, strict=True):
            value.name = f"{scope}/{output.name}"
        self._graph.append(node)
        return node.outputs

    def concat(self, values: Sequence[ir.Value], name: str) -> ir.Value:
        """Concatenate along axis 0."""
        node = ir.node("Concat", values, attributes={"axis": 0}, name=name)
        self._graph.append(node)
        return node.outputs[0]

    def model(self) -> ir.Model:
        """Return the finished model with the functions it calls and the bodies of their custom ops."""
        functions = list(self._functions.values())
        called = {node.op_type for function in functions for node in function}
        functions += [parse_function(body) for name, body in registry.bodies().items() if name in called]
        return ir.Model(self._graph, ir_version=_IR_VERSION, producer_name="qwen3vl-export", functions=functions)

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value


def build_vision(pieces: Pieces, checkpoint: Checkpoint) -> ir.Model:
    """Build `vision.onnx`.

    Raises:
        CheckpointError: A weight is missing or of another shape.
    """
    config = checkpoint.config
    vision = config.vision
    builder = GraphBuilder("vision", checkpoint)
    pixels, indices, weights, cos, sin = builder.inputs(vision_dims(config), VISION_DTYPES)
    (hidden,) = builder.call(pieces.patch_embed, [pixels, indices, weights], _VISUAL)
    deepstack = []
    for i in range(vision.depth):
        is_scored = pieces.scored_block is not None and i == vision.depth - 1
        block = pieces.scored_block if is_scored else pieces.vision_block
        assert block is not None
        hidden, *scores = builder.call(block, [hidden, cos, sin], f"{_VISUAL}.blocks.{i}")
        if i in vision.deepstack_layers:
            assert pieces.deepstack_merger is not None
            # The config lists the blocks in the order of the mergers; levels are in the order of the blocks.
            scope = f"{_VISUAL}.deepstack_merger_list.{vision.deepstack_layers.index(i)}"
            deepstack += builder.call(pieces.deepstack_merger, [hidden], scope)
    (merged,) = builder.call(pieces.merger, [hidden], f"{_VISUAL}.merger")
    embeds = builder.concat([merged, *deepstack], "levels")
    builder.output(embeds, VISION_OUTPUTS[0], (config.num_visual_levels, "V", config.text.hidden_size))
    for each in scores:
        builder.output(each, TOKEN_SCORES, ("V",))
    return builder.model()


def build_decoder(pieces: Pieces, checkpoint: Checkpoint) -> ir.Model:
    """Build `decoder.onnx`.

    Raises:
        CheckpointError: A weight is missing or of another shape.
    """
    config = checkpoint.config
    text = config.text
    builder = GraphBuilder("decoder", checkpoint)
    ids, positions, rows, embeds, past_lengths, logits_positions = builder.inputs(decoder_dims(config), DECODER_DTYPES)
    past_dims = dict.fromkeys(past_names(text.num_layers), cache_dims(config))
    past = builder.inputs(past_dims, dict.fromkeys(past_dims, np.float32))
    inv_freq = builder.constant("inv_freq", pieces.inv_freq.astype(np.float32))
    axes = builder.constant("axis_of_frequency", pieces.axis_of_frequency.astype(np.int64))
    cos, sin = builder.call(pieces.rotary, [positions, inv_freq, axes], "rotary")
    (hidden,) = builder.call(pieces.embed, [ids, rows, embeds], f"{_LANGUAGE}.embed_tokens")
    present = []
    for i in range(text.num_layers):
        scope = f"{_LANGUAGE}.layers.{i}"
        layer = pieces.dense_layer if text.experts_of(i) is None else pieces.sparse_layer
        assert layer is not None
        of_layer = past[2 * i : 2 * i + 2]
        hidden, *new = builder.call(layer, [hidden, cos, sin, *of_layer, past_lengths], scope)
        present += new
        if i < len(config.vision.deepstack_layers):
            level = builder.constant(f"deepstack_level.{i + 1}", np.array([i + 1]))
            (hidden,) = builder.call(pieces.add_deepstack, [hidden, rows, embeds, level], f"deepstack.{i}")
    (logits,) = builder.call(
        pieces.head,
        [hidden, logits_positions],
        "head",
        keys={
            "norm.weight": f"{_LANGUAGE}.norm.weight",
            "lm_head.weight": EMBEDDING_KEY if text.tie_word_embeddings else HEAD_KEY,
        },
    )
    builder.output(logits, DECODER_OUTPUTS[0], ("B", "L", text.vocab_size))
    for name, value in zip(present_names(text.num_layers), present, strict=True):
        builder.output(value, name, cache_dims(config))
    return builder.model()

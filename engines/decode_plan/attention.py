"""Read the attention of a lowered decoder: its norms, its scale, and what all layers share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from engines.decode_plan.decoder import Norm
from engines.decode_plan.match import (
    attributes,
    before_cast,
    check_input,
    check_numbers,
    check_same,
    check_stored,
    inputs,
    made_by,
    numbers,
    result,
    stored,
    taken,
)
from engines.decode_plan.norm import read_norm
from engines.kernels.launch import Unserved
from runtime.model_config import TextConfig


@dataclass(frozen=True)
class Attention:
    """Norms of each query and key head before the rotary embedding, and the scale of scores."""

    q_norm: Norm
    k_norm: Norm
    scale: float


class AttentionReader:
    """Reads the attention of one layer after the other, which share the rotary embedding and the lengths.

    Values: B sequences, S new tokens, T rows of a cache, D head dim.

    Args:
        text: Shape of the decoder.
        half: Type of activations and KV cache.
        outputs: Of the graph, by name.

    Attributes:
        frequencies: Values of the initializers that the rotary embedding takes, once a layer was read.
    """

    def __init__(self, text: TextConfig, half: ir.DataType, outputs: Mapping[str, ir.Value]) -> None:
        self.frequencies: dict[str, np.ndarray] = {}
        self._text, self._half, self._outputs = text, half, outputs
        self._rotary: tuple[ir.Value, ir.Value] | None = None
        self._lengths: ir.Value | None = None

    def read(self, value: ir.Value | None, index: int) -> tuple[Attention, ir.Value]:
        """Return a layer's attention, and the product of queries, keys and values.

        Args:
            value: Its result, before the product of the heads.
            index: Of the layer.

        Raises:
            Unserved: It is not plain attention over the whole cache, with norms and a rotary embedding of whole heads.
        """
        text = self._text
        node = made_by(value, "GroupQueryAttention", what=f"the heads of layer {index}")
        heads = {"num_heads": text.num_heads, "kv_num_heads": text.num_kv_heads}
        scale = float(attributes(node, free=("scale",), **heads)["scale"])
        if not 0 < scale < math.inf:
            raise Unserved(f"layer {index}: scores are scaled by {scale}")
        queries, keys, values, *cache, lengths, capacity = inputs(node, range(7))
        for kind, past, present in zip(("key", "value"), cache, (result(node, 1), result(node, 2)), strict=True):
            name = f"past_key_values.{index}.{kind}"
            check_input(past, name, f"the cache of layer {index}")
            check_same(self._outputs[name.replace("past", "present")], present, "the cache that is returned")
            self._check_cache(past)
        q_norm, q_part = self._turned(queries, text.num_heads, "queries")
        k_norm, k_part = self._turned(keys, text.num_kv_heads, "keys")
        self._check_lengths(lengths)
        self._check_capacity(capacity, cache[0])
        split = made_by(values, "Split", what="the values", output=2)
        check_same(q_part, result(split, 0), "the queries")
        check_same(k_part, result(split, 1), "the keys")
        product, sizes = taken(split, 2, axis=-1)
        widths = [count * text.head_dim for count in (text.num_heads, text.num_kv_heads, text.num_kv_heads)]
        check_numbers(sizes, widths, "the sizes of queries, keys and values")
        return Attention(q_norm, k_norm, scale), product

    def _check_cache(self, value: ir.Value | None) -> None:
        dims = () if value is None or value.shape is None else value.shape.dims
        expected = (self._text.num_kv_heads, self._text.head_dim)
        if value is None or value.dtype != self._half or len(dims) != 4 or (dims[1], dims[3]) != expected:
            found = "none" if value is None else f"{value.dtype} {value.shape}"
            raise Unserved(f"a KV cache of {found}, expected {self._half} [B, {expected[0]}, T, {expected[1]}]")

    def _turned(self, value: ir.Value | None, num_heads: int, what: str) -> tuple[Norm, ir.Value]:
        """Return the norm of heads before the rotary embedding, and the heads joined."""
        rotary = made_by(before_cast(value, what), "RotaryEmbedding", what=what)
        joined, cos, sin = taken(rotary, 3, num_heads=num_heads)
        self._check_rotary(cos, sin)
        normed, shape = taken(made_by(before_cast(joined, what), "Reshape", what=what), 2)
        check_numbers(shape, [0, 0, -1], f"the shape of joined {what}")
        norm, heads = read_norm(normed, self._text.head_dim, self._half, what)
        part, shape = taken(made_by(heads, "Reshape", what=f"heads of {what}"), 2)
        check_numbers(shape, [0, 0, -1, self._text.head_dim], f"the shape of heads of {what}")
        return norm, part

    def _check_rotary(self, cos: ir.Value, sin: ir.Value) -> None:
        """Raise unless cosines and sines are those of position · frequency, and the same in all layers."""
        if self._rotary is not None:
            check_same(cos, self._rotary[0], "the cosines of the rotary embedding")
            check_same(sin, self._rotary[1], "the sines of the rotary embedding")
            return
        (angles,) = taken(made_by(before_cast(cos, "cosines"), "Cos", what="the cosines"), 1)
        (same,) = taken(made_by(before_cast(sin, "sines"), "Sin", what="the sines"), 1)
        check_same(same, angles, "what the sines are of")
        positions, frequencies = taken(made_by(angles, "Mul", what="the angles"), 2)
        cast = made_by(positions, "Cast", what="the positions")
        attributes(cast, to=ir.DataType.FLOAT)
        (turned,) = inputs(cast, range(1))
        (gathered,) = taken(made_by(turned, "Transpose", what="the positions"), 1, perm=[1, 2, 0])
        given, index = taken(made_by(gathered, "Gather", what="the positions"), 2)
        check_input(given, "position_ids", "the positions")
        axes, shape = taken(made_by(index, "Reshape", what="the axes of the frequencies"), 2)
        check_numbers(shape, [-1], "the shape of the axes")
        half = self._text.head_dim // 2
        check_stored(stored(frequencies, "the frequencies"), (half,), ir.DataType.FLOAT)
        check_stored(stored(axes, "the axes of the frequencies"), (half,), ir.DataType.INT64)
        if not set(numbers(axes, "the axes of the frequencies")) <= {0, 1, 2}:
            raise Unserved(f"{axes.name}: axes beyond the three of a position")
        self.frequencies = {"inv_freq": _values(frequencies), "axis_of_frequency": _values(axes)}
        self._rotary = cos, sin

    def _check_lengths(self, value: ir.Value | None) -> None:
        """Raise unless a value is the number of cached and new tokens less one, and the same in all layers."""
        if self._lengths is not None:
            check_same(value, self._lengths, "the lengths")
            return
        what = "the lengths"
        cast = made_by(value, "Cast", what=what)
        attributes(cast, to=ir.DataType.INT32)
        total, one = taken(made_by(inputs(cast, range(1))[0], "Sub", what=what), 2)
        check_numbers(one, [1], "what is taken from the lengths")
        past, new = taken(made_by(total, "Add", what=what), 2)
        check_input(past, "past_lengths", what)
        ones, axis = taken(made_by(new, "ReduceSum", what="the number of new tokens"), 2, keepdims=0)
        check_numbers(axis, [1], "the axis of the new tokens")
        one, shape = taken(made_by(ones, "Expand", what="the number of new tokens"), 2)
        check_numbers(one, [1], "a new token")
        (table,) = taken(made_by(shape, "Shape", what="the shape of the new tokens"), 1, end=2)
        cos = None if self._rotary is None else before_cast(self._rotary[0], "cosines")
        check_same(table, cos, "what has a row for each new token")
        self._lengths = value

    def _check_capacity(self, value: ir.Value | None, past: ir.Value | None) -> None:
        """Raise unless a value is the number of rows of a cache."""
        cast = made_by(value, "Cast", what="the cache's rows")
        attributes(cast, to=ir.DataType.INT32)
        shape = made_by(inputs(cast, range(1))[0], "Shape", what="the cache's rows")
        (measured,) = taken(shape, 1, start=2, end=3)
        check_same(measured, past, "what the cache's rows are of")


def _values(value: ir.Value) -> np.ndarray:
    tensor = value.const_value
    if tensor is None:
        raise Unserved(f"{value.name} has no values")
    return tensor.numpy()

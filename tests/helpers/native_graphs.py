"""Graphs of one operator of `qwen3vl.cpu`, all of whose inputs are given with each call.

Numpy's memory is handed to the kernels as it is, so a test chooses addresses, and what lies beside an array.

Shapes: M rows of x, N rows (outputs) and K columns of a weight, J blocks of a row, G columns of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engines.quantize.blockwise import QuantizedBlocks
from engines.quantize.packed import pack_tiles
from helpers.cpu_ops import weight_of_tiles
from runtime import native

Array = NDArray[Any]
BLOCKS = (32, 64, 128, 256)
CACHE_DTYPES = {"": np.float32, "Float16": np.float16, "Int8": np.int8, "Int4": np.uint8}
"""By the ending of DecodeAttention's name, the dtype of the cache's elements."""

_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int64): TensorProto.INT64,
}
PRODUCT_INPUTS = ("x", "weight", "bias", "norm", "residual")
ATTENTION_INPUTS = (
    *("qkv", "q_norm", "k_norm", "cos", "sin", "past_key", "past_value", "past_lengths"),
    *("key_scales", "value_scales"),
)


def run_op(
    op_type: str,
    inputs: Mapping[str, Array],
    names: Sequence[str],
    num_outputs: int = 1,
    threads: int = 1,
    constants: Mapping[str, Array] | None = None,
    **attributes: Any,
) -> list[Array]:
    """Run an operator.

    Args:
        op_type: Its name.
        inputs: By their names; those of `names` that are not there are left out of the node.
        names: Of all inputs, in the operator's order.
        num_outputs: Outputs; the first is float32, the others are of the dtype of the input past_key.
        threads: Of the session.
        constants: Inputs that are part of the graph.
        attributes: Of the node.
    """
    session = session_of(op_type, inputs, names, num_outputs, threads, constants, **attributes)
    return session.run(None, dict(inputs))  # type: ignore[no-any-return]


def session_of(
    op_type: str,
    inputs: Mapping[str, Array],
    names: Sequence[str],
    num_outputs: int = 1,
    threads: int = 1,
    constants: Mapping[str, Array] | None = None,
    **attributes: Any,
) -> ort.InferenceSession:
    """Open a graph of an operator for inputs like these, or return the one that was opened for such."""
    types = tuple((name, _TYPES[inputs[name].dtype], inputs[name].ndim) for name in names if name in inputs)
    held = tuple(numpy_helper.from_array(a, name).SerializeToString() for name, a in (constants or {}).items())
    return _session(op_type, types, tuple(names), held, num_outputs, threads, tuple(sorted(attributes.items())))


@functools.lru_cache(maxsize=64)
def _session(
    op_type: str,
    types: tuple[tuple[str, int, int], ...],
    names: tuple[str, ...],
    held: tuple[bytes, ...],
    num_outputs: int,
    threads: int,
    attributes: tuple[tuple[str, Any], ...],
) -> ort.InferenceSession:
    constants = [TensorProto.FromString(each) for each in held]
    given = {name: type_ for name, type_, _ in types}
    has = {*given, *(constant.name for constant in constants)}
    node_inputs = [name if name in has else "" for name in names]
    while not node_inputs[-1]:
        node_inputs.pop()
    outputs = [f"out{i}" for i in range(num_outputs)]
    output_types = [TensorProto.FLOAT, *[given.get("past_key", TensorProto.FLOAT)] * (num_outputs - 1)]
    node = helper.make_node(op_type, node_inputs, outputs, domain=native.DOMAIN, **dict(attributes))
    graph = helper.make_graph(
        [node],
        op_type,
        [helper.make_tensor_value_info(name, type_, [None] * rank) for name, type_, rank in types],
        [helper.make_tensor_value_info(name, type_, None) for name, type_ in zip(outputs, output_types, strict=True)],
        constants,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(native.DOMAIN, 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # each output has memory of its own, which sanitizers watch
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # there may be fewer cores than threads
    native.register(options)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Weight:
    """A weight in tiles, and what it stands for.

    Args:
        codes: [N, K], 0 … 2^bits - 1.
        scales, zeros: [N, J].
        block: G.
        bits: 4 or 8.

    Attributes:
        tiles: uint8 [ceil(N / 16), bytes of a tile].
        values: float64 [N, K].
    """

    def __init__(self, codes: Array, scales: Array, zeros: Array, block: int, bits: int) -> None:
        self.num_rows, self.num_columns = codes.shape
        self.block, self.bits = block, bits
        # Missing columns of the last block have the code of the zero point.
        padded = np.repeat(zeros, block, axis=1).astype(np.uint8)
        padded[:, : self.num_columns] = codes
        parts = padded.reshape(-1, block), scales.reshape(-1).astype(np.float32), zeros.reshape(-1).astype(np.uint8)
        self.tiles = pack_tiles(QuantizedBlocks(*parts), bits, scales.shape[1])
        self.values = weight_of_tiles(self.tiles, self.num_rows, self.num_columns, bits, block)

    @property
    def sizes(self) -> dict[str, int]:
        """Attributes of the node."""
        return {"K": self.num_columns, "N": self.num_rows, "block_size": self.block}

    def multiply(self, x: Array, threads: int = 1, *, gated: int = 0, **others: Array | float) -> Array:
        """Return what MatMulInt4 or MatMulInt8 gives; `others` are inputs by their names, and epsilon."""
        inputs = {"x": x, "weight": self.tiles, **{k: v for k, v in others.items() if isinstance(v, np.ndarray)}}
        attributes = {**self.sizes, **({"epsilon": others["epsilon"]} if "epsilon" in others else {}), "gated": gated}
        return run_op(f"MatMulInt{self.bits}", inputs, PRODUCT_INPUTS, threads=threads, **attributes)[0]

    def look_up(self, indices: Array, threads: int = 1) -> Array:
        """Return rows."""
        inputs = {"indices": indices, "weight": self.tiles}
        return run_op(f"LookUpInt{self.bits}", inputs, ("indices", "weight"), threads=threads, **self.sizes)[0]

    def rounding(self, x: Array) -> Array:
        """Return how far off a right product [M, N] of activations that are whole numbers times a factor may be.

        Sums of a block are whole numbers below 2^24, which float32 holds. Each block's sum is multiplied by the scale
        of x, rounded, then by that of the weight and added, rounded once; at the end come the unit, bias and residual.
        """
        terms, partial = np.zeros((len(x), self.num_rows)), np.zeros((len(x), self.num_rows))
        for start in range(0, self.num_columns, self.block):
            part = slice(start, start + self.block)
            term = x[:, part].astype(np.float64) @ self.values[:, part].T
            partial += term
            terms += np.abs(term) + np.abs(partial)
        return 2.0**-23 * terms + 1e-44


def random_weight(num_rows: int, num_columns: int, block: int, bits: int, seed: int = 0) -> Weight:
    """Return a weight of any codes and zero points, with scales from 0.01 to 0.02."""
    random = np.random.default_rng(seed)
    shape = (num_rows, -(-num_columns // block))
    codes, zeros = random.integers(0, 1 << bits, (num_rows, num_columns)), random.integers(0, 1 << bits, shape)
    return Weight(codes, 0.01 * (1 + random.random(shape)), zeros, block, bits)


def whole_rows(num_rows: int, num_columns: int, block: int, seed: int = 0) -> Array:
    """Return activations [M, K] that 8 bits hold: whole numbers, 127 or -127 once a block, times a power of 2 a row."""
    random = np.random.default_rng(seed)
    x = random.integers(-127, 128, (num_rows, num_columns)).astype(np.float32)
    for start in range(0, num_columns, block):
        width = min(block, num_columns - start)
        places = start + random.integers(0, width, num_rows)
        x[np.arange(num_rows), places] = random.choice([-127, 127], num_rows)
    return x * np.float32(2) ** random.integers(-12, 12, (num_rows, 1)).astype(np.float32)


def same_bits(a: Array, b: Array) -> bool:
    """Return whether two arrays are the same bits; any NaN is as good as another."""
    is_nan = np.isnan(a) & np.isnan(b)
    return a.shape == b.shape and bool(
        np.array_equal(np.where(is_nan, 0, a).view(np.uint8), np.where(is_nan, 0, b).view(np.uint8))
    )

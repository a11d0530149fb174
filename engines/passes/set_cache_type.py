"""Let our own attention keep the KV cache in another type than float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.initializers import add_initializer
from engines.onnx_text import CPU_KERNELS
from engines.passes.cache_values import set_cache_types
from runtime.cache_types import CODE_BITS

_ATTENTION = "DecodeAttention"
# Suffix of the operator's name and type of the cache, by bits of an element.
_KINDS = {
    16: ("Float16", ir.DataType.FLOAT16),
    8: ("Int8", ir.DataType.INT8),
    4: ("Int4", ir.DataType.UINT8),  # two channels a byte
}
# Places among the operator's inputs.
_PAST_KEY, _KEY_SCALES, _NUM_INPUTS = 5, 8, 10


class SetCacheTypePass(ir.passes.InPlacePass):
    """Exchange every DecodeAttention for the one of a cache in 16, 8 or 4 bits, and give the cache its type.

    Args:
        bits_L: Of an element of each layer's cache.
        scales_L2KH: The step between two codes of each channel, keys before values; of layers in 16 bits, which are
            float16, it is not read. None if all layers are.
    """

    def __init__(self, bits_L: Sequence[int], scales_L2KH: NDArray[np.float32] | None = None) -> None:
        super().__init__()
        assert (scales_L2KH is None) == (set(bits_L) == {16}), "codes have scales, float16 has none"
        self._bits_L, self._scales_L2KH = bits_L, scales_L2KH

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Exchange them; a graph without a cache stays as it is."""
        nodes = [node for node in model.graph if (node.domain, node.op_type) == (CPU_KERNELS, _ATTENTION)]
        layers = {f"past_key_values.{i}.key": i for i in range(len(nodes))}
        for node in nodes:
            past_key = node.inputs[_PAST_KEY]
            assert past_key is not None
            layer = layers.pop(str(past_key.name))
            suffix, _ = _KINDS[self._bits_L[layer]]
            node.op_type = f"{_ATTENTION}{suffix}"
            if self._bits_L[layer] in CODE_BITS:
                assert self._scales_L2KH is not None
                _add_scales(model, node, layer, self._scales_L2KH[layer])
        if nodes:
            set_cache_types(model.graph, [_KINDS[bits][1] for bits in self._bits_L], self._bits_L)
        return ir.passes.PassResult(model, bool(nodes))


def _add_scales(model: ir.Model, node: ir.Node, layer: int, scales_2KH: NDArray[np.float32]) -> None:
    node.resize_inputs(_NUM_INPUTS)
    for i, kind in enumerate(("key", "value")):
        scales = np.ascontiguousarray(scales_2KH[i], np.float32)
        tensor = ir.Tensor(scales, name=f"cache_scales.{layer}.{kind}")
        node.replace_input_with(_KEY_SCALES + i, add_initializer(model, tensor))

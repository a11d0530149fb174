"""Store the KV cache in 8 or 4 bits, by static scales; each layer in its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.initializers import add_initializer
from engines.onnx_text import MICROSOFT
from engines.passes.cache_values import set_cache_types

_DTYPES = {8: ir.DataType.INT8, 4: ir.DataType.UINT8}
# Places among GroupQueryAttention's inputs.
_PAST_KEY, _KEY_SCALE, _NUM_INPUTS = 3, 12, 14


class QuantizeCachePass(ir.passes.InPlacePass):
    """Let every GroupQueryAttention write codes into the cache and read its keys and values, the new ones too, from it.

    A scale a channel: keys have channels far larger than the rest, and with one scale for the tensor the others would
    share few codes. The kernel takes the same kind of scale for keys and values only.

    Args:
        bits_L: Bits of each layer's codes.
        scales_L2KH: The step between two codes of each channel, keys before values.
    """

    def __init__(self, bits_L: Sequence[int], scales_L2KH: NDArray[np.float32]) -> None:
        super().__init__()
        self._bits_L = bits_L
        self._scales_L2KH = scales_L2KH

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Give the attention of each layer its scales, and the cache its dtype."""
        graph = model.graph
        layers = {f"past_key_values.{i}.key": i for i in range(len(self._scales_L2KH))}
        for node in graph:
            if (node.domain, node.op_type) != (MICROSOFT, "GroupQueryAttention"):
                continue
            past_key = node.inputs[_PAST_KEY]
            assert past_key is not None
            layer = layers.pop(str(past_key.name))
            node.resize_inputs(_NUM_INPUTS)
            for i, kind in enumerate(("key", "value")):
                # The kernel counts K·H scales, head by head; the shape is the one in which they broadcast.
                scales = self._scales_L2KH[layer, i][None, :, None]
                tensor = ir.Tensor(np.ascontiguousarray(scales, np.float32), name=f"cache_scales.{layer}.{kind}")
                node.replace_input_with(_KEY_SCALE + i, add_initializer(model, tensor))
                node.attributes[f"{kind[0]}_quant_type"] = ir.AttrString(f"{kind[0]}_quant_type", "PER_CHANNEL")
            node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", self._bits_L[layer])
        assert not layers, f"no GroupQueryAttention reads {', '.join(layers)}"
        set_cache_types(graph, [_DTYPES[bits] for bits in self._bits_L], self._bits_L)
        return ir.passes.PassResult(model, modified=True)

"""Store the KV cache in 8 or 4 bits, by static scales."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.initializers import add_initializer
from engines.onnx_text import MICROSOFT

_DTYPES = {8: ir.DataType.INT8, 4: ir.DataType.UINT8}
# Places among GroupQueryAttention's inputs.
_PAST_KEY, _KEY_SCALE, _NUM_INPUTS = 3, 12, 14


class QuantizeCachePass(ir.passes.InPlacePass):
    """Let every GroupQueryAttention write codes into the cache and read its keys and values, the new ones too, from it.

    A scale a channel: keys have channels far larger than the rest, and with one scale for the tensor the others would
    share few codes. The kernel takes the same kind of scale for keys and values only.
    """

    def __init__(self, bits: int, scales_L2KH: NDArray[np.float32]) -> None:
        super().__init__()
        self._bits = bits
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
            node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", self._bits)
        assert not layers, f"no GroupQueryAttention reads {', '.join(layers)}"
        for value in (*graph.inputs, *graph.outputs):
            if str(value.name).startswith(("past_key_values.", "present_key_values.")):
                assert value.shape is not None and isinstance(value.shape[-1], int)
                *others, head_dim = value.shape
                value.dtype = _DTYPES[self._bits]
                value.shape = ir.Shape([*others, head_dim * self._bits // 8])
        return ir.passes.PassResult(model, modified=True)

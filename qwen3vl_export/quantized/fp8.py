"""FP8 checkpoints in blocks of 128×128, as Qwen publishes them.

Layout (transformers, integrations/finegrained_fp8.py, `FP8Linear`): `weight` float8_e4m3fn [N, K] and
`weight_scale_inv` [ceil(N / 128), ceil(K / 128)]; a weight is its FP8 value times its block's scale. Engines of other
frameworks also round activations to FP8; only weights are imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.weights import StreamedTensor
from qwen3vl_export.quantized.parts import CHUNK_WEIGHTS, Module, QuantizedEntry, unsupported
from qwen3vl_export.safetensors_reader import read_rows

METHOD = "fp8"
_BLOCK = 128


class Fp8Format:
    """What config.json says of an FP8 checkpoint.

    Raises:
        CheckpointError: The format is not read.
    """

    parts: tuple[str, ...] = ("weight_scale_inv",)

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        for field, default, expected in (
            ("weight_block_size", None, [_BLOCK, _BLOCK]),
            ("fmt", "e4m3", "e4m3"),
            ("scale_fmt", "float", "float"),
            ("activation_scheme", "dynamic", "dynamic"),
        ):
            found = default if config.get(field) is None else config[field]
            if found != expected:
                raise unsupported(where, field, found, f"{expected}")

    def entry(self, module: Module) -> QuantizedEntry:
        """Check the parts of one weight.

        Raises:
            CheckpointError: One is missing or does not fit.
        """
        shape = module.find("weight", ("F8_E4M3",)).shape
        module.find("weight_scale_inv", shape=[-(-n // _BLOCK) for n in shape])
        return QuantizedEntry(module.path, shape, lambda key: _Fp8Weight(key, module))


class _Fp8Weight(StreamedTensor):
    def __init__(self, key: str, module: Module) -> None:
        super().__init__(key, module.parts["weight"].shape, ir.DataType.FLOAT)
        self._module = module

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield the products, rows of whole blocks at a time."""
        entry, values = self._module.parts["weight"], e4m3_values()
        num_rows, num_columns = entry.shape
        scales_IJ = self._module.scales(self._module.parts["weight_scale_inv"])
        num_block_rows = max(1, CHUNK_WEIGHTS // (num_columns * _BLOCK))
        for first in range(0, len(scales_IJ), num_block_rows):
            rows = range(first * _BLOCK, min((first + num_block_rows) * _BLOCK, num_rows))
            weights_RK = values[read_rows(entry, rows.start, len(rows))]
            for i, scales_J in enumerate(scales_IJ[first : first + num_block_rows]):
                weights_RK[i * _BLOCK : (i + 1) * _BLOCK] *= scales_J.repeat(_BLOCK)[:num_columns]
            yield weights_RK.reshape(-1)


def e4m3_values() -> NDArray[np.float32]:
    """Return the value of every byte as float8_e4m3fn: no infinities, and NaN only where all seven bits are set.

    Micikevicius et al., FP8 Formats for Deep Learning (https://arxiv.org/abs/2209.05433), section 3.
    """
    byte = np.arange(256)
    sign = np.where(byte & 0x80, -1.0, 1.0)
    exponent, fraction = (byte >> 3) & 15, (byte & 7) / 8
    magnitude = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    magnitude[(byte & 0x7F) == 0x7F] = np.nan
    return np.asarray(sign * magnitude, np.float32)

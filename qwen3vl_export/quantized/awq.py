"""AWQ checkpoints in AutoAWQ's GEMM layout, 4 bits.

Layout (AutoAWQ 0.2.9, awq/modules/linear/gemm.py, `WQLinear_GEMM.from_linear`): `qweight` int32 [K, N / 8] and `qzeros`
int32 [J, N / 8] hold eight outputs in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits; `scales` is
[J, N]. A weight is (code - zero point) · scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.quantize.blockwise import Codes, FloatArray
from qwen3vl_export.quantized.parts import GroupedWeight, Module, QuantizedEntry, column_slices, unsupported
from qwen3vl_export.safetensors_reader import read_rows

METHOD = "awq"
_OUTPUT_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = 4


class AwqFormat:
    """What config.json says of an AWQ checkpoint.

    Raises:
        CheckpointError: The format is not read.
    """

    parts: tuple[str, ...] = ("qweight", "qzeros", "scales")

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        version = config.get("version") or config.get("format") or "gemm"
        if str(version).lower() != "gemm":
            raise unsupported(where, "version", version, '"gemm", the one layout of AWQ that is read')
        bits = config.get("bits", config.get("w_bit", _BITS))
        if bits != _BITS:
            raise unsupported(where, "bits", bits, "4")
        self._group = config.get("group_size", config.get("q_group_size", 128))
        if type(self._group) is not int or not (self._group > 0 or self._group == -1):
            raise unsupported(where, "group_size", self._group, "a number of columns, or -1 for all")

    def entry(self, module: Module) -> QuantizedEntry:
        """Check the parts of one weight.

        Raises:
            CheckpointError: One is missing or does not fit.
        """
        num_columns, num_words = module.find("qweight", ("I32",)).shape
        group = num_columns if self._group == -1 else self._group
        module.check_groups(num_columns, group)
        module.find("qzeros", ("I32",), (num_columns // group, num_words))
        module.find("scales", shape=(num_columns // group, 8 * num_words))
        return _AwqWeight(module, (8 * num_words, num_columns), _BITS, group).entry()


class _AwqWeight(GroupedWeight):
    def chunks(self) -> Iterator[Codes]:
        for words_KW in column_slices(self.module.parts["qweight"], 8 * self.shape[1]):
            yield _unpack(words_KW)

    def read_scales(self) -> FloatArray:
        return np.ascontiguousarray(self.module.scales(self.module.parts["scales"]).T)

    def read_zero_points(self) -> Codes:
        return _unpack(read_rows(self.module.parts["qzeros"]))


def _unpack(words_KW: NDArray[np.int32]) -> Codes:
    """Return codes [8 · W, K]."""
    words_WK = np.ascontiguousarray(words_KW.T).view(np.uint32)
    codes = np.empty((len(words_WK), 8, words_WK.shape[1]), np.uint8)
    for nibble, output in enumerate(_OUTPUT_OF_NIBBLE):
        codes[:, output] = (words_WK >> np.uint32(4 * nibble)) & np.uint32(15)
    return codes.reshape(-1, words_WK.shape[1])

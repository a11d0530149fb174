"""GPTQ checkpoints, v1 and v2, 4 or 8 bits, with columns in order or in the order of their activations.

Layout (GPTQModel 7.7, nn_modules/qlinear/__init__.py, `pack_original`): `qweight` int32 [K · bits / 32, N] holds
consecutive inputs of an output in a word, the first in the lowest bits; `qzeros` int32 [J, ceil(N · bits / 32)]
consecutive outputs; `scales` is [J, N]; `g_idx` int32 [K] names each column's group. v1 stores zero points less one.
A weight is (code - zero point) · scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from engines.quantize.blockwise import Codes, FloatArray
from qwen3vl_export.quantized.parts import (
    GroupedWeight,
    Module,
    QuantizedEntry,
    column_slices,
    matches,
    unpack_codes,
    unsupported,
)
from qwen3vl_export.safetensors_reader import read_rows

METHOD = "gptq"
# One in every code of a word.
_ONES = {4: 0x11111111, 8: 0x01010101}


class GptqFormat:
    """What config.json says of a GPTQ checkpoint.

    Raises:
        CheckpointError: The format is not read.
    """

    parts: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config, self._where = config, where
        layout = config.get("checkpoint_format") or config.get("format") or "gptq"
        if config.get("is_marlin_format"):
            layout = "marlin"
        if layout not in ("gptq", "gptq_v2"):
            raise unsupported(where, "checkpoint_format", layout, '"gptq" or "gptq_v2"')
        self._is_v1 = layout == "gptq"
        pack_dtype = config.get("pack_dtype", "int32")
        if pack_dtype != "int32":
            raise unsupported(where, "pack_dtype", pack_dtype, '"int32"')
        self._dynamic = config.get("dynamic") or {}
        if not isinstance(self._dynamic, dict):
            raise unsupported(where, "dynamic", self._dynamic, "an object of patterns")
        self._settings("")

    def entry(self, module: Module) -> QuantizedEntry:
        """Check the parts of one weight.

        Raises:
            CheckpointError: One is missing or does not fit.
        """
        bits, group, is_reordered = self._settings(module.name)
        num_words, num_rows = module.find("qweight", ("I32",)).shape
        num_columns = num_words * 32 // bits
        group = num_columns if group == -1 else group
        num_groups = -(-num_columns // group)
        module.find("qzeros", ("I32",), (num_groups, -(-num_rows * bits // 32)))
        module.find("scales", shape=(num_groups, num_rows))
        groups_K = None
        if is_reordered or "g_idx" in module.parts:
            groups_K = module.group_of_column("g_idx", num_columns, num_groups)
        return _GptqWeight(module, (num_rows, num_columns), bits, group, groups_K, is_v1=self._is_v1).entry()

    def _settings(self, name: str) -> tuple[int, int, bool]:
        """Return bits, group size and whether columns are reordered, for one module."""
        values = dict(self._config)
        # GPTQModel, `dynamic_get`: the first pattern that matches; "-:" marks modules that are not quantised.
        for pattern, overrides in self._dynamic.items():
            if isinstance(overrides, dict) and matches(pattern.removeprefix("+:"), name, self._where):
                values |= overrides
                break
        bits, group = values.get("bits"), values.get("group_size", 128)
        if type(bits) is not int or bits not in _ONES:
            raise unsupported(self._where, "bits", bits, "4 or 8")
        if type(group) is not int or not (group > 0 or group == -1):
            raise unsupported(self._where, "group_size", group, "a number of columns, or -1 for all")
        return bits, group, bool(values.get("desc_act"))


class _GptqWeight(GroupedWeight):
    def __init__(self, *arguments: Any, is_v1: bool) -> None:
        super().__init__(*arguments)
        self._is_v1 = is_v1

    def chunks(self) -> Iterator[Codes]:
        for words in column_slices(self.module.parts["qweight"], self.shape[1]):
            yield unpack_codes(words.T, self.bits)

    def read_scales(self) -> FloatArray:
        return np.ascontiguousarray(self.module.scales(self.module.parts["scales"]).T)

    def read_zero_points(self) -> Codes:
        words_JW = read_rows(self.module.parts["qzeros"]).view(np.uint32)
        if self._is_v1:
            # Added to the word as GPTQModel does: it subtracted from the word, so a zero point of 0 borrowed from the
            # next one.
            words_JW = words_JW + np.uint32(_ONES[self.bits])
        return np.ascontiguousarray(unpack_codes(words_JW.view(np.int32), self.bits)[:, : self.shape[0]].T)

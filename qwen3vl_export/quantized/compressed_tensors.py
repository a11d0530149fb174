"""compressed-tensors checkpoints in the pack-quantized format, 4 or 8 bits, symmetric or not.

Layout (compressed-tensors 0.20, compressors/pack_quantized): `weight_packed` int32 [N, ceil(K · bits / 32)] holds
consecutive inputs, the first in the lowest bits, each code plus 2^(bits - 1); `weight_scale` is [N, J];
`weight_zero_point` int32 [ceil(N · bits / 32), J] is packed along N in the same way, and absent where it is 0;
`weight_shape` is N, K. `weight_g_idx` int32 [K] names each column's group; releases before August 2026 wrote it for
actorder "group". A weight is (code - zero point) · scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from engines.quantize.blockwise import Codes, FloatArray
from qwen3vl_export.quantized.parts import (
    CHUNK_WEIGHTS,
    GroupedWeight,
    Module,
    QuantizedEntry,
    as_object,
    matches,
    unpack_codes,
    unsupported,
)
from qwen3vl_export.safetensors_reader import read_rows
from runtime.errors import CheckpointError

METHOD = "compressed-tensors"
_FORMAT = "pack-quantized"


class CompressedTensorsFormat:
    """What config.json says of a compressed-tensors checkpoint.

    Raises:
        CheckpointError: The format is not read.
    """

    parts: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._where = where
        sparsity = as_object(config.get("sparsity_config"), where, "sparsity_config").get("format", "dense")
        if sparsity != "dense":
            raise unsupported(where, "sparsity_config.format", sparsity, '"dense"')
        if config.get("kv_cache_scheme") is not None:
            raise unsupported(where, "kv_cache_scheme", config["kv_cache_scheme"], "none: the cache is the target's")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
            raise unsupported(where, "config_groups", groups, "an object of schemes")
        self._schemes: list[tuple[list[str], Mapping[str, Any]]] = []
        for name, group in groups.items():
            stored = group.get("format") or config.get("format")
            if stored != _FORMAT:
                raise unsupported(where, f"format of {name}", stored, f'"{_FORMAT}"')
            if group.get("input_activations") is not None or group.get("output_activations") is not None:
                raise unsupported(where, f"activations of {name}", "quantised", "none: only weights are imported")
            weights = as_object(group.get("weights"), where, f"weights of {name}")
            self._check_weights(weights, name)
            self._schemes.append((list(group.get("targets") or []), weights))

    def _check_weights(self, weights: Mapping[str, Any], name: str) -> None:
        if weights.get("type", "int") != "int" or weights.get("num_bits") not in (4, 8):
            found = f"{weights.get('type', 'int')} of {weights.get('num_bits')} bits"
            raise unsupported(self._where, f"weights of {name}", found, "int of 4 or 8 bits")
        group = weights.get("group_size")
        strategy = weights.get("strategy") or ("group" if group else None)
        if strategy not in ("group", "channel"):
            raise unsupported(self._where, f"strategy of {name}", strategy, '"group" or "channel"')
        if strategy == "group" and (type(group) is not int or group <= 0):
            raise unsupported(self._where, f"group_size of {name}", group, "a number of columns")

    def entry(self, module: Module) -> QuantizedEntry:
        """Check the parts of one weight.

        Raises:
            CheckpointError: One is missing or does not fit.
        """
        weights = self._scheme_of(module.name)
        bits = weights["num_bits"]
        num_rows, num_columns = (int(n) for n in read_rows(module.find("weight_shape", ("I64", "I32"), (2,))))
        module.find("weight_packed", ("I32",), (num_rows, -(-num_columns * bits // 32)))
        group = weights.get("group_size")
        if group in (None, -1):
            group = num_columns
        module.check_groups(num_columns, group)
        num_groups = num_columns // group
        module.find("weight_scale", shape=(num_rows, num_groups))
        is_symmetric = weights.get("symmetric", True)
        if not is_symmetric:
            module.find("weight_zero_point", ("I32",), (-(-num_rows * bits // 32), num_groups))
        elif "weight_zero_point" in module.parts:
            raise CheckpointError(
                f"{module.path}: {module.name} has zero points, config.json says it is symmetric",
                remedy="take weights and config.json from one checkpoint",
            )
        groups_K = None
        if weights.get("actorder") in ("group", "dynamic", True) or "weight_g_idx" in module.parts:
            groups_K = module.group_of_column("weight_g_idx", num_columns, num_groups)
        shape = (num_rows, num_columns)
        return _PackedWeight(module, shape, bits, group, groups_K, is_symmetric=is_symmetric).entry()

    def _scheme_of(self, name: str) -> Mapping[str, Any]:
        """Return the scheme of a module: by name, by pattern, else the one for its class (`match_targets`)."""
        ranks = (
            lambda target: target == name,
            lambda target: target.startswith("re:") and matches(target[3:], name, self._where),
            lambda target: target == "Linear",
        )
        for fits in ranks:
            for targets, weights in self._schemes:
                if any(map(fits, targets)):
                    return weights
        raise CheckpointError(
            f"{self._where}: no target of config_groups is {name}, whose weights are quantised",
            remedy="take weights and config.json from one checkpoint",
        )


class _PackedWeight(GroupedWeight):
    def __init__(self, *arguments: Any, is_symmetric: bool) -> None:
        super().__init__(*arguments)
        self._is_symmetric = is_symmetric

    def chunks(self) -> Iterator[Codes]:
        entry, (num_rows, num_columns) = self.module.parts["weight_packed"], self.shape
        count = max(1, CHUNK_WEIGHTS // num_columns)
        for first in range(0, num_rows, count):
            words = read_rows(entry, first, min(count, num_rows - first))
            yield unpack_codes(words, self.bits)[:, :num_columns]

    def read_scales(self) -> FloatArray:
        return self.module.scales(self.module.parts["weight_scale"])

    def read_zero_points(self) -> Codes:
        if self._is_symmetric:
            return np.full((self.shape[0], self.num_groups), 1 << (self.bits - 1), np.uint8)
        words_WJ = read_rows(self.module.parts["weight_zero_point"])
        return np.ascontiguousarray(unpack_codes(words_WJ.T, self.bits)[:, : self.shape[0]].T)

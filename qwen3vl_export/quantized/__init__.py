"""Quantised checkpoints: their parts are joined into the weights that the model names, dequantised while they are read.

config.json's `quantization_config` says which format it is; which layers are quantised is what the file holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from qwen3vl_export.quantized import awq, compressed_tensors, fp8, gptq
from qwen3vl_export.quantized.parts import UNQUANTIZED, Module, QuantizedEntry, json_like
from qwen3vl_export.safetensors_reader import TensorEntry
from runtime.errors import CheckpointError


class _Format(Protocol):
    """One format of quantised checkpoint.

    Attributes:
        parts: Last words of the keys that only a quantised weight has.
    """

    parts: tuple[str, ...]

    def entry(self, module: Module) -> QuantizedEntry: ...


_FORMATS: Mapping[str, Callable[[Mapping[str, Any], str], _Format]] = {
    awq.METHOD: awq.AwqFormat,
    gptq.METHOD: gptq.GptqFormat,
    compressed_tensors.METHOD: compressed_tensors.CompressedTensorsFormat,
    fp8.METHOD: fp8.Fp8Format,
}
_MARKS = ("qweight", "weight_packed", "weight_scale_inv")


def join_parts(
    entries: Mapping[str, TensorEntry], hf_config: Mapping[str, Any], folder: Path
) -> dict[str, TensorEntry | QuantizedEntry]:
    """Return the entries with the parts of each quantised weight replaced by one, under the weight's own key.

    Args:
        entries: Every stored tensor by key.
        hf_config: Contents of `config.json`.
        folder: Where the checkpoint lies.

    Raises:
        CheckpointError: The format is not read, or parts are missing or do not fit.
    """
    config = hf_config.get("quantization_config")
    if config is None:
        config = (hf_config.get("text_config") or {}).get("quantization_config")
    if config is None:
        stray = next((key for key in sorted(entries) if key.endswith(tuple(f".{mark}" for mark in _MARKS))), None)
        if stray is not None:
            raise CheckpointError(
                f"{folder}: {stray} is of a quantised weight, but config.json has no quantization_config",
                remedy="take config.json from the quantised checkpoint",
            )
        return dict(entries)
    opened = _open_format(config, f"{folder / 'config.json'}: quantization_config")
    modules: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in entries.items():
        name, _, part = key.rpartition(".")
        if part in opened.parts or (part == "weight" and entry.dtype == "F8_E4M3"):
            modules.setdefault(name, {})[part] = entry
    if not modules:
        raise CheckpointError(
            f"{folder}: config.json says {json_like(config.get('quant_method'))}, no weight is stored in that format",
            remedy="remove quantization_config from config.json if the weights are unquantised",
        )
    joined: dict[str, TensorEntry | QuantizedEntry] = dict(entries)
    for name, parts in modules.items():
        for part in parts:
            del joined[f"{name}.{part}"]
        plain = joined.get(f"{name}.weight")
        if plain is not None:
            raise CheckpointError(
                f"{plain.path}: {name}.weight is unquantised, beside {', '.join(sorted(parts))}",
                remedy="two checkpoints were mixed: get the quantised one again",
            )
        joined[f"{name}.weight"] = opened.entry(Module(name, parts))
    return joined


def _open_format(config: Any, where: str) -> _Format:
    if not isinstance(config, dict):
        raise CheckpointError(f"{where} is {json_like(config)}, expected an object", remedy=UNQUANTIZED)
    method = config.get("quant_method")
    made = _FORMATS.get(method) if isinstance(method, str) else None
    if made is None:
        raise CheckpointError(
            f"{where}.quant_method is {json_like(method)}, expected one of {', '.join(_FORMATS)}", remedy=UNQUANTIZED
        )
    return made(config, where)

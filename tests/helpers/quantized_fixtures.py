"""Pack weights into the forms of quantised checkpoints and read them back, one code at a time.

Written from the formats' descriptions and slow on purpose, so that it shares nothing with what it checks.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Form:
    """One form of quantised checkpoint, in small groups."""

    name: str
    bits: int = 4
    group: int = 16
    symmetric: bool = False
    act_order: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says."""
        sizes = {"bits": self.bits, "group_size": self.group}
        if self.name == "awq":
            return {"quant_method": "awq", "version": "gemm", "zero_point": True, **sizes}
        if self.name in ("gptq", "gptq_v2"):
            return {"quant_method": "gptq", "checkpoint_format": self.name, "desc_act": self.act_order, **sizes}
        if self.name == "fp8":
            return {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
                "modules_to_not_convert": ["lm_head", "model.visual"],
            }
        weights = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": "group"}
        weights |= {"group_size": self.group} | ({"actorder": "group"} if self.act_order else {})
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*visual.*"],
        }


FORMS = {
    "awq": Form("awq"),
    "gptq v1": Form("gptq"),
    "gptq v2, 8 bits": Form("gptq_v2", bits=8, symmetric=True),
    "gptq act-order": Form("gptq", act_order=True),
    "pack int4": Form("pack"),
    "pack int8 symmetric": Form("pack", bits=8, symmetric=True),
    "pack g_idx": Form("pack", act_order=True),
    "fp8": Form("fp8"),
}


def quantize(weight_NK: np.ndarray, form: Form, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the stored parts of a weight, and the float32 weight that they stand for."""
    if form.name == "fp8":
        return _quantize_fp8(weight_NK)
    num_rows, num_columns = weight_NK.shape
    num_groups = -(-num_columns // form.group)
    order = np.random.default_rng(seed).permutation(num_columns) if form.act_order else np.arange(num_columns)
    group_of = np.empty(num_columns, np.int32)
    group_of[order] = np.arange(num_columns) // form.group
    top = 2**form.bits - 1
    codes = np.zeros((num_rows, num_columns), np.int64)
    scales, zeros = np.zeros((num_rows, num_groups), np.float16), np.zeros((num_rows, num_groups), np.int64)
    for group in range(num_groups):
        part = weight_NK[:, group_of == group]
        if form.symmetric:
            scales[:, group] = 2 * np.abs(part).max(1) / top
            zeros[:, group] = (top + 1) // 2
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scales[:, group] = (high - low) / top
            # GPTQ v1 cannot store a zero point of 0 on its own; another test has that case.
            zeros[:, group] = np.clip(np.rint(-low / scales[:, group]), 1, top)
    expected = np.zeros((num_rows, num_columns), np.float32)
    for n in range(num_rows):
        for k in range(num_columns):
            scale, zero = np.float32(scales[n, group_of[k]]), zeros[n, group_of[k]]
            codes[n, k] = min(max(round(float(weight_NK[n, k] / scale)) + zero, 0), top)
            expected[n, k] = np.float32(codes[n, k] - zero) * scale
    if form.name == "pack":
        parts = {
            "weight_packed": pack_words(codes, form.bits),
            "weight_scale": scales,
            "weight_shape": np.array([num_rows, num_columns]),
        }
        parts |= {} if form.symmetric else {"weight_zero_point": pack_words(zeros.T, form.bits).T}
        return parts | ({"weight_g_idx": group_of} if form.act_order else {}), expected
    if form.name == "awq":
        parts = {"qweight": pack_words(codes.T, 4, AWQ_ORDER), "qzeros": pack_words(zeros.T, 4, AWQ_ORDER)}
    else:
        less = 1 if form.name == "gptq" else 0
        parts = {"qweight": pack_words(codes, form.bits).T, "qzeros": pack_words(zeros.T - less, form.bits)}
        parts["g_idx"] = group_of
    return parts | {"scales": scales.T}, expected


def pack_words(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Pack along the last axis; `order` says which of a word's values comes first, second, … from the lowest bits."""
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    rows, columns = values.shape
    words = np.zeros((rows, -(-columns // per_word)), np.int32)
    for row in range(rows):
        for word in range(words.shape[1]):
            number = 0
            for place, offset in enumerate(order):
                if word * per_word + offset < columns:
                    number |= int(values[row, word * per_word + offset]) << (bits * place)
            words[row, word] = number - (1 << 32 if number >= 1 << 31 else 0)
    return words


def _quantize_fp8(weight_NK: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    import torch

    num_rows, num_columns = weight_NK.shape
    scales = np.zeros((-(-num_rows // 128), -(-num_columns // 128)), np.float32)
    stored = torch.zeros(num_rows, num_columns, dtype=torch.float8_e4m3fn)
    expected = np.zeros_like(weight_NK)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            scales[i, j] = np.float16(np.abs(weight_NK[block]).max() / 448)
            stored[block] = torch.from_numpy(weight_NK[block] / scales[i, j]).to(torch.float8_e4m3fn)
            expected[block] = stored[block].float().numpy() * scales[i, j]
    return {"weight": stored, "weight_scale_inv": scales}, expected


def is_quantized(key: str) -> bool:
    """Say which weights of a tiny checkpoint are packed: the decoder's linear layers."""
    return key.startswith("model.language_model.layers.") and key.endswith("_proj.weight")


def quantize_checkpoint(source: Path, folder: Path, form: Form) -> dict[str, np.ndarray]:
    """Write a quantised copy of a checkpoint and return all its weights as float32."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    stored: dict[str, torch.Tensor] = {}
    expected: dict[str, np.ndarray] = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        if not is_quantized(key):
            stored[key], expected[key] = tensor, tensor.float().numpy()
            continue
        parts, expected[key] = quantize(tensor.float().numpy(), form)
        stored |= {f"{key.removesuffix('.weight')}.{name}": as_torch(part) for name, part in parts.items()}
    save_file(stored, folder / "model.safetensors")
    change_config(folder, form.config)
    return expected


def write_layer(folder: Path, form: Form, shape: tuple[int, int]) -> np.ndarray:
    """Write one layer, `layer`, as a checkpoint of its own and return its weight as float32."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    parts, expected = quantize(np.random.default_rng(1).normal(size=shape).astype(np.float32), form)
    save_file({f"layer.{name}": as_torch(part) for name, part in parts.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": form.config}))
    return expected


def change_config(folder: Path, quantization: dict[str, Any] | None) -> None:
    """Write `quantization_config` into config.json."""
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))


def as_torch(array: Any) -> Any:
    import torch

    return torch.from_numpy(np.array(array, order="C")) if isinstance(array, np.ndarray) else array.contiguous()

"""Store the KV cache of an engine in fewer bits: float16, or codes by the largest keys and values of prompts.

Shapes: L layers, B batch, K kv heads, T cache capacity, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.bundle import DECODER, PREFILL
from engines.quantised_kernels import kernels_of
from engines.target import Target
from runtime.errors import BundleError, UsageError
from runtime.manifest import FileRecord, Manifest

if TYPE_CHECKING:
    from engines.quantize.calibration_data import CalibrationPrompt

SCALES_NAME = "cache_scales.npy"
HALF_CACHE = "float16"
CACHE_BITS = {HALF_CACHE: 16, "int8": 8, "int4": 4}
MARGINS = {8: 1.25, 4: 1.0}
"""Range of the codes over the largest magnitude that calibration saw, by bits: what is beyond is cut off.

Demo, ranges from 16 prompts, 100 others: mean KL in 8 bits at 1, 1.25, 1.5 and 2: 1.7e-4, 3.8e-5, 3.9e-5 and 9.6e-5,
where 9e-4, 5e-5, 7e-6 and none of the values are cut off. In 4 bits a wider step costs more than what it saves: at 0.7,
0.85, 1 and 1.25: 1.5e-2, 5.6e-3, 5.5e-3 and 1.0e-2.
"""
_DTYPE_NAMES = {16: HALF_CACHE, 8: "int8", 4: "uint8"}  # two of 4 bits a byte


@dataclass(frozen=True)
class CacheQuantization:
    """How many bits an element of the KV cache takes, 16, 8 or 4, and the prompts its scales come from; none for 16."""

    bits: int
    prompts: Sequence[CalibrationPrompt]

    @property
    def work(self) -> str:
        """What is done for it, for a line on progress."""
        return f"quantising the KV cache on {len(self.prompts)} prompts" if self.prompts else "halving the KV cache"


def wanted_cache(name: str, prompts: Sequence[CalibrationPrompt], target: Target) -> CacheQuantization:
    """Return what `--kv-cache` asks for.

    Raises:
        UsageError: No such kind of cache, none of the target's, or no prompts to find its scales.
    """
    if name not in CACHE_BITS:
        kinds = ", ".join(CACHE_BITS)
        raise UsageError(
            f"--kv-cache {name}: unknown",
            remedy=f"the kinds are {kinds}; leave the option out for {target.cache_dtype}",
        )
    if target.cache_pass is None or (name == HALF_CACHE and not target.supports_half_cache):
        has_others = any(each.supports_half_cache for each in target.other_kernels)
        raise UsageError(
            f"{target.name} has no {name} KV cache" + (" with these kernels" if has_others else ""),
            remedy="leave out --kv-cache, or choose another target" + (", or --kernels own" if has_others else ""),
        )
    if name == HALF_CACHE:
        return CacheQuantization(CACHE_BITS[name], ())
    if not prompts:
        raise UsageError(
            f"--kv-cache {name} needs prompts: its scales are the ranges of keys and values for these prompts",
            remedy="add --calibration DIR",
        )
    return CacheQuantization(CACHE_BITS[name], prompts)


def quantize_cache(folder: Path, manifest: Manifest, wanted: CacheQuantization, target: Target) -> Manifest:
    """Rewrite the decoder graphs of a finished engine for another cache; weights stay as they are.

    For a cache in 8 or 4 bits, the engine is opened and runs the prompts, so its memory is needed.

    Args:
        folder: All its files but the manifest; the graphs are rewritten, and the scales are added.
        manifest: What describes it so far.
        wanted: Bits and prompts.
        target: What the engine was built for.

    Returns:
        The manifest of the rewritten engine.

    Raises:
        CapacityError: A prompt is longer than the context, or the engine does not fit into memory.
        BundleError: A key or a value is NaN or infinite.
    """
    assert target.cache_pass is not None
    scales_L2KH = None
    if wanted.prompts:
        scales_L2KH = scales_of(cache_ranges(folder, manifest, wanted.prompts), wanted.bits)
    files, kernels = dict(manifest.files), set(manifest.capabilities["kernels"])
    for path in (folder / f"{name}.onnx" for name in (DECODER, PREFILL)):
        if path.name in files:
            model = ir.load(path)
            kernels -= kernels_of(model)
            target.cache_pass(wanted.bits, scales_L2KH)(model)
            kernels |= kernels_of(model)
            ir.save(model, path)
            files[path.name] = FileRecord.of(path)
    capabilities = {**manifest.capabilities, "kernels": sorted(kernels), "cache_dtype": _DTYPE_NAMES[wanted.bits]}
    source = dict(manifest.source)
    if scales_L2KH is not None:
        np.save(folder / SCALES_NAME, scales_L2KH)
        files[SCALES_NAME] = FileRecord.of(folder / SCALES_NAME)
        capabilities |= {"cache_bits": wanted.bits, "cache_scales": SCALES_NAME}
        source["cache_calibration"] = {"prompts": len(wanted.prompts)}
    return replace(manifest, capabilities=capabilities, source=source, files=files)


def cache_ranges(folder: Path, manifest: Manifest, prompts: Sequence[CalibrationPrompt]) -> NDArray[np.float32]:
    """Return the largest magnitude of each channel of the keys and values of all prompt tokens, [L, 2, K, H].

    Keys as the cache holds them: after norm and rotary embedding.

    Args:
        folder: Files of an engine.
        manifest: What describes it; it need not be in the folder.
        prompts: What to run.

    Raises:
        CapacityError: A prompt is longer than the context, or the engine does not fit into memory.
        BundleError: A key or a value is NaN or infinite.
    """
    from runtime.engine_options import EngineOptions
    from runtime.generation import prefill
    from runtime.model import Qwen3VLModel

    model = Qwen3VLModel.from_manifest(folder, manifest, EngineOptions.checked(manifest))
    text = model.config.text
    largest_L2KH = np.zeros((text.num_layers, 2, text.num_kv_heads, text.head_dim), np.float32)
    for prompt in prompts:
        prepared = model.prepare(prompt.messages)
        inputs = prepared.decoder_inputs(model.encode_images(prepared.images))
        cache = model.session.new_cache(inputs.num_cache_rows)
        prefill(model.session, cache, inputs)
        for layer, largest_2KH in enumerate(largest_L2KH):
            for largest_KH, values_BKTH in zip(largest_2KH, cache.layer(layer), strict=True):
                np.maximum(largest_KH, np.abs(values_BKTH).max(axis=(0, 2)), out=largest_KH)
        if not np.isfinite(largest_L2KH).all():
            raise BundleError(
                f"{prompt.place}: this prompt gives keys or values that are NaN or infinite",
                remedy="check the checkpoint's weights, or leave the prompt out",
            )
    return largest_L2KH


def scales_of(ranges_L2KH: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Return the step between two codes of each channel; a channel that was always 0 takes its head's largest."""
    heads = ranges_L2KH.max(axis=-1, keepdims=True)
    filled = np.where(ranges_L2KH > 0, ranges_L2KH, np.where(heads > 0, heads, 1.0))
    largest_code = 2 ** (bits - 1) - 1
    return np.asarray(filled * (MARGINS[bits] / largest_code), np.float32)

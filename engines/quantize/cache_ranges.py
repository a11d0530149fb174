"""Store the KV cache of an engine in fewer bits: float16, codes by the ranges of prompts, or each layer in its own.

Shapes: L layers, B batch, K kv heads, T cache capacity, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.bundle import DECODER, PREFILL
from engines.quantised_kernels import kernels_of
from engines.quantize.cache_sensitivity import cache_sensitivity, choose_bits
from engines.target import Target
from runtime.cache_types import CODE_BITS, DTYPE_OF_BITS, MIXED
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
DEFAULT_RATIO = 0.4


@dataclass(frozen=True)
class CacheQuantization:
    """How many bits an element of the KV cache takes, 16, 8 or 4, and the prompts its scales come from; none for 16.

    Attributes:
        bits: Of all layers; None to choose those of each by what it costs the answers.
        prompts: For scales and costs.
        ratio: Most bytes if bits are chosen, as a share of those of a cache in float16.
    """

    bits: int | None
    prompts: Sequence[CalibrationPrompt]
    ratio: float = DEFAULT_RATIO

    @property
    def work(self) -> str:
        """What is done for it, for a line on progress."""
        if self.bits is None:
            return f"choosing the bits of each layer's KV cache on {len(self.prompts)} prompts"
        return f"quantising the KV cache on {len(self.prompts)} prompts" if self.prompts else "halving the KV cache"


def wanted_cache(
    name: str, prompts: Sequence[CalibrationPrompt], target: Target, ratio: float | None = None
) -> CacheQuantization:
    """Return what `--kv-cache` asks for.

    Args:
        name: Its kind.
        prompts: Those of `--calibration`.
        target: What is built.
        ratio: That of `--kv-cache-ratio`, or None.

    Raises:
        UsageError: No such kind of cache, none of the target's, or no prompts to find its scales.
    """
    if name not in CACHE_BITS and name != MIXED:
        kinds = ", ".join((*CACHE_BITS, MIXED))
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
    if ratio is not None and name != MIXED:
        raise UsageError(
            f"--kv-cache-ratio chooses between kinds of cache, and --kv-cache {name} is one",
            remedy=f"leave it out, or give --kv-cache {MIXED}",
        )
    if name == HALF_CACHE:
        return CacheQuantization(CACHE_BITS[name], ())
    if not prompts:
        raise UsageError(
            f"--kv-cache {name} needs prompts: its scales are the ranges of keys and values for these prompts",
            remedy="add --calibration DIR",
        )
    return CacheQuantization(CACHE_BITS.get(name), prompts, DEFAULT_RATIO if ratio is None else ratio)


def quantize_cache(folder: Path, manifest: Manifest, wanted: CacheQuantization, target: Target) -> Manifest:
    """Rewrite the decoder graphs of a finished engine for another cache; weights stay as they are.

    For a cache in 8 or 4 bits, or mixed, the engine is opened and runs the prompts, so its memory is needed.

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
    num_layers = manifest.model.text.num_layers
    bits_L: Sequence[int] = () if wanted.bits is None else (wanted.bits,) * num_layers
    scales_L2KH, measured = None, {}
    if wanted.prompts:
        ranges_L2KH = cache_ranges(folder, manifest, wanted.prompts)
        scales = {bits: scales_of(ranges_L2KH, bits) for bits in CODE_BITS}
        if wanted.bits is None:
            kinds = (16, *CODE_BITS) if target.supports_half_cache else CODE_BITS
            losses = cache_sensitivity(folder, manifest, wanted.prompts, scales, kinds)
            bits_L = choose_bits(losses, wanted.ratio)
            measured = {"kl_by_layer": [{str(bits): kl for bits, kl in each.items()} for each in losses]}
        # Of layers in float16, nothing reads the scales.
        scales_L2KH = np.stack([scales[min(bits, 8)][layer] for layer, bits in enumerate(bits_L)])
        if set(bits_L) == {16}:
            scales_L2KH = None
    files, kernels = dict(manifest.files), set(manifest.capabilities["kernels"])
    for path in (folder / f"{name}.onnx" for name in (DECODER, PREFILL)):
        if path.name in files:
            model = ir.load(path)
            kernels -= kernels_of(model)
            target.cache_pass(bits_L, scales_L2KH)(model)
            kernels |= kernels_of(model)
            ir.save(model, path)
            files[path.name] = FileRecord.of(path)
    capabilities = {**manifest.capabilities, "kernels": sorted(kernels), **_described(bits_L)}
    source = dict(manifest.source)
    if wanted.prompts:
        source["cache_calibration"] = {"prompts": len(wanted.prompts), **measured}
    if scales_L2KH is not None:
        np.save(folder / SCALES_NAME, scales_L2KH)
        files[SCALES_NAME] = FileRecord.of(folder / SCALES_NAME)
        capabilities["cache_scales"] = SCALES_NAME
    return replace(manifest, capabilities=capabilities, source=source, files=files)


def _described(bits_L: Sequence[int]) -> dict[str, Any]:
    """Return the capabilities that say how each layer is kept."""
    first = bits_L[0]
    if set(bits_L) != {first}:
        return {"cache_dtype": MIXED, "cache_layer_bits": list(bits_L)}
    return {"cache_dtype": DTYPE_OF_BITS[first], **({"cache_bits": first} if first in CODE_BITS else {})}


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

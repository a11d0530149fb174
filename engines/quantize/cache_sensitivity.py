"""How much the answers suffer when one layer's keys and values are rounded, and which bits to give each layer.

Measured in the engine itself, whose cache is float32 then: the rows of a prompt but its last tokens are rounded in one
layer, as the cache would keep them, these tokens are run again, and their logits are compared with those after the
exact rows. A prompt is run once in whole; each layer and kind of cache costs its last tokens alone.

Shapes: L layers, B batch, K kv heads, T rows, H head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.cache_types import CODE_BITS
from runtime.errors import UsageError
from runtime.manifest import Manifest

if TYPE_CHECKING:
    from engines.quantize.calibration_data import CalibrationPrompt

MAX_PROMPTS = 16
"""Of those given, so many are run: of 2B in 4 bits, each takes a minute on two cores."""
TAIL_TOKENS = 32
"""Last tokens of a prompt, whose logits are compared."""

FloatArray = NDArray[np.float32]


def rounded(values_BKTH: FloatArray, bits: int, scales_KH: FloatArray) -> FloatArray:
    """Return keys or values as a cache of so many bits keeps them.

    Args:
        values_BKTH: float32.
        bits: 16 for float16; 8 or 4 for codes, which are cut off at both ends.
        scales_KH: The step between two codes of each channel.
    """
    if bits not in CODE_BITS:
        return values_BKTH.astype(np.float16).astype(np.float32)
    steps_KTH, half = scales_KH[:, None], 2 ** (bits - 1)
    return np.asarray(np.clip(np.rint(values_BKTH / steps_KTH), -half, half - 1) * steps_KTH, np.float32)


def cache_sensitivity(
    folder: Path,
    manifest: Manifest,
    prompts: Sequence[CalibrationPrompt],
    scales: Mapping[int, FloatArray],
    kinds: Sequence[int],
) -> list[dict[int, float]]:
    """Return the mean KL divergence in nats that rounding each layer alone costs, by bits.

    Args:
        folder: Files of an engine with a cache in float32.
        manifest: What describes it; it need not be in the folder.
        prompts: What to run; at most `MAX_PROMPTS` of them, evenly spread.
        scales: Those of codes, [L, 2, K, H], by bits.
        kinds: Bits to compare.

    Raises:
        CapacityError: A prompt is longer than the context, or the engine does not fit into memory.
    """
    from runtime.engine_options import EngineOptions
    from runtime.model import Qwen3VLModel

    chosen = prompts[:: -(-len(prompts) // MAX_PROMPTS)]
    with Qwen3VLModel.from_manifest(folder, manifest, EngineOptions.checked(manifest)) as model:
        losses = [_losses_of(model, prompt, scales, kinds) for prompt in chosen]
    return [
        {bits: float(np.mean([each[layer][bits] for each in losses])) for bits in kinds}
        for layer in range(model.config.text.num_layers)
    ]


def _losses_of(
    model: Any, prompt: CalibrationPrompt, scales: Mapping[int, FloatArray], kinds: Sequence[int]
) -> list[dict[int, float]]:
    from runtime.generation import prefill

    prepared = model.prepare(prompt.messages)
    inputs = prepared.decoder_inputs(model.encode_images(prepared.images), all_logits=True)
    num_tokens = inputs.num_cache_rows
    split = max(1, num_tokens - TAIL_TOKENS)
    cache = model.session.new_cache(num_tokens)
    prefill(model.session, cache, prepared.decoder_inputs(inputs.visual_embeds))
    tail = inputs.chunk(split, num_tokens)

    def run() -> NDArray[np.float64]:
        return _log_softmax(model.session.prefill(tail, cache)[0])

    expected_TV = run()
    losses: list[dict[int, float]] = []
    for layer in range(model.config.text.num_layers):
        exact = cache.layer(layer)
        losses.append({})
        for bits in kinds:
            steps_2KH = scales[bits][layer] if bits in scales else np.ones_like(exact[0][0, :, 0])[None].repeat(2, 0)
            cache.write_layer(layer, *(rounded(part, bits, step) for part, step in zip(exact, steps_2KH, strict=True)))
            found_TV = run()
            losses[layer][bits] = float((np.exp(expected_TV) * (expected_TV - found_TV)).sum(-1).mean())
        cache.write_layer(layer, *exact)
    return losses


def _log_softmax(logits_TV: FloatArray) -> NDArray[np.float64]:
    shifted = logits_TV.astype(np.float64) - logits_TV.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def choose_bits(losses: Sequence[Mapping[int, float]], ratio: float) -> tuple[int, ...]:
    """Return the bits of each layer with the least sum of losses, if all of them together are at most so many.

    The sum takes layers as independent of each other. It is the least there is: dynamic programming over bits spent.

    Args:
        losses: Of each layer, by bits.
        ratio: Most bytes, as a share of those of a cache in float16.

    Raises:
        UsageError: No kind is that small.
    """
    most = 16 * len(losses) * ratio
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for by_bits in losses:
        grown: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (loss, chosen) in best.items():
            for bits, more in by_bits.items():
                found = loss + more, (*chosen, bits)
                grown[spent + bits] = min(grown.get(spent + bits, found), found)
        best = grown
    fitting = [found for spent, found in best.items() if spent <= most]
    if not fitting:
        least = min(best) / (16 * len(losses))
        raise UsageError(
            f"--kv-cache-ratio {ratio}: the smallest cache takes {least:g} of the bytes of float16",
            remedy=f"give at least {least:g}",
        )
    return min(fitting)[1]

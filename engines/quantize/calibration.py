"""Calibration: what prompts of the user put into the products decides how these are quantised.

Weights in blocks are rounded by it (GPTQ, below); activations in 8 bits take their scales from it
(`engines.quantize.input_ranges`).

The graphs run in float32, slice by slice (`engines.quantize.slices`), over all prompts. Before a slice hands its
results on, its weights are quantised with the Gram matrices of their inputs, and stand in the graph as codes from then
on: the passes of the target find them there and write them as they are.

Memory, beside the runtime's own: what the next slice takes for all tokens (2B: 41 kB a visual token before the first
layers, 8 kB a token later), `SLICE_BYTES` of weights and Gram matrices, or one product's if that is more, and three
times the largest Gram matrix while it is factorised. Disk: a slice's weights, or the embedding's, in float32, and a
byte for each quantised weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engines.bundle import DECODER, VISION, Bundle
from engines.disk import check_disk_space
from engines.quantize.blockwise import QuantizedBlocks
from engines.quantize.calibration_data import CalibrationPrompt
from engines.quantize.formats import BLOCKWISE, FLOAT8
from engines.quantize.gptq import FloatArray, InputMetric, factorize, quantize_rows
from engines.quantize.imported import GroupQuantizedTensor
from engines.quantize.input_ranges import ranged_weights
from engines.quantize.products import largest_slice_bytes, not_finite, products_by_input
from engines.quantize.slices import Arrays, cut
from engines.quantize.tensors import row_chunks
from engines.target import Target
from engines.weights import StreamedTensor
from runtime.contract import no_visual_embeds, past_names
from runtime.errors import Qwen3VLError, UsageError

Rounding: TypeAlias = Callable[[FloatArray, InputMetric, int], QuantizedBlocks]
"""Signature of `gptq.quantize_rows`."""

METHOD = "gptq"
RANGES_METHOD = "input ranges"
EXPERTS = "rounded without calibration"
_EMBEDS = "visual_embeds"
SLICE_BYTES = 1 << 30
MAX_PROMPT_TOKENS = 4096
MAX_TOKENS = 1 << 16
"""Most tokens of all prompts together: it bounds the memory for their activations."""
# Rows of one product of activations: less, and adding a Gram matrix of 6144 columns costs as much as computing it.
_GRAM_ROWS = 1024
# Weights that are rounded at a time.
_CHUNK_WEIGHTS = 1 << 23


@dataclass(frozen=True)
class Calibration:
    """What calibration found.

    Attributes:
        weights: Tensors in place of those that the bundle refers to, by checkpoint key.
        record: What a manifest says of it, under `source`.
    """

    weights: Mapping[str, StreamedTensor]
    record: Mapping[str, Any]

    def applied_to(self, bundle: Bundle) -> Bundle:
        """Return a bundle with these weights."""
        graphs = bundle.copies()
        for model in graphs.values():
            for key, value in model.graph.initializers.items():
                value.const_value = self.weights.get(key, value.const_value)
        return replace(bundle, graphs=graphs, source={**bundle.source, "calibration": self.record})


def calibrate(
    bundle: Bundle,
    target: Target,
    prompts: Sequence[CalibrationPrompt],
    folder: Path,
    *,
    rounding: Rounding = quantize_rows,
) -> Calibration:
    """Find what prompts change of the weights of `target`.

    Weights in blocks become codes chosen by GPTQ, but those that the checkpoint already holds as codes stay; weights of
    products whose activations are float8 get the range of these. Experts are inside one node, which shows neither the
    tokens of each nor the inputs of its second product: they are rounded as without calibration.

    Args:
        bundle: The graphs, and the weights before calibration.
        target: The target that the engine will be built for.
        prompts: At least one.
        folder: An empty folder for the codes and one slice of the graph; build the engine while it exists.
        rounding: Another one, to compare with.

    Raises:
        UsageError: No prompt, prompts that are too long, or a target that calibration does not change.
        BundleError: An activation is NaN or infinite.
    """
    rounds_blocks = target.formats.has_products_in(BLOCKWISE)
    if not rounds_blocks and not needs_prompts(target):
        raise UsageError(
            f"{target.name} stores no weights in blocks of integers and no activations in float8, so calibration would "
            "change nothing",
            remedy="choose a target that it changes (docs/quantization.md), or leave the calibration out",
        )
    if not prompts:
        raise UsageError("the calibration set is empty", remedy="give at least one prompt")
    record = record_prompts(bundle, prompts)

    def run(name: str, samples: list[Arrays]) -> Mapping[str, StreamedTensor]:
        if rounds_blocks:
            return _quantized_weights(bundle, name, target, samples, folder, rounding)
        return ranged_weights(bundle, name, target, samples, folder, SLICE_BYTES)

    of_vision = run(VISION, record.images)
    embeds = iter([sample[_EMBEDS] for sample in record.images])
    for sample, num_images in zip(record.prompts, record.num_images, strict=True):
        if num_images:
            sample[_EMBEDS] = np.concatenate([next(embeds) for _ in range(num_images)], axis=1)
    del embeds
    record.images.clear()
    of_decoder = run(DECODER, record.prompts)
    method = METHOD if rounds_blocks else RANGES_METHOD
    found = {"method": method, "prompts": len(prompts), "tokens": record.num_tokens, "sha256": record.sha256}
    if bundle.config.text.experts is not None:
        found["experts"] = EXPERTS
    return Calibration({**of_vision, **of_decoder}, found)


def needs_prompts(target: Target) -> bool:
    """Say whether a target computes with activations of a fixed scale, which calibration prompts give."""
    return target.formats.has_products_in(FLOAT8)


def check_prompts(target: Target, prompts: Sequence[CalibrationPrompt]) -> None:
    """Raise before any work if a target needs calibration prompts and there are none.

    Raises:
        UsageError: It computes with float8 activations.
    """
    if not prompts and needs_prompts(target):
        raise UsageError(
            f"{target.name} needs calibration prompts: it computes with float8 activations, whose scales are the "
            "ranges that prompts give",
            remedy="add --calibration DIR, a folder with *.jsonl conversations, or with prompts.txt and images",
        )


@dataclass
class Record:
    """Inputs of the graphs for all prompts.

    Attributes:
        images: Inputs of the vision graph, one sample for each image.
        prompts: Inputs of the decoder, one sample for each prompt, with a dummy in place of its visual embeddings.
        num_images: Number of images of each prompt.
        num_tokens: Number of tokens of all prompts.
        sha256: Digest of token ids and pixels, in order.
    """

    images: list[Arrays] = field(default_factory=list)
    prompts: list[Arrays] = field(default_factory=list)
    num_images: list[int] = field(default_factory=list)
    num_tokens: int = 0
    sha256: str = ""


def record_prompts(bundle: Bundle, prompts: Sequence[CalibrationPrompt]) -> Record:
    """Prepare every prompt as the runtime does.

    Raises:
        UsageError: A prompt, or all of them together, are too long.
    """
    from runtime.preparation import Preparation

    preparation = Preparation.from_files(bundle.assets, bundle.config)
    text = bundle.config.text
    record = Record()
    digest = hashlib.sha256()
    for prompt in prompts:
        try:
            prepared = preparation.prepare(prompt.messages)
        except Qwen3VLError as error:
            raise type(error)(f"{prompt.place}: {error.message}", remedy=error.remedy) from error
        ids = np.asarray(prepared.prompt.input_ids, np.int64)
        record.num_tokens += len(ids)
        for found, limit, what in (
            (len(ids), min(MAX_PROMPT_TOKENS, text.max_positions), "this prompt has"),
            (record.num_tokens, MAX_TOKENS, "the calibration set up to here has"),
        ):
            if found > limit:
                raise UsageError(
                    f"{prompt.place}: {what} {found} tokens, at most {limit} are taken",
                    remedy="shorten it, leave prompts out, or make the images smaller",
                )
        digest.update(ids.tobytes())
        for image in prepared.images:
            digest.update(image.pixel_values.tobytes())
        record.num_images.append(len(prepared.images))
        # Zeros without memory of their own: every layer's cache, as long as the prompt.
        empty = np.broadcast_to(np.float32(0), (1, text.num_kv_heads, len(ids), text.head_dim))
        caches = dict.fromkeys(past_names(text.num_layers), empty)
        inputs = prepared.decoder_inputs(no_visual_embeds(bundle.config), all_logits=True)
        record.prompts.append(inputs.arrays() | caches)
        record.images += [preparation.vision_inputs(image).arrays() for image in prepared.images]
    record.sha256 = digest.hexdigest()
    return record


def _quantized_weights(
    bundle: Bundle, name: str, target: Target, samples: list[Arrays], folder: Path, rounding: Rounding
) -> dict[str, StreamedTensor]:
    """Run one graph over its samples, quantising on the way; the samples become outputs of the vision graph."""
    calibrated: dict[str, StreamedTensor] = {}
    if not samples:
        return calibrated
    assert target.storage is not None, f"{target.name}: formats, but no storage"
    model, products = products_by_input(bundle, name, target, BLOCKWISE)
    products = {
        x: kept
        for x, group in products.items()
        if (kept := [found for found in group if not isinstance(found.tensor, GroupQuantizedTensor)])
    }
    num_weights = sum(found.tensor.size for group in products.values() for found in group)
    check_disk_space(folder, num_weights + largest_slice_bytes(bundle, SLICE_BYTES))
    watched = {x: 4 * group[0].num_inputs ** 2 for x, group in products.items()}
    outputs = model.graph.outputs if name == VISION else ()
    for part in cut(model.graph, watched, outputs, SLICE_BYTES):
        opened = part.open(samples[0], folder)
        if part.watched:
            grams = {str(x.name): Gram(products[x][0].num_inputs) for x in part.watched}
            for sample in samples:
                found_arrays = opened.run(sample)
                for x_name, gram in grams.items():
                    gram.add(found_arrays[x_name])
            del opened
            for x in part.watched:
                gram_KK = grams.pop(str(x.name)).total()
                if not np.isfinite(gram_KK.sum()):
                    raise not_finite(products[x][0].key)
                metrics: dict[tuple[int, bool], InputMetric] = {}
                for found in products[x]:
                    weight_format = target.formats.format_of(found.key)
                    block = target.storage.block(found.tensor, weight_format, is_table=found.is_table)
                    kind = block, weight_format.symmetric
                    if kind not in metrics:
                        metrics[kind] = factorize(gram_KK, block, symmetric=weight_format.symmetric)
                    codes = _StoredCodes(found.tensor, weight_format.bits, block, folder)
                    for rows_RK in row_chunks(found.tensor, _CHUNK_WEIGHTS):
                        codes.append(rounding(rows_RK, metrics[kind], weight_format.bits))
                    found.value.const_value = codes
                    calibrated[found.key] = _Calibrated(codes, found.tensor)
            if not part.later:
                continue
            opened = part.open(samples[0], folder)
        for sample in samples:
            opened.advance(sample)
    return calibrated


class _StoredCodes(GroupQuantizedTensor):
    """Codes in files, a file for each stretch of rows."""

    def __init__(self, source: StreamedTensor, bits: int, block: int, folder: Path) -> None:
        super().__init__(str(source.name), source.shape.numpy(), bits, block)
        self._folder = folder
        self._files: list[Path] = []

    def append(self, quantized: QuantizedBlocks) -> None:
        """Write the blocks of the next rows."""
        path = self._folder / f"{self.name}.{len(self._files)}.npz"
        np.savez(path, codes=quantized.codes, scales=quantized.scales, zero_points=quantized.zero_points)
        self._files.append(path)

    def quantized_rows(self) -> Iterator[QuantizedBlocks]:
        """Yield what was written."""
        for path in self._files:
            with np.load(path) as arrays:
                yield QuantizedBlocks(**arrays)


class _Calibrated(GroupQuantizedTensor):
    """Codes for the format that they were chosen for, and the unrounded weights for any other, such as 8 bits a row."""

    def __init__(self, codes: GroupQuantizedTensor, source: StreamedTensor) -> None:
        super().__init__(str(source.name), source.shape.numpy(), codes.bits, codes.block)
        self._codes, self._source = codes, source

    def quantized_rows(self) -> Iterator[QuantizedBlocks]:
        """Yield the codes."""
        return self._codes.quantized_rows()

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield the unrounded weights."""
        return self._source.blocks()


class Gram:
    """H = Σ x xᵀ, float32 [K, K], over inputs that come a few rows at a time."""

    def __init__(self, num_columns: int) -> None:
        self._sum_KK = np.zeros((num_columns, num_columns), np.float32)
        self._waiting: list[FloatArray] = []

    def add(self, x: FloatArray) -> None:
        """Add inputs [..., K]."""
        self._waiting.append(x.reshape(-1, len(self._sum_KK)))
        if sum(map(len, self._waiting)) >= _GRAM_ROWS:
            self._flush()

    def total(self) -> FloatArray:
        """Return the sum."""
        self._flush()
        return self._sum_KK

    def _flush(self) -> None:
        if self._waiting:
            x_MK = np.concatenate(self._waiting)
            self._sum_KK += x_MK.T @ x_MK
            self._waiting = []

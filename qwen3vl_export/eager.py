"""Run a checkpoint in PyTorch, without export: its weights in `Qwen3VL`, and a session that the runtime drives.

The session follows the protocol of engines, so prompts, pixels, positions, sampling and streaming are the runtime's
own; only the two graphs are exchanged for the torch definition that they were traced from.

Shapes: see runtime/session.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen3vl_export.checkpoint import EMBEDDING_KEY, HEAD_KEY, Checkpoint
from qwen3vl_export.modeling import LayerCache, Qwen3VL
from runtime.contract import DecoderInputs, FloatArray, IntArray, VisionInputs
from runtime.engine_options import checked_max_context
from runtime.errors import CheckpointError, UsageError
from runtime.manifest import Manifest
from runtime.memory import machine_bytes
from runtime.model import Qwen3VLModel
from runtime.preparation import Preparation
from runtime.session import KVCache
from runtime.shown import one_line, shown
from runtime.visual_pruning.scored import ScoredEmbeds

_LONGEST_REASON = 200

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_eager(
    checkpoint: str, *, dtype: str = "float32", device: str = "cpu", max_context: int | None = None
) -> Qwen3VLModel:
    """Open a checkpoint as a model that answers with eager PyTorch; `logits` and `generate` are those of an engine.

    Args:
        checkpoint: A Hugging Face folder, a Hub id, or `demo` or `demo-moe`.
        dtype: Type of weights, activations and cache: float32, bfloat16 or float16.
        device: Device of PyTorch, such as `cuda`.
        max_context: Most tokens of prompt and answer together; 4096 by default, or what the model was trained for.

    Raises:
        CheckpointError: A file or a weight is missing, left over, or not what config.json implies.
        UsageError: There is no such dtype or device, or `max_context` is beyond what the model was trained for.
    """
    if not isinstance(checkpoint, str) or not checkpoint:
        raise UsageError(f"{shown(checkpoint)} is not a checkpoint", remedy="give a folder, a Hub id, or 'demo'")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UsageError(f"unknown dtype {shown(dtype)}", remedy=f"give one of {', '.join(DTYPES)}")
    kind = _kind_of(device)
    source = Checkpoint.open(checkpoint)
    max_context = checked_max_context(max_context, source.config.text.max_positions)
    assets = source.assets()
    model = load(source, dtype=DTYPES[dtype], device=device)
    manifest = Manifest(
        target="eager",
        session="eager",
        capabilities={"precision": dtype, "cache_dtype": dtype, "device": "cpu" if kind == "cpu" else "gpu"},
        model=source.config,
        versions={"torch": str(torch.__version__)},
        source=source.describe(),
        files={},
    )
    return Qwen3VLModel(
        manifest,
        EagerSession(model),
        Preparation.from_files(assets, source.config),
        max_context,
        machine_bytes(),
    )


def _kind_of(device: str) -> str:
    """Return the kind of a device that PyTorch can compute on, such as `cuda` of `cuda:0`.

    Raises:
        UsageError: It is none, or is not here.
    """
    if not isinstance(device, (str, torch.device)):
        raise UsageError(f"device must be a string, got {type(device).__name__}", remedy="give 'cpu'")
    try:
        torch.zeros(1, device=device).cpu()  # `meta` holds no numbers to bring back
        return torch.device(device).type
    except Exception as error:  # each device fails in classes of its own
        reason = one_line(str(error).partition("\n")[0], _LONGEST_REASON)
        raise UsageError(f"device {shown(device)}: PyTorch cannot use it ({reason})", remedy="give 'cpu'") from error


def load(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Qwen3VL:
    """Return the torch model with a checkpoint's weights, in evaluation mode; quantised ones as their codes say.

    Raises:
        CheckpointError: A weight is missing, left over, or of another shape than config.json implies.
    """
    with torch.device("meta"):  # no memory, and no time for a random start
        model = Qwen3VL(checkpoint.config)
    model.load_state_dict(weights_of(checkpoint, dtype=dtype, device=device), assign=True)
    model.tie()
    return model.eval()


def weights_of(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    """Read all weights by the names that `Qwen3VL` has for them; a tied head is the embedding's tensor.

    Raises:
        CheckpointError: A weight is missing, left over, not finite, or of another shape than config.json implies.
        UsageError: A weight is beyond the range of `dtype`.
    """
    weights: dict[str, Tensor] = {}

    def take(key: str, values: NDArray[Any]) -> None:
        stored = torch.from_numpy(np.ascontiguousarray(values))
        weights[key] = stored.to(device=device, dtype=dtype)
        if not weights[key].isfinite().all():
            if stored.isfinite().all():
                raise UsageError(
                    f"{key}: {dtype} does not hold its values", remedy="take dtype 'bfloat16' or 'float32'"
                )
            raise CheckpointError(
                f"{checkpoint.folder}: {key} holds values that are not finite",
                remedy="the checkpoint is damaged, or was saved after a training that diverged: get it again",
            )

    checkpoint.used_keys  # noqa: B018 (raises for those that are left over)
    for key, tensor in checkpoint.weights.items():
        take(key, tensor.numpy())
    if checkpoint.config.text.tie_word_embeddings:
        weights[HEAD_KEY] = weights[EMBEDDING_KEY]
    return weights


class EagerCache:
    """A cache of `Qwen3VL`, whose calls give new tensors: `write` takes their new rows over."""

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers
        self.batch, _, self.capacity, _ = layers[0][0].shape

    def part(self, slot: int, batch: int, num_rows: int) -> list[LayerCache]:
        """Return views of the first rows of some slots."""
        return [
            (keys[slot : slot + batch, :, :num_rows], values[slot : slot + batch, :, :num_rows])
            for keys, values in self.layers
        ]

    def write(self, slot: int, presents: list[LayerCache], past_lengths: IntArray, num_new: int) -> None:
        """Take over the rows that a call added behind the past of each sequence."""
        for pair, new in zip(self.layers, presents, strict=True):
            for whole_BKTH, part_BKTH in zip(pair, new, strict=True):
                for index, past in enumerate(past_lengths.tolist()):
                    rows = slice(past, past + num_new)
                    whole_BKTH[slot + index, :, rows] = part_BKTH[index, :, rows]

    def copy_rows(self, source: int, target: int, num_rows: int) -> None:
        """Copy the first rows of one slot to another."""
        for each in itertools.chain.from_iterable(self.layers):
            each[target, :, :num_rows] = each[source, :, :num_rows]

    def swap_rows(self, slot: int, other: int, num_rows: int) -> None:
        """Exchange the first rows of two slots."""
        for each in itertools.chain.from_iterable(self.layers):
            each[[slot, other], :, :num_rows] = each[[other, slot], :, :num_rows]

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(each.nbytes for pair in self.layers for each in pair)

    def layer(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return copies of one layer's keys and values, float32 [B, K, T, H]."""
        keys, values = (each.float().cpu().numpy().copy() for each in self.layers[index])
        return keys, values


class EagerSession:
    """The protocol of `runtime.session.Session` on the torch definition."""

    def __init__(self, model: Qwen3VL) -> None:
        self.model = model

    @torch.inference_mode()
    def vision(self, inputs: VisionInputs) -> FloatArray:
        """Run the vision tower; see `runtime.session.Session.vision`."""
        # The tables stay float32 whatever the weights' type, as in transformers.
        return _array(self.model.visual(**self._tensors(inputs, in_weights_type="pixel_values")))

    @torch.inference_mode()
    def scored_vision(self, inputs: VisionInputs) -> ScoredEmbeds:
        """Run the vision tower; see `runtime.visual_pruning.scored.ScoringSession.scored_vision`."""
        embeds, scores = self.model.visual.scored(*self._tensors(inputs, in_weights_type="pixel_values").values())
        return ScoredEmbeds(_array(embeds), _array(scores))

    def new_cache(self, capacity: int, batch: int = 1) -> EagerCache:
        """Allocate a cache of zeros."""
        return EagerCache(self.model.new_cache(capacity, batch))

    def decode_batch(self, num_sequences: int, num_slots: int) -> int:
        """Return the same number: no step is recorded."""
        return num_sequences

    def prefill(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        """Run the decoder; see `runtime.session.Session.prefill`."""
        return self.decode(inputs, cache, slot)

    @torch.inference_mode()
    def decode(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        """Run the decoder; see `runtime.session.Session.decode`."""
        assert isinstance(cache, EagerCache)
        assert inputs.num_cache_rows <= cache.capacity, "past_lengths + S exceeds the cache"
        tensors = self._tensors(inputs, in_weights_type="visual_embeds")
        batch, num_new = inputs.input_ids.shape
        # No more rows than the call needs, since the model copies all that it gets.
        pasts = cache.part(slot, batch, inputs.num_cache_rows)
        logits, presents = self.model(**tensors, cache=pasts)
        cache.write(slot, presents, inputs.past_lengths, num_new)
        return _array(logits)

    def _tensors(self, inputs: VisionInputs | DecoderInputs, in_weights_type: str) -> dict[str, Tensor]:
        """Return the inputs on the weights' device, that of one name in their type."""
        like = self.model.lm_head.weight
        tensors = {name: torch.from_numpy(array).to(like.device) for name, array in inputs.arrays().items()}
        return {**tensors, in_weights_type: tensors[in_weights_type].to(like.dtype)}


def _array(values: Tensor) -> FloatArray:
    return values.float().cpu().numpy()

"""What engines are compared with: untouched transformers, or our own definition of the model, in float32.

`TransformersReference` judges everything. `OwnReference` needs no transformers: it shares prompt, pixels, positions and
the definition of the model with the engine, so it shows faults of export, lowering and kernels alone.

Shapes: S prompt tokens, P patches, N steps, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.eager import EagerSession, load
from qwen3vl_export.modeling import Qwen3VL
from qwen3vl_export.routing import Choice, RouterStatistics, watched_routers
from runtime.contract import DecoderInputs, FloatArray, no_visual_embeds
from runtime.errors import UsageError
from runtime.positions import PromptPositions, VisualSpan, mrope_positions
from runtime.vision_inputs import vision_inputs

TRANSFORMERS, OWN = "transformers", "own"
_OWN_NOTE = (
    "the reference is this package's own PyTorch definition: prompt, pixels, positions and the definition itself were "
    "not compared with transformers"
)


@dataclass(frozen=True)
class ReferenceOutput:
    """What the reference computes for one prompt.

    Attributes:
        visual_embeds: [1+D, V, hidden], or None without images.
        logits: [S, vocab] of the prompt.
        layers: Keys and values of each layer behind the prompt and all greedy tokens but the last, [1, K, S+N-1, H].
        tokens: Greedy tokens; the end of the sequence does not stop them.
        step_logits: [N, vocab]: the logits that chose each of `tokens`.
        routers: What the routers of a mixture of experts did.
        gaps: Of each of their choices, how far the last chosen and the first rejected expert are apart; empty where
            choices cannot be followed.
    """

    visual_embeds: FloatArray | None
    logits: FloatArray
    layers: list[tuple[FloatArray, FloatArray]]
    tokens: list[int]
    step_logits: FloatArray
    routers: RouterStatistics
    gaps: dict[Choice, float]


class Reference(Protocol):
    """Runs prompts in float32.

    Attributes:
        name: What it is, with its version.
        notes: What the comparison with it does not show; a run may add to them.
    """

    name: str
    notes: list[str]

    def inputs(self, messages: list[dict[str, Any]]) -> dict[str, NDArray[Any]] | None:
        """Return what its processor makes of messages, or None if it has none."""

    def run(
        self,
        input_ids: Sequence[int],
        pixel_values: Sequence[FloatArray],
        grids_thw: Sequence[tuple[int, int, int]],
        num_steps: int,
        *,
        swapped: frozenset[Choice] = frozenset(),
        likely_tokens: Sequence[int] = (),
    ) -> ReferenceOutput:
        """Run one prompt and `num_steps` greedy tokens.

        Args:
            input_ids: The prompt; every image token in it stands for an image.
            pixel_values: Patches of each image, [P, C·Tp·p·p].
            grids_thw: Patch grid of each image.
            num_steps: Tokens to generate.
            swapped: Choices of routers where the other expert is taken, see `watched_routers`.
            likely_tokens: If these are the greedy tokens, one call computes all steps.
        """


def open_reference(kind: str, checkpoint: Checkpoint) -> Reference:
    """Open the reference of a checkpoint.

    Args:
        kind: `transformers` or `own`.
        checkpoint: The weights.

    Raises:
        UsageError: There is no such reference, or it needs a package that is not installed.
        CheckpointError: Weights are missing or of another shape than config.json implies.
    """
    if kind == OWN:
        return OwnReference(load(checkpoint))
    if kind == TRANSFORMERS:
        from qwen3vl_export.parity.transformers_reference import TransformersReference

        return TransformersReference(checkpoint)
    raise UsageError(f"unknown reference {kind!r}", remedy=f"give one of {TRANSFORMERS}, {OWN}")


class OwnReference:
    """Our own definition of the model, run eagerly."""

    def __init__(self, model: Qwen3VL) -> None:
        self._model = model
        self._session = EagerSession(model)
        self.name = f"own definition, torch {torch.__version__}"
        self.notes = [_OWN_NOTE]

    def inputs(self, messages: list[dict[str, Any]]) -> None:
        """Return None: its processor is the runtime's, which would be compared with itself."""

    def run(
        self,
        input_ids: Sequence[int],
        pixel_values: Sequence[FloatArray],
        grids_thw: Sequence[tuple[int, int, int]],
        num_steps: int,
        *,
        swapped: frozenset[Choice] = frozenset(),
        likely_tokens: Sequence[int] = (),
    ) -> ReferenceOutput:
        """Run one prompt; see `Reference.run`."""
        visual = self._encode(pixel_values, grids_thw) if pixel_values else None
        run = partial(self._run, input_ids, self._positions(input_ids, grids_thw), visual, swapped)
        if likely_tokens:
            output = run(likely_tokens[:-1], 1)
            if output.tokens == list(likely_tokens):
                return output
        return run((), num_steps)

    def _encode(self, pixel_values: Sequence[FloatArray], grids_thw: Sequence[tuple[int, int, int]]) -> FloatArray:
        images = zip(pixel_values, grids_thw, strict=True)
        inputs = [vision_inputs(pixels, grid, self._model.config.vision) for pixels, grid in images]
        return np.concatenate(list(map(self._session.vision, inputs)), axis=1)

    def _positions(self, input_ids: Sequence[int], grids_thw: Sequence[tuple[int, int, int]]) -> PromptPositions:
        """Give each image the image tokens that follow those of the image before it."""
        merge, spans, end = self._model.config.vision.spatial_merge_size, [], 0
        for t, h, w in grids_thw:
            start = list(input_ids).index(self._model.config.image_token_id, end)
            spans.append(VisualSpan(start, (t, h // merge, w // merge)))
            end = spans[-1].end
        return mrope_positions(len(input_ids), spans)

    def _run(
        self,
        input_ids: Sequence[int],
        positions: PromptPositions,
        visual: FloatArray | None,
        swapped: frozenset[Choice],
        given: Sequence[int],
        num_steps: int,
    ) -> ReferenceOutput:
        """Run the prompt, the tokens given behind it in one call, and then steps of greedy tokens."""
        config, num_prompt = self._model.config, len(input_ids)
        no_embeds = no_visual_embeds(config)
        cache = self._session.new_cache(num_prompt + len(given) + num_steps - 1)

        def behind(tokens: Sequence[int], past: int) -> FloatArray:
            inputs = DecoderInputs.text(np.array([tokens]), np.array([past]), no_embeds, delta=positions.delta)
            return self._session.decode(inputs, cache)[0]

        embeds = no_embeds if visual is None else visual
        prompt = DecoderInputs.prompt(input_ids, positions, embeds, all_logits=True)
        with watched_routers(self._model, num_prompt, swapped=swapped) as watched:
            logits = self._session.decode(prompt, cache)[0]
            steps = [logits[-1], *(behind(given, num_prompt) if given else ())]
            while len(steps) < len(given) + num_steps:
                steps += list(behind([int(steps[-1].argmax())], num_prompt + len(steps) - 1))
        layers = [cache.layer(i) for i in range(config.text.num_layers)]
        tokens = [int(step.argmax()) for step in steps]
        return ReferenceOutput(visual, logits, layers, tokens, np.stack(steps), watched.statistics, watched.gaps)

"""The reference that needs no transformers: our own definition of the model, run eagerly in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from qwen3vl_export.eager import EagerSession
from qwen3vl_export.modeling import Qwen3VL
from qwen3vl_export.parity.reference import ReferenceOutput
from qwen3vl_export.routing import Assignment, watched_routers
from runtime.contract import DecoderInputs, FloatArray, IntArray, no_visual_embeds, on_host
from runtime.positions import mrope_positions
from runtime.preparation import Prepared
from runtime.vision_inputs import vision_inputs

OWN_NOTE = (
    "the reference is this package's own PyTorch definition: prompt, pixels, positions and the definition itself were "
    "not compared with transformers"
)


class OwnReference:
    """See `Reference`.

    Args:
        model: The definition, with the checkpoint's weights.
        kept: Indices of the tokens of each prompt that are run, as if the others had never been in it; None for all.
    """

    def __init__(self, model: Qwen3VL, kept: IntArray | None = None) -> None:
        self._model = model
        self._kept = kept
        self._session = EagerSession(model)
        self.name = f"own definition, torch {torch.__version__}"
        self.notes = [OWN_NOTE]
        self.keeps_markers = True

    def keeping(self, kept: IntArray) -> OwnReference:
        """Return a reference of the same weights that runs these tokens of a prompt."""
        return OwnReference(self._model, kept)

    def inputs(self, messages: list[dict[str, Any]]) -> None:
        """Return None: its processor is the runtime's, which would be compared with itself."""

    def run(
        self,
        prepared: Prepared,
        num_steps: int,
        *,
        swapped: frozenset[Assignment] = frozenset(),
        likely_tokens: Sequence[int] = (),
    ) -> ReferenceOutput:
        """Run one prompt; see `Reference.run`."""
        vision = self._model.config.vision
        inputs = [vision_inputs(image.pixel_values, image.grid_thw, vision) for image in prepared.images]
        encoded = list(map(self._session.scored_vision, inputs))
        visual = np.concatenate([on_host(each.embeds) for each in encoded], axis=1) if inputs else None
        scores = np.concatenate([each.scores for each in encoded]) if inputs else None
        run = partial(self._run, prepared, visual, swapped)
        if likely_tokens:
            output = run(likely_tokens[:-1], 1)
            if output.tokens == list(likely_tokens):
                return replace(output, token_scores=scores)
        return replace(run((), num_steps), token_scores=scores)

    def _run(
        self,
        prepared: Prepared,
        visual: FloatArray | None,
        swapped: frozenset[Assignment],
        given: Sequence[int],
        num_steps: int,
    ) -> ReferenceOutput:
        """Run the prompt, and tokens given after it, in one call; then steps of greedy tokens."""
        config, num_whole = self._model.config, len(prepared.prompt.input_ids)
        ids = [*prepared.prompt.input_ids, *given]
        no_embeds, positions = no_visual_embeds(config), mrope_positions(len(ids), prepared.prompt.spans)
        first = DecoderInputs.prompt(ids, positions, no_embeds if visual is None else visual, all_logits=True)
        num_prompt, delta = num_whole, positions.delta
        if self._kept is not None:
            first = _columns(first, np.append(self._kept, np.arange(num_whole, len(ids))))
            num_prompt, delta = len(self._kept), delta + num_whole - len(self._kept)
        num_run = num_prompt + len(given)
        cache = self._session.new_cache(num_run + num_steps - 1)
        with watched_routers(self._model, num_prompt, swapped=swapped) as watched:
            logits = self._session.decode(first, cache)[0]
            steps = list(logits[num_prompt - 1 :])
            for past in range(num_run, num_run + num_steps - 1):
                token = np.array([[steps[-1].argmax()]])
                step = DecoderInputs.text(token, np.array([past]), no_embeds, delta=delta)
                steps.append(self._session.decode(step, cache)[0, 0])
        layers = [cache.layer(i) for i in range(config.text.num_layers)]
        tokens = [int(step.argmax()) for step in steps]
        return ReferenceOutput(
            visual, logits[:num_prompt], layers, tokens, np.stack(steps), watched.statistics, watched.gaps
        )


def _columns(inputs: DecoderInputs, columns: IntArray) -> DecoderInputs:
    """Return the tokens of one prompt at these places, each with its own position and row, all with logits."""
    return replace(
        inputs,
        input_ids=inputs.input_ids[:, columns],
        position_ids=inputs.position_ids[:, :, columns],
        visual_rows=inputs.visual_rows[:, columns],
        logits_positions=np.arange(len(columns))[None],
    )

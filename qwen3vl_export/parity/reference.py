"""What engines are compared with: untouched transformers, or our own definition of the model, in float32.

`TransformersReference` judges everything. `OwnReference` needs no transformers: it shares prompt, pixels, positions and
the definition of the model with the engine, so it shows faults of export, lowering and kernels alone.

Shapes: S prompt tokens, N steps, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen3vl_export.routing import Assignment, RouterStatistics
from runtime.contract import FloatArray
from runtime.image_processor import ProcessedImage
from runtime.preparation import Prepared
from runtime.video.processor import ProcessedVideo

TRANSFORMERS, OWN = "transformers", "own"


@dataclass(frozen=True)
class ReferenceOutput:
    """What the reference computes for one prompt.

    Attributes:
        visual_embeds: [1+D, V, hidden], or None without images.
        logits: [S, vocab] of the prompt.
        layers: Keys and values of each layer after the prompt and all greedy tokens but the last, [1, K, S+N-1, H].
        tokens: Greedy tokens; the end of the sequence does not stop them.
        step_logits: [N, vocab]: the logits that chose each of `tokens`.
        routers: What the routers of a mixture of experts did.
        gaps: For each of their assignments, how far the last chosen and the first rejected expert are apart; empty
            where assignments cannot be followed.
        token_scores: [V]: the attention that each visual token gets; None where the reference does not say it.
    """

    visual_embeds: FloatArray | None
    logits: FloatArray
    layers: list[tuple[FloatArray, FloatArray]]
    tokens: list[int]
    step_logits: FloatArray
    routers: RouterStatistics
    gaps: dict[Assignment, float]
    token_scores: FloatArray | None = None


def segments_by_kind(prepared: Prepared) -> dict[str, FloatArray]:
    """Return the pixels of all images and of all videos, under transformers' names for them, [patches, E]."""
    found: dict[str, FloatArray] = {}
    for name, kind in (("pixel_values", ProcessedImage), ("pixel_values_videos", ProcessedVideo)):
        inputs = [each for each in prepared.inputs if isinstance(each, kind)]
        segments = [image for each in inputs for image in (getattr(each, "segments", None) or (each,))]
        if segments:
            found[name] = np.concatenate([image.pixel_values for image in segments])
    return found


class Reference(Protocol):
    """Runs prompts in float32.

    Attributes:
        name: What it is, with its version.
        notes: What the comparison with it does not show; a run may add to them.
        keeps_markers: How it writes prompts with videos; see `Preparation`.
    """

    name: str
    notes: list[str]
    keeps_markers: bool

    def inputs(self, messages: list[dict[str, Any]]) -> dict[str, NDArray[Any]] | None:
        """Return what its processor makes of messages, or None if it has none."""

    def run(
        self,
        prepared: Prepared,
        num_steps: int,
        *,
        swapped: frozenset[Assignment] = frozenset(),
        likely_tokens: Sequence[int] = (),
    ) -> ReferenceOutput:
        """Run one prompt and `num_steps` greedy tokens.

        Args:
            prepared: The prompt, of which transformers takes token ids, pixels and grids; every image token stands for
                an image.
            num_steps: Tokens to generate.
            swapped: Assignments in which the other expert is taken, see `watched_routers`.
            likely_tokens: If these are the greedy tokens, one call computes all steps.
        """

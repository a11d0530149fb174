"""What the vision tower gives of a segment: visual embeddings, and the scores of its tokens where an engine has them.

Shapes: V visual rows, D DeepStack levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import numpy as np

from runtime.contract import FloatArray, VisionInputs, VisualEmbeds, join_embeds, split_embeds

if TYPE_CHECKING:
    from runtime.session import Session


@dataclass(frozen=True, eq=False)
class ScoredEmbeds:
    """Visual embeddings with the scores of their tokens.

    Attributes:
        embeds: [1+D, V, hidden].
        scores: float32 [V]: the graph's `token_scores`.
    """

    embeds: VisualEmbeds
    scores: FloatArray

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.embeds.nbytes + self.scores.nbytes


Encoded: TypeAlias = VisualEmbeds | ScoredEmbeds


@runtime_checkable
class ScoringSession(Protocol):
    """A session whose vision tower says how much attention each token gets.

    Attributes:
        has_token_scores: Whether this engine's does (`qwen3vl-export --token-scores`).
    """

    has_token_scores: bool

    def scored_vision(self, inputs: VisionInputs) -> ScoredEmbeds:
        """Run the vision tower; see `runtime.session.Session.vision`."""


def encoder_of(session: Session) -> Callable[[VisionInputs], Encoded]:
    """Return what runs a session's vision tower, with scores if it has them."""
    if isinstance(session, ScoringSession) and session.has_token_scores:
        return session.scored_vision
    return lambda inputs: session.vision(inputs)


def split_encoded(encoded: Encoded, num_segments: int) -> list[Encoded]:
    """Return those of each of several segments of one grid."""
    if not isinstance(encoded, ScoredEmbeds):
        return list(split_embeds(encoded, num_segments))
    scores = np.split(encoded.scores, num_segments)
    return list(map(ScoredEmbeds, split_embeds(encoded.embeds, num_segments), scores))


def join_encoded(parts: Sequence[Encoded]) -> tuple[VisualEmbeds, FloatArray | None]:
    """Return the embeddings of segments one after the other, and their scores if all have some."""
    embeds = join_embeds([part.embeds if isinstance(part, ScoredEmbeds) else part for part in parts])
    scores = [part.scores for part in parts if isinstance(part, ScoredEmbeds)]
    assert len(scores) in (0, len(parts)), "segments with scores and others without"
    return embeds, np.concatenate(scores) if scores else None

"""Scores of visual tokens, and which tokens of a whole prompt a pruned one holds: for the reference that judges it.

Positions, DeepStack rows and the numbers of later tokens are then those of the whole prompt, which is numbered without
pruning.
"""

from __future__ import annotations

import numpy as np

from runtime.contract import FloatArray, IntArray
from runtime.model import Qwen3VLModel
from runtime.preparation import Prepared
from runtime.visual_pruning.prompt import decided_spans
from runtime.visual_pruning.scored import ScoringSession


def token_scores(model: Qwen3VLModel, prepared: Prepared) -> FloatArray | None:
    """Return the scores of a prompt's visual tokens, [V]; None where the engine has none, or the prompt no images."""
    session = model.session
    if not (isinstance(session, ScoringSession) and session.has_token_scores and prepared.images):
        return None
    inputs = map(model.preparation.vision_inputs, prepared.images)
    return np.concatenate([session.scored_vision(each).scores for each in inputs])


def kept_tokens(whole: Prepared, pruned: Prepared, embeds: FloatArray, scores: FloatArray | None = None) -> IntArray:
    """Return the indices of the whole prompt's tokens that the pruned prompt holds, int64.

    Args:
        whole: The prompt with all its visual tokens.
        pruned: The same prompt with those that stay.
        embeds: The visual embeddings that they are chosen by, [1+D, V, hidden].
        scores: The scores of the tokens, [V], if the engine has some.
    """
    stays = np.ones(len(whole.prompt.input_ids), bool)
    for span, decided in zip(
        whole.prompt.spans, decided_spans(pruned.prompt.spans, embeds, scores=scores), strict=True
    ):
        if decided.kept is not None:
            assert isinstance(decided.kept, tuple)
            stays[span.start : span.end] = False
            stays[span.start + np.array(decided.kept)] = True
    return np.flatnonzero(stays)

"""Which tokens of a whole prompt a pruned one holds, told from the whole prompt: for the reference that judges it.

Positions, DeepStack rows and the numbers of later tokens are then those of the whole prompt, which is numbered without
pruning.
"""

from __future__ import annotations

import numpy as np

from runtime.contract import FloatArray, IntArray
from runtime.preparation import Prepared
from runtime.visual_pruning.prompt import decided_spans


def kept_tokens(whole: Prepared, pruned: Prepared, embeds: FloatArray) -> IntArray:
    """Return the indices of the whole prompt's tokens that the pruned prompt holds, int64.

    Args:
        whole: The prompt with all its visual tokens.
        pruned: The same prompt with those that stay.
        embeds: The visual embeddings that they are chosen by, [1+D, V, hidden].
    """
    stays = np.ones(len(whole.prompt.input_ids), bool)
    for span, decided in zip(whole.prompt.spans, decided_spans(pruned.prompt.spans, embeds), strict=True):
        if decided.kept is not None:
            assert isinstance(decided.kept, tuple)
            stays[span.start : span.end] = False
            stays[span.start + np.array(decided.kept)] = True
    return np.flatnonzero(stays)

"""The generation loop: a generator of tokens; text, stop strings and timing sit one layer up, in `runtime.model`.

Shapes: S prompt tokens, V visual rows, D DeepStack levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from runtime.positions import PromptPositions
from runtime.session import Floats, KVCache, Session

# A chunk bounds the activations of a long prompt; the products reach their full speed well below it.
PREFILL_CHUNK = 512


def prefill(
    session: Session,
    cache: KVCache,
    input_ids: list[int],
    positions: PromptPositions,
    visual_embeds: Floats,
    *,
    all_logits: bool = False,
    chunk: int = PREFILL_CHUNK,
) -> Floats:
    """Run the prompt through the decoder in chunks, writing rows 0 … S - 1 of `cache`.

    Args:
        session: The engine.
        cache: An empty cache of at least S positions.
        input_ids: The prompt.
        positions: Its positions and visual rows.
        visual_embeds: [1+D, V, hidden], V ≥ 1.
        all_logits: Return the logits of every position, not of the last one alone.
        chunk: Most new tokens of one call.

    Returns:
        float32 [S, vocab], or [1, vocab].
    """
    ids = np.asarray(input_ids, np.int64)[None]
    pieces = []
    for start in range(0, ids.shape[1], chunk):
        part = slice(start, min(start + chunk, ids.shape[1]))
        num_new = part.stop - part.start
        is_last = part.stop == ids.shape[1]
        asked = np.arange(num_new)[None] if all_logits else np.array([[num_new - 1]])
        logits = session.decode(
            ids[:, part],
            positions.position_ids[:, :, part],
            positions.visual_rows[:, part],
            visual_embeds,
            np.array([start], np.int64),
            asked,
            cache,
        )
        if all_logits or is_last:
            pieces.append(logits[0])
    return np.concatenate(pieces)


def decode_steps(
    session: Session,
    cache: KVCache,
    logits_V: Floats,
    num_cached: int,
    delta: int,
    dummy_embeds: Floats,
    choose: Callable[[Floats], int],
) -> Iterator[int]:
    """Yield tokens for ever: choose one from the last logits, and run it only when the next one is asked for.

    Args:
        session: The engine.
        cache: Holds `num_cached` rows; one more is written before each token but the first.
        logits_V: Logits behind the prompt, [vocab].
        num_cached: Valid rows of the cache.
        delta: Position of a token minus its index (`PromptPositions.delta`).
        dummy_embeds: [1+D, 1, hidden], since a generated token takes no visual row.
        choose: Sampler.
    """
    no_row = np.full((1, 1), -1, np.int64)
    only = np.zeros((1, 1), np.int64)
    while True:
        token = choose(logits_V)
        yield token
        logits_V = session.decode(
            np.array([[token]], np.int64),
            np.full((3, 1, 1), num_cached + delta, np.int64),
            no_row,
            dummy_embeds,
            np.array([num_cached], np.int64),
            only,
            cache,
        )[0, 0]
        num_cached += 1

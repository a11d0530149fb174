"""The generation loop: a generator of tokens; text, stop strings and timing sit one layer up, in `runtime.model`.

Shapes: S prompt tokens, L of them that get logits, D DeepStack levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from runtime.contract import DecoderInputs, FloatArray
from runtime.session import KVCache, Session, TopLogits, TopLogitsSession

# A chunk bounds the activations of a long prompt; the products reach their full speed well below it.
PREFILL_CHUNK = 512
GPU_PREFILL_CHUNK = 2048
"""On a GPU, if memory allows (`runtime.scheduling.plan`): of 2B in float16 on an H200, 512 tokens take 6.9 ms and 2048
take 18.6 ms."""


def chunk_limit(capabilities: Mapping[str, Any], *, all_logits: bool = False) -> int:
    """Return the most new tokens of one call of an engine: of its own sizes, or of its device's if it has none.

    Args:
        capabilities: Those of the engine's manifest.
        all_logits: Each of the tokens gets logits.
    """
    chunk = int(capabilities.get("prefill_chunk", PREFILL_CHUNK))
    if all_logits:
        return min(chunk, int(capabilities.get("logits_chunk", chunk)))
    is_free = "prefill_chunk" not in capabilities and capabilities.get("device") == "gpu"
    return GPU_PREFILL_CHUNK if is_free else chunk


def prefill(session: Session, cache: KVCache, prompt: DecoderInputs, *, chunk: int = PREFILL_CHUNK) -> FloatArray:
    """Run all of `prefill_chunks`, with the same arguments, and return all logits, float32 [L, vocab]."""
    return np.concatenate(list(prefill_chunks(session, cache, prompt, chunk=chunk)))


def prefill_chunks(
    session: Session, cache: KVCache, prompt: DecoderInputs, *, chunk: int = PREFILL_CHUNK
) -> Iterator[FloatArray]:
    """Run the prompt through the decoder in chunks, writing rows 0 … S - 1 of `cache`.

    Args:
        session: The engine.
        cache: An empty cache of at least S positions.
        prompt: One whole sequence (`DecoderInputs.prompt`).
        chunk: Most new tokens of one call.

    Yields:
        The logits that the prompt asks for after tokens of the chunk, float32 [0 … L, vocab].
    """
    num_tokens = prompt.input_ids.shape[1]
    for start in range(0, num_tokens, chunk):
        stop = min(start + chunk, num_tokens)
        yield session.prefill(prompt.chunk(start, stop), cache)[0, : len(prompt.asked_in(start, stop))]


class Drafter(Protocol):
    """Guess the tokens that come next, such as `runtime.prompt_lookup.PromptLookup`."""

    def append(self, token_id: int) -> None:
        """Take the next token of the answer."""

    def draft(self, room: int) -> list[int]:
        """Return at most `room` tokens; asked once before each call of the decoder."""


def decode_steps(
    session: Session,
    cache: KVCache,
    logits_V: FloatArray,
    num_cached: int,
    delta: int,
    dummy_embeds: FloatArray,
    choose: Callable[[Any], int],
    drafter: Drafter | None = None,
    top: bool = False,
) -> Iterator[int]:
    """Yield tokens for ever: choose one from the last logits, and run it only when the next one is asked for.

    With a drafter, a call runs the last token and the drafted ones after it, which gives the logits after each.
    `choose` is asked position by position as without, and a draft is kept while it is what `choose` returned: the
    logits after a right draft are those of plain decoding, so penalties, draws of a seeded sampler and tokens are the
    same too. For sampling this is speculative sampling (Leviathan et al. 2023, arXiv:2211.17192) with a draft
    distribution of one point: a draft is accepted with its probability under the model, and a token chosen in its
    place follows the rest of that distribution. The next call overwrites the rows of the cache after a wrong draft.

    The same up to rounding, that is: a call of several positions sums in another order, so near-ties of the logits
    may fall otherwise, the more so where activations are quantised.

    Args:
        session: The engine.
        cache: Holds `num_cached` rows; the row of each token but the last is written before the next is yielded.
        logits_V: Logits after the prompt, [vocab].
        num_cached: Valid rows of the cache.
        delta: Position of a token minus its index (`PromptPositions.delta`).
        dummy_embeds: [1+D, 1, hidden], since a generated token takes no visual row.
        choose: Sampler; it gets a row of logits.
        drafter: Knows the prompt already; None decodes token by token.
        top: Leave the logits on the device and give `choose` a `TopLogits` instead (except for the first token); the
            session is a `TopLogitsSession`.
    """
    drafts: list[int] = []
    rows: Sequence[FloatArray | TopLogits] | FloatArray = logits_V[None]
    num_tokens = num_cached
    while True:
        for row, draft in zip(rows, [*drafts, None], strict=True):
            token = choose(row)
            if drafter is not None:
                drafter.append(token)
            yield token
            num_tokens += 1
            if token != draft:
                break
        # The last token has no row yet, and nobody wants logits after the last position that the cache holds.
        past = num_tokens - 1
        drafts = [] if drafter is None else drafter.draft(max(0, cache.capacity - past - 2))
        run = cast(TopLogitsSession, session).decode_top if top else session.decode
        tokens = np.array([[token, *drafts]])
        rows = run(DecoderInputs.text(tokens, np.array([past]), dummy_embeds, delta=delta), cache)[0]

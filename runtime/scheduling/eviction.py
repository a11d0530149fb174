"""Rows of a prompt that are given up when it has run (`runtime.cache_eviction`), for a session that shows its queries.

They are judged between two steps: 0.9 s of one core for a prompt of 4096 tokens (2B), for which other sequences wait.

Shapes: W tokens of the window, L layers, N query heads, K kv heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from runtime.cache_eviction import choose_rows, window_scores
from runtime.contract import DecoderInputs, FloatArray, IntArray
from runtime.errors import UsageError
from runtime.model_config import ModelConfig
from runtime.scheduling.request import Limits, Request
from runtime.session import KVCache, Session

if TYPE_CHECKING:
    from runtime.scheduling.sequence import Sequence

MIN_EVICTED_ROWS = 256
"""Fewer rows are not given up: those of a prompt of 512 tokens are judged in the time that 24 tokens then save (2B in 4
bits, one thread: 122 ms, and 5.1 of 98 ms a token)."""


class EvictingCache(KVCache, Protocol):
    """A cache that gives up rows of a slot."""

    def keys(self, index: int, slot: int, num_rows: int) -> FloatArray:
        """Return the keys of the first rows of a slot in one layer, float32 [K, rows, H]."""

    def keep_rows(self, index: int, slot: int, rows_KM: IntArray) -> None:
        """Move the rows that each kv head of a layer keeps to the front of a slot, in their order."""

    def release_rows(self, slot: int, start: int, stop: int) -> None:
        """Give the memory of rows start … stop - 1 of a slot back to the system, until they are written again."""


class QueriesSession(Session, Protocol):
    """A session whose engine was built with `--kv-scores`."""

    def prefill_with_queries(
        self, inputs: DecoderInputs, cache: KVCache, slot: int = 0
    ) -> tuple[FloatArray, FloatArray]:
        """Run a chunk as `prefill` does; return its logits, and the queries of its last tokens, [W, L, N, H]."""


class Eviction:
    """Runs prompts that are longer than the budget, and gives up rows at their end.

    Args:
        session: The engine.
        config: Shape of the model.
        budget: Rows that a prompt keeps.
        window: Last tokens that judge the others.
    """

    def __init__(self, session: Session, config: ModelConfig, budget: int, window: int) -> None:
        self._session = cast(QueriesSession, session)
        self._num_layers, self._scale = config.text.num_layers, config.text.head_dim**-0.5
        self._budget, self.window = budget, window

    @classmethod
    def of(
        cls, session: Session, config: ModelConfig, capabilities: Mapping[str, Any], limits: Limits
    ) -> Eviction | None:
        """Return it for an engine that was opened with `kv_budget`; None for any other."""
        if limits.kv_budget is None:
            return None
        return cls(session, config, limits.kv_budget, int(capabilities["kv_scores"]))

    def is_for(self, request: Request) -> bool:
        """Return whether a prompt gives up rows: so many that it saves time, and an answer is wanted."""
        return request.on_logits is None and request.num_tokens - self._budget >= MIN_EVICTED_ROWS

    def prefill(self, sequence: Sequence, inputs: DecoderInputs, cache: KVCache, slot: int) -> FloatArray:
        """Run a chunk of such a prompt and keep the queries of its last tokens; return the logits, [1, L, vocab]."""
        logits, queries_WLNH = self._session.prefill_with_queries(inputs, cache, slot)
        before = sequence.window_queries
        joined = queries_WLNH if before is None else np.concatenate([before, queries_WLNH])
        sequence.window_queries = joined[-self.window :]
        return logits

    def evict(self, sequence: Sequence, cache: KVCache, slot: int) -> None:
        """Give up rows of a prompt that has run."""
        queries_WLNH, num_rows = sequence.window_queries, sequence.num_rows
        assert queries_WLNH is not None
        evicting, spans = cast(EvictingCache, cache), sequence.request.prepared.prompt.spans
        for layer in range(self._num_layers):
            keys_KTH = evicting.keys(layer, slot, num_rows)
            scores_KT = window_scores(queries_WLNH[:, layer], keys_KTH, self._scale)
            evicting.keep_rows(layer, slot, choose_rows(scores_KT, self._budget, len(queries_WLNH), spans))
        evicting.release_rows(slot, self._budget, num_rows)
        sequence.evict(self._budget)


def check_kv_budget(budget: int | None, capabilities: Mapping[str, Any], max_context: int) -> None:
    """Refuse a budget that the engine cannot keep to, or that changes nothing.

    Raises:
        UsageError: The engine shows no queries, or the budget is out of range.
    """
    if budget is None:
        return
    if "kv_scores" not in capabilities:
        on_gpu = capabilities.get("device") == "gpu"
        raise UsageError(
            f"kv_budget={budget}: the engine does not give the queries that rows are judged by",
            remedy="leave kv_budget out: no engine on a GPU has them"
            if on_gpu
            else "build the engine with --kv-scores, and leave prefill_engine out",
        )
    least, most = 2 * int(capabilities["kv_scores"]), max_context - MIN_EVICTED_ROWS
    if least > most:
        raise UsageError(
            f"kv_budget={budget}: prompts of up to {max_context} tokens, max_context, are too short to give up rows",
            remedy="leave kv_budget out, or raise max_context",
        )
    if not least <= budget <= most:
        raise UsageError(
            f"kv_budget={budget}: expected {least}, twice the window that judges the rows, to {most}, so that a prompt "
            f"of {max_context} tokens, max_context, gives up {MIN_EVICTED_ROWS}",
            remedy="choose another kv_budget, or leave it out for all rows",
        )

"""The openings of an engine that the tuner compares: two beside each other if memory has room, else one at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.contract import VisualEmbeds
from runtime.errors import EngineError
from runtime.manifest import Manifest
from runtime.memory import LIBRARIES, PREFILL, WEIGHTS, machine_bytes
from runtime.model import Qwen3VLModel
from runtime.scheduling.plan import held_bytes
from runtime.scheduling.request import Limits
from runtime.session import KVCache, Session
from runtime.tuning import Tuning, tuned_limits


def opening_of(tuning: Tuning) -> Tuning:
    """Return the settings that an engine has to be opened anew for; the others are of single calls."""
    return replace(tuning, prefill_chunk=None, vision_patches=None, draft_cost=None)


@dataclass
class Opened:
    """An opening, and what is kept of it between calls.

    Attributes:
        model: The engine.
        cache: Of its session, beside the model's own.
        embeds: Of the images of the long prompt; None before they were made.
    """

    model: Qwen3VLModel
    cache: KVCache
    embeds: VisualEmbeds | None = None

    @property
    def session(self) -> Session:
        """The session, which is idle while the model has no request."""
        return self.model.session

    def limits(self, tuning: Tuning) -> Limits:
        """Return the limits that the scheduler would have."""
        model = self.model
        held = held_bytes(model.manifest, model.limits)
        room = model.max_memory - held[WEIGHTS] - held[PREFILL] - held[LIBRARIES]
        return tuned_limits(model.limits, tuning, model.manifest, room)


class Openings:
    """Open an engine with tunings, and close what was used least recently.

    Args:
        engine: Its folder.
        manifest: Its manifest.
        num_sequences: Most sequences of a step; fewer where the engine was built for fewer.
        given: Further arguments of `from_engine`.
        on_close: Told of each opening that is closed.
    """

    def __init__(
        self,
        engine: Path,
        manifest: Manifest,
        num_sequences: int,
        given: Mapping[str, Any],
        on_close: Callable[[Tuning], object],
    ) -> None:
        self._engine, self._given, self._on_close = engine, given, on_close
        self._max_sequences = min(num_sequences, int(manifest.capabilities.get("max_batch", num_sequences)))
        self._held: dict[Tuning, Opened] = {}
        self._most = 1
        first = self.get(Tuning())
        one = sum(held_bytes(manifest, first.model.limits).values())
        free = getattr(first.session, "free_bytes", None)
        has_room = one <= free if free is not None else 2 * one <= machine_bytes()
        self._most = 2 if has_room else 1

    @property
    def holds_two(self) -> bool:
        """Whether contenders are open beside each other."""
        return self._most > 1

    def get(self, tuning: Tuning) -> Opened:
        """Return an opening; another one may be closed for it.

        Raises:
            EngineError, CapacityError: It does not open, or not as the tuning says.
        """
        found = self._held.pop(tuning, None)
        if found is None:
            while len(self._held) >= self._most:
                self._close(next(iter(self._held)))
            found = self._open(tuning)
        self._held[tuning] = found  # the newest comes last
        return found

    def close(self) -> None:
        """Close all."""
        for tuning in list(self._held):
            self._close(tuning)

    def _close(self, tuning: Tuning) -> None:
        self._held.pop(tuning).model.close(drain=False)
        self._on_close(tuning)
        gc.collect()  # a session frees its memory with the last reference

    def _open(self, tuning: Tuning) -> Opened:
        serving = {"max_sequences": self._max_sequences, "kept_sequences": 0, "prefix_cache": False}
        options = {**serving, "vision_cache_bytes": 0, **self._given, "tuned": tuning}
        model = Qwen3VLModel.from_engine(self._engine, **options)
        if tuning.huge_pages and not getattr(model.session, "huge_page_bytes", 0):
            model.close(drain=False)
            raise EngineError("the kernel gives no huge pages", remedy="allow them (transparent_hugepage)")
        return Opened(model, model.session.new_cache(model.max_context, model.limits.max_sequences))

"""Models on the session of one that is open, with limits of their own; and what passes between engine and sequences."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from helpers import PICTURES
from runtime.contract import FloatArray
from runtime.generation import chunk_limit
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel
from runtime.piece import Piece
from runtime.sampling import Logits
from runtime.scheduling.request import Limits, Request
from runtime.scheduling.sequence import Sequence
from runtime.scheduling.worker import Worker
from runtime.session import Session, TopLogits


def serving(
    opened: Qwen3VLModel,
    *,
    session: Session | None = None,
    manifest: Manifest | None = None,
    max_context: int | None = None,
    max_rows: int | None = None,
    **limits: Any,
) -> Qwen3VLModel:
    """Return another model on an opened one's session, or on one that wraps it; only one of them may work at a time.

    A slot has as many rows as the context has tokens, unless `max_rows` says otherwise.
    """
    context = max_context or opened.max_context
    chunk = limits.get("prefill_chunk", chunk_limit(opened.manifest.capabilities))
    chosen = Limits(
        max_sequences=4,
        max_context=max_rows or context,
        kept_sequences=2,
        prefix_cache=True,
        vision_cache_bytes=1 << 24,
        max_queue=256,
        max_queue_tokens=64 * context,
        max_delay_s=0.01,
        prefill_chunk=chunk,
        last_chunk=chunk,
        logits_chunk=chunk_limit(opened.manifest.capabilities, all_logits=True),
    )
    return Qwen3VLModel(
        manifest or opened.manifest,
        session or opened.session,
        opened.preparation,
        context,
        opened.max_memory,
        limits=replace(chosen, **limits),
    )


def alone(opened: Qwen3VLModel, **limits: Any) -> Qwen3VLModel:
    """Return a fresh model that runs one sequence at a time and keeps nothing."""
    nothing = {"max_sequences": 1, "kept_sequences": 0, "prefix_cache": False, "vision_cache_bytes": 0}
    return serving(opened, **nothing, **limits)


def asked(question: str, *pictures: Any) -> list[dict[str, Any]]:
    """Return messages about held-out pictures, by their numbers, or about any other images."""
    images = [str(PICTURES / f"held_out_{each}.png") if isinstance(each, int) else each for each in pictures]
    content = [*({"type": "image", "image": each} for each in images), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


class WrappedSession:
    """Hands everything on to a session; subclasses change or watch a call."""

    def __init__(self, session: Session) -> None:
        self.wrapped = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


@contextmanager
def watched_logits() -> Iterator[dict[Request, list[FloatArray]]]:
    """Collect, request by request, the logits that each token of its answer was chosen from."""
    found: dict[Request, list[FloatArray]] = {}
    take_token = Sequence.take_token

    def watching(sequence: Sequence, logits: Logits | TopLogits) -> list[Piece]:
        assert isinstance(logits, np.ndarray)
        found.setdefault(sequence.request, []).append(logits.copy())
        return take_token(sequence, logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sequence, "take_token", watching)
        yield found


@contextmanager
def held_until_submitted(model: Qwen3VLModel, num_requests: int) -> Iterator[threading.Event]:
    """Run no prompt before so many requests have been submitted, so that they run side by side.

    Gives an event that is set then. The block has to last until it is.
    """
    ready, submit, prefill = threading.Event(), Worker.submit, model.session.prefill
    numbers = itertools.count(1)

    def counting(worker: Worker, *arguments: Any, **keywords: Any) -> None:
        submit(worker, *arguments, **keywords)
        if next(numbers) >= num_requests:
            ready.set()

    def held(*arguments: Any) -> FloatArray:
        assert ready.wait(60)
        return prefill(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "submit", counting)
        patch.setattr(model.session, "prefill", held)
        yield ready

"""The protocol that every kind of engine follows, and the opening of an engine folder.

Shapes: B batch, S new tokens, T cache capacity, L logits positions, I segments, P patches, K kv heads, H head dim.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

import runtime.sessions
from runtime.contract import DecoderInputs, FloatArray, IntArray, VisionInputs, VisualEmbeds
from runtime.decode_plan import has_plan
from runtime.errors import EngineError, UsageError
from runtime.manifest import Manifest

VISION, PREFILL, DECODE = "vision", "prefill", "decode"
PARTS = frozenset({VISION, PREFILL, DECODE})
"""What a session runs: the vision tower, prompts, and steps of one token; each may have an engine of its own
(`runtime.route`)."""


class KVCache(Protocol):
    """Keys and values of all layers, written in place by `Session.decode`.

    A slot is the place of one sequence; a row that of one of its tokens, in all layers.

    Attributes:
        capacity: Rows of a slot.
        batch: Number of slots.
    """

    capacity: int
    batch: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""

    def layer(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return copies of one layer's keys and values, [B, K, T, H]."""

    def copy_rows(self, source: int, target: int, num_rows: int) -> None:
        """Copy the first rows of one slot to another."""

    def swap_rows(self, slot: int, other: int, num_rows: int) -> None:
        """Exchange the first rows of two slots."""


class Session(Protocol):
    """An opened engine: two graphs and the memory they work in. One thread at a time may call it.

    Some have more attributes, which others lack:

    - `free_bytes`, an int: of a session on a GPU, the device memory that is free for new caches; runs will take part of
      it for their activations.
    - `chunk_sizes`, ints: numbers of tokens that a chunk of a prompt is filled up to.
    - `decodes_anywhere(num_sequences)`: whether decode steps of so many are as fast from any slot on, as things are
      now; else they begin at slot 0.
    - `rehearse_decode(cache, num_rows)`: compares own kernels of decode steps with others, which is done at their first
      use else, on rows behind the valid ones: `num_rows` of each slot from 0 on, a slot for each sequence that will
      step.
    - `runs_vision_beside`, a bool: `vision` may be called in another thread while the decoder runs.
    - `max_segments`, an int: most segments of one call of `vision`; any number where it is missing.
    - `decode_kernels`, a str: whose kernels run decode steps, `own` or `onnxruntime`; and `decode_plan_problem`, a str
      or None: why not our own.
    """

    def vision(self, inputs: VisionInputs) -> VisualEmbeds:
        """Run the vision tower on I segments of one grid: visual embeddings [1+D, I·P / merge², hidden].

        They may stay in the session's own memory, a part for each segment; `decode` takes them from there.
        """

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """Allocate an empty cache of at least `capacity` rows in each of `batch` slots."""

    def decode_batch(self, num_sequences: int, num_slots: int) -> int:
        """Return the batch size that a decode step of so many sequences is to have, at most the cache's slots.

        It is larger than their number where steps are recorded for some sizes only; the caller fills it up.
        """

    def prefill(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        """Run the decoder on a chunk of one prompt, [1, S]: as `decode`, but it may write rows behind those as well."""

    def decode(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
        """Run the decoder on [B, S] new tokens after `past_lengths` cached ones.

        Writes rows past_lengths … past_lengths + S - 1 of slots slot … slot + B - 1 of `cache`, and nothing else; its
        capacity is at least `inputs.num_cache_rows`. With S > 1 and a past, B is 1.

        Returns:
            Logits of the asked positions, [B, L, vocab].
        """


@dataclass(frozen=True)
class TopLogits:
    """The largest logits after one position, and a way to all of them.

    Attributes:
        ids: Distinct token ids, int64 [k].
        values: Their logits, float32 [k], falling; no other token has a larger one than the last of them.
        vocab_size: Number of all logits.
        fetch: Copies all logits from the device, float32 [vocab]; only until the session's next call.
    """

    ids: IntArray
    values: FloatArray
    vocab_size: int
    fetch: Callable[[], FloatArray]


class TopLogitsSession(Session, Protocol):
    """A session whose engine finds the largest logits itself; its capabilities say how many: `top_k`."""

    def decode_top(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> list[list[TopLogits]]:
        """Run the decoder as `decode` does, and leave the logits on the device: the largest of each, [B][L]."""


def top_logits(
    ids_BLk: IntArray, values_BLk: FloatArray, vocab_size: int, fetch: Callable[[int, int], FloatArray]
) -> list[list[TopLogits]]:
    """Return what `decode_top` does; `fetch` takes a sequence and one of its positions."""
    return [
        [TopLogits(ids_k, values_k, vocab_size, partial(fetch, b, i)) for i, (ids_k, values_k) in enumerate(pairs)]
        for b, pairs in enumerate(zip(*rows, strict=True) for rows in zip(ids_BLk, values_BLk, strict=True))
    ]


def is_on_gpu(manifest: Manifest) -> bool:
    """Return whether the engine lives in the memory of a GPU, which refuses by itself what it cannot hold."""
    return bool(manifest.capabilities.get("device", "cpu") == "gpu")


@dataclass(frozen=True)
class SessionOptions:
    """How an engine is opened.

    Attributes:
        threads: Threads of the engine, at least 1; None for `runtime.machine.default_threads`.
        huge_pages: Spend seconds to move the weights to huge pages (`runtime.huge_pages`).
        cuda_graphs: Record decode steps on a GPU.
        decode_plan: Run decode steps with the engine's own kernels, where it brings some for the GPU.
        batch_invariant: Of these kernels, take the form whose rounding does not depend on the batch.
        weights_twice: Take them even where ONNX Runtime keeps a second copy of the weights on the GPU.
        parts: What the session is asked for: it may leave graphs closed that run nothing of it.
        separate_prefill: Read prompts with a decoder of their own, where an engine has one.
        every_batch: Record decode steps for every number of sequences, not for powers of two alone.
        sdpa_kernel: The CUDA provider's option of that name; None leaves it to the provider.
    """

    threads: int | None = None
    huge_pages: bool = False
    cuda_graphs: bool = True
    decode_plan: bool = True
    batch_invariant: bool = False
    weights_twice: bool = False
    parts: frozenset[str] = PARTS
    separate_prefill: bool = True
    every_batch: bool = False
    sdpa_kernel: str | None = None


def open_session(folder: Path, manifest: Manifest, options: SessionOptions = SessionOptions()) -> Session:
    """Open an engine folder whose manifest was read and checked.

    Raises:
        EngineError: No session of that kind exists here, or its library is not installed.
        UsageError: The session has no use for an option that was given.
    """
    if not (options.cuda_graphs or is_on_gpu(manifest)):
        raise UsageError(
            f"cuda_graphs=False: {folder} does not run on a GPU", remedy="leave cuda_graphs (--no-cuda-graphs) out"
        )
    _check_plan_options(folder, manifest, options)
    if options.huge_pages and is_on_gpu(manifest):
        raise UsageError("huge_pages: the weights are on the GPU", remedy="leave huge_pages out")
    known = sorted(module.name for module in pkgutil.iter_modules(runtime.sessions.__path__))
    if manifest.session not in known:
        raise EngineError(
            f"{folder}: unknown kind of session {manifest.session!r:.80}; known: {', '.join(known)}",
            remedy="install the version that built the engine, or build it again",
        )
    module = importlib.import_module(f"runtime.sessions.{manifest.session}")
    session: Session = module.open_session(folder, manifest, options)
    if manifest.capabilities.get("top_k") and not hasattr(session, "decode_top"):
        raise EngineError(
            f"{folder}: engine.json promises the largest logits (top_k), which a session {manifest.session!r} does not "
            "find",
            remedy="build the engine again",
        )
    return session


def _check_plan_options(folder: Path, manifest: Manifest, options: SessionOptions) -> None:
    """Refuse options of the decode plan where there is none.

    Raises:
        UsageError: One was given.
    """
    for name in ("batch_invariant", "weights_twice"):
        if getattr(options, name) and not (options.decode_plan and has_plan(manifest)):
            reason = f"{folder} brings no decode plan" if options.decode_plan else "decode_plan=False switches it off"
            raise UsageError(f"{name}: it is of the decode plan, and {reason}", remedy=f"leave {name} out")
    if not (options.decode_plan or is_on_gpu(manifest)):
        raise UsageError(
            f"decode_plan=False: {folder} does not run on a GPU", remedy="leave decode_plan (--no-decode-plan) out"
        )

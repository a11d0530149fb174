"""How many sequences an engine holds: planned in bytes when it is opened, or refused with numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.errors import CapacityError, UsageError
from runtime.generation import PREFILL_CHUNK, chunk_limit
from runtime.manifest import Manifest
from runtime.memory import cache_bytes, sink_bytes
from runtime.memory_plan import Planner, Work
from runtime.scheduling.request import Limits
from runtime.scheduling.scheduler import LEAST_LAST_SHARE
from runtime.serving_options import ServingOptions
from runtime.sliding_window import SlidingWindow

DEFAULT_SEQUENCES = 8
DEFAULT_KEPT = 4
DEFAULT_EMBEDS_BYTES = 256 << 20
# Of so many parts of the memory beside weights and workspace, kept embeddings take one at most where nobody says.
_PARTS_OF_EMBEDS = 16
# The same of slots of the KV cache that nobody asked for; a caller may ask for all of it.
_PARTS_OF_CACHE = 2
# And what longer chunks of prompts than the usual ones take beyond those.
_PARTS_OF_PREFILL = 8


def plan_limits(
    manifest: Manifest,
    options: ServingOptions,
    max_context: int,
    room_bytes: int | None,
    window: SlidingWindow | None = None,
) -> Limits:
    """Return what an engine holds.

    Args:
        manifest: Its manifest.
        options: What the caller gave; what is None is chosen here.
        max_context: Most tokens of a sequence: rows of a slot.
        room_bytes: Memory beside weights and the workspace of chunks of `PREFILL_CHUNK`; None if nobody knows.
        window: What a sequence keeps of its rows, if not all; then it may have more tokens.

    Raises:
        CapacityError: What the caller asks for does not fit.
        UsageError: The engine was built for fewer sequences.
    """
    capabilities = manifest.capabilities
    built_for = capabilities.get("max_batch")
    capacity, slot_bytes = _slot(manifest, max_context, window)
    # One sequence comes first: with embeddings that leave it no room, an engine would open and refuse each request.
    spare = None if room_bytes is None else max(0, room_bytes - slot_bytes)
    embeds_bytes = _embeds_bytes(options.vision_cache_bytes, room_bytes, spare)
    cache_room = None if room_bytes is None else max(0, room_bytes - embeds_bytes)
    fitting = None if cache_room is None else cache_room // slot_bytes
    # What nobody asked for leaves memory to others.
    modest = None if cache_room is None else max(1, cache_room // _PARTS_OF_CACHE // slot_bytes)
    most = min((int(each) for each in (built_for, modest) if each is not None), default=None)
    sequences, kept = options.max_sequences, options.kept_sequences if options.prefix_cache else 0
    _check_built_for(sequences, kept, built_for)
    if sequences is None:
        sequences = DEFAULT_SEQUENCES if most is None else max(1, min(DEFAULT_SEQUENCES, most - (kept or 0)))
    if kept is None:
        kept = DEFAULT_KEPT if most is None else max(0, min(DEFAULT_KEPT, most - sequences))
    if fitting is not None and sequences + kept > max(1, fitting):
        raise CapacityError(
            f"{sequences + kept} sequences of {capacity} tokens take {(sequences + kept) * slot_bytes / 1e9:.2f} GB of "
            f"KV cache, and {(cache_room or 0) / 1e9:.2f} GB are left for it: room for {fitting}",
            remedy="lower max_sequences, kept_sequences, max_context or window, or raise max_memory if there is more",
        )
    left = 0 if cache_room is None else cache_room - (sequences + kept) * slot_bytes
    chunk, last_chunk = _chunks(manifest, capacity, min(left, (room_bytes or 0) // _PARTS_OF_PREFILL))
    return Limits(
        max_sequences=sequences,
        max_context=max_context,
        kept_sequences=kept,
        prefix_cache=options.prefix_cache,
        vision_cache_bytes=embeds_bytes,
        max_queue=options.max_queue,
        max_queue_tokens=options.max_queue_tokens or 16 * max_context,
        max_delay_s=options.max_delay_ms / 1e3,
        prefill_chunk=chunk,
        last_chunk=last_chunk,
        logits_chunk=chunk_limit(capabilities, all_logits=True),
        kv_budget=options.kv_budget,
        window=window,
    )


def _slot(manifest: Manifest, max_context: int, window: SlidingWindow | None) -> tuple[int, int]:
    """Return the rows of a slot and the bytes that it takes."""
    capacity = int(manifest.capabilities.get("capacity", max_context))
    sink_tokens = 0 if window is None else window.sink_tokens
    rows_bytes = cache_bytes(manifest.model, manifest.capabilities, capacity)
    return capacity, rows_bytes + sink_bytes(manifest.model, sink_tokens)


def _chunks(manifest: Manifest, capacity: int, spare_bytes: int) -> tuple[int, int]:
    """Return the most tokens of a chunk, and of one that ends a prompt.

    Chunks that are longer than `PREFILL_CHUNK` may take so many bytes of workspace beyond that of these.
    """
    chunk = chunk_limit(manifest.capabilities)
    if chunk <= PREFILL_CHUNK or "prefill_chunk" in manifest.capabilities:
        return chunk, chunk
    planner = Planner.of(manifest)

    def workspace(chunk: int) -> int:
        return planner.workspaces(Work(capacity, chunk=chunk))[0]

    usual = workspace(PREFILL_CHUNK)
    while chunk > PREFILL_CHUNK:
        last = chunk + chunk // LEAST_LAST_SHARE
        if workspace(last) - usual <= spare_bytes:
            return chunk, last
        chunk //= 2
    return chunk, chunk


def _embeds_bytes(given: int | None, room_bytes: int | None, spare_bytes: int | None) -> int:
    """Return the most bytes of kept embeddings; `spare_bytes` are left beside one sequence, None if nobody knows."""
    spare = DEFAULT_EMBEDS_BYTES if spare_bytes is None else spare_bytes
    if given is None:
        room = DEFAULT_EMBEDS_BYTES if room_bytes is None else max(0, room_bytes) // _PARTS_OF_EMBEDS
        return min(DEFAULT_EMBEDS_BYTES, room, spare)
    if spare_bytes is not None and given > spare:
        raise CapacityError(
            f"vision_cache_bytes = {given}: that is {given / 1e9:.2f} GB, and {spare / 1e9:.2f} GB are left beside one "
            "sequence",
            remedy="lower vision_cache_bytes or max_context, or raise max_memory if the machine has more",
        )
    return given


def work_of(limits: Limits) -> Work:
    """Return what an opened engine holds and runs at most, but for the images and logits of a call."""
    return Work(
        context=limits.max_context,
        sequences=limits.max_sequences,
        kept=limits.kept_sequences,
        chunk=max(limits.prefill_chunk, limits.last_chunk),
        embeds_bytes=limits.vision_cache_bytes,
        sink_tokens=0 if limits.window is None else limits.window.sink_tokens,
    )


def held_bytes(manifest: Manifest, limits: Limits) -> Mapping[str, int]:
    """Return the bytes of an opened engine at most, part by part, but for the images and logits of a call."""
    return Planner.of(manifest).plan(work_of(limits)).parts


def _check_built_for(max_sequences: int | None, kept_sequences: int | None, built_for: Any) -> None:
    total = (max_sequences or 1) + (kept_sequences or 0)
    if built_for is not None and total > int(built_for):
        asked = {"max_sequences": max_sequences, "kept_sequences": kept_sequences}
        given = ", ".join(f"{name} = {value}" for name, value in asked.items() if value)
        beside = "" if max_sequences else " beside one that runs"
        raise UsageError(
            f"{given}{beside}: the engine was built for {built_for} sequence{'s' if int(built_for) > 1 else ''}",
            remedy="lower them, or build the engine again with a larger --max-batch",
        )

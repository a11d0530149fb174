"""How many sequences an engine holds, in bytes of its KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest

from runtime.errors import CapacityError, UsageError
from runtime.manifest import Manifest
from runtime.memory import CACHE, EMBEDS, PREFILL, cache_bytes
from runtime.memory_plan import Planner, Work
from runtime.model import Qwen3VLModel
from runtime.scheduling.plan import DEFAULT_EMBEDS_BYTES, plan_limits, work_of
from runtime.scheduling.request import Limits
from runtime.serving_options import ServingOptions

CONTEXT = 1000


@pytest.fixture(scope="module")
def manifest(demo_engine: Path) -> Manifest:
    return Manifest.read(demo_engine)


def slot_bytes(manifest: Manifest) -> int:
    return cache_bytes(manifest.model, manifest.capabilities, CONTEXT)


def held_bytes(manifest: Manifest, limits: Limits) -> Mapping[str, int]:
    return Planner.of(manifest).plan(work_of(limits)).parts


def prefill_bytes(manifest: Manifest, context: int, chunk: int) -> int:
    return Planner.of(manifest).workspaces(Work(context, chunk=chunk))[0]


def test_defaults_with_memory_to_spare(manifest: Manifest) -> None:
    limits = plan_limits(manifest, ServingOptions(), CONTEXT, 1 << 40)
    assert (limits.max_sequences, limits.kept_sequences, limits.num_slots) == (8, 4, 12)
    assert limits.vision_cache_bytes == DEFAULT_EMBEDS_BYTES and limits.max_queue_tokens == 16 * CONTEXT
    held = held_bytes(manifest, limits)
    assert held[CACHE] == 12 * slot_bytes(manifest) and held[EMBEDS] == DEFAULT_EMBEDS_BYTES


@pytest.mark.parametrize(("slots", "expected"), [(0, (1, 0)), (1, (1, 0)), (2, (2, 0)), (8, (8, 0)), (10, (8, 2))])
def test_defaults_take_half_of_what_is_left(manifest: Manifest, slots: int, expected: tuple[int, int]) -> None:
    options = ServingOptions(vision_cache_bytes=0)
    limits = plan_limits(manifest, options, CONTEXT, 2 * slots * slot_bytes(manifest) + 1)
    assert (limits.max_sequences, limits.kept_sequences) == expected


def test_slots_that_are_kept_on_request_leave_fewer_that_run(manifest: Manifest) -> None:
    options = ServingOptions(kept_sequences=5, vision_cache_bytes=0)
    limits = plan_limits(manifest, options, CONTEXT, 12 * slot_bytes(manifest))
    assert (limits.max_sequences, limits.kept_sequences) == (1, 5)


def test_what_is_asked_for_may_take_all_and_is_refused_beyond_it_with_numbers(manifest: Manifest) -> None:
    room = 5 * slot_bytes(manifest)
    limits = plan_limits(manifest, ServingOptions(4, 1, vision_cache_bytes=0), CONTEXT, room)
    assert limits.num_slots == 5
    with pytest.raises(CapacityError, match=r"6 sequences of 1000 tokens take .* room for 5") as caught:
        plan_limits(manifest, ServingOptions(4, 2, vision_cache_bytes=0), CONTEXT, room)
    assert "max_sequences" in (caught.value.remedy or "")
    with pytest.raises(CapacityError, match="room for 4"):
        plan_limits(manifest, ServingOptions(5, 0, vision_cache_bytes=slot_bytes(manifest)), CONTEXT, room)


def test_what_fits_on_a_gpu_fits_when_a_request_comes(manifest: Manifest) -> None:
    on_gpu = dataclasses.replace(manifest, capabilities={**manifest.capabilities, "device": "gpu"})
    room = 5 * slot_bytes(manifest)
    with pytest.raises(CapacityError, match="room for 4"):  # embeddings are kept in the same memory
        plan_limits(on_gpu, ServingOptions(5, 0), CONTEXT, room)
    limits = plan_limits(on_gpu, ServingOptions(4, 0), CONTEXT, room)
    held = held_bytes(on_gpu, limits)
    assert held[EMBEDS] == limits.vision_cache_bytes > 0 and held[CACHE] + held[EMBEDS] <= room


def test_without_a_prefix_cache_no_further_slots_are_kept(manifest: Manifest) -> None:
    assert plan_limits(manifest, ServingOptions(prefix_cache=False), CONTEXT, None).num_slots == 8


def test_a_compiled_engine_has_as_many_slots_as_it_was_built_for(manifest: Manifest) -> None:
    built = dataclasses.replace(manifest, capabilities={**manifest.capabilities, "max_batch": 4, "capacity": 2000})
    limits = plan_limits(built, ServingOptions(), CONTEXT, None)
    assert (limits.max_sequences, limits.kept_sequences, limits.max_context) == (4, 0, CONTEXT)
    assert plan_limits(built, ServingOptions(max_sequences=3), CONTEXT, None).kept_sequences == 1
    kept = plan_limits(built, ServingOptions(kept_sequences=3), CONTEXT, None)
    assert (kept.max_sequences, kept.kept_sequences) == (1, 3)
    for given in ({"max_sequences": 5}, {"max_sequences": 3, "kept_sequences": 2}, {"kept_sequences": 4}):
        with pytest.raises(UsageError, match="built for 4 sequences") as caught:
            plan_limits(built, ServingOptions(**given), CONTEXT, None)
        assert "--max-batch" in (caught.value.remedy or "")
    one = dataclasses.replace(manifest, capabilities={**manifest.capabilities, "max_batch": 1})
    assert plan_limits(one, ServingOptions(), CONTEXT, None).num_slots == 1


@pytest.mark.parametrize(
    "given",
    [
        {"max_sequences": 0},
        {"max_sequences": 1.5},
        {"kept_sequences": -1},
        {"max_queue": 0},
        {"max_queue_tokens": "many"},
        {"max_delay_ms": 0},
        {"max_delay_ms": float("nan")},
        {"prefix_cache": "no"},
        {"vision_cache_bytes": -1},
        {"kept_sequences": 4, "prefix_cache": False},
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(demo_engine: Path, given: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        Qwen3VLModel.from_engine(demo_engine, **given)


def test_more_sequences_than_the_memory_holds_are_refused(demo_engine: Path) -> None:
    with pytest.raises(CapacityError, match="KV cache"):
        Qwen3VLModel.from_engine(demo_engine, max_sequences=100_000)


def test_kept_embeddings_leave_room_for_a_sequence(demo_engine: Path, manifest: Manifest) -> None:
    with pytest.raises(CapacityError, match="beside one sequence") as caught:
        Qwen3VLModel.from_engine(demo_engine, vision_cache_bytes=1 << 60)
    assert "lower vision_cache_bytes" in (caught.value.remedy or "")
    room = slot_bytes(manifest) + 1000
    assert plan_limits(manifest, ServingOptions(), CONTEXT, room).vision_cache_bytes == 1000
    assert plan_limits(manifest, ServingOptions(vision_cache_bytes=1000), CONTEXT, room).num_slots == 1
    with pytest.raises(CapacityError, match="vision_cache_bytes = 1001"):
        plan_limits(manifest, ServingOptions(vision_cache_bytes=1001), CONTEXT, room)


@pytest.mark.parametrize(
    ("room_parts", "chunks"),
    [(None, (512, 512)), (0, (512, 512)), (0.99, (1024, 1152)), (1.01, (2048, 2304)), (1000, (2048, 2304))],
)
def test_chunks_are_long_on_a_gpu_whose_memory_allows_it(
    manifest: Manifest, room_parts: float | None, chunks: tuple[int, int]
) -> None:
    context = 1 << 14
    on_gpu = dataclasses.replace(manifest, capabilities={**manifest.capabilities, "device": "gpu"})
    usual, longer = (prefill_bytes(on_gpu, context, tokens) for tokens in (512, 2304))
    needed = 8 * (longer - usual)
    room = None if room_parts is None else int(room_parts * needed)
    limits = plan_limits(on_gpu, ServingOptions(), context, room)
    assert (limits.prefill_chunk, limits.last_chunk) == chunks
    assert limits.logits_chunk == 512, "all logits of a chunk are many bytes"
    if room:
        held = held_bytes(on_gpu, limits)
        assert held[CACHE] + held[EMBEDS] + held[PREFILL] - usual <= room
        assert held[PREFILL] == prefill_bytes(on_gpu, context, chunks[1])
    on_cpu = plan_limits(manifest, ServingOptions(), context, room)
    assert (on_cpu.prefill_chunk, on_cpu.last_chunk) == (512, 512)
    built = dataclasses.replace(on_gpu, capabilities={**on_gpu.capabilities, "prefill_chunk": 256})
    limits = plan_limits(built, ServingOptions(), context, room)
    assert (limits.prefill_chunk, limits.last_chunk) == (256, 256), "what it was built for"


def test_chunks_take_what_is_left_and_nothing_that_was_asked_for(manifest: Manifest) -> None:
    on_gpu = dataclasses.replace(manifest, capabilities={**manifest.capabilities, "device": "gpu"})
    num_slots = 10_000  # of which an eighth is much more than long chunks need
    options = ServingOptions(num_slots - 1, 0, vision_cache_bytes=0)
    room = num_slots * slot_bytes(manifest)
    longer = prefill_bytes(on_gpu, CONTEXT, 2304) - prefill_bytes(on_gpu, CONTEXT, 512)
    assert plan_limits(on_gpu, options, CONTEXT, room - slot_bytes(manifest)).prefill_chunk == 512
    assert plan_limits(on_gpu, options, CONTEXT, room + longer).prefill_chunk == 2048

"""A sliding window with sinks against PyTorch with an explicit mask, and the same comparison where it is broken."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
import runtime.scheduling.sliding
from helpers.serving import WrappedSession, alone, asked, held_until_submitted, watched_logits
from helpers.sliding_reference import (
    PIXELS,
    WINDOW,
    Answered,
    answered,
    distance,
    long_answer,
    windowed,
    with_positions,
)
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.eager import load
from qwen3vl_export.parity.metrics import difference
from runtime.context_room import ContextRoom
from runtime.contract import FloatArray
from runtime.errors import CapacityError, UsageError
from runtime.model import Qwen3VLModel
from runtime.positions import VisualSpan
from runtime.raw_prompt import RawPrompt
from runtime.rotary import moved_keys
from runtime.sessions.ort_cpu import OrtKVCache
from runtime.sliding_window import SlidingWindow, slide

MAX_SCALED = configs.load("tolerances")["fp32"]["logits_scaled"]
LONG = "Say where each of the digits is. "
SHORT, PICTURES, MANY = asked(LONG), asked(LONG * 2, *PIXELS), asked(LONG * 40, *PIXELS[:1])
"""An answer that outgrows the window; a prompt that does, with images that are dropped; one that begins late."""


@pytest.fixture(scope="module")
def torch_model() -> Any:
    return load(Checkpoint.open("demo"))


@pytest.fixture(scope="module")
def opened(demo_engine: Path) -> Iterator[Qwen3VLModel]:
    with Qwen3VLModel.from_engine(demo_engine, max_sequences=1, kept_sequences=0) as model:
        yield model


@pytest.mark.parametrize("prompt", [SHORT, PICTURES, MANY], ids=["answer", "pictures", "begins late"])
def test_the_logits_are_those_of_an_explicit_mask(torch_model: Any, opened: Qwen3VLModel, prompt: Any) -> None:
    model = windowed(opened)
    assert distance(torch_model, model, answered(model, prompt)) < MAX_SCALED
    assert model.statistics()["dropped_rows"] > 0


@pytest.mark.parametrize("sink_tokens", [0, 1, 6])
def test_other_numbers_of_sinks(torch_model: Any, opened: Qwen3VLModel, sink_tokens: int) -> None:
    # Of 6 sinks, two would be of the image.
    window = SlidingWindow(64, sink_tokens)
    model = windowed(opened, window)
    assert distance(torch_model, model, answered(model, PICTURES), window) < MAX_SCALED


def test_positions_go_back_before_the_model_ends(torch_model: Any, opened: Qwen3VLModel) -> None:
    model = windowed(opened, manifest=with_positions(opened.manifest, 112), session=Positions(opened.session))
    assert distance(torch_model, model, answered(model, PICTURES, 200)) < MAX_SCALED
    assert 96 < model.session.highest < 112


def test_positions_go_back_in_the_middle_of_a_wide_image(opened: Qwen3VLModel) -> None:
    wide = [np.full((32, 544, 3), shade, np.uint8) for shade in range(10)]  # 17 tokens side by side
    for most in range(97, 131):
        manifest = with_positions(opened.manifest, most)
        model = windowed(opened, manifest=manifest, session=Positions(opened.session), max_sequences=1)
        model.generate(asked(LONG, *wide), long_answer(model, 2))
        assert model.session.highest < most


class Positions:
    """Notes the highest position of a token."""

    def __init__(self, session: Any) -> None:
        self._session, self.highest = session, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def prefill(self, inputs: Any, *others: Any) -> FloatArray:
        self.highest = max(self.highest, int(inputs.position_ids.max()))
        return self._session.prefill(inputs, *others)

    def decode(self, inputs: Any, *others: Any) -> FloatArray:
        self.highest = max(self.highest, int(inputs.position_ids.max()))
        return self._session.decode(inputs, *others)


def test_until_the_window_is_full_the_bits_are_those_without(opened: Qwen3VLModel) -> None:
    prompt = asked(LONG, 0)
    without = answered(alone(opened), prompt, 40)
    window = SlidingWindow(len(without.ids) - 1)
    model = windowed(opened, window, max_sequences=1, kept_sequences=0, prefix_cache=False, vision_cache_bytes=0)
    found = answered(model, prompt, 40)
    assert found.token_ids == without.token_ids
    np.testing.assert_array_equal(found.logits, without.logits)
    assert model.statistics()["dropped_rows"] == 0
    answered(model, prompt, 41)
    assert model.statistics()["dropped_rows"] == window.block


def test_chunks_and_drafts_change_nothing(opened: Qwen3VLModel) -> None:
    whole = answered(windowed(opened), PICTURES)
    in_chunks = answered(windowed(opened, prefill_chunk=7, last_chunk=7), PICTURES)
    drafted = windowed(opened)
    with_drafts = answered(drafted, PICTURES, prompt_lookup_num_tokens=6)
    for other in (in_chunks, with_drafts):
        assert other.token_ids == whole.token_ids
        assert difference(np.array(other.logits), np.array(whole.logits)).scaled < MAX_SCALED


def test_sequences_beside_each_other_slide_each_for_itself(torch_model: Any, opened: Qwen3VLModel) -> None:
    model = windowed(opened, max_sequences=3)
    prompts = [PICTURES, asked(LONG * 3, PIXELS[2]), SHORT]
    with watched_logits() as found, held_until_submitted(model, 3) as ready, ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(model.generate, each, long_answer(model, 60 + i)) for i, each in enumerate(prompts)]
        assert ready.wait(60)
        for future in futures:
            future.result()
    assert len(found) == 3
    assert model.statistics()["batch_size"]["sum"] > model.statistics()["batch_size"]["count"], "nothing ran together"
    for request, logits in found.items():
        answer = Answered(request.prepared, request.pieces.result.token_ids, logits)
        assert distance(torch_model, model, answer) < MAX_SCALED


class FillsUp(WrappedSession):
    """Runs steps of all slots, as sessions on a GPU fill up a batch."""

    def decode_batch(self, num_sequences: int, num_slots: int) -> int:
        return num_slots

    def decodes_anywhere(self, num_sequences: int) -> bool:
        return False


def test_a_slot_that_was_full_when_its_answer_ended_has_room_for_what_fills_up_a_batch(opened: Qwen3VLModel) -> None:
    model = windowed(opened, session=FillsUp(opened.session), max_sequences=1, kept_sequences=1)
    num_tokens = len(model.prepare(SHORT).prompt.input_ids)
    # The last token of an answer gets no row.
    model.generate(SHORT, long_answer(model, WINDOW.tokens - num_tokens + 1))
    assert model.statistics()["dropped_rows"] == 0
    assert model.generate(PICTURES, long_answer(model, 2)).finish_reason == "length"


def turns(model: Qwen3VLModel, number: int) -> tuple[Any, list[Answered]]:
    """A conversation of so many turns, each with an image."""
    chat, found = model.chat(), []
    for index in range(number):
        with watched_logits() as watched:
            chat.ask(LONG, images=[PIXELS[index % 3]], max_new_tokens=12)
        ((request, logits),) = watched.items()
        found.append(Answered(request.prepared, request.pieces.result.token_ids, logits))
    return chat, found


def test_a_turn_runs_only_what_is_new(torch_model: Any, opened: Qwen3VLModel) -> None:
    model = windowed(opened, max_sequences=1)
    chat, found = turns(model, 30)
    stats = [turn.answer.stats for turn in chat.turns]
    assert stats[-1].prompt_tokens > 5 * WINDOW.tokens
    new = [each.prompt_tokens - each.cached_tokens for each in stats[1:]]
    assert max(new) < 64, new
    assert max(each.peak_cache_bytes for each in stats) == stats[-1].peak_cache_bytes == cache_bytes(model, WINDOW)
    # The rows that were taken over are those that a run of the whole prompt would have.
    assert distance(torch_model, model, found[-1], is_continued=True) < MAX_SCALED


def cache_bytes(model: Qwen3VLModel, window: SlidingWindow) -> int:
    text = model.config.text
    return window.tokens * text.num_layers * 2 * text.num_kv_heads * text.head_dim * 4


def test_a_turn_of_an_engine_that_keeps_no_rows_of_answers(torch_model: Any, opened: Qwen3VLModel) -> None:
    capabilities = {**opened.manifest.capabilities, "prefill_min_tokens": 1}
    model = windowed(opened, manifest=replace(opened.manifest, capabilities=capabilities), max_sequences=1)
    chat, found = turns(model, 12)
    for before, after in itertools.pairwise([turn.answer.stats for turn in chat.turns]):
        assert after.cached_tokens == before.prompt_tokens, "the rows of the prompt alone"
    assert distance(torch_model, model, found[-1], is_continued=True) < MAX_SCALED


def test_a_history_that_differs_before_the_gap_shares_nothing(opened: Qwen3VLModel) -> None:
    model = windowed(opened, max_sequences=1)
    ids = list(model.prepare(asked(LONG * 20)).prompt.input_ids)[:300]
    model.generate(RawPrompt(ids), max_new_tokens=4)
    other = [*ids[:40], ids[40] + 1, *ids[41:]]
    again, differs = (model.generate(RawPrompt([*each, ids[7]]), max_new_tokens=2) for each in (ids, other))
    assert again.stats.cached_tokens == len(ids)
    assert differs.stats.cached_tokens < 40 + 1


def test_a_prompt_that_parts_far_behind_the_gap_is_run_anew(opened: Qwen3VLModel) -> None:
    model = windowed(opened, max_sequences=1)
    ids = list(model.prepare(asked(LONG * 20)).prompt.input_ids)[:300]
    model.generate(RawPrompt(ids), max_new_tokens=2)
    dropped = model.statistics()["dropped_rows"]
    kept_from = 4 + dropped  # the first token behind the gap
    near = model.generate(RawPrompt([*ids[:290], ids[290] + 1, ids[8]]), max_new_tokens=2)
    assert near.stats.cached_tokens == 290
    model.generate(RawPrompt(ids), max_new_tokens=2)
    far = model.generate(RawPrompt([*ids[: kept_from + 20], *ids[9:60]]), max_new_tokens=2)
    assert far.stats.cached_tokens == 0


def test_memory_stays(opened: Qwen3VLModel) -> None:
    model = windowed(opened, max_sequences=1, kept_sequences=1)
    chat, _ = turns(model, 24)
    statistics = model.statistics()
    assert statistics["cache_rows"] <= statistics["slots"] * WINDOW.tokens
    images = [
        part["image"]
        for each in chat.messages
        for part in each["content"]
        if isinstance(part, dict) and part["type"] == "image"
    ]
    held = [image for image in images if image.has_patches]
    assert len(images) == 24 and 0 < len(held) < 24
    assert sum(image.num_visual_tokens for image in held) < 6 * WINDOW.tokens


def test_images_that_the_window_has_passed_for_good_are_refused_where_they_would_be_run(opened: Qwen3VLModel) -> None:
    model = windowed(opened, max_sequences=1)
    chat, _ = turns(model, 24)
    chat.rewind(2)
    with pytest.raises(UsageError, match="pixels of an image of this conversation were given up"):
        chat.ask(LONG)


def test_an_image_among_the_sinks_keeps_its_pixels(opened: Qwen3VLModel) -> None:
    window = SlidingWindow(96, 32)
    model = windowed(opened, window, max_sequences=1, kept_sequences=0, vision_cache_bytes=0)
    chat, found = turns(model, 24)
    assert found[0].prepared.prompt.spans[0].end < window.sink_tokens
    model.generate(SHORT, max_new_tokens=2)  # whose rows take the place of the chat's
    again = chat.ask(LONG, max_new_tokens=2).stats
    assert (again.cached_tokens, again.prompt_tokens > 5 * window.tokens) == (0, True)
    images = [part["image"] for part in chat.messages[0]["content"] if part["type"] == "image"]
    assert all(image.has_patches for image in images)


def test_a_prompt_that_has_room_in_the_window_takes_no_rows_behind_a_gap(opened: Qwen3VLModel) -> None:
    model = windowed(opened, max_sequences=1)
    ids = list(model.prepare(asked(LONG * 20)).prompt.input_ids)[:300]
    for num_tokens, is_exact in ((WINDOW.tokens, True), (WINDOW.tokens + 1, False)):
        model.generate(RawPrompt(ids[: WINDOW.tokens + 4]), max_new_tokens=2)
        again = model.generate(RawPrompt([*ids[: num_tokens - 2], *ids[200:202]]), max_new_tokens=2)
        assert (again.stats.cached_tokens == 0) == is_exact


@pytest.fixture
def other_engine(demo_engine: Path, tmp_path: Path) -> Path:
    """The same engine in another folder."""
    return shutil.copytree(demo_engine, tmp_path / "other", copy_function=os.link)


def test_a_vision_tower_of_another_engine_changes_nothing(demo_engine: Path, other_engine: Path) -> None:
    texts = []
    for route in ({}, {"vision_engine": other_engine}):
        with Qwen3VLModel.from_engine(demo_engine, window=WINDOW.tokens, max_sequences=1, **route) as model:
            answers = [each.answer for each in turns(model, 12)[0].turns]
            assert model.statistics()["dropped_rows"] > 0
        texts.append([each.token_ids for each in answers])
    assert texts[0] == texts[1]


def test_prompts_of_another_engine_are_refused(demo_engine: Path, other_engine: Path) -> None:
    with pytest.raises(UsageError, match="prefill_engine and window are given together") as error:
        Qwen3VLModel.from_engine(demo_engine, window=WINDOW.tokens, prefill_engine=other_engine)
    assert "vision_engine may stay" in error.value.remedy


def test_rows_on_arrays() -> None:
    keys, values = np.random.default_rng(0).standard_normal((2, 2, 3, 20, 8), np.float32)
    theta = 1e4
    # Rows at positions 0 … 19, of which 4 … 9 go.
    rotated = np.stack([moved_keys(keys[..., row, :], row, theta) for row in range(20)], axis=-2)
    kept, kept_values = slide(rotated, values, num_sinks=4, num_dropped=6, num_positions=6, theta=theta)
    rows, positions = [0, 1, 2, 3, *range(10, 20)], [6, 7, 8, 9, *range(10, 20)]
    expected = [moved_keys(keys[..., row, :], position, theta) for row, position in zip(rows, positions, strict=True)]
    np.testing.assert_allclose(kept, np.stack(expected, axis=-2), atol=1e-5)
    np.testing.assert_array_equal(kept_values, values[..., rows, :])


@settings(max_examples=200)
@given(st.data())
def test_no_image_is_cut_and_the_window_is_never_exceeded(data: st.DataObject) -> None:
    window = SlidingWindow(data.draw(st.integers(20, 80)), data.draw(st.integers(0, 4)))
    spans: list[VisualSpan] = []
    for gap, side in data.draw(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=12)):
        tokens = min(side * side, window.max_segment_tokens)
        spans.append(VisualSpan((spans[-1].end if spans else 0) + gap, (1, 1, tokens)))
    window.check_segments(spans)
    sinks, total = window.num_sinks(spans), (spans[-1].end if spans else 0) + 100
    kept = sinks
    for token in range(sinks + 1, total):
        if sinks + token - kept == window.tokens:
            first, kept = kept, window.next_kept(kept, token, spans)
            assert first < kept <= token
        assert sinks + token - kept < window.tokens
        for span in spans:
            assert not span.start < sinks < span.end
            assert not span.start < kept < span.end


def test_bad_requests(opened: Qwen3VLModel) -> None:
    model = windowed(opened, SlidingWindow(24, 4))
    with pytest.raises(CapacityError, match="has 24 visual tokens, and the window of 24 keeps"):
        model.generate(asked(LONG, np.zeros((192, 128, 3), np.uint8)))
    with pytest.raises(UsageError, match="logits needs the rows of all tokens") as error:
        model.logits(SHORT)
    assert error.value.remedy == "open it without window"
    room = ContextRoom(8, model.preparation, window=WINDOW)
    with pytest.raises(CapacityError, match="with a window, the most of both together is 8") as error:
        room.check(model.prepare(SHORT))
    assert error.value.remedy.startswith("begin a new conversation")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, "window = 4 leaves 0 rows beside 4 sinks"),
        ({"window": 19}, "window = 19 leaves 15 rows beside 4 sinks"),
        ({"window": 64, "sink_tokens": 64}, "window = 64 leaves 0 rows beside 64 sinks"),
        ({"window": 4097}, "window = 4097, expected 1 to 4096, what the model was trained for"),
        ({"window": -1}, "window = -1, expected 1 to 4096, what the model was trained for"),
        ({"window": True}, "window = True, expected 1 to 4096"),
        ({"window": 2.5}, "window = 2.5, expected 1 to 4096"),
        ({"window": 64, "sink_tokens": -1}, "sink_tokens = -1, expected 0 to 4096"),
        ({"sink_tokens": 4}, "sink_tokens is of the sliding window, and there is none"),
        ({"window": 64, "max_context": 64}, "max_context and window are given together"),
        ({"window": 64, "visual_token_share": 0.5}, "visual_token_share and window are given together"),
        ({"window": 64, "fit": True}, "fit and window are given together"),
    ],
)
def test_bad_options(demo_engine: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        Qwen3VLModel.from_engine(demo_engine, **options)
    assert message in error.value.message
    assert error.value.remedy


def test_visual_tokens_may_all_stay_in_a_window_but_not_fewer(demo_engine: Path) -> None:
    messages = asked("What is this?", np.zeros((256, 128, 3), np.uint8))
    with Qwen3VLModel.from_engine(demo_engine, window=128, visual_token_share=1) as model:
        assert model.generate(messages, max_new_tokens=1).stats.pruned_tokens == 0
        with pytest.raises(UsageError, match="visual_token_share and window are given together"):
            model.generate(messages, max_new_tokens=1, visual_token_share=0.5)


def test_a_window_beyond_the_capacity_of_an_engine() -> None:
    with pytest.raises(UsageError, match="1 to 64, the capacity that the engine was built with"):
        SlidingWindow.checked(65, None, trained=4096, capacity=64, max_context=None)
    assert SlidingWindow.checked(64, None, trained=4096, capacity=64, max_context=None) == SlidingWindow(64, 4)


def test_opened_by_its_options(demo_engine: Path) -> None:
    with Qwen3VLModel.from_engine(demo_engine, window=64, sink_tokens=2, max_sequences=1, kept_sequences=0) as model:
        assert model.limits.window == SlidingWindow(64, 2)
        assert model.session.new_cache(1).num_bytes * 64 == cache_bytes(model, SlidingWindow(64))
        assert "window=64, sink_tokens=2" in repr(model)
        assert model.generate(SHORT, long_answer(model, 200)).finish_reason == "length"
        assert model.statistics()["cache_rows"] <= 64
        assert model.generate(asked(LONG * 20), max_new_tokens=2).stats.prompt_tokens > 2 * 64


def shifted(moved_keys: Callable[..., FloatArray], change: Callable[[int], int]) -> Callable[..., FloatArray]:
    return lambda keys, num_positions, theta: moved_keys(keys, change(num_positions), theta)


def rows_off_by_one(patch: pytest.MonkeyPatch) -> None:
    move = OrtKVCache.move_rows

    def later(cache: OrtKVCache, slot: int, source: int, target: int, num_rows: int) -> None:
        move(cache, slot, source + 1, target, num_rows - 1)

    patch.setattr(OrtKVCache, "move_rows", later)


def sinks_dropped(patch: pytest.MonkeyPatch) -> None:
    move = OrtKVCache.move_rows

    def over_the_sinks(cache: OrtKVCache, slot: int, source: int, target: int, num_rows: int) -> None:
        move(cache, slot, source - target, 0, num_rows + target)

    patch.setattr(OrtKVCache, "move_rows", over_the_sinks)


def move_wrongly(change: Callable[[int], int]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        wrong = shifted(runtime.scheduling.sliding.moved_keys, change)
        patch.setattr(runtime.scheduling.sliding, "moved_keys", wrong)

    return apply


def window_off_by_one(patch: pytest.MonkeyPatch) -> None:
    room = runtime.scheduling.sliding.Sliding.room
    patch.setattr(runtime.scheduling.sliding.Sliding, "room", lambda each, sequence: room(each, sequence) - 1)


def images_cut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SlidingWindow, "next_kept", lambda window, first, num_done, spans: first + window.block)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "window off by one": window_off_by_one,
    "rows off by one": rows_off_by_one,
    "sinks dropped": sinks_dropped,
    "sinks that keep their distance": move_wrongly(lambda number: number if number < 0 else 0),
    "sinks a position too far": move_wrongly(lambda number: number + 1 if number > 0 else number),
    "keys moved back by a position too few": move_wrongly(lambda number: number + 1 if number < 0 else number),
    "images cut": images_cut,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(torch_model: Any, opened: Qwen3VLModel, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    FAULTS[fault](monkeypatch)
    model = windowed(opened, manifest=with_positions(opened.manifest, 112))
    assert distance(torch_model, model, answered(model, PICTURES, 60)) > 10 * MAX_SCALED

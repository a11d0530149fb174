"""A prompt of which some visual tokens stay: what the decoder gets, caches, conversations, options, refusals."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import PICTURES
from runtime.contract import DecoderInputs
from runtime.errors import CapacityError, UsageError
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.positions import VisualSpan, mrope_positions
from runtime.preparation import Prepared
from runtime.raw_prompt import RawPrompt
from runtime.scheduling.prompt_keys import prompt_keys
from runtime.visual_pruning.choice import choose_visual_tokens
from runtime.visual_pruning.frames import changed_tokens, pixel_changes

pytestmark = pytest.mark.portable

SHARE = 0.5
READ, COUNT = "Read the digits.", "How many digits are there?"
PICTURE = str(PICTURES / "held_out_1.png")


@pytest.fixture(scope="module")
def model(demo_engine: Path) -> Iterator[Qwen3VLModel]:
    with Qwen3VLModel.from_engine(demo_engine, threads=1) as opened:
        yield opened


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def clip() -> np.ndarray:
    """Ten frames, 6 x 4 tokens each, in which a square of one token moves from the third on."""
    frames = np.stack([noise(192, 128)] * 10)
    for number in range(2, 10):
        frames[number, 16 * number : 16 * number + 32, 32:64] = 255 - 20 * number
    return frames


def messages(*parts: Any) -> list[dict[str, Any]]:
    """Return a turn of images, of videos (four dimensions), and of text."""
    content = []
    for each in parts:
        if isinstance(each, np.ndarray) and each.ndim == 4:
            content.append({"type": "video", "video": each, "sample_fps": 2})
        elif isinstance(each, np.ndarray):
            content.append({"type": "image", "image": each})
        else:
            content.append({"type": "text", "text": each})
    return [{"role": "user", "content": content}]


PROMPTS = {
    "image": messages("Look:", noise(256, 320), READ),
    "images": messages(noise(256, 320), "and", noise(96, 96, 1), noise(224, 160, 2), READ),
    "video": messages("Look:", clip(), READ),
    "both": messages(noise(160, 192, 3), clip(), "and", noise(192, 160, 4), READ),
}


def kept_columns(whole: Prepared, embeds: np.ndarray, share: float) -> np.ndarray:
    """Return which tokens of a whole prompt stay, from the plain functions."""
    stays = np.ones(len(whole.prompt.input_ids), bool)
    spans, row = iter(whole.prompt.spans), 0
    for each in whole.inputs:
        segments = getattr(each, "segments", (each,))
        num_tokens = sum(segment.num_visual_tokens for segment in segments)
        num_kept = max(min(num_tokens, 16), math.ceil(share * num_tokens))
        if len(segments) > 1:
            kept = changed_tokens(pixel_changes([segment.pixel_values for segment in segments], 4), num_kept)
        else:
            kept = [choose_visual_tokens(embeds[0, row : row + num_tokens], num_kept)]
        row += num_tokens
        for tokens in kept:
            span = next(spans)
            stays[span.start : span.end] = False
            stays[span.start + tokens] = True
    return np.flatnonzero(stays)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_decoder_gets_columns_of_the_whole_prompt(model: Qwen3VLModel, name: str) -> None:
    """Each token that stays has the id, the positions and the row that it has in the whole prompt."""
    whole, pruned = (model.prepare(PROMPTS[name], visual_token_share=share) for share in (1, SHARE))
    embeds = model.encode_images(whole.images)
    columns = kept_columns(whole, embeds, SHARE)
    expected, found = whole.decoder_inputs(embeds), pruned.decoder_inputs(embeds)
    assert found.input_ids.tolist() == expected.input_ids[:, columns].tolist()
    assert found.position_ids.tolist() == expected.position_ids[:, :, columns].tolist()
    assert found.visual_rows.tolist() == expected.visual_rows[:, columns].tolist()
    assert found.visual_embeds is embeds, "rows and levels are those of the whole image"
    assert found.logits_positions.tolist() == [[len(columns) - 1]]
    # The next token stands where it would in the whole prompt.
    num_whole, num_kept = len(whole.prompt.input_ids), len(columns)
    assert num_kept + pruned.positions.delta == num_whole + whole.positions.delta
    assert pruned.num_pruned_tokens == num_whole - num_kept > 0
    assert pruned.num_visual_tokens == whole.num_visual_tokens - pruned.num_pruned_tokens


@pytest.mark.parametrize("name", PROMPTS)
def test_segments_without_embeddings_are_left_out_at_the_start(model: Qwen3VLModel, name: str) -> None:
    pruned = model.prepare(PROMPTS[name], visual_token_share=SHARE)
    embeds = model.encode_images(pruned.images)
    whole = pruned.decoder_inputs(embeds)
    for num_skipped, span in enumerate(pruned.prompt.spans):
        first = sum(each.num_rows for each in pruned.prompt.spans[:num_skipped])
        found = pruned.decoder_inputs(embeds[:, first:], num_skipped=num_skipped)
        for part, expected in ((found, whole), (found.chunk(span.start, 10**6), whole.chunk(span.start, 10**6))):
            later = slice(span.start, None) if part is found else slice(None)
            assert part.position_ids[:, :, later].tolist() == expected.position_ids[:, :, later].tolist()
            rows, wanted = part.visual_rows[:, later], expected.visual_rows[:, later]
            assert rows.tolist() == np.where(wanted < 0, -1, wanted - first).tolist()


def test_positions_are_open_until_the_embeddings_are_there() -> None:
    grid = (1, 2, 3)
    whole = mrope_positions(12, [VisualSpan(2, grid)])
    open_ = mrope_positions(9, [VisualSpan(2, grid, 3)])
    decided = mrope_positions(9, [VisualSpan(2, grid, (0, 2, 5))])
    columns = [0, 1, 2, 4, 7, *range(8, 12)]
    assert decided.position_ids.tolist() == whole.position_ids[:, :, columns].tolist()
    assert decided.visual_rows.tolist() == [[-1, -1, 0, 2, 5, -1, -1, -1, -1]]
    assert open_.position_ids[:, 0, 2:5].tolist() == [[-1] * 3] * 3
    assert (
        np.delete(open_.position_ids, [2, 3, 4], 2).tolist() == np.delete(decided.position_ids, [2, 3, 4], 2).tolist()
    )
    assert open_.delta == decided.delta == whole.delta + 3


def test_a_prompt_may_end_with_a_pruned_image() -> None:
    grid = (1, 3, 2)
    whole, pruned = mrope_positions(8, [VisualSpan(2, grid)]), mrope_positions(3, [VisualSpan(2, grid, (0,))])
    assert pruned.delta + 3 == whole.delta + 8


def test_small_images_stay_whole(model: Qwen3VLModel) -> None:
    prepared = model.prepare(messages(noise(128, 128), READ), visual_token_share=0.1)
    assert prepared.num_pruned_tokens == 0 and prepared.prompt.spans[0].kept is None


def test_share_1_is_the_prompt_that_it_was(model: Qwen3VLModel) -> None:
    for content in PROMPTS.values():
        plain, one = model.prepare(content), model.prepare(content, visual_token_share=1)
        assert plain.prompt == one.prompt
        assert plain.positions.position_ids.tolist() == one.positions.position_ids.tolist()
        assert prompt_keys(plain).tolist() == prompt_keys(one).tolist()


def test_rows_of_another_share_are_not_taken(model: Qwen3VLModel) -> None:
    keys = {share: prompt_keys(model.prepare(PROMPTS["image"], visual_token_share=share)) for share in (1, 0.5, 0.25)}
    start = model.prepare(PROMPTS["image"]).prompt.spans[0].start
    for share, own in keys.items():
        assert (own[:start] == keys[1][:start]).all()
        for other in keys.keys() - {share}:
            assert (own[start, 1:] != keys[other][start, 1:]).any()


def answered(engine: Path, content: Any, share: float, **options: Any) -> Any:
    """Ask a model that knows nothing of earlier requests."""
    with Qwen3VLModel.from_engine(engine, threads=1, **options) as fresh:
        return fresh.generate(content, max_new_tokens=8, visual_token_share=share)


def test_answers_do_not_depend_on_what_was_asked_before(demo_engine: Path) -> None:
    """Neither on rows of the KV cache nor on embeddings that other shares have left behind."""
    questions = [user_message(text, [PICTURE]) for text in (READ, COUNT)]
    with Qwen3VLModel.from_engine(demo_engine, threads=1) as model:
        for share in (1, SHARE, 0.25, SHARE):
            for content in questions:
                found = model.generate(content, max_new_tokens=8, visual_token_share=share, logprobs=True)
                with Qwen3VLModel.from_engine(demo_engine, threads=1) as fresh:
                    expected = fresh.generate(content, max_new_tokens=8, visual_token_share=share, logprobs=True)
                assert found.token_ids == expected.token_ids
                pairs = zip(found.logprobs, expected.logprobs, strict=True)
                assert all(abs(ours.logprob - theirs.logprob) < 1e-3 for ours, theirs in pairs)


def test_each_turn_runs_what_is_new(model: Qwen3VLModel, demo_engine: Path) -> None:
    chat = model.chat(visual_token_share=SHARE)
    first = chat.ask(READ, images=[PICTURE])
    second = chat.ask(COUNT)
    assert second.stats.cached_tokens >= first.stats.prompt_tokens - 1
    assert first.stats.pruned_tokens == second.stats.pruned_tokens > 0
    assert second.text == answered(demo_engine, chat.messages[:-1], SHARE).text


@pytest.mark.parametrize("share", [SHARE, 1])
def test_rows_of_a_part_of_a_pruned_image_are_not_used(demo_engine: Path, share: float) -> None:
    """A prompt that was dropped in the middle of an image leaves rows, which only a whole image begins with."""
    content = PROMPTS["image"]
    opened = Qwen3VLModel.from_engine(demo_engine, threads=1)
    limits = replace(opened.limits, prefill_chunk=16, last_chunk=16, vision_cache_bytes=0)
    parts = opened.manifest, opened.session, opened.preparation, opened.max_context, opened.max_memory
    num_calls, is_cancelled = 0, threading.Event()
    prefill = opened.session.prefill

    def watched(inputs: DecoderInputs, cache: Any, slot: int = 0) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            is_begun.set()
            assert is_cancelled.wait(120)
        return prefill(inputs, cache, slot)

    is_begun = threading.Event()
    opened.session.prefill = watched  # type: ignore[method-assign]
    with opened, Qwen3VLModel(*parts, limits=limits) as model, ThreadPoolExecutor(1) as reader:
        stream = model.stream(content, max_new_tokens=2, visual_token_share=share)
        read = reader.submit(list, stream)
        assert is_begun.wait(120)
        stream.close()
        is_cancelled.set()
        assert read.result() == []
        found = model.generate(content, max_new_tokens=2, visual_token_share=share)
    span = opened.prepare(content, visual_token_share=share).prompt.spans[0]
    assert found.stats.cached_tokens == (span.start if share < 1 else 32)
    assert found.token_ids == answered(demo_engine, content, share).token_ids[:2]


def test_the_request_beats_the_engine(demo_engine: Path) -> None:
    with Qwen3VLModel.from_engine(demo_engine, threads=1, visual_token_share=0.25) as model:
        counts = [
            model.prepare(PROMPTS["image"], **keywords).num_visual_tokens
            for keywords in ({}, {"visual_token_share": SHARE}, {"visual_token_share": 1}, {"max_pixels": 200_000})
        ]
        assert counts == [20, 40, 80, 20]
        model.generate(PROMPTS["image"], max_new_tokens=1)
        assert model.statistics()["pruned_tokens"] == 60
        logits = model.logits(PROMPTS["image"])
        assert len(logits) == len(model.prepare(PROMPTS["image"]).prompt.input_ids)


def test_a_video_that_fits_when_it_is_pruned_is_taken(demo_engine: Path) -> None:
    with Qwen3VLModel.from_engine(demo_engine, threads=1, max_context=130) as model:
        with pytest.raises(CapacityError, match="120 visual tokens"):
            model.prepare(PROMPTS["video"])
        assert model.prepare(PROMPTS["video"], visual_token_share=0.3).num_visual_tokens == 36


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan"), float("inf"), "0.5", True, [0.5]])
def test_what_is_no_share_is_refused(demo_engine: Path, model: Qwen3VLModel, share: Any) -> None:
    for refused in (
        lambda: Qwen3VLModel.from_engine(demo_engine, visual_token_share=share),
        lambda: model.generate(PROMPTS["image"], visual_token_share=share),
        lambda: model.prepare(PROMPTS["image"], visual_token_share=share),
        lambda: model.chat(visual_token_share=share),
    ):
        with pytest.raises(UsageError, match="visual_token_share must be"):
            refused()


def test_a_raw_prompt_with_segments_is_refused(model: Qwen3VLModel) -> None:
    prepared = model.prepare(PROMPTS["image"])
    raw = RawPrompt(prepared.prompt.input_ids, [(prepared.prompt.spans[0].start, prepared.images[0])])
    assert model.prepare(raw, visual_token_share=1).num_visual_tokens == 80
    with pytest.raises(UsageError, match="visual_token_share and a raw prompt"):
        model.prepare(raw, visual_token_share=SHARE)
    assert model.prepare(RawPrompt("text"), visual_token_share=SHARE).num_visual_tokens == 0


def test_an_engine_on_a_gpu_refuses(gpu_engine: Path) -> None:
    with pytest.raises(UsageError, match="runs on a GPU"):
        Qwen3VLModel.from_engine(gpu_engine, visual_token_share=SHARE)
    with Qwen3VLModel.from_engine(gpu_engine) as model, pytest.raises(UsageError, match="runs on a GPU"):
        model.prepare(PROMPTS["image"], visual_token_share=SHARE)

"""Prompt lookup: what is drafted, how much, and that drafts change no token of an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import runtime.scheduling.worker
from qwen3vl_export.demo import IMAGES
from runtime.contract import DecoderInputs
from runtime.errors import UsageError
from runtime.generation import Drafter, decode_steps, prefill
from runtime.generation_config import GenerationOptions
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.prompt_lookup import DRAFT_COST, NGRAM_SIZES, DraftLength, NgramIndex, PromptLookup
from runtime.sampling import Sampler

NUM_TOKENS = 48
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2}
SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 7}
OPTIONS = {
    "greedy": {},
    "greedy with penalties": PENALTIES,
    "sampled": SAMPLING,
    "sampled with penalties": SAMPLING | PENALTIES,
    "sampled from everything": {"do_sample": True, "top_k": 0, "seed": 3},
}


class Forced:
    """Draft the known next tokens, `size` at a time, wrong ones at the places that `is_right` refuses."""

    def __init__(self, tokens: list[int], size: int, is_right: Callable[[int], bool]) -> None:
        self._tokens, self._size, self._is_right = tokens, size, is_right
        self._next = 0
        self.rooms: list[int] = []
        self.num_drafted = self.num_accepted = 0

    def append(self, token_id: int) -> None:
        self._next += 1

    def draft(self, room: int) -> list[int]:
        self.rooms.append(room)
        places = range(self._next, min(self._next + min(self._size, room), len(self._tokens)))
        return [self._tokens[i] if self._is_right(i) else self._tokens[i] ^ 1 for i in places]


DRAFTERS: dict[str, Callable[[list[int]], Forced]] = {
    "all right": lambda tokens: Forced(tokens, 5, lambda i: True),
    "all wrong": lambda tokens: Forced(tokens, 3, lambda i: False),
    "every third wrong": lambda tokens: Forced(tokens, 7, lambda i: i % 3 > 0),
}


@pytest.fixture(scope="module")
def tiny(tiny_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(tiny_engine, threads=2)


@pytest.fixture(scope="module")
def demo(demo_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(demo_engine, threads=2)


@pytest.fixture
def messages() -> list[dict[str, Any]]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    return user_message("Answer as JSON, and again: answer as JSON.", [noise])


def answer(
    model: Qwen3VLModel, messages: Any, options: dict[str, Any], make: Callable[[list[int]], Drafter] | None = None
) -> tuple[list[int], list[int], list[np.ndarray]]:
    """Return NUM_TOKENS tokens, the number of positions of each decoder call after the prompt, and the keys."""
    prepared = model.prepare(messages)
    ids = prepared.prompt.input_ids
    embeds = model.encode_images(prepared.images)
    cache = model.session.new_cache(len(ids) + NUM_TOKENS)
    logits = prefill(model.session, cache, prepared.decoder_inputs(embeds))[-1]
    sampler = Sampler(GenerationOptions(**options))
    sampler.start(ids)
    sizes: list[int] = []

    class Counting:
        def decode(self, inputs: DecoderInputs, cache: Any) -> np.ndarray:
            sizes.append(inputs.input_ids.shape[1])
            return model.session.decode(inputs, cache)

    drafter = make(ids) if make else None
    steps = decode_steps(
        Counting(), cache, logits, len(ids), prepared.positions.delta, embeds[:, :1], sampler.next, drafter
    )
    tokens = [next(steps) for _ in range(NUM_TOKENS)]
    valid = len(ids) + NUM_TOKENS - 1
    return tokens, sizes, [cache.layer(i)[0][:, :, :valid] for i in range(model.config.text.num_layers)]


@pytest.mark.portable
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("options", OPTIONS)
def test_drafts_change_no_token(tiny: Qwen3VLModel, messages: Any, options: str, drafter: str) -> None:
    plain, plain_sizes, plain_keys = answer(tiny, messages, OPTIONS[options])
    found, sizes, keys = answer(tiny, messages, OPTIONS[options], lambda _: DRAFTERS[drafter](plain))
    assert found == plain
    assert plain_sizes == [1] * (NUM_TOKENS - 1)
    # The last token is never drafted: the call before it would only give logits that nobody asks for.
    if drafter == "all right":
        assert sizes == [6] * 7 + [5]
    elif drafter == "all wrong":
        assert sizes == [4] * 44 + [3, 2, 1]
    else:
        assert len(sizes) < NUM_TOKENS / 2
    for found_key, plain_key in zip(keys, plain_keys, strict=True):
        np.testing.assert_allclose(found_key, plain_key, atol=1e-4)


@pytest.mark.portable
@pytest.mark.parametrize("options", OPTIONS)
def test_lookup_changes_no_token(tiny: Qwen3VLModel, messages: Any, options: str) -> None:
    lookups = []

    def make(ids: list[int]) -> PromptLookup:
        lookups.append(PromptLookup(ids, 10))
        return lookups[0]

    plain, _, _ = answer(tiny, messages, OPTIONS[options])
    found, sizes, _ = answer(tiny, messages, OPTIONS[options], make)
    assert found == plain
    (lookup,) = lookups
    assert sum(sizes) == len(sizes) + lookup.num_drafted
    # Each call gives one token beside the accepted ones, and the first token comes from the prompt.
    assert 1 + len(sizes) + lookup.num_accepted == NUM_TOKENS


@pytest.mark.portable
def test_a_draft_is_compared_with_what_is_chosen(tiny: Qwen3VLModel, messages: Any) -> None:
    """A loop that trusted its drafts would follow these."""
    plain, _, _ = answer(tiny, messages, {})
    other = [token ^ 1 for token in plain]
    found, _, _ = answer(tiny, messages, {}, lambda _: Forced(other, 5, lambda i: True))
    assert found == plain != other


@pytest.mark.portable
def test_room_is_what_the_cache_still_takes(tiny: Qwen3VLModel, messages: Any) -> None:
    plain, _, _ = answer(tiny, messages, {})
    drafter = Forced(plain, 1000, lambda i: i < 10)
    answer(tiny, messages, {}, lambda _: drafter)
    # Nine drafts after the first token are right, then each call gives one token.
    assert drafter.rooms == [NUM_TOKENS - 2, *range(NUM_TOKENS - 12, -1, -1)]


def brute_force_following(ids: list[int], num_tokens: int) -> list[int]:
    for size in NGRAM_SIZES:
        for start in range(len(ids) - size - 1, -1, -1):
            if len(ids) > size and ids[start : start + size] == ids[-size:]:
                longer = list(ids)
                for i in range(num_tokens):
                    longer.append(longer[start + size + i])
                return longer[len(ids) :]
    return []


@pytest.mark.portable
@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=20), st.integers(0, 12))
def test_index_equals_a_search(prompt: list[int], later: list[int], num_tokens: int) -> None:
    index = NgramIndex(prompt)
    for token in later:
        index.append(token)
    assert index.following(num_tokens) == brute_force_following(prompt + later, num_tokens)


@pytest.mark.portable
def test_index_by_example() -> None:
    assert NgramIndex([1, 2, 3, 4, 9, 1, 2]).following(3) == [3, 4, 9]
    assert NgramIndex([1, 2, 3, 9, 1, 2, 4, 9, 1, 2]).following(1) == [4]
    assert NgramIndex([5, 1, 2, 3, 6, 1, 2, 4, 5, 1, 2]).following(1) == [3]
    assert NgramIndex([7, 8, 7, 8, 7]).following(4) == [8, 7, 8, 7]
    assert NgramIndex([1, 2, 3]).following(4) == []


@pytest.mark.portable
def test_image_tokens_are_never_drafted() -> None:
    prompt = [1, 2, 3, 99, 99, 99, 4, 1]
    lookup = PromptLookup(prompt, 5, never=[99])
    lookup.length.rate = 1.0
    lookup.append(2)
    assert lookup.draft(10) == [3]
    everything = PromptLookup(prompt, 5)
    everything.length.rate = 1.0
    everything.append(2)
    assert everything.draft(10) == [3, 99, 99, 99, 4]


@pytest.mark.portable
def test_lookup_counts_what_came_true() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 1], 4)
    lookup.length.rate = 0.9
    lookup.append(2)
    assert lookup.draft(10) == [3, 4, 5, 6]
    for token in (3, 4, 7):
        lookup.append(token)
    assert (lookup.num_drafted, lookup.num_accepted) == (4, 2)
    assert lookup.length.rate == pytest.approx(((0.9 * 0.8 + 0.2) * 0.8 + 0.2) * 0.8)
    lookup.append(6)  # stood in the draft, after the rejected token
    assert (lookup.num_drafted, lookup.num_accepted) == (4, 2)


@pytest.mark.portable
def test_draft_keeps_to_its_limits() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 8, 1, 2], 4)
    lookup.length.rate = 1.0
    assert [len(lookup.draft(room)) for room in (10, 3, 1, 0)] == [4, 3, 1, 0]


@pytest.mark.portable
@pytest.mark.parametrize("rate", np.linspace(DRAFT_COST + 0.01, 1.0, 23))
@pytest.mark.parametrize("limit", [1, 3, 10, 64])
def test_length_gives_most_tokens_at_its_cost(rate: float, limit: int) -> None:
    length = DraftLength()
    length.rate = rate
    tokens_per_cost = [sum(rate**i for i in range(k + 1)) / (1 + DRAFT_COST * k) for k in range(limit + 1)]
    assert length.next(limit) == int(np.argmax(tokens_per_cost))


def drafted_when_all_is_wrong(num_calls: int) -> int:
    length, total = DraftLength(), 0
    for _ in range(num_calls):
        num_drafted = length.next(10)
        total += num_drafted
        if num_drafted:
            length.judge(False)
    return total


@pytest.mark.portable
def test_wrong_drafts_cost_the_logarithm_of_the_answer() -> None:
    counts = [drafted_when_all_is_wrong(num_calls) for num_calls in (256, 512, 1024, 2048, 4096)]
    # 3 % of 256 calls, were each drafted token to cost DRAFT_COST of a call; then at most one probe a doubling.
    assert counts[0] * DRAFT_COST < 0.03 * 256
    assert all(0 <= later - earlier <= 1 for earlier, later in pairwise(counts))


@pytest.mark.portable
def test_length_recovers_when_the_text_begins_to_repeat() -> None:
    length = DraftLength()
    for _ in range(200):
        if length.next(10):
            length.judge(False)
    calls = 0
    while (num_drafted := length.next(10)) < 10:
        calls += 1
        for _ in range(num_drafted):
            length.judge(True)
    assert calls < 100


# Through `generate`


def question(index: int = 3) -> list[dict[str, Any]]:
    entry = json.loads((IMAGES / "truth.json").read_text())[index]
    return user_message(entry["question"], [IMAGES / entry["file"]])


def generate_with_lookup(model: Qwen3VLModel, messages: Any, **options: Any) -> tuple[Any, Any]:
    plain = model.generate(messages, **options)
    return plain, model.generate(messages, prompt_lookup_num_tokens=10, **options)


@pytest.mark.portable
@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "seed": 5}, PENALTIES], ids=["greedy", "sampled", "penalties"]
)
def test_answers_are_the_same(demo: Qwen3VLModel, index: int, options: dict[str, Any]) -> None:
    plain, found = generate_with_lookup(demo, question(index), **options)
    assert (found.text, found.token_ids, found.finish_reason) == (plain.text, plain.token_ids, plain.finish_reason)
    assert plain.stats.drafted_tokens == plain.stats.accepted_tokens == 0
    assert 0 <= found.stats.accepted_tokens <= found.stats.drafted_tokens


@pytest.mark.portable
@pytest.mark.parametrize("stop", [(), ("igits",), ('":[', "3,"), ("}",)])
def test_an_answer_ends_inside_an_accepted_draft(
    demo: Qwen3VLModel, monkeypatch: pytest.MonkeyPatch, stop: tuple[str, ...]
) -> None:
    whole = demo.generate(question()).token_ids
    plain = demo.generate(question(), stop=stop)
    assert plain.finish_reason == ("stop" if stop else "eos")
    drafter = Forced([*whole, 5, 6, 7], 30, lambda i: True)
    monkeypatch.setattr(runtime.scheduling.worker, "PromptLookup", lambda *_: drafter)
    found = demo.generate(question(), stop=stop, prompt_lookup_num_tokens=30)
    assert (found.text, found.token_ids, found.finish_reason) == (plain.text, plain.token_ids, plain.finish_reason)
    assert len(drafter.rooms) == 1  # one call gave the whole answer, and the tokens after its end were dropped


@pytest.mark.portable
def test_an_answer_ends_at_its_limit_inside_an_accepted_draft(tiny: Qwen3VLModel, messages: Any) -> None:
    for limit in (1, 2, 3, 17):
        plain, found = generate_with_lookup(tiny, messages, max_new_tokens=limit, eos_token_id=())
        assert found.token_ids == plain.token_ids and len(found.token_ids) == limit


@pytest.mark.portable
def test_lookup_counts_reach_the_statistics(tiny: Qwen3VLModel, messages: Any) -> None:
    _, found = generate_with_lookup(tiny, messages, max_new_tokens=64, eos_token_id=())
    assert 0 < found.stats.accepted_tokens <= found.stats.drafted_tokens


@pytest.mark.portable
def test_drafts_never_reach_the_decoder_of_prompts(
    tiny: Qwen3VLModel, messages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine may run prompts in other weights: those go through `prefill`, drafts through `decode`."""
    num_prompt_tokens = len(tiny.prepare(messages).prompt.input_ids)
    sizes: dict[str, list[int]] = {"prefill": [], "decode": []}

    def counted(name: str) -> Callable[..., np.ndarray]:
        whole = getattr(tiny.session, name)

        def call(inputs: DecoderInputs, *rest: Any) -> np.ndarray:
            sizes[name].append(inputs.input_ids.shape[1])
            return whole(inputs, *rest)

        return call

    for name in sizes:
        monkeypatch.setattr(tiny.session, name, counted(name))
    stats = tiny.generate(messages, max_new_tokens=64, eos_token_id=(), prompt_lookup_num_tokens=10).stats
    assert sum(sizes["prefill"]) == num_prompt_tokens - stats.cached_tokens
    assert 4 < max(sizes["decode"]) <= 11


@pytest.mark.portable
@pytest.mark.parametrize("value", [-1, 65, 2.5, True])
def test_a_length_that_makes_no_sense_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="prompt_lookup_num_tokens"):
        GenerationOptions(prompt_lookup_num_tokens=value)


@pytest.mark.portable
def test_the_option_of_a_saved_configuration_is_read() -> None:
    read = GenerationOptions.from_generation_config
    assert read({"prompt_lookup_num_tokens": None}).prompt_lookup_num_tokens == 0
    assert read({"prompt_lookup_num_tokens": 8}).replace(prompt_lookup_num_tokens=0).prompt_lookup_num_tokens == 0

"""Sequences that share an engine against PyTorch alone, logits by logits; and the same gate on engines that are broken.

What the runtime adds to the graphs is compared: batches, chunks, moves between slots, rows and embeddings that are
used again. The references are those of `qwen3vl verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import configs
import runtime.scheduling.sequence
from helpers.serving import WrappedSession, asked, held_until_submitted, serving, watched_logits
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.eager import load
from qwen3vl_export.parity.metrics import difference
from qwen3vl_export.parity.own_reference import OwnReference
from qwen3vl_export.parity.reference import Reference
from qwen3vl_export.parity.transformers_reference import TransformersReference
from qwen3vl_export.parity.verify import PLAIN_GREEDY
from runtime.contract import DecoderInputs, FloatArray
from runtime.model import Qwen3VLModel
from runtime.scheduling.prompt_keys import prompt_keys, text_keys
from runtime.scheduling.request import Request
from runtime.scheduling.sequence import Sequence
from runtime.scheduling.slots import Slots
from runtime.stream import Stream

LIMITS = configs.load("tolerances")["fp32"]
MAX_CONTEXT = 512
NUM_TOKENS = 8
_PIXELS = np.random.default_rng(0).integers(0, 256, (2, 96, 64, 3), np.uint8)
LONG = "Say where each of the digits is. " * 12
SYSTEM = {"role": "system", "content": "You look at pictures of digits and answer with as few words as you can."}


@dataclass(frozen=True)
class Watched:
    """What a request gave: its prompt, the tokens of its answer, and the logits that each was chosen from."""

    messages: list[dict[str, Any]]
    token_ids: list[int]
    logits: list[FloatArray]


class Gate:
    """Compares with a reference, whose outputs are kept.

    Args:
        reference: In PyTorch.
        prepare: Makes a prompt of messages.
    """

    def __init__(self, reference: Reference, prepare: Callable[[Any], Any]) -> None:
        self._reference = reference
        self._prepare = prepare
        self._outputs: dict[str, tuple[list[int], FloatArray]] = {}

    def excess(self, watched: Watched) -> float:
        """Return the largest difference of two logits, in units of its limit; infinite where another token is chosen.

        Tokens are compared up to the first that differs at a near-tie.
        """
        tokens, expected = self._expected(watched.messages, len(watched.token_ids))
        worst = 0.0
        for found, token, right_token, right in zip(watched.logits, watched.token_ids, tokens, expected, strict=False):
            worst = max(worst, difference(found, right).scaled / LIMITS["logits_scaled"])
            if token != right_token:
                is_tie = right.max() - right[token] <= LIMITS["near_tie_gap"]
                return worst if is_tie else float("inf")
        return worst

    def _expected(self, messages: list[dict[str, Any]], num_tokens: int) -> tuple[list[int], FloatArray]:
        key = repr(messages)
        if key not in self._outputs or len(self._outputs[key][0]) < num_tokens:
            output = self._reference.run(self._prepare(messages), num_tokens)
            self._outputs[key] = output.tokens, output.step_logits
        return self._outputs[key]


@pytest.fixture(scope="module")
def opened(demo_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(demo_engine, threads=1)


@pytest.fixture(
    scope="module",
    params=["own", pytest.param("transformers", marks=pytest.mark.judge)],
)
def gate(request: pytest.FixtureRequest, opened: Qwen3VLModel) -> Gate:
    checkpoint = Checkpoint.open("demo")
    if request.param == "own":
        return Gate(OwnReference(load(checkpoint)), opened.prepare)
    pytest.importorskip("transformers")
    return Gate(TransformersReference(checkpoint), opened.prepare)


@pytest.fixture(scope="module")
def own_gate(opened: Qwen3VLModel) -> Gate:
    return Gate(OwnReference(load(Checkpoint.open("demo"))), opened.prepare)


def answers(model: Qwen3VLModel, prompts: list[list[dict[str, Any]]], num_tokens: int | list[int]) -> list[Watched]:
    """Run prompts side by side to so many greedy tokens and watch each."""
    counts = [num_tokens] * len(prompts) if isinstance(num_tokens, int) else num_tokens
    options = [model.defaults.replace(max_new_tokens=count) for count in counts]
    with watched_logits() as watched, held_until_submitted(model, len(prompts)):
        outcomes = model.generate_batch(prompts, options, **PLAIN_GREEDY)
    found = []
    for messages, outcome in zip(prompts, outcomes, strict=True):
        assert not isinstance(outcome, Exception), outcome
        found.append(Watched(messages, outcome.token_ids, logits_of(model, messages, watched)))
    return found


def logits_of(
    model: Qwen3VLModel, messages: list[dict[str, Any]], watched: dict[Request, list[FloatArray]]
) -> list[FloatArray]:
    """Return what was watched of the one request with these messages."""
    wanted = prompt_keys(model.prepare(messages))
    (found,) = (logits for request, logits in watched.items() if np.array_equal(prompt_keys(request.prepared), wanted))
    return found


# Each scenario runs on a model and returns what it watched.


def unequal_batch(model: Qwen3VLModel) -> list[Watched]:
    """Prompts of many lengths, without, with one and with three images of different sizes, that end at other times."""
    prompts = [
        asked("Read the digits.", 0),
        asked(LONG),
        asked("Answer as JSON.", 3, _PIXELS[0], 1),
        asked("Hi"),
        asked("How many digits are there?", _PIXELS[1]),
    ]
    found = answers(model, prompts, [10, 40, 30, 20, 30])
    statistics = model.statistics()
    assert statistics["batch_size"]["sum"] > 1.5 * statistics["batch_size"]["count"], "they did not run side by side"
    return found


def prefix_hit(model: Qwen3VLModel) -> list[Watched]:
    """The same prompt again, one that goes on otherwise after the image, and one that has another image there."""
    first = answers(model, [[SYSTEM, *asked("Read the digits.", _PIXELS[0])]], NUM_TOKENS)
    others = [
        [SYSTEM, *asked("How many digits are there?", _PIXELS[0])],
        [SYSTEM, *asked("Read the digits.", _PIXELS[1])],
        [SYSTEM, *asked("Read the digits.", _PIXELS[0], 3)],
    ]
    found = first + answers(model, others, NUM_TOKENS)
    assert model.statistics()["prefix_hits"] >= len(others)
    return found


def second_turn(model: Qwen3VLModel) -> list[Watched]:
    """A second turn with a new image, and a third, each as messages."""
    messages = asked("Read the digits.", 0)
    found = []
    for number in (3, 5):
        reply = model.generate(messages)
        messages = [*messages, {"role": "assistant", "content": reply.text}, *asked("Answer as JSON.", number)]
        cached = model.statistics()["cached_tokens"]
        found += answers(model, [messages], NUM_TOKENS)
        rows = reply.stats.prompt_tokens + reply.stats.new_tokens - 1
        assert model.statistics()["cached_tokens"] - cached == rows, "the earlier turn was not found"
    return found


def cancelled_neighbour(model: Qwen3VLModel) -> list[Watched]:
    """Sequences beside one that is cancelled once all three decode; its place is taken by the last."""
    prompts = [asked("Answer as JSON.", 3), asked("Tell me.", _PIXELS[0]), asked(LONG)]
    streams = [
        model.stream(messages, max_new_tokens=count, **PLAIN_GREEDY)
        for messages, count in zip(prompts, (300, 30, 24), strict=True)
    ]
    decode, batches = model.session.decode, []

    def cancelling(inputs: DecoderInputs, *arguments: Any) -> FloatArray:
        logits = decode(inputs, *arguments)
        batches.append(len(inputs.input_ids))
        if batches[-1] == 3:
            streams[0].close()
        return logits

    with pytest.MonkeyPatch.context() as patch, watched_logits() as watched, ThreadPoolExecutor(2) as pool:
        patch.setattr(model.session, "decode", cancelling)
        next(streams[0])  # it decodes, so its place is the first
        ended = list(pool.map(Stream.wait, streams[1:]))
    assert batches.count(3) == 1, "it was cancelled beside both"
    return [
        Watched(messages, each.token_ids, logits_of(model, messages, watched))  # type: ignore[union-attr]
        for messages, each in zip(prompts[1:], ended, strict=True)
    ]


def rewound_and_forked(model: Qwen3VLModel) -> list[Watched]:
    """A conversation that goes on otherwise, with a new image, after a rewind; and a fork that kept the turn."""
    chat = model.chat(max_new_tokens=NUM_TOKENS, **PLAIN_GREEDY)
    chat.ask("Read the digits.", images=[_PIXELS[0]])
    chat.ask("How many digits are there?")
    fork = chat.fork()
    chat.rewind(1)
    found = []
    for each, images in ((chat, [_PIXELS[1]]), (fork, []), (chat, [])):
        with watched_logits() as watched:
            answer = each.ask("Answer as JSON.", images=images)
        assert answer.stats.cached_tokens > each.turns[0].answer.stats.prompt_tokens, "the first turn was not found"
        messages = each.messages[:-1]
        found.append(Watched(messages, answer.token_ids, logits_of(model, messages, watched)))
    return found


SCENARIOS = [unequal_batch, prefix_hit, second_turn, cancelled_neighbour, rewound_and_forked]


def worst_excess(gate: Gate, found: list[Watched]) -> float:
    return max(gate.excess(each) for each in found)


@pytest.mark.portable
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.__name__)
def test_sequences_agree_with_pytorch(
    opened: Qwen3VLModel, gate: Gate, scenario: Callable[[Qwen3VLModel], list[Watched]]
) -> None:
    model = serving(opened, max_context=MAX_CONTEXT, max_sequences=5)
    found = scenario(model)
    model.close()
    assert all(len(each.logits) == len(each.token_ids) > 1 for each in found)
    assert worst_excess(gate, found) <= 1


@pytest.mark.portable
@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_prompts_in_chunks_agree_with_pytorch(opened: Qwen3VLModel, gate: Gate, chunk: int) -> None:
    model = serving(opened, max_context=MAX_CONTEXT, prefill_chunk=chunk, logits_chunk=chunk)
    prompts = [asked("Answer as JSON.", 3, _PIXELS[0]), asked("Read the digits.", _PIXELS[1])]
    found = answers(model, prompts, NUM_TOKENS)
    statistics = model.statistics()
    model.close()
    assert statistics["chunk_tokens"]["sum"] == statistics["prompt_tokens"] - statistics["cached_tokens"]
    assert statistics["chunk_tokens"]["sum"] <= chunk * statistics["chunk_tokens"]["count"]
    assert worst_excess(gate, found) <= 1


@pytest.fixture
def broken(opened: Qwen3VLModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Broken]:
    yield Broken(opened, monkeypatch)


class Broken:
    """What a sabotage works on: it wraps the session, or patches a public method; and the model that it makes."""

    def __init__(self, opened: Qwen3VLModel, patch: pytest.MonkeyPatch) -> None:
        self.session = WrappedSession(opened.session)
        self.patch = patch
        self.limits: dict[str, Any] = {"max_context": MAX_CONTEXT, "max_sequences": 5}
        self._opened = opened

    @property
    def model(self) -> Qwen3VLModel:
        return serving(self._opened, session=self.session, **self.limits)

    def change_call(self, name: str, change: Callable[[DecoderInputs], DecoderInputs]) -> None:
        """Alter the inputs of calls of `prefill` or `decode`."""
        whole = getattr(self.session.wrapped, name)

        def call(inputs: DecoderInputs, cache: Any, slot: int = 0) -> FloatArray:
            found: FloatArray = whole(change(inputs), cache, slot)
            return found

        setattr(self.session, name, call)


def lengths_turned(broken: Broken) -> None:
    """In a batch, each sequence sees as many rows as its neighbour has."""
    broken.change_call("decode", lambda inputs: replace(inputs, past_lengths=np.roll(inputs.past_lengths, 1)))


def slots_swapped(broken: Broken) -> None:
    """A sequence is moved, but its rows stay."""
    new_cache = broken.session.wrapped.new_cache

    def without_moves(capacity: int, batch: int = 1) -> Any:
        cache = new_cache(capacity, batch)
        for name in ("swap_rows", "copy_rows"):
            broken.patch.setattr(cache, name, lambda *_: None)
        return cache

    broken.session.new_cache = without_moves  # type: ignore[attr-defined]


def keys_without_pixels(broken: Broken) -> None:
    """Rows are found by token ids alone, and all images have one id."""
    broken.patch.setattr(
        runtime.scheduling.sequence, "prompt_keys", lambda prepared: text_keys(prepared.prompt.input_ids)
    )


def delta_of_the_first_image(broken: Broken) -> None:
    """A turn's tokens are numbered as if only the first image had come before them."""

    start = Sequence.start

    def start_with_less(sequence: Sequence, *arguments: Any) -> None:
        start(sequence, *arguments)
        first = sequence.request.prepared.prompt.spans[:1]
        sequence.delta = sum(max(span.merged_grid_thw) - span.num_tokens for span in first)

    broken.patch.setattr(Sequence, "start", start_with_less)


def deepstack_shifted(broken: Broken) -> None:
    """In a chunk behind the first, the levels after level 0 are one row off."""

    def change(inputs: DecoderInputs) -> DecoderInputs:
        if not inputs.past_lengths.any():
            return inputs
        embeds = inputs.visual_embeds.copy()
        embeds[1:] = np.roll(embeds[1:], 1, axis=1)
        return replace(inputs, visual_embeds=embeds)

    broken.limits["prefill_chunk"] = 24
    broken.change_call("prefill", change)


def rows_overstated(broken: Broken) -> None:
    """A sequence that ends leaves its slot with one row more than it wrote."""
    leave = Slots.leave

    def leave_more(slots: Slots, owner: Any, keys: Any) -> None:
        if keys is not None:
            slots.write(owner, min(len(keys), slots.num_rows(slots.place(owner)) + 1))
        leave(slots, owner, keys)

    broken.patch.setattr(Slots, "leave", leave_more)


def stale_second_turn(model: Qwen3VLModel) -> list[Watched]:
    """A second turn behind the whole answer of the first, its end token included, whose row was never written."""
    messages = asked("Read the digits.", 0)
    reply = model.generate(messages)
    messages = [*messages, {"role": "assistant", "content": reply.text}, *asked("Answer as JSON.", 3)]
    return answers(model, [messages], NUM_TOKENS)


SABOTAGES: list[tuple[Callable[[Broken], None], Callable[[Qwen3VLModel], list[Watched]]]] = [
    (lengths_turned, unequal_batch),
    (slots_swapped, unequal_batch),
    (slots_swapped, cancelled_neighbour),
    (keys_without_pixels, prefix_hit),
    (delta_of_the_first_image, second_turn),
    (deepstack_shifted, unequal_batch),
    (rows_overstated, stale_second_turn),
]


@pytest.mark.portable
@pytest.mark.parametrize(("sabotage", "scenario"), SABOTAGES, ids=lambda each: each.__name__)
def test_the_gate_notices(
    broken: Broken,
    own_gate: Gate,
    sabotage: Callable[[Broken], None],
    scenario: Callable[[Qwen3VLModel], list[Watched]],
) -> None:
    unbroken = broken.model
    assert worst_excess(own_gate, scenario(unbroken)) <= 1
    unbroken.close()
    sabotage(broken)
    model = broken.model
    excess = worst_excess(own_gate, scenario(model))
    model.close()
    print(f"{excess:.3g} times the limit")  # pytest -rP shows the margin
    # Well past the limit: a fault that just passes it would be noticed by luck.
    assert excess > 5

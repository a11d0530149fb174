"""Log probabilities, biases, and several answers to one prompt."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.serving import asked
from runtime.answer import Generation
from runtime.choices import mean_logprob
from runtime.errors import UsageError
from runtime.model import Qwen3VLModel

HOT: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def model(demo_engine: Path) -> Iterator[Qwen3VLModel]:
    with Qwen3VLModel.from_engine(demo_engine, threads=1, max_context=512, max_sequences=4) as opened:
        yield opened


def reference(model: Qwen3VLModel, prompt: str, answer: Generation) -> list[list[float]]:
    """Return the log probabilities after each prefix, token by token, as plain Python computes them."""
    rows = []
    text_ids = model.prepare(prompt).prompt.input_ids
    for i in range(len(answer.token_ids)):
        logits = _logits_after(model, [*text_ids, *answer.token_ids[:i]])
        largest = max(logits)
        total = math.fsum(math.exp(each - largest) for each in logits)
        rows.append([each - largest - math.log(total) for each in logits])
    return rows


def _logits_after(model: Qwen3VLModel, token_ids: list[int]) -> list[float]:
    from runtime.contract import DecoderInputs, no_visual_embeds

    ids = np.array([token_ids], np.int64)
    last = np.array([[len(token_ids) - 1]])
    inputs = DecoderInputs.text(ids, np.zeros(1, np.int64), no_visual_embeds(model.config), logits_positions=last)
    cache = model.session.new_cache(len(token_ids), 1)
    return [float(each) for each in model.session.prefill(inputs, cache)[0, -1]]


def check_logprobs(model: Qwen3VLModel, prompt: str, answer: Generation, num_top: int) -> None:
    assert answer.logprobs is not None
    assert [each.token_id for each in answer.logprobs] == list(answer.token_ids)
    for noted, row in zip(answer.logprobs, reference(model, prompt, answer), strict=True):
        assert noted.logprob == pytest.approx(row[noted.token_id], abs=2e-3)
        assert noted.token_bytes == model.tokenizer.token_bytes(noted.token_id)
        assert [each.logprob for each in noted.top] == pytest.approx(sorted(row)[::-1][:num_top], abs=2e-3)


@pytest.mark.parametrize(
    "options", [{}, {**HOT, "seed": 2}, {"prompt_lookup_num_tokens": 6}, {"repetition_penalty": 1.4}]
)
def test_logprobs_are_those_of_the_model(model: Qwen3VLModel, options: dict[str, Any]) -> None:
    prompt = "one two one two one two"
    answer = model.generate(prompt, logprobs=True, top_logprobs=4, **{"max_new_tokens": 12, **options})
    check_logprobs(model, prompt, answer, 4)


def test_logprobs_of_the_token_before_are_found(model: Qwen3VLModel) -> None:
    prompt = "one two one two"
    answer = model.generate(prompt, logprobs=True, **HOT, seed=3, eos_token_ids=())
    assert answer.logprobs is not None
    values = [each.logprob for each in answer.logprobs]
    moved = [
        replace(each, logprob=value) for each, value in zip(answer.logprobs, [*values[1:], values[0]], strict=True)
    ]
    with pytest.raises(AssertionError):
        check_logprobs(model, prompt, replace(answer, logprobs=tuple(moved)), 0)


def test_logprobs_in_a_batch_are_those_alone(model: Qwen3VLModel) -> None:
    prompts = ["Hi", "one two", "Read the digits"]
    together = model.generate_batch(prompts, logprobs=True, max_new_tokens=6, eos_token_ids=())
    for prompt, answer in zip(prompts, together, strict=True):
        assert isinstance(answer, Generation)
        check_logprobs(model, prompt, answer, 0)
    assert model.generate("Hi", max_new_tokens=2).logprobs is None


def test_biases_ban_and_force(model: Qwen3VLModel) -> None:
    first = model.generate("Hi", max_new_tokens=1).token_ids[0]
    assert model.generate("Hi", max_new_tokens=1, logit_bias={first: -100}).token_ids[0] != first
    for options in ({}, {"do_sample": True, "seed": 1, "temperature": 1.5}):
        assert model.generate("Hi", max_new_tokens=3, logit_bias={"70": 100}, **options).token_ids == [70] * 3
    for bad in ({10_000: 1.0}, {1: 101}, {"a": 1}, {-1: 1}, {1: math.nan}, [1]):
        with pytest.raises(UsageError, match="logit_bias"):
            model.generate("Hi", logit_bias=bad)


def test_n_answers_are_those_of_their_seeds_and_share_the_prompt(model: Qwen3VLModel) -> None:
    messages = asked("Read the digits.", 0)
    answer = model.generate(messages, n=3, seed=5, **HOT)
    alone = [model.generate(messages, seed=5 + i, **HOT).token_ids for i in range(3)]
    assert [each.token_ids for each in answer.choices] == alone
    assert answer.token_ids == alone[0]
    assert all(each.stats.cached_tokens for each in answer.choices[1:])
    again = asyncio.run(model.agenerate(messages, n=3, seed=5, **HOT))
    assert [each.token_ids for each in again.choices] == alone


def test_best_of_gives_the_likeliest(model: Qwen3VLModel) -> None:
    all_of_them = [model.generate("Hi", seed=i, logprobs=True, **HOT) for i in range(5)]
    ranked = sorted(all_of_them, key=mean_logprob, reverse=True)
    assert len({mean_logprob(each) for each in ranked}) > 1
    best = model.generate("Hi", n=2, best_of=5, seed=0, **HOT)
    assert [each.token_ids for each in best.choices] == [each.token_ids for each in ranked[:2]]
    assert best.logprobs is None


def test_several_answers_are_refused_where_there_is_one(model: Qwen3VLModel) -> None:
    with pytest.raises(UsageError, match="greedy"):
        model.generate("Hi", n=2)
    with pytest.raises(UsageError, match="less than n"):
        model.generate("Hi", n=3, best_of=2, do_sample=True)
    with pytest.raises(UsageError, match="top_logprobs"):
        model.generate("Hi", top_logprobs=2)
    for call in (
        lambda: model.stream("Hi", n=2, do_sample=True),
        lambda: model.generate("Hi", n=2, do_sample=True, on_piece=print),
        lambda: model.chat(n=2, do_sample=True).ask("Hi"),
    ):
        with pytest.raises(UsageError, match="one answer"):
            call()

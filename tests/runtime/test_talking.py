"""Thoughts, calls and loops on an engine: budgets in its cache, conversations that go on, streams of pieces."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import judge
from helpers.answers import TOKENIZER, TOOLS, check_pieces
from helpers.scripted import Scripted
from helpers.tokenizer_fixture import INSTRUCT_TEMPLATE, THINKING_TEMPLATE, build_tokenizer_files
from runtime.answer import Generation
from runtime.contract import DecoderInputs, FloatArray
from runtime.errors import UsageError
from runtime.generation import prefill
from runtime.model import Qwen3VLModel
from runtime.piece import REASONING, TEXT, TOOL_CALL, Piece

pytestmark = pytest.mark.portable

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
BUDGET = 7
QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def tiny(tiny_engine: Path) -> Iterator[Qwen3VLModel]:
    with Qwen3VLModel.from_engine(tiny_engine, threads=1) as model:
        yield model


@pytest.fixture
def opened(tiny: Qwen3VLModel) -> Iterator[Callable[..., Scripted]]:
    models: list[Scripted] = []

    def open_(template: str = THINKING_TEMPLATE, **serving: Any) -> Scripted:
        models.append(Scripted(tiny, template, **serving))
        return models[-1]

    yield open_
    for each in models:
        each.model.close(drain=False)


def logits_after(scripted: Scripted, messages: Any, token_ids: list[int]) -> FloatArray:
    """Return the logits after the prompt and after each token of an answer, by one fresh run of all, [L, vocab]."""
    prepared = scripted.model.prepare(messages)
    ids = [*prepared.prompt.input_ids, *token_ids]
    session = scripted.session.wrapped
    embeds = scripted.model.encode_images([])
    places = np.arange(len(ids))[None]
    whole = DecoderInputs.text(np.array([ids]), np.array([0]), embeds, delta=0, logits_positions=places)
    return prefill(session, session.new_cache(len(ids)), whole)[len(prepared.prompt.input_ids) - 1 :]


@pytest.mark.parametrize("lookup", [0, 10])
def test_forced_tokens_go_through_the_engine(opened: Callable[..., Scripted], lookup: int) -> None:
    """Every token is the likeliest after those before it, forced ones included; none is drafted past them."""
    scripted = opened()
    options = {"max_new_tokens": 100, "eos_token_ids": [479], "prompt_lookup_num_tokens": lookup}
    answer = scripted.model.generate(QUESTION, max_thinking_tokens=BUDGET, **options)
    forced = TOKENIZER.encode("\n\nConsidering the limited time by the user, I have")
    start = answer.token_ids.index(forced[0], BUDGET)
    text = TOKENIZER.decode(answer.token_ids)
    ending = "based on the thinking directly now.\n</think>\n\n"
    assert start <= BUDGET + 3 and answer.token_ids[start : start + len(forced)] == forced
    assert ending in text
    assert answer.reasoning.endswith("directly now.")
    num_forced = len(TOKENIZER.encode(text[text.index("\n\nConsidering") : text.index(ending) + len(ending)]))
    likeliest = logits_after(scripted, QUESTION, answer.token_ids)[:-1].argmax(axis=-1).tolist()
    chosen = [*range(start), *range(start + num_forced, len(answer.token_ids))]
    assert [likeliest[place] for place in chosen] == [answer.token_ids[place] for place in chosen]
    assert likeliest[start : start + num_forced] != answer.token_ids[start : start + num_forced]
    assert answer.stats.new_tokens == 100


def test_a_budget_beside_an_answer_without_one(opened: Callable[..., Scripted]) -> None:
    scripted = opened()
    alone = [scripted.model.generate(QUESTION, max_new_tokens=80, **each) for each in ({}, {"max_thinking_tokens": 0})]
    options = [scripted.model.defaults.replace(max_new_tokens=80, **each) for each in ({}, {"max_thinking_tokens": 0})]
    together = scripted.model.generate_batch([QUESTION, QUESTION], options)
    assert [each.token_ids for each in together if isinstance(each, Generation)] == [each.token_ids for each in alone]
    assert alone[1].reasoning == "" and alone[1].raw_text.startswith("\n</think>\n\n")


def test_penalties_know_forced_tokens(opened: Callable[..., Scripted]) -> None:
    scripted = opened()
    options = {"max_new_tokens": 110, "max_thinking_tokens": 3, "eos_token_ids": [479], "frequency_penalty": 2.0}
    ids = scripted.model.generate(QUESTION, **options).token_ids
    start = TOKENIZER.decode(ids).index("</think>")
    place = next(n for n in range(len(ids)) if len(TOKENIZER.decode(ids[:n])) > start + len("</think>\n\n"))
    logits_LV = logits_after(scripted, QUESTION, ids)
    vocabulary = logits_LV.shape[-1]
    penalised = [logits_LV[n] - 2.0 * np.bincount(ids[:n], minlength=vocabulary) for n in range(place, len(ids))]
    assert [int(row.argmax()) for row in penalised] == ids[place:]


def test_a_budget_needs_marks(tiny: Qwen3VLModel) -> None:
    with pytest.raises(UsageError, match="this model does not think"):
        tiny.generate(QUESTION, max_thinking_tokens=3)


def test_pieces_are_streamed_by_kind(opened: Callable[..., Scripted]) -> None:
    scripted = opened()
    scripted.write(f"hm, two\n</think>\n\nI ask.\n{CALL}\n{CLOCK}")
    stream = scripted.model.stream(QUESTION, tools=TOOLS)
    pieces = list(stream)
    assert stream.result is not None
    check_pieces(stream.result, pieces)
    kinds = [
        kind
        for kind, last in zip([p.kind for p in pieces], [None, *(p.kind for p in pieces)], strict=False)
        if kind != last
    ]
    assert kinds == [REASONING, TEXT, TOOL_CALL]
    assert (stream.result.reasoning, stream.result.text) == ("hm, two", "I ask.")
    assert [call.name for call in stream.result.tool_calls] == ["weather", "clock"]
    told: list[Piece] = []
    generation = scripted.model.generate(QUESTION, tools=TOOLS, on_piece=told.append)
    assert told == pieces and generation.tool_calls == stream.result.tool_calls

    async def read() -> list[Piece]:
        return [piece async for piece in scripted.model.stream(QUESTION, tools=TOOLS)]

    assert [piece.kind for piece in asyncio.run(read())] == [piece.kind for piece in pieces]


def test_tool_choice(opened: Callable[..., Scripted]) -> None:
    scripted = opened(INSTRUCT_TEMPLATE)
    scripted.write(CLOCK)
    none = scripted.model.generate(QUESTION, tools=TOOLS, tool_choice="none")
    assert (none.text, none.tool_calls) == (CLOCK, ())
    assert none.stats.prompt_tokens == scripted.model.generate(QUESTION).stats.prompt_tokens
    assert len(scripted.model.generate(QUESTION, tools=TOOLS, tool_choice="auto").tool_calls) == 1
    for wrong in ("always", 5, None):
        with pytest.raises(UsageError, match="expected 'auto', 'none', 'required'"):
            scripted.model.chat(tools=TOOLS, tool_choice=wrong)


RESULTS = [{"role": "tool", "content": "sunny"}, {"role": "tool", "content": "noon"}]


@pytest.mark.parametrize("call", [CALL, CALL.replace(": ", ":")], ids=["as the template", "otherwise"])
@pytest.mark.parametrize("template", [INSTRUCT_TEMPLATE, THINKING_TEMPLATE], ids=["instruct", "thinking"])
def test_results_are_fed_back_and_rows_are_shared(opened: Callable[..., Scripted], template: str, call: str) -> None:
    """A call that the model writes as the template does is found in the cache; another one is run again."""
    scripted = opened(template)
    thought = "hm\n</think>\n\n" if template is THINKING_TEMPLATE else ""
    chat = scripted.model.chat("Be brief.", tools=TOOLS)
    scripted.write(f"{thought}I ask.\n{call}\n{CLOCK}")
    first = chat.ask(QUESTION)
    assert [each.name for each in first.tool_calls] == ["weather", "clock"]
    scripted.write(f"{thought}Sunny at noon.")
    second = chat.ask(results_of(first))
    assert (second.text, second.tool_calls) == ("Sunny at noon.", ())
    num_rows = first.stats.prompt_tokens + first.stats.new_tokens - 1
    if call is CALL:
        assert second.stats.cached_tokens == num_rows
    else:
        assert first.stats.prompt_tokens < second.stats.cached_tokens < num_rows
    roles = [message["role"] for message in chat.messages]
    assert roles == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert chat.messages[2]["tool_calls"][0]["function"]["arguments"] == {"city": "Köln", "days": 2}
    assert chat.messages[2].get("reasoning_content") == ("hm" if thought else None)


def results_of(answer: Generation) -> list[dict[str, Any]]:
    return [{**result, "tool_call_id": call.id} for result, call in zip(RESULTS, answer.tool_calls, strict=True)]


@pytest.mark.judge
@pytest.mark.parametrize("thinking", [False, True], ids=["instruct", "thinking"])
def test_the_history_is_rendered_as_transformers_renders_it(
    opened: Callable[..., Scripted], thinking: bool, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    """Turns with thoughts, calls and results; thoughts before the last question are gone, those after it stay."""
    processor = judge.processor(build_tokenizer_files(tmp_path / "processor", thinking=thinking))
    scripted = opened(THINKING_TEMPLATE if thinking else INSTRUCT_TEMPLATE)
    thought = "old thought\n</think>\n\n" if thinking else ""
    chat = scripted.model.chat("Be brief.", tools=TOOLS)

    def check() -> str:
        prompt = scripted.model.prepare(chat.messages, tools=TOOLS).prompt
        expected = processor.apply_chat_template(chat.messages, add_generation_prompt=True, tools=TOOLS)
        assert prompt.text == expected
        assert prompt.input_ids == processor.tokenizer.encode(expected)
        return prompt.text

    scripted.write(f"{thought}Four.")
    chat.ask(QUESTION)
    scripted.write(f"{thought.replace('old', 'new')}I ask.\n{CALL}\n{CLOCK}")
    chat.ask("And outside?")
    chat_text = check()
    assert ("new thought" in chat_text) is thinking and "old thought" not in chat_text
    scripted.write(f"{thought}Sunny.")
    chat.ask(results_of(chat.turns[-1].answer))
    assert "sunny" in check()
    scripted.write("Bye.")
    chat.ask("Thanks")
    assert "thought" not in check()


@pytest.mark.parametrize("lookup", [0, 10])
def test_a_loop_ends(opened: Callable[..., Scripted], lookup: int) -> None:
    scripted = opened(INSTRUCT_TEMPLATE)
    one = TOKENIZER.encode("again and again ")
    script = scripted.write(one * 20)
    options = {"prompt_lookup_num_tokens": lookup} if lookup else {}
    ended = scripted.model.generate(QUESTION, max_repetitions=8, **options)
    assert ended.finish_reason == "repetition"
    assert ended.token_ids == script[: max(64, 8 * len(one))]
    assert scripted.model.statistics()["requests"]["repetition"] == 1
    assert bool(ended.stats.accepted_tokens) is bool(lookup)
    whole = scripted.model.generate(QUESTION, **options)
    assert (whole.finish_reason, whole.token_ids) == ("eos", script)


def test_calls_as_json_have_what_servers_hand_on(opened: Callable[..., Scripted]) -> None:
    scripted = opened(INSTRUCT_TEMPLATE)
    scripted.write(CALL)
    (call,) = scripted.model.generate(QUESTION, tools=TOOLS).tool_calls
    assert json.loads(call.arguments_text) == call.arguments
    assert call.to_message() == {
        "id": call.id,
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}},
    }

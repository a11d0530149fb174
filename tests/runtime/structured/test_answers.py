"""Answers that follow a format, whatever is sampled, and what is refused before a prompt runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import UsageError
from runtime.model import Qwen3VLModel
from runtime.structured.constraint import Constraint

pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["a", "b"]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "count", "kind", "flags"],
    "additionalProperties": False,
}
HOT = {"do_sample": True, "temperature": 1.5, "top_k": 0}


def check(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["name", "count", "kind", "flags"]
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 8
    assert type(value["count"]) is int
    assert 0 <= value["count"] <= 999
    assert value["kind"] in ("a", "b")
    assert len(value["flags"]) <= 3
    assert all(type(each) is bool for each in value["flags"])


@pytest.fixture(scope="module")
def model(demo_engine: Path) -> Iterator[Qwen3VLModel]:
    with Qwen3VLModel.from_engine(demo_engine, threads=1, max_context=512, max_sequences=4) as opened:
        yield opened


def outcomes(model: Qwen3VLModel, num: int, **options: Any) -> list[Any]:
    chosen = [model.defaults.replace(max_new_tokens=300, **HOT, seed=seed) for seed in range(num - 1)]
    chosen.append(model.defaults.replace(max_new_tokens=300))
    return model.generate_batch(["Hi"] * num, chosen, **options)


def test_all_answers_are_valid(model: Qwen3VLModel) -> None:
    answers = outcomes(model, 30, response_format=SCHEMA)
    for each in answers:
        check(each.text)
        assert each.finish_reason in ("stop", "eos")
    assert len({each.text for each in answers}) > 20


def test_a_matcher_that_allows_everything_is_found(model: Qwen3VLModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Constraint, "mask", lambda self, logits_V: logits_V)
    monkeypatch.setattr(Constraint, "accept", lambda self, token_id: None)
    with pytest.raises((ValueError, AssertionError)):
        for each in outcomes(model, 4, response_format=SCHEMA):
            check(each.text)


@pytest.mark.parametrize(
    "options",
    [{}, {"repetition_penalty": 1.3, "presence_penalty": 0.5}, {**HOT, "seed": 4}, {"frequency_penalty": 0.5}],
)
def test_prompt_lookup_changes_nothing(model: Qwen3VLModel, options: dict[str, Any]) -> None:
    prompt = '{"name": "abc", "count": 12, "kind": "a", "flags": [true, false, true]} again'
    plain = model.generate(prompt, response_format=SCHEMA, max_new_tokens=200, **options)
    drafted = model.generate(prompt, response_format=SCHEMA, max_new_tokens=200, prompt_lookup_num_tokens=8, **options)
    assert drafted.token_ids == plain.token_ids
    check(plain.text)
    if not options:
        assert drafted.stats.accepted_tokens > 0


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"type": "regex", "regex": "[0-9]{3}-x?"}, "[0-9]{3}-x?"),
        ({"type": "choice", "choices": ['yes\n"q"', "nö", "a/b\\c"]}, r'yes\n"q"|nö|a/b\\c'),
        ({"type": "grammar", "grammar": 'start: "<" /[a-c]{2}/ ">"'}, "<[a-c]{2}>"),
    ],
)
def test_other_formats(model: Qwen3VLModel, form: dict[str, Any], pattern: str) -> None:
    for seed in range(4):
        assert re.fullmatch(pattern, model.generate("Hi", response_format=form, **HOT, seed=seed).text)


def test_a_whole_openai_format_and_a_class(model: Qwen3VLModel) -> None:
    class Count:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]}

    schema = {**Count.model_json_schema(), "additionalProperties": False}
    whole = {"type": "json_schema", "json_schema": {"name": "count", "schema": schema, "strict": True}}
    assert json.loads(model.generate("Hi", response_format=whole).text) == {"n": 7}
    assert model.defaults.replace(response_format=Count).response_format is not None
    assert model.defaults.replace(response_format={"type": "text"}).response_format is None
    free = model.generate("Hi", response_format={"type": "text"}, max_new_tokens=4)
    assert free.token_ids == model.generate("Hi", max_new_tokens=4).token_ids


def test_an_answer_without_room_ends_with_length(model: Qwen3VLModel) -> None:
    assert model.generate("Hi", response_format=SCHEMA, max_new_tokens=5).finish_reason == "length"


def test_special_tokens_and_ends_are_allowed_only_where_the_format_ends(model: Qwen3VLModel) -> None:
    ends = model.defaults.eos_token_ids
    bias = dict.fromkeys(ends, 100.0)
    answer = model.generate("Hi", response_format={"type": "regex", "regex": "ab?"}, logit_bias=bias)
    assert answer.text == "a"
    assert answer.finish_reason == "eos"
    assert answer.token_ids[-1] in ends


@pytest.mark.parametrize(
    "form",
    [
        "json",
        {},
        {"type": "foo"},
        {"type": "regex"},
        {"type": "regex", "regex": "["},
        {"type": "regex", "regex": r"[^\s\S]"},
        {"type": "choice", "choices": []},
        {"type": "choice", "choices": ["a", "a"]},
        {"type": "choice", "choices": ["a", 1]},
        {"type": "grammar", "grammar": "start: foo"},
        {"type": "grammar", "grammar": "start: <|im_end|>"},
        {"type": "grammar", "grammar": 'start: start "b"'},
        {"type": "regex", "regex": "a" * 300_000},
        {"$ref": "#"},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"type": "object", "unknownKeyword": 1, "not": {}},
    ],
)
def test_impossible_formats_are_refused_before_the_prompt_runs(model: Qwen3VLModel, form: Any) -> None:
    before = model.statistics()
    with pytest.raises(UsageError) as caught:
        if form == {}:
            form = {"type": {}}
        model.generate("Hi", response_format=form, max_new_tokens=5)
    assert caught.value.remedy
    assert "response_format" in str(caught.value)
    assert model.statistics()["prompts"] == before["prompts"]


def test_a_recursive_schema_with_an_end_is_taken(model: Qwen3VLModel) -> None:
    tree = {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}
    bias = {model.tokenizer.encode("]")[0]: 100.0}
    answer = model.generate("Hi", response_format=tree, logit_bias=bias, max_new_tokens=20)
    assert json.loads(answer.text) == []


def test_deep_schemas_are_refused() -> None:
    from runtime.structured.response_format import response_format

    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(5000):
        deep = {"type": "array", "items": deep}
    loop: dict[str, Any] = {"type": "array"}
    loop["items"] = loop
    for schema in (deep, loop):
        with pytest.raises(UsageError, match="levels"):
            response_format("response_format", schema)


def test_a_request_that_fails_on_the_way_fails_alone(model: Qwen3VLModel) -> None:
    # Behind "a" comes nothing but a special token, which no answer may hold.
    stuck = {"type": "grammar", "grammar": 'start: "a" <|im_end|>'}
    options = [model.defaults.replace(response_format=form, max_new_tokens=200) for form in (stuck, SCHEMA)]
    failed, answer = model.generate_batch(["Hi", "Hi"], options)
    assert isinstance(failed, UsageError)
    assert "no token can follow" in str(failed)
    check(answer.text)


def test_the_format_begins_behind_a_thought() -> None:
    class Only:
        """Allows token 1 once."""

        def __init__(self) -> None:
            self.taken: list[int] = []

        def consume_token(self, sampled_token: int) -> bool:
            self.taken.append(sampled_token)
            return True

        def validate_tokens(self, tokens: list[int]) -> int:
            return tokens.count(1)

        def is_accepting(self) -> bool:
            return bool(self.taken)

        def is_stopped(self) -> bool:
            return bool(self.taken)

        def is_error(self) -> bool:
            return False

        def get_error(self) -> str:
            return ""

        def deep_copy(self) -> Only:
            return Only()

        def unsafe_compute_mask_ptr(self, trg_pointer: int, trg_byte_size: int) -> None:
            import ctypes

            ctypes.memset(trg_pointer, 0, trg_byte_size)
            ctypes.memset(trg_pointer, 0b10, 1)

    matcher, logits = Only(), np.zeros(8, np.float32)
    constraint = Constraint(matcher, np.ones(8, np.bool_), (7,), starts_after=(5, 6))
    for token_id in (5, 3, 5, 6):
        assert np.flatnonzero(constraint.mask(logits) == 0).tolist() == [*range(7)]  # all but the end
        assert constraint.num_allowed([3, 1]) == 2
        constraint.accept(token_id)
    constraint.skip(2)
    assert np.flatnonzero(constraint.mask(logits) == 0).tolist() == [1]
    assert not constraint.is_complete
    constraint.accept(1)
    assert matcher.taken == [1]
    assert constraint.is_complete

"""/v1/completions, /tokenize and /detokenize: texts without a chat template."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.http_server import Client, shown
from helpers.serving import asked
from runtime.model import Qwen3VLModel
from runtime.raw_prompt import RawPrompt


def texts(events: list[Any], index: int = 0) -> str:
    return "".join(each["text"] for event in events for each in event["choices"] if each["index"] == index)


def test_a_text_is_continued(client: Client, opened: Qwen3VLModel) -> None:
    expected = opened.generate(RawPrompt("Which digits"), max_new_tokens=8, do_sample=False)
    asks = {"prompt": "Which digits", "max_tokens": 8, "temperature": 0}
    body = client.ask("/v1/completions", asks).json
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert body["choices"][0]["text"] == expected.raw_text and body["choices"][0]["logprobs"] is None
    assert body["usage"]["prompt_tokens"] == expected.stats.prompt_tokens
    events = client.ask("/v1/completions", {**asks, "stream": True, "stream_options": {"include_usage": True}}).events
    assert texts(events) == expected.raw_text and events[-1]["usage"] == body["usage"] | {
        "prompt_tokens_details": events[-1]["usage"]["prompt_tokens_details"]
    }


def test_several_prompts_in_all_forms(client: Client, opened: Qwen3VLModel) -> None:
    prompts = ["One", "Two three"]
    ids = [opened.tokenizer.encode(each) for each in prompts]
    asks: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    alone = [client.ask("/v1/completions", {"prompt": each, **asks}).json["choices"][0]["text"] for each in prompts]
    for given in (prompts, ids):
        body = client.ask("/v1/completions", {"prompt": given, **asks}).json
        assert [each["text"] for each in body["choices"]] == alone
        assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
        events = client.ask("/v1/completions", {"prompt": given, "stream": True, **asks}).events
        assert [texts(events, index) for index in range(2)] == alone
    assert client.ask("/v1/completions", {"prompt": ids[0], **asks}).json["choices"][0]["text"] == alone[0]
    body = client.ask("/v1/completions", {"prompt": prompts, "n": 2, "echo": True, **asks}).json
    assert [each["text"] for each in body["choices"]] == [
        prompt + text for prompt, text in zip(prompts, alone, strict=True) for _ in range(2)
    ]
    assert [each["index"] for each in body["choices"]] == [0, 1, 2, 3]


def test_log_probabilities_and_ranked_answers(client: Client, opened: Qwen3VLModel) -> None:
    never = {str(token): -100 for token in opened.defaults.eos_token_ids}
    asks = {"prompt": "One", "max_tokens": 4, "temperature": 0, "logit_bias": never, "logprobs": 2}
    choice = client.ask("/v1/completions", asks).json["choices"][0]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert [len(each) for each in found["top_logprobs"]] == [2] * 4
    assert found["text_offset"] == [sum(map(len, found["tokens"][:i])) for i in range(4)]
    best: dict[str, Any] = {"temperature": 1.5, "best_of": 3, "seed": 1, "logprobs": 0}
    ranked = client.ask("/v1/completions", {**asks, **best}).json
    drawn: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "best_of": 3, "seed": 1}
    expected = opened.generate(RawPrompt("One"), max_new_tokens=4, logit_bias=never, **drawn)
    assert [each["text"] for each in ranked["choices"]] == [expected.raw_text]
    both = client.ask("/v1/completions", {**asks, **best, "prompt": ["One", "Two"], "n": 2}).json["choices"]
    assert [each["index"] for each in both] == [0, 1, 2, 3] and both[0]["text"] == expected.raw_text


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": [-1]}, "id"),
        ({"prompt": [10**9]}, "id"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "a", "best_of": 2, "n": 3, "temperature": 1}, "best_of"),
        ({"prompt": ["a"] * 6, "best_of": 3, "temperature": 1}, "18 answers"),
        ({"prompt": "a", "best_of": 2, "stream": True, "temperature": 1}, "best_of"),
        ({"prompt": ["a"] * 17}, "at most 16"),
        ({"prompt": "a", "messages": []}, "messages"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({}, "prompt is missing"),
    ],
)
def test_a_wrong_request(client: Client, fields: dict[str, Any], word: str) -> None:
    answered = client.ask("/v1/completions", fields)
    assert answered.status == 400 and word in answered.error["message"]


def test_tokens_of_texts_and_chats(client: Client, opened: Qwen3VLModel) -> None:
    ids = opened.tokenizer.encode("Hello <|im_end|>")
    body = client.ask("/tokenize", {"prompt": "Hello <|im_end|>", "return_token_strs": True}).json
    assert (body["tokens"], body["count"], body["max_model_len"]) == (ids, len(ids), opened.max_context)
    assert "".join(body["token_strs"]) == "Hello <|im_end|>"
    vllm = {"prompt": "Hello", "add_special_tokens": True, "add_generation_prompt": True}
    assert client.ask("/tokenize", vllm).json["tokens"] == opened.tokenizer.encode("Hello")
    assert client.ask("/detokenize", {"tokens": ids}).json == {"prompt": "Hello <|im_end|>"}
    chat = client.ask("/tokenize", {"messages": [{"role": "user", "content": shown()}]}).json
    assert chat["tokens"] == opened.prepare(asked("Which digits are there?", 0)).prompt.input_ids


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]}),
        ("/tokenize", {"prompt": "word " * 50_000}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [1 << 70]}),
        ("/detokenize", {"tokens": ["a"]}),
    ],
)
def test_wrong_requests_for_tokens(client: Client, path: str, body: dict[str, Any]) -> None:
    assert client.ask(path, body).error["message"]

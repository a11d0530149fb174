"""Requests that are wrong get an error in OpenAI's form, which says what to do; none is a 500."""

from __future__ import annotations

import json
import resource
from random import Random
from typing import Any

import pytest

from helpers.http_server import Client, data_url, running, shown
from runtime.model import Qwen3VLModel

_MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"model": "gpt-4o"}, "does not exist. Remedy: pass one of: demo"),
        ({"temperature": -1}, "temperature=0"),
        ({"temperature": "0"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens alone"),
        ({"n": 0}, "n: "),
        ({"n": 17}, "at most 16"),
        ({"seed": -1}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 500}}, "logit_bias"),
        ({"top_logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 50}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "schema"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"functions": []}, "pass tools"),
        ({"max_tokns": 5}, "did you mean 'max_tokens'?"),
        ({"stream": "yes"}, "stream"),
        ({"\ud800": 1}, "unknown field"),
        ({"stream_options": {"\ud800\n": 1}}, "unknown field"),
        ({"x" * 1000: 1}, "unknown field"),
        ({"stream_options": {"usage": True}}, "stream_options.usage"),
        ({"num_frames": 5000}, "768"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ({"messages": [{"role": "user", "content": "word " * 20000}]}, "tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "audio"),
    ],
)
def test_a_wrong_field(client: Client, fields: dict[str, Any], word: str) -> None:
    answered = client.ask("/v1/chat/completions", {"messages": _MESSAGES, **fields})
    assert answered.status == (404 if "model" in fields else 400)
    assert word in answered.error["message"] and answered.error["type"] == "invalid_request_error"
    assert "do_sample" not in answered.error["message"] and "max_new_tokens" not in answered.error["message"]


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "the body is missing"),
        (b"{", "the body is no JSON"),
        (b"[]", "the body"),
        (b"null", "the body"),
        (b'"text"', "the body"),
        (b"{}", "messages is missing"),
        (b'{"messages": NaN}', "NaN is no value of JSON"),
        (b"\xff\xfe{\0}\0", "byte 0 is not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"messages": ' + b"9" * 5000 + b"}", "no JSON"),
        (b'{"messages": [{"role": "user", "content": "a"}]} x', "no JSON"),
    ],
)
def test_a_body_that_is_no_request(client: Client, raw: bytes, word: str) -> None:
    answered = client.ask("/v1/chat/completions", raw=raw)
    assert answered.status == 400 and word in answered.error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/chat/completions", 405), ("POST", "/health", 405), ("GET", "/nothing", 404), ("GET", "/page/x", 404)],
)
def test_wrong_paths_and_methods(client: Client, method: str, path: str, status: int) -> None:
    answered = client.ask(path, method=method, raw=b"{}")
    assert answered.status == status and "Remedy: " in answered.error["message"]


@pytest.mark.parametrize(
    ("path", "raw"),
    [
        ("/v1/chat/completions", b'{"messages": [' + b",".join([b"1"] * 250_000) + b"]}"),
        ("/v1/chat/completions", b'{"messages": [], "stop": [' + b",".join([b"1"] * 250_000) + b"]}"),
        ("/v1/chat/completions", b"{" + b",".join(b'"a%d":1' % i for i in range(100_000)) + b"}"),
        (
            "/v1/chat/completions",
            b'{"messages": [], "logit_bias": {' + b",".join(b'"%d":""' % i for i in range(100_000)) + b"}}",
        ),
        ("/v1/completions", b'{"prompt": [' + b",".join([b"null"] * 250_000) + b"]}"),
        ("/v1/completions", b'{"prompt": [' + b",".join([b"[1.5]"] * 100_000) + b"]}"),
        ("/detokenize", b'{"tokens": [' + b",".join([b'""'] * 250_000) + b"]}"),
        ("/v1/chat/completions", b"[" + b",".join([b"1"] * 500_000) + b"]"),
    ],
    ids=["messages", "stop", "fields", "biases", "prompts", "lists", "tokens", "values"],
)
def test_a_body_that_is_wrong_many_times(client: Client, path: str, raw: bytes) -> None:
    """Noting all that is wrong took seconds, in which nobody else was served, and a kilobyte for each."""
    peak = _peak_bytes()
    assert client.ask(path, raw=raw).status == 400
    assert _peak_bytes() - peak < 200e6


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_other_types_of_content(client: Client, kind: str) -> None:
    answered = client.ask("/v1/chat/completions", raw=b"{}", headers={"content-type": kind})
    assert answered.status == 415 and "application/json" in answered.error["message"]


def test_images_that_are_none(client: Client) -> None:
    for url in (
        "data:image/png;base64,AAAA",
        "data:image/png;base64,!",
        "data:text/plain,a",
        "data:",
        data_url()[:200],
    ):
        answered = client.chat(shown("x", url))
        assert (answered.status, answered.error["code"]) == (400, "invalid_image"), url


def test_an_error_after_the_first_piece_is_an_event(opened: Qwen3VLModel) -> None:
    from helpers.scripted import Scripted
    from helpers.tokenizer_fixture import INSTRUCT_TEMPLATE
    from runtime.errors import EngineError

    model = Scripted(opened, INSTRUCT_TEMPLATE)
    model.write("one two three four five six")
    decode, calls = model.session.decode, []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise EngineError("the engine broke", remedy="open it again")
        return decode(*arguments)

    model.session.decode = failing  # type: ignore[method-assign]
    with running(model.model) as client:
        answered = client.chat("Count", temperature=0, stream=True)
        last = json.loads(answered.content.decode().strip().split("\n\n")[-1].removeprefix("data: "))
        assert answered.status == 200 and "the engine broke" in last["error"]["message"]
        assert b"[DONE]" not in answered.content
        assert client.ask("/ready").status == 200, "it may work again"
        model.model.close()
        ready = client.ask("/ready")
        assert ready.status == 503 and "retry-after" in ready.headers
        assert client.ask("/health").status == 200


def test_mutated_bodies(client: Client) -> None:
    """Ten thousand of them are a benchmark (`python -m benchmarks serve-hostile`); these are a sample."""
    random = Random(0)
    whole = json.dumps(
        {
            "messages": [{"role": "user", "content": shown()}],
            "tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}],
            "max_tokens": 2,
            "n": 1,
            "stream": False,
            "stop": ["x"],
            "temperature": 0.5,
        }
    ).encode()
    statuses = set()
    for _ in range(150):
        body = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            start = random.randrange(len(body))
            body[start : start + random.choice((0, 1, 1, 8))] = random.choice((b"", b"\xff", b"9", b'"', b"{", b"null"))
        status = client.ask("/v1/chat/completions", raw=bytes(body)).status
        statuses.add(status)
        assert status in (200, 400, 404), bytes(body)
    assert 400 in statuses

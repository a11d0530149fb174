"""/v1/chat/completions: what the engine answers, in OpenAI's form, whole and as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers.answers import TOOLS
from helpers.http_server import Client, data_url, running, shown
from helpers.scripted import Scripted
from helpers.serving import asked
from helpers.tokenizer_fixture import INSTRUCT_TEMPLATE, THINKING_TEMPLATE
from runtime.model import Qwen3VLModel

_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def joined(events: list[Any], key: str = "content", index: int = 0) -> str:
    """The text of a stream's pieces."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get(key) or "" for choice in choices)


def test_an_answer_is_the_engines_own(client: Client, opened: Qwen3VLModel) -> None:
    expected = opened.generate(asked("Which digits are there?", 0))
    answered = client.chat(shown(), timings=True)
    assert answered.status == 200, answered.content
    body = answered.json
    assert body["object"] == "chat.completion" and body["model"] == "demo" and body["id"].startswith("chatcmpl-")
    assert body["system_fingerprint"].startswith("ort-cpu-fp32-")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    prompt, new = expected.stats.prompt_tokens, expected.stats.new_tokens
    usage = body["usage"]
    assert [usage[f"{name}_tokens"] for name in ("prompt", "completion", "total")] == [prompt, new, prompt + new]
    assert body["timings"]["new_tokens"] == new and body["timings"]["ttft_s"] > 0


def test_a_stream_adds_up_to_the_whole(client: Client) -> None:
    whole = client.chat(shown()).json
    plain = client.chat(shown(), stream=True).events
    events = client.chat(shown(), stream=True, stream_options={"include_usage": True}).events
    assert joined(plain) == joined(events) == whole["choices"][0]["message"]["content"]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 2) + ["stop"]
    assert len({event["id"] for event in events}) == 1 and {event["object"] for event in events} == {
        "chat.completion.chunk"
    }
    assert events[-1]["choices"] == [] and all(event["usage"] is None for event in events[:-1])
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all("usage" not in event for event in plain)


def test_several_answers_are_those_that_the_engine_draws(client: Client, opened: Qwen3VLModel) -> None:
    asks: dict[str, Any] = {"n": 3, "temperature": 1.5, "seed": 5}
    expected = opened.generate(asked("Which digits are there?", 0), do_sample=True, **asks)
    texts = [each.text for each in expected.choices]
    body = client.chat(shown(), **asks).json
    assert [choice["message"]["content"] for choice in body["choices"]] == texts
    assert body["usage"]["completion_tokens"] == sum(each.stats.new_tokens for each in expected.choices)
    events = client.chat(shown(), stream=True, **asks).events
    assert [joined(events, index=index) for index in range(3)] == texts


def test_greedy_answers_are_made_once_and_given_as_often_as_asked(client: Client) -> None:
    body = client.chat(shown(), n=2, temperature=0).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][0]["message"] == body["choices"][1]["message"]
    events = client.chat(shown(), n=2, temperature=0, stream=True).events
    assert joined(events, index=0) == joined(events, index=1) == body["choices"][0]["message"]["content"]


def test_options_reach_the_engine(client: Client, opened: Qwen3VLModel) -> None:
    first = client.chat(shown(), max_completion_tokens=1).json
    assert (first["choices"][0]["finish_reason"], first["usage"]["completion_tokens"]) == ("length", 1)
    text = client.chat(shown()).json["choices"][0]["message"]["content"]
    assert client.chat(shown(), stop=text[1]).json["choices"][0]["message"]["content"] == text[0]
    token = opened.tokenizer.encode(text[0])[0]
    banned = client.chat(shown(), logit_bias={str(token): -100}, max_tokens=4).json
    assert text[0] not in banned["choices"][0]["message"]["content"]
    longer = client.chat(shown(), max_tokens=30, ignore_eos=True).json
    assert longer["usage"]["completion_tokens"] == 30
    fewer = client.chat(shown(), max_visual_tokens=4).json
    assert fewer["usage"]["prompt_tokens"] < client.chat(shown()).json["usage"]["prompt_tokens"]


def test_log_probabilities(client: Client, opened: Qwen3VLModel) -> None:
    expected = opened.generate(asked("Which digits are there?", 0), logprobs=True, top_logprobs=2)
    body = client.chat(shown(), logprobs=True, top_logprobs=2).json["choices"][0]
    content = body["logprobs"]["content"]
    assert "".join(each["token"] for each in content) == body["message"]["content"], "without the end token"
    assert expected.logprobs is not None
    for found, wanted in zip(content, expected.logprobs[:-1], strict=True):
        assert found["logprob"] == pytest.approx(wanted.logprob, abs=1e-5)
        assert bytes(found["bytes"]) == wanted.token_bytes
        assert [other["token"] for other in found["top_logprobs"]] == [other.text for other in wanted.top]
    events = client.chat(shown(), logprobs=True, top_logprobs=2, stream=True).events
    found = [each for event in events for each in (event["choices"][0]["logprobs"] or {}).get("content", [])]
    assert [each["token"] for each in found] == [each["token"] for each in content]


def test_answers_of_a_format(client: Client) -> None:
    pytest.importorskip("llguidance", reason="needs the extra structured")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    asks = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    text = client.chat(shown(), response_format=asks).json["choices"][0]["message"]["content"]
    assert json.loads(text)["a"] in (1, 2)


def test_a_prompt_that_is_asked_again_is_found_in_the_cache(client: Client) -> None:
    content = shown("Which digits are there, asked twice?")
    first, second = (client.chat(content, timings=True).json for _ in range(2))
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < first["usage"]["prompt_tokens"] - 1
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == second["usage"]["prompt_tokens"] - 1
    assert second["timings"]["cached_images"] == 1


@contextmanager
def scripted(opened: Qwen3VLModel, template: str) -> Iterator[tuple[Scripted, Client]]:
    """A model that writes what a test says, behind a server."""
    model = Scripted(opened, template)
    with running(model.model) as client:
        yield model, client


@pytest.fixture
def instruct(opened: Qwen3VLModel) -> Iterator[tuple[Scripted, Client]]:
    with scripted(opened, INSTRUCT_TEMPLATE) as found:
        yield found


@pytest.fixture
def thinking(opened: Qwen3VLModel) -> Iterator[tuple[Scripted, Client]]:
    with scripted(opened, THINKING_TEMPLATE) as found:
        yield found


@pytest.mark.parametrize("kind", ["instruct", "thinking"])
def test_calls_of_functions(kind: str, request: pytest.FixtureRequest) -> None:
    model, client = request.getfixturevalue(kind)
    thoughts = "I look.\n</think>\n\n" if kind == "thinking" else ""
    model.write(f"{thoughts}Let me see.\n{_CALL}")
    whole = client.chat("Is it warm?", tools=TOOLS, temperature=0).json["choices"][0]
    assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] == "Let me see."
    (call,) = whole["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Köln"}'}
    events = client.chat("Is it warm?", tools=TOOLS, temperature=0, stream=True).events
    deltas = [event["choices"][0]["delta"] for event in events]
    (streamed,) = [each for delta in deltas for each in delta.get("tool_calls", [])]
    assert streamed == {"index": 0, **call}
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    result = [
        {"role": "user", "content": "Is it warm?"},
        {"role": "assistant", **whole["message"]},
        {"role": "tool", "tool_call_id": call["id"], "content": "21 °C"},
    ]
    model.write(f"{thoughts}Yes.")
    body = client.ask("/v1/chat/completions", {"messages": result, "tools": TOOLS, "temperature": 0}).json
    assert body["choices"][0]["message"]["content"].strip() == "Yes."
    assert body["choices"][0]["finish_reason"] == "stop"


def test_a_call_that_is_asked_for(instruct: tuple[Scripted, Client]) -> None:
    pytest.importorskip("llguidance", reason="needs the extra structured")
    model, client = instruct
    model.write("It is late.")
    named = {"type": "function", "function": {"name": "clock"}}
    for choice, names in ((named, ["clock"]), ("required", ["clock", "weather"])):
        asks = {"tools": TOOLS, "tool_choice": choice, "temperature": 0, "parallel_tool_calls": False}
        body = client.chat("What time is it?", **asks).json["choices"][0]
        (call,) = body["message"]["tool_calls"]
        assert call["function"]["name"] in names and isinstance(json.loads(call["function"]["arguments"]), dict)
        assert body["finish_reason"] == "tool_calls"
    assert (
        client.chat("What time is it?", tools=TOOLS, tool_choice="none", temperature=0)
        .json["choices"][0]["message"]["content"]
        .startswith("It is late.")
    )


def test_thoughts_stand_apart(thinking: tuple[Scripted, Client]) -> None:
    model, client = thinking
    model.write("Warm is above 20.\n</think>\n\nYes.")
    asks = {"temperature": 0, "max_completion_tokens": 100}
    message = client.chat("Is it warm?", **asks).json
    assert message["choices"][0]["message"]["reasoning_content"].strip() == "Warm is above 20."
    assert message["choices"][0]["message"]["content"].strip() == "Yes."
    assert 0 < message["usage"]["completion_tokens_details"]["reasoning_tokens"] < message["usage"]["completion_tokens"]
    events = client.chat("Is it warm?", stream=True, **asks).events
    assert joined(events, "reasoning_content").strip() == "Warm is above 20." and joined(events).strip() == "Yes."


def test_boxes_are_in_pixels_of_the_picture(instruct: tuple[Scripted, Client]) -> None:
    model, client = instruct
    model.write('[{"bbox_2d": [0, 0, 500, 1000], "label": "cup"}]')
    body = client.chat(shown("Where is it?"), boxes=True, temperature=0).json
    width, height = model.model.generate(asked("Where is it?", 0), do_sample=False).image_sizes[0]
    assert body["boxes"] == [{"label": "cup", "box": [0, 0, width / 2, height], "image": 0}] and body["points"] == []
    events = client.chat(shown("Where is it?"), boxes=True, temperature=0, stream=True).events
    assert events[-1]["boxes"] == body["boxes"] and events[-1]["choices"] == []


def test_engines_answer_by_name(opened: Qwen3VLModel) -> None:
    models = {name: Scripted(opened, INSTRUCT_TEMPLATE) for name in ("first", "second")}
    for name, model in models.items():
        model.write(f"I am the {name}.")
    with running({name: each.model for name, each in models.items()}) as client:
        for name in models:
            body = client.chat("Who are you?", model=name, temperature=0).json
            assert (body["model"], body["choices"][0]["message"]["content"]) == (name, f"I am the {name}.")
        assert client.chat("Who are you?").error["param"] == "model"
        error = client.chat("Who are you?", model="third")
        assert error.status == 404 and error.error["code"] == "model_not_found"
        assert "first, second" in error.error["message"]
        assert [each["id"] for each in client.ask("/v1/models").json["data"]] == ["first", "second"]


def test_videos(client: Client, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="needs the extra video")
    from helpers.clips import encode, moving, write

    clip = write(tmp_path, "clip.mp4", encode(moving(8)))
    part = {"type": "video_url", "video_url": {"url": data_url(clip, "video/mp4")}, "num_frames": 4}
    body = client.chat([part, {"type": "text", "text": "What happens?"}], max_tokens=3, timings=True).json
    assert body["timings"]["visual_tokens"] > 0 and body["usage"]["completion_tokens"] <= 3

"""Chat messages: every accepted spelling, and the place named for every refused one."""

from __future__ import annotations

import collections.abc
import copy
import enum
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import UsageError
from runtime.messages import normalise_messages, user_message

IMAGE_PART = {"type": "image", "image": "<image>"}


def split(messages: Any) -> tuple[list[dict[str, Any]], tuple[Any, ...]]:
    """Return the plain messages and the sources of the images."""
    plain, attachments = normalise_messages(messages)
    assert {attachment.kind.name for attachment in attachments} <= {"image"}
    return plain, tuple(attachment.source for attachment in attachments)


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.portable
def test_a_string_is_one_user_turn() -> None:
    plain, images = split("hello")
    assert plain == [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert images == ()


@pytest.mark.portable
def test_the_helper_puts_images_before_the_prompt() -> None:
    plain, images = split(user_message("which?", ["a.png", "b.png"]))
    assert plain == [{"role": "user", "content": [IMAGE_PART, IMAGE_PART, {"type": "text", "text": "which?"}]}]
    assert images == ("a.png", "b.png")


@pytest.mark.portable
def test_images_come_in_order_over_all_messages_and_the_input_stays_as_it_was() -> None:
    array = np.zeros((2, 2, 3), np.uint8)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image", "image": array}, {"type": "text", "text": "and"}]},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": ({"type": "image", "url": "data:image/png;base64,AAAA"},)},
    ]
    before = copy.deepcopy(messages)
    plain, images = split(messages)
    assert images[0] is array
    assert images[1:] == ("data:image/png;base64,AAAA",)
    assert plain[0] == {"role": "system", "content": "be brief"}
    assert plain[3] == {"role": "user", "content": [IMAGE_PART]}
    np.testing.assert_equal(messages, before)
    plain[1]["content"][0]["image"] = "changed"
    assert normalise_messages(messages)[0][1]["content"][0] == IMAGE_PART


@pytest.mark.portable
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image", "image": "cat.png"}, "cat.png"),
        ({"type": "image", "url": "https://example.org/a.png"}, "https://example.org/a.png"),
        ({"type": "image", "path": "cat.png"}, Path("cat.png")),
        ({"type": "image", "path": Path("cat.png")}, Path("cat.png")),
        ({"type": "image", "base64": "aGk="}, b"hi"),
        ({"type": "image", "data": b"hi"}, b"hi"),
        ({"type": "image", "image": "cat.png", "url": None}, "cat.png"),
        ({"type": "image_url", "image_url": {"url": "data:x"}}, "data:x"),
        ({"type": "image_url", "image_url": {"url": "data:x", "detail": "auto"}}, "data:x"),
        ({"type": "image_url", "image_url": "data:x"}, "data:x"),
    ],
)
def test_spellings_of_an_image(part: dict[str, Any], expected: Any) -> None:
    plain, images = split(user(part))
    assert plain[0]["content"] == [IMAGE_PART]
    assert images == (expected,)


@pytest.mark.portable
def test_reasoning_has_one_name_whatever_the_caller_wrote() -> None:
    for name in ("reasoning", "thinking", "reasoning_content"):
        plain, _ = normalise_messages([{"role": "assistant", "content": "4", name: "2+2"}])
        assert plain[0]["reasoning_content"] == "2+2"


@pytest.mark.portable
def test_a_turn_of_tool_calls_needs_no_content() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": [1, 2.5, None, True]}}}
    plain, _ = normalise_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert plain == [{"role": "assistant", "tool_calls": [call], "content": ""}]


@pytest.mark.portable
@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (None, "messages must be a list"),
        ({"role": "user", "content": "x"}, "messages must be a list"),
        (b"x", "messages must be a list"),
        ([], "messages is empty"),
        (["x"], r"messages\[0\] must be a dict, got str"),
        ([{"content": "x"}], r"messages\[0\] has no 'role'"),
        ([{"role": "human", "content": "x"}], r"messages\[0\] has the unknown role 'human'"),
        ([{"role": "user", "contents": "x"}], r"unknown key 'contents'.*\n.*did you mean 'content'"),
        ([{"role": "user"}], r"messages\[0\]\.content must be a string or a list of parts, got nothing"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content must be .* got int"),
        ([{"role": "user", "content": "a\ud800"}], r"messages\[0\]\.content holds a lone surrogate"),
        (user("x"), r"messages\[0\]\.content\[0\] must be a dict, got str"),
        (user({"text": "x"}), r"messages\[0\]\.content\[0\] has no 'type'"),
        (
            user({"type": "audio", "audio": "x"}),
            r"messages\[0\]\.content\[0\] is a part of the type 'audio'.*\n.*transcript",
        ),
        (user({"type": "text"}), r"messages\[0\]\.content\[0\] is a text part without 'text'"),
        (user({"type": "text", "text": 3}), r"messages\[0\]\.content\[0\]\.text must be a string, got int"),
        (user({"type": "text", "text": "x", "txt": 1}), r"messages\[0\]\.content\[0\] has the unknown key 'txt'"),
        (user({"type": "image"}), r"messages\[0\]\.content\[0\] must hold its image under one key, found none"),
        (user({"type": "image", "image": "a", "url": "b"}), "under one key, found 2: image, url"),
        (
            user({"type": "text", "text": "a", "max_pixels": 9}),
            r"has the key .max_pixels., which is not taken here\n.*in the part of the image",
        ),
        (user({"type": "image", "image": "a", "max_pixels": 0}), r"content\[0\]\.max_pixels must be at least 1, got 0"),
        (user({"type": "image", "image": "a", "min_pixels": "9"}), r"content\[0\]\.min_pixels must be an integer"),
        (user({"type": "image", "image": "a", "min_pixels": 9, "max_pixels": 8}), "min_pixels 9 is above max_pixels 8"),
        (user({"type": "image", "image": "a", "resized_height": 64}), r"resized_height and resized_width go together"),
        (user({"type": "image", "path": 3}), r"content\[0\]\.path must be a path, got int"),
        (user({"type": "image", "url": 3}), r"content\[0\]\.url must be a string, got int"),
        (user({"type": "image", "base64": "a*b"}), r"content\[0\]\.base64 is not base64"),
        (user({"type": "image", "base64": 5}), r"content\[0\]\.base64 is not base64"),
        (user({"type": "image_url"}), r"content\[0\]\.image_url must be a string, got NoneType"),
        (user({"type": "image_url", "image_url": {}}), r"image_url\.url must be a string"),
        (user({"type": "image_url", "image_url": {"url": "x", "detail": "best"}}), r"detail='best'.*\n.*max_pixels"),
        (user({"type": "film", "video": "a.mp4"}), r"content\[0\] has the unknown type 'film'"),
        ([{"role": "assistant", "tool_calls": [{"f": {1}}]}], r"messages\[0\]\.tool_calls\[0\]\.f must be JSON"),
        ([{"role": "user", "content": "x", "name": object()}], r"messages\[0\]\.name must be JSON data, got object"),
    ],
)
def test_what_is_refused_and_where(messages: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        normalise_messages(messages)


@pytest.mark.portable
def test_the_place_counts_messages_and_parts() -> None:
    fine = {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image", "image": "a"}]}
    bad = {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "video"}]}
    with pytest.raises(UsageError, match=r"messages\[2\]\.content\[1\]"):
        normalise_messages([fine, fine, bad])


@pytest.mark.portable
@pytest.mark.parametrize(
    ("message", "expected"),
    [
        # openai: every field of the class, null where it is not set
        (
            {"role": "assistant", "content": "ok", "refusal": None, "audio": None, "function_call": None,
             "tool_calls": None, "name": None, "annotations": []},
            {"role": "assistant", "content": "ok", "annotations": []},
        ),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        ({"role": "user", "content": None}, {"role": "user", "content": ""}),
        ({"role": "tool", "content": None, "tool_call_id": "1"}, {"role": "tool", "tool_call_id": "1", "content": ""}),
        ({"role": "assistant", "content": None, "refusal": "No."}, {"role": "assistant", "content": "No."}),
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        ({"role": "function", "name": "f", "content": "4"}, {"role": "tool", "name": "f", "content": "4"}),
        # the Responses API
        (
            {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant",
             "content": [{"type": "output_text", "text": "ok", "annotations": [], "logprobs": None}]},
            {"role": "assistant", "id": "msg_1", "type": "message", "status": "completed",
             "content": [{"type": "text", "text": "ok"}]},
        ),
        ({"role": "user", "content": [{"type": "input_text", "text": "x"}]},
         {"role": "user", "content": [{"type": "text", "text": "x"}]}),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
         {"role": "assistant", "content": [{"type": "text", "text": "No."}]}),
        # Anthropic
        ({"role": "system", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
         {"role": "system", "content": [{"type": "text", "text": "x"}]}),
        # langchain
        ({"type": "AIMessageChunk", "content": "x"}, {"role": "assistant", "type": "AIMessageChunk", "content": "x"}),
        ({"type": "human", "content": "x", "id": None, "example": False, "additional_kwargs": {}},
         {"role": "user", "type": "human", "content": "x", "example": False, "additional_kwargs": {}}),
        (
            {"type": "ai", "content": "", "tool_calls": [{"name": "f", "args": {"a": 1}, "id": "1"}]},
            {"role": "assistant", "type": "ai", "content": "",
             "tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": 1}}}]},
        ),
    ],
)  # fmt: skip
def test_messages_of_client_libraries(message: dict[str, Any], expected: dict[str, Any]) -> None:
    assert split([message]) == ([expected], ())


@pytest.mark.portable
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image", "base64": "aG\r\nk"}, b"hi"),
        ({"type": "image", "base64": "data:image/png;base64,aGk="}, b"hi"),
        ({"type": "image", "data": "aGk"}, b"hi"),
        ({"type": "image", "source_type": "base64", "data": "aGk=", "mime_type": "image/png"}, b"hi"),
        ({"type": "image", "source_type": "url", "url": "data:x"}, "data:x"),
        ({"type": "image", "base64": "aGk=", "mime_type": "image/png", "id": "1"}, b"hi"),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}, b"hi"),
        (
            {"type": "image", "source": {"type": "url", "url": "data:x"}, "cache_control": {"type": "ephemeral"}},
            "data:x",
        ),
        ({"type": "image_url", "image_url": {"url": "data:x", "detail": "high"}}, "data:x"),
        ({"type": "image_url", "image_url": {"url": "data:x", "detail": None}}, "data:x"),
        ({"type": "input_image", "image_url": "data:x", "detail": "auto", "file_id": None}, "data:x"),
    ],
)
def test_images_of_client_libraries(part: dict[str, Any], expected: Any) -> None:
    assert split(user(part)) == ([{"role": "user", "content": [IMAGE_PART]}], (expected,))


class Dumping:
    """Like an object of pydantic, as clients hand out and users put into the next request."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def model_dump(self) -> dict[str, Any]:
        return self.values


@pytest.mark.portable
def test_objects_of_pydantic_are_dumped() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = Dumping(role="assistant", content=None, refusal=None, tool_calls=[Dumping(**call)])
    question = {"role": "user", "content": [Dumping(type="text", text="x")]}
    plain, _ = normalise_messages(
        [question, answer, {"role": "assistant", "content": None, "tool_calls": [Dumping(**call)]}]
    )
    expected = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert plain == [{"role": "user", "content": [{"type": "text", "text": "x"}]}, expected, expected]


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def shared(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value, value]
    return value


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)
LOOP: dict[str, Any] = {}
LOOP["a"] = LOOP


class Hostile:
    """Its own methods raise."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("evil ==")

    def __repr__(self) -> str:
        raise RuntimeError("evil repr")


class HostileDict(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("evil \x1b items")


class EndlessMessages(collections.abc.Sequence[Any]):
    """Of one message by its length, and of any number by its iterator."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        return {"role": "user", "content": "x"}


@pytest.mark.portable
@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "x", "tool_calls": nested(101)}], "tool_calls is nested deeper than 100 levels"),
        ([{"role": "user", "content": "x", "tool_calls": nested(100_000)}], "nested deeper than 100 levels"),
        ([{"role": "user", "content": "x", "thinking": ENDLESS}], "thinking is nested deeper.*\n.*holds itself"),
        ([{"role": "user", "content": "x", "thinking": LOOP}], "thinking is nested deeper.*\n.*holds itself"),
        ([{"role": "user", "content": "x", "thinking": shared(40)}], "holds more than 100000 values"),
        ([{"role": "user", "content": "x", "name": 10**400}], r"\.name is an integer of 1329 bits"),
        ([{"role": nested(5000), "content": "x"}], "unknown role a list of 1"),
        ([{"role": [1], "content": "x"}], "unknown role a list of 1"),
        ([{"role": Hostile(), "content": "x"}], "unknown role a Hostile"),
        ([{"role": 10**5000, "content": "x"}], "unknown role an integer of 16610 bits"),
        ([{"role": "x" * 10**6, "content": "x"}], "unknown role 'xxx"),
        ([{Hostile: 1, "role": "user", "content": "x"}], "has the unknown key <class"),
        ([{"role": "user", "content": "x", "\ud800": 1}], r"a key of messages\[0\] holds a lone surrogate"),
        ([HostileDict(role="user")], r"messages cannot be read: RuntimeError: evil \\x1b items"),
        (
            user({"type": Hostile()}),
            "has the unknown type a Hostile\n.* text, input_text, output_text, refusal, image, im",
        ),
        (user({"type": "text", "text": "\udcff"}), r"lone surrogate, \\udcff, at character 0"),
        (user({"type": "image", "file_id": "1"}), "has the key 'file_id'"),
        (user({"type": "image", "images": ["a"]}), "unknown key 'images'.*\n.*did you mean 'image'"),
        (user({"type": "image", "source": "a"}), r"\.source must be a dict, got str"),
        (user({"type": "input_image", "image_url": None}), r"image_url must be a string, got NoneType"),
        ([{"role": "user", "content": "x", "images": ["a.png"]}], "has the key 'images'.*\n.*content, as a part"),
        ([{"role": "user", "parts": [{"text": "x"}]}], "has the key 'parts'"),
        ([{"role": "assistant", "content": "x", "audio": {"id": "1"}}], "has the key 'audio'.*\n.*transcript"),
        ([{"role": "assistant", "content": "", "function_call": {"name": "f"}}], "'function_call'.*\n.*tool_calls"),
        ([{"role": "user", "Content": "x"}], "unknown key 'Content'"),
        ([{"type": "function_call", "name": "f"}], r"messages\[0\] is a function_call without 'arguments'"),
        ([{"type": "function_call_output"}], "is a function_call_output without 'output'"),
        ([{"type": "reasoning", "summary": []}], "is an item of the type 'reasoning'.*\n.*leave it out"),
        ([{"type": "item_reference", "id": "1"}], "is an item of the type 'item_reference'.*\n.*the item itself"),
        ([{"type": "web_search_call"}], "has no 'role'"),
        (user({"type": "tool_use", "name": "f", "input": {}}), "part of the type 'tool_use'.*\n.*tool_calls"),
        (user({"type": "tool_result", "content": "x"}), "part of the type 'tool_result'.*\n.*'role': 'tool'"),
        (user({"type": "thinking", "thinking": "x"}), "part of the type 'thinking'.*\n.*reasoning_content"),
        (user({"type": "redacted_thinking", "data": "x"}), "'redacted_thinking'.*\n.*leave it out"),
        (user({"type": "input_file", "file_id": "x"}), "'input_file'.*\n.*pages as images"),
        (user({"type": "text", "text": "x", **{str(i): i for i in range(200)}}), "has 202 keys, expected at most 100"),
        ([{"role": "user", "content": "x", **{str(i): i for i in range(200)}}], "has 202 keys, expected at most 100"),
    ],
)
def test_hostile_values_end_in_an_error_of_ours(messages: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=expected) as raised:
        normalise_messages(messages)
    assert len(str(raised.value)) <= 500
    str(raised.value).encode()


@pytest.mark.portable
def test_messages_are_as_many_as_their_length_says() -> None:
    assert normalise_messages(EndlessMessages())[0] == [{"role": "user", "content": "x"}]


@pytest.mark.portable
def test_a_role_may_be_of_an_enumeration() -> None:
    role = enum.Enum("Role", {"USER": "user"}, type=str)
    plain, _ = normalise_messages([{"role": role["USER"], "content": "x"}])
    assert type(plain[0]["role"]) is str and plain[0]["role"] == "user"


def call_of(name: str, call_id: str) -> dict[str, Any]:
    return {"type": "function", "id": call_id, "function": {"name": name, "arguments": "{}"}}


@pytest.mark.portable
def test_items_of_the_responses_api_are_turns() -> None:
    items = [
        {"role": "user", "content": "weather?"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "id": "fc_1", "call_id": "1", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}", "role": None},
        {"type": "function_call_output", "call_id": "1", "output": "rain"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "sun"}]},
        {"type": "function_call", "call_id": "3", "name": "h", "arguments": "{}"},
    ]
    plain, images = split(items)
    said = [{"type": "text", "text": "I look."}]
    first = {
        "role": "assistant",
        "type": "message",
        "content": said,
        "tool_calls": [call_of("f", "1"), call_of("g", "2")],
    }
    assert plain == [
        {"role": "user", "content": "weather?"},
        first,
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "sun"}]},
        {"role": "assistant", "tool_calls": [call_of("h", "3")], "content": ""},
    ]
    assert images == () and "tool_calls" not in items[1]
    # Messages with roles stay the turns that they are.
    turns = [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call_of("f", "1")]},
    ]
    assert [turn["content"] for turn in normalise_messages(turns)[0]] == ["a", ""]


TEXT = {"type": "text", "text": ""}


@pytest.mark.portable
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [TEXT] * 1_000_000}],
        [{"role": "user", "content": "x"}] * 1_000_000,
        [{"role": "user", "content": [TEXT] * 1000}] * 1000,
        [{"role": "user", "content": "x", "tool_calls": [0] * 90_000}] * 1000,
        [{"role": "user", "content": [TEXT | {f"key {i}": i for i in range(90)}] * 100_000}],
        [{"role": "user", "content": "x", **{f"key {i}": i for i in range(90)}}] * 100_000,
        [{"type": "function_call", "name": "f", "arguments": "{}"}] * 100_000,
    ],
    ids=["parts", "messages", "parts of many", "values", "keys of parts", "keys of messages", "calls"],
)
def test_all_messages_and_parts_are_counted_before_they_are_copied(messages: Any) -> None:
    started = time.thread_time()
    with pytest.raises(UsageError, match="the list of messages holds more than 100000 values"):
        normalise_messages(messages)
    assert time.thread_time() - started < 20


@pytest.mark.portable
def test_as_many_messages_and_parts_as_a_context_has_room_for_are_taken() -> None:
    assert len(normalise_messages([{"role": "user", "content": "x"}] * 100_000)[0]) == 100_000
    parts = [TEXT] * 99_999
    assert len(normalise_messages([{"role": "user", "content": parts}])[0][0]["content"]) == 99_999

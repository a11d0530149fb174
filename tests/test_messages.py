"""Chat messages: every accepted spelling, and the place named for every refused one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import UsageError
from runtime.messages import normalise_messages, user_message

IMAGE_PART = {"type": "image", "image": "<image>"}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.portable
def test_a_string_is_one_user_turn() -> None:
    plain, images = normalise_messages("hello")
    assert plain == [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert images == ()


@pytest.mark.portable
def test_the_helper_puts_images_before_the_prompt() -> None:
    plain, images = normalise_messages(user_message("which?", ["a.png", "b.png"]))
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
    plain, images = normalise_messages(messages)
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
    plain, images = normalise_messages(user(part))
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
        (user({"type": "audio", "audio": "x"}), r"messages\[0\]\.content\[0\] has the unknown type 'audio'"),
        (user({"type": "text"}), r"messages\[0\]\.content\[0\] is a text part without 'text'"),
        (user({"type": "text", "text": 3}), r"messages\[0\]\.content\[0\]\.text must be a string, got int"),
        (user({"type": "text", "text": "x", "txt": 1}), r"messages\[0\]\.content\[0\] has the unknown key 'txt'"),
        (user({"type": "image"}), r"messages\[0\]\.content\[0\] must hold its image under one key, found none"),
        (user({"type": "image", "image": "a", "url": "b"}), "under one key, found 2: image, url"),
        (
            user({"type": "image", "image": "a", "max_pixels": 9}),
            r"has the key .max_pixels., which is not taken here\n.*when the engine is opened",
        ),
        (user({"type": "image", "path": 3}), r"content\[0\]\.path must be a path, got int"),
        (user({"type": "image", "url": 3}), r"content\[0\]\.url must be a string, got int"),
        (user({"type": "image", "base64": "a*b"}), r"content\[0\]\.base64 is not base64"),
        (user({"type": "image", "base64": 5}), r"content\[0\]\.base64 is not base64"),
        (user({"type": "image_url"}), r"content\[0\]\.image_url must be a string, got NoneType"),
        (user({"type": "image_url", "image_url": {}}), r"image_url\.url must be a string"),
        (user({"type": "image_url", "image_url": {"url": "x", "detail": "low"}}), r"detail='low'.*\n.*max_pixels"),
        (user({"type": "video", "video": "a.mp4"}), r"content\[0\] is a video, which is not supported yet"),
        (user({"type": "video_url", "video_url": {"url": "x"}}), "is a video"),
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

"""Check chat messages in Hugging Face's format, and take the images out of them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.arguments import reading
from runtime.base64_text import decode_base64
from runtime.errors import UsageError
from runtime.plain_data import ValueCount, dumped, plain_data, text_data
from runtime.shown import shown

_ROLES = ("system", "user", "assistant", "tool")
# Names that client libraries have for them: OpenAI's, which calls system messages of newer models "developer", and
# langchain's, which has no role and says under "type" what a message is.
_OTHER_ROLES = {"developer": "system", "function": "tool"}
_TYPES_AS_ROLES = {
    **{"human": "user", "ai": "assistant", "system": "system", "tool": "tool", "developer": "system"},
    **{"function": "tool", "HumanMessageChunk": "user", "AIMessageChunk": "assistant"},
    **{"SystemMessageChunk": "system", "ToolMessageChunk": "tool", "FunctionMessageChunk": "tool"},
}
_MESSAGE_KEYS = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
    "refusal",
)
# Other keys change no prompt, in transformers neither (`cache_control`, `annotations`, `id`, `status` …): of a message
# the template gets them, of a part nobody. But these hold a part of the conversation, and must not be lost in silence.
_PART_REMEDY = 'put it into content, as a part: {"type": "image", …} or {"type": "text", …}'
_VIDEO_REMEDY = "pass frames of the video as images, one part each"
_REFUSED_MESSAGE_KEYS = {
    "audio": "audio is not supported; pass its transcript as text",
    "function_call": "write it as tool_calls: a list of {'type': 'function', 'function': {'name', 'arguments'}}",
    "tools": "pass tools as an argument of generate or stream",
    "video": _VIDEO_REMEDY,
    "videos": _VIDEO_REMEDY,
    **dict.fromkeys(("attachments", "files", "image", "images", "image_url", "parts", "text"), _PART_REMEDY),
}
_RESOLUTION = "set the resolution when the engine is opened: min_pixels, max_pixels"
_REFUSED_PART_KEYS = {
    **dict.fromkeys(("max_pixels", "min_pixels", "resized_height", "resized_width"), _RESOLUTION),
    "file_id": "nothing is fetched: pass the image itself, as a path, bytes or base64",
}
_MOST_KEYS = 100  # of a message or a part: each that is not known is compared with those that are
# Parts of Anthropic's and OpenAI's interfaces, and items of OpenAI's Responses API, that are said otherwise here.
_REFUSED_PARTS = {
    "tool_use": "write it into tool_calls of the assistant's message: [{'type': 'function', 'function': {'name': …, "
    "'arguments': …}}]",
    "tool_result": "write it as a message of its own: {'role': 'tool', 'content': …}",
    "thinking": "write it as reasoning_content of the assistant's message, or leave it out",
    "redacted_thinking": "leave it out: nobody but Anthropic can read it",
    "reasoning": "write it as reasoning_content of the assistant's message, or leave it out",
    **dict.fromkeys(("input_audio", "audio"), "audio is not supported; pass its transcript as text"),
    **dict.fromkeys(("document", "file", "input_file"), "pass its text as text and its pages as images"),
}
_REFUSED_ITEMS = {
    "reasoning": "leave it out, or write its text as reasoning_content of the assistant's message behind it",
    "item_reference": "nothing is stored: pass the item itself",
}
_LEAST_LIKENESS = 0.8  # of a key to a known one, to be called mistyped
_LONGEST_KEY = 40  # that is compared: longer ones are nothing mistyped, and take long

# Kinds of text parts, of OpenAI's two interfaces, and the key of each that holds the text.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_IMAGE_PARTS = ("image", "image_url", "input_image")
# The names under which transformers' `apply_chat_template` takes an image, and "data", bytes or base64.
_IMAGE_SOURCE_KEYS = ("image", "url", "path", "base64", "data")
# What a template sees in place of an image; it only asks whether the key is there.
_IMAGE_PART = {"type": "image", "image": "<image>"}


def user_message(prompt: str, images: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """Return one user turn: the images first, then the prompt."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def system_message(text: str | None) -> list[dict[str, Any]]:
    """Return one system turn, or none."""
    return [] if text is None else [{"role": "system", "content": text}]


def normalise_messages(messages: Any) -> tuple[list[dict[str, Any]], tuple[Any, ...]]:
    """Check messages and split them into plain data for the template and the images in order.

    Args:
        messages: A list of `{"role", "content"}` with content a string or a list of parts, or a bare string for one
            user turn. Parts are `{"type": "text", "text": …}`, `{"type": "image", "image" | "url" | "path" | "base64"
            | "data": …}`, and those of OpenAI (`text`, `image_url`; `input_text`, `output_text`, `input_image`),
            langchain and Anthropic. Objects of pydantic are dumped. Null fields and fields that change no prompt are
            passed over; content that is null is empty. Not written to.

    Returns:
        The messages as fresh plain data, image parts without their images; and the images as given, but `path` as
        `Path` and `base64` as bytes.

    Raises:
        UsageError: Anything else, with its place (`messages[2].content[1]`).
    """
    with reading("messages", "pass plain lists, dicts and strings"):
        return _normalised(messages)


def _normalised(messages: Any) -> tuple[list[dict[str, Any]], tuple[Any, ...]]:
    if isinstance(messages, str):
        messages = user_message(messages)
    if not isinstance(messages, Sequence) or isinstance(messages, (bytes, bytearray, memoryview)):
        raise UsageError(
            f"messages must be a list of messages or a string, got {type(messages).__name__}",
            remedy='pass [{"role": "user", "content": "…"}] or a plain string',
        )
    if not messages:
        raise UsageError("messages is empty", remedy='pass at least one {"role": "user", "content": "…"}')
    images: list[Any] = []
    count = ValueCount("the list of messages")
    count.add(len(messages))
    plain: list[dict[str, Any]] = []
    for i in range(len(messages)):  # by index, since a class of the caller's own may iterate for ever
        item = dumped(messages[i])
        message = _message(item, f"messages[{i}]", images, count)
        before = plain[-1] if plain else {}
        if _is_call(item) and before.get("role") == "assistant" and type(before.get("tool_calls", [])) is list:
            # The items of one answer are one turn.
            before.setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            plain.append(message)
    return plain, tuple(images)


def _role(message: Mapping[str, Any], place: str) -> str:
    given = message.get("role")
    if given is None:
        given = _TYPES_AS_ROLES.get(_exact(message.get("type")))
    if given is None:
        raise UsageError(f"{place} has no 'role'", remedy=f"the roles are {', '.join(_ROLES)}")
    role = _OTHER_ROLES.get(_exact(given), _exact(given))
    if role not in _ROLES:
        # Qwen's templates leave out turns of a role they do not know.
        raise UsageError(f"{place} has the unknown role {shown(given)}", remedy=f"the roles are {', '.join(_ROLES)}")
    return role


def _exact(value: Any) -> str:
    """Return a string, also one of an enumeration, as an exact `str`, to be looked up; empty if it is none."""
    return str.__str__(value) if isinstance(value, str) else ""


def _message(message: Any, place: str, images: list[Any], count: ValueCount) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f"{place} must be a dict, got {type(message).__name__}")
    _check_num_keys(message, place, count)
    # A client that sends every field of its class sends null for those that are not set.
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    message = _of_item(message, place)
    role = _role(message, place)
    _check_keys(message, _MESSAGE_KEYS, _REFUSED_MESSAGE_KEYS, place)
    plain = {
        text_data(key, f"a key of {place}"): plain_data(value, f"{place}.{key}", count)
        for key, value in message.items()
        if key not in ("role", "content", "refusal")
    }
    if "tool_calls" in plain:
        plain["tool_calls"] = _tool_calls(plain["tool_calls"])
    # As transformers: a template reads `reasoning_content`, whatever the caller named it.
    reasoning = next((plain[key] for key in ("reasoning_content", "thinking", "reasoning") if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    content = message.get("content")
    if content is None:
        content = message.get("refusal", "" if "content" in message or plain.get("tool_calls") else None)
    return {"role": role, **plain, "content": _content(content, f"{place}.content", images, count)}


def _of_item(item: dict[Any, Any], place: str) -> dict[Any, Any]:
    """Return the message that an item of OpenAI's Responses API is, if it is one without a role; else the same."""
    kind = _exact(item.get("type"))
    if "role" in item or not kind:
        return item
    if kind in _REFUSED_ITEMS:
        raise UsageError(f"{place} is an item of the type {kind!r}, which is not taken", remedy=_REFUSED_ITEMS[kind])
    if kind == "function_call":
        function = {key: _required(item, key, kind, place) for key in ("name", "arguments")}
        call = {"type": "function", "id": item.get("call_id", item.get("id")), "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        output = _required(item, "output", kind, place)
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
    return item


def _required(item: Mapping[Any, Any], key: str, kind: str, place: str) -> Any:
    if key not in item:
        raise UsageError(f"{place} is a {kind} without {key!r}", remedy="pass the item as the client returned it")
    return item[key]


def _is_call(item: Any) -> bool:
    """Return whether a message is an item of the Responses API that calls a function."""
    return isinstance(item, Mapping) and item.get("role") is None and _exact(item.get("type")) == "function_call"


def _check_num_keys(values: Mapping[Any, Any], place: str, count: ValueCount) -> None:
    if len(values) > _MOST_KEYS:
        raise UsageError(f"{place} has {len(values)} keys, expected at most {_MOST_KEYS}", remedy="pass less data")
    count.add(max(0, len(values) - 2))  # every message and part has two


def _tool_calls(calls: Any) -> Any:
    """Write calls as langchain holds them, `{"name", "args"}`, in the form that templates read."""
    if not isinstance(calls, list):
        return calls
    return [
        {"type": "function", "id": call.get("id"), "function": {"name": call["name"], "arguments": call["args"]}}
        if isinstance(call, dict) and {"name", "args"} <= set(call) and "function" not in call
        else call
        for call in calls
    ]


def _is_empty(value: Any) -> bool:
    return isinstance(value, (str, list, tuple, dict)) and len(value) == 0


def _content(content: Any, place: str, images: list[Any], count: ValueCount) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return text_data(content, place)
    if not isinstance(content, (list, tuple)):
        found = "nothing" if content is None else type(content).__name__
        raise UsageError(f"{place} must be a string or a list of parts, got {found}")
    count.add(len(content))
    # By index, as above.
    return [_part(content[i], f"{place}[{i}]", images, count) for i in range(len(content))]


def _part(part: Any, place: str, images: list[Any], count: ValueCount) -> dict[str, Any]:
    part = dumped(part)
    if not isinstance(part, Mapping):
        raise UsageError(
            f"{place} must be a dict, got {type(part).__name__}", remedy='write text as {"type": "text", "text": "…"}'
        )
    _check_num_keys(part, place, count)
    part = {key: value for key, value in part.items() if value is not None}
    kind = _exact(part.get("type"))
    if kind in _TEXT_PARTS:
        key = _TEXT_PARTS[kind]
        _check_keys(part, ("type", key), _REFUSED_PART_KEYS, place)
        if key not in part:
            raise UsageError(f"{place} is a {kind} part without {key!r}")
        return {"type": "text", "text": text_data(part[key], f"{place}.{key}")}
    if kind == "image":
        _check_keys(part, ("type", *_IMAGE_SOURCE_KEYS, "source", "detail"), _REFUSED_PART_KEYS, place)
        images.append(_image_source(part, place))
        return dict(_IMAGE_PART)
    if kind in ("image_url", "input_image"):
        _check_keys(part, ("type", "image_url", "detail"), _REFUSED_PART_KEYS, place)
        images.append(_openai_image(part, place))
        return dict(_IMAGE_PART)
    if kind in ("video", "video_url"):
        raise UsageError(
            f"{place} is a video, which is not supported yet", remedy="pass frames of it as images, one part each"
        )
    if kind in _REFUSED_PARTS:
        raise UsageError(
            f"{place} is a part of the type {kind!r}, which is not taken as a part", remedy=_REFUSED_PARTS[kind]
        )
    found = f"has the unknown type {shown(part['type'])}" if "type" in part else "has no 'type'"
    raise UsageError(f"{place} {found}", remedy=f"the types are {', '.join((*_TEXT_PARTS, *_IMAGE_PARTS))}")


def _image_source(part: Mapping[str, Any], place: str) -> Any:
    _check_detail(part, place)
    if "source" in part:
        if not isinstance(part["source"], Mapping):
            raise UsageError(f"{place}.source must be a dict, got {type(part['source']).__name__}")
        # Anthropic's form: {"type": "base64", "media_type": …, "data": …} or {"type": "url", "url": …}.
        part, place = {**part, **part["source"]}, f"{place}.source"
    keys = [key for key in _IMAGE_SOURCE_KEYS if part.get(key) is not None]
    if len(keys) != 1:
        found = f"{len(keys)}: {', '.join(keys)}" if keys else "none"
        raise UsageError(
            f"{place} must hold its image under one key, found {found}",
            remedy=f"the keys are {', '.join(_IMAGE_SOURCE_KEYS)}",
        )
    key, source = keys[0], part[keys[0]]
    if key == "path":
        if not isinstance(source, (str, os.PathLike)):
            raise UsageError(f"{place}.path must be a path, got {type(source).__name__}")
        return Path(os.fsdecode(source))
    if key == "url" and not isinstance(source, str):
        raise UsageError(f"{place}.url must be a string, got {type(source).__name__}")
    # Under "data" bytes are those of the file, as transformers takes them, and text is base64.
    if key == "base64" or (key == "data" and isinstance(source, str)):
        return _decode_base64(source, f"{place}.{key}")
    return source


def _openai_image(part: Mapping[str, Any], place: str) -> str:
    """Return the URL of `{"url", "detail"}`, or of a bare string, as the Responses API has it."""
    value, place = part.get("image_url"), f"{place}.image_url"
    if isinstance(value, Mapping):
        _check_keys(value, ("url", "detail"), _REFUSED_PART_KEYS, place)
        _check_detail(value, place)
        value, place = value.get("url"), f"{place}.url"
    else:
        _check_detail(part, place)
    if not isinstance(value, str):
        raise UsageError(f"{place} must be a string, got {type(value).__name__}")
    return str.__str__(value)


def _check_detail(values: Mapping[str, Any], place: str) -> None:
    detail = values.get("detail")
    # "high" asks for what is done anyway: the image in its own resolution.
    if detail is not None and _exact(detail) not in ("auto", "high"):
        raise UsageError(
            f"{place}.detail={shown(detail)} is not supported", remedy="set the resolution with max_pixels"
        )


def _decode_base64(source: Any, place: str) -> bytes:
    if not isinstance(source, (str, bytes, bytearray)):
        raise UsageError(f"{place} is not base64: expected text, got {type(source).__name__}")
    try:
        return decode_base64(source)
    except ValueError as error:
        raise UsageError(
            f"{place} is not base64: {error}", remedy="pass base64.b64encode(data).decode(), or the bytes under 'data'"
        ) from error


def _check_keys(found: Mapping[Any, Any], known: Sequence[str], refused: Mapping[str, str], place: str) -> None:
    """Refuse keys that are a known one mistyped, or hold what would be lost; others change no prompt."""
    for key, value in found.items():
        name = _exact(key)
        if name in known:
            continue
        if name in refused and not _is_empty(value):
            raise UsageError(f"{place} has the key {name!r}, which is not taken here", remedy=refused[name])
        close = difflib.get_close_matches(name.lower()[:_LONGEST_KEY], known, n=1, cutoff=_LEAST_LIKENESS)
        if close or not isinstance(key, str):
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UsageError(
                f"{place} has the unknown key {shown(key)}", remedy=f"{hint}the keys are {', '.join(known)}"
            )

"""Check chat messages in Hugging Face's format, and take the images out of them."""

from __future__ import annotations

import base64
import binascii
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import UsageError

_ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
)
# The names under which transformers' `apply_chat_template` takes an image, and "data", bytes or a data URL.
_IMAGE_SOURCE_KEYS = ("image", "url", "path", "base64", "data")
# What a template sees in place of an image; it only asks whether the key is there.
_IMAGE_PART = {"type": "image", "image": "<image>"}


def user_message(prompt: str, images: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """Return one user turn: the images first, then the prompt."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def normalise_messages(messages: Any) -> tuple[list[dict[str, Any]], tuple[Any, ...]]:
    """Check messages and split them into plain data for the template and the images in order.

    Args:
        messages: A list of `{"role", "content"}` with content a string or a list of parts, or a bare string for one
            user turn. Parts are `{"type": "text", "text": …}`, `{"type": "image", "image" | "url" | "path" | "base64"
            | "data": …}`, and OpenAI's `{"type": "image_url", "image_url": {"url": …}}`. Not written to.

    Returns:
        The messages as fresh plain data, image parts without their images; and the images as given, but `path` as
        `Path` and `base64` as bytes.

    Raises:
        UsageError: Anything else, with its place (`messages[2].content[1]`).
    """
    if isinstance(messages, str):
        messages = user_message(messages)
    if not isinstance(messages, Sequence) or isinstance(messages, (bytes, bytearray)):
        raise UsageError(
            f"messages must be a list of messages or a string, got {type(messages).__name__}",
            remedy='pass [{"role": "user", "content": "…"}] or a plain string',
        )
    if not messages:
        raise UsageError("messages is empty", remedy='pass at least one {"role": "user", "content": "…"}')
    images: list[Any] = []
    plain = [_message(message, f"messages[{i}]", images) for i, message in enumerate(messages)]
    return plain, tuple(images)


def plain_data(value: Any, place: str) -> Any:
    """Return a copy of JSON-like data built of exact built-in types, fit for an untrusted template.

    Objects of other types are refused: their methods would be open to the template.

    Raises:
        UsageError: A value is no JSON, or a string cannot be written as UTF-8.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, place)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_text(key, f"a key of {place}"): plain_data(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item, f"{place}[{i}]") for i, item in enumerate(value)]
    raise UsageError(f"{place} must be JSON data, got {type(value).__name__}")


def _message(message: Any, place: str, images: list[Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f"{place} must be a dict, got {type(message).__name__}")
    _check_keys(message, _MESSAGE_KEYS, place)
    if "role" not in message:
        raise UsageError(f"{place} has no 'role'", remedy=f"the roles are {', '.join(_ROLES)}")
    role = message["role"]
    if role not in _ROLES:
        # Qwen's templates leave out turns of a role they do not know.
        raise UsageError(f"{place} has the unknown role {role!r}", remedy=f"the roles are {', '.join(_ROLES)}")
    plain = {
        key: plain_data(value, f"{place}.{key}")
        for key, value in message.items()
        if key not in ("content",) and value is not None
    }
    # As transformers: a template reads `reasoning_content`, whatever the caller named it.
    reasoning = next((plain[key] for key in ("reasoning_content", "thinking", "reasoning") if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    content = message.get("content")
    if content is None and plain.get("tool_calls"):
        content = ""
    return {**plain, "content": _content(content, f"{place}.content", images)}


def _content(content: Any, place: str, images: list[Any]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return _text(content, place)
    if not isinstance(content, (list, tuple)):
        found = "nothing" if content is None else type(content).__name__
        raise UsageError(f"{place} must be a string or a list of parts, got {found}")
    return [_part(part, f"{place}[{i}]", images) for i, part in enumerate(content)]


def _part(part: Any, place: str, images: list[Any]) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise UsageError(
            f"{place} must be a dict, got {type(part).__name__}", remedy='write text as {"type": "text", "text": "…"}'
        )
    kind = part.get("type")
    if kind == "text":
        _check_keys(part, ("type", "text"), place)
        if "text" not in part:
            raise UsageError(f"{place} is a text part without 'text'")
        return {"type": "text", "text": _text(part["text"], f"{place}.text")}
    if kind == "image":
        _check_keys(part, ("type", *_IMAGE_SOURCE_KEYS), place)
        images.append(_image_source(part, place))
        return dict(_IMAGE_PART)
    if kind == "image_url":
        _check_keys(part, ("type", "image_url"), place)
        images.append(_openai_image(part.get("image_url"), f"{place}.image_url"))
        return dict(_IMAGE_PART)
    if kind in ("video", "video_url"):
        raise UsageError(
            f"{place} is a video, which is not supported yet", remedy="pass frames of it as images, one part each"
        )
    found = "has no 'type'" if kind is None else f"has the unknown type {kind!r}"
    raise UsageError(f"{place} {found}", remedy="the types are text, image and image_url")


def _image_source(part: Mapping[str, Any], place: str) -> Any:
    keys = [key for key in _IMAGE_SOURCE_KEYS if part.get(key) is not None]
    if len(keys) != 1:
        found = f"{len(keys)}: {', '.join(keys)}" if keys else "none"
        raise UsageError(
            f"{place} must hold its image under one key, found {found}",
            remedy=f"the keys are {', '.join(_IMAGE_SOURCE_KEYS)}",
        )
    source = part[keys[0]]
    if keys[0] == "path":
        if not isinstance(source, (str, Path)):
            raise UsageError(f"{place}.path must be a path, got {type(source).__name__}")
        return Path(source)
    if keys[0] == "url" and not isinstance(source, str):
        raise UsageError(f"{place}.url must be a string, got {type(source).__name__}")
    if keys[0] == "base64":
        return _decode_base64(source, f"{place}.base64")
    return source


def _openai_image(value: Any, place: str) -> str:
    if isinstance(value, Mapping):
        _check_keys(value, ("url", "detail"), place)
        if value.get("detail", "auto") != "auto":
            raise UsageError(
                f"{place}.detail={value['detail']!r} is not supported", remedy="set the resolution with max_pixels"
            )
        value, place = value.get("url"), f"{place}.url"
    if not isinstance(value, str):
        raise UsageError(f"{place} must be a string, got {type(value).__name__}")
    return value


def _decode_base64(source: Any, place: str) -> bytes:
    try:
        return base64.b64decode(source, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise UsageError(f"{place} is not base64: {error}") from error


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{place} must be a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{place} holds a lone surrogate, {value[error.start]!r}, at character {error.start}",
            remedy="decode the text from its bytes as UTF-8",
        ) from error
    return str.__str__(value)


def _check_keys(found: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for key in found:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UsageError(f"{place} has the unknown key {key!r}", remedy=f"{hint}the keys are {', '.join(known)}")

"""From the tensors of a request to the body of a chat completion, which says all that can be asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.integrations.triton.config import (
    CHAT_REQUEST,
    IMAGE,
    INPUTS,
    OPTIONS,
    SAMPLING,
    STREAM,
    TEXT_INPUT,
    VIDEO,
)
from runtime.server.bodies import parse_json
from runtime.server.errors import ApiError
from runtime.shown import shown


@dataclass(frozen=True)
class TritonRequest:
    """What a request holds, in memory of ours.

    Attributes:
        tensors: The elements of each input tensor that was given: bytes, numbers or truth values.
        parameters: Its parameters, as JSON.
    """

    tensors: Mapping[str, list[Any]]
    parameters: str

    @classmethod
    def copied(cls, request: Any) -> TritonRequest:
        """Copy an `InferenceRequest`, whose memory is the server's again when `execute` returns."""
        tensors = {}
        for tensor in request.inputs():
            values = tensor.as_numpy().reshape(-1)
            # A float32 as the number that was meant: 0.7, not 0.699999988.
            tensors[tensor.name()] = [float(str(each)) for each in values] if values.dtype.kind == "f" else [*values]
        return cls({name: [_plain(each) for each in values] for name, values in tensors.items()}, request.parameters())


def chat_body(request: TritonRequest) -> dict[str, Any]:
    """Return the body of the chat completion that a request asks for.

    `chat_request` is such a body. Otherwise `text_input` is the question of a user, after the images and videos.

    Raises:
        ApiError: A tensor has not one element, a text is no UTF-8 or no JSON, there is no prompt, or there are two, or
            an option is given twice.
    """
    values = {name: _value(name, found) for name, found in request.tensors.items()}
    stream = values.pop(STREAM, None)
    if CHAT_REQUEST in values:
        body = _json_object(CHAT_REQUEST, values.pop(CHAT_REQUEST))
        others = [*values, *_json_object("parameters", request.parameters or "{}")]
        if others:
            raise _refusal(
                f"{CHAT_REQUEST} and {shown(others[0])} are given together", "put all of it into chat_request"
            )
    else:
        body = _options(values, request.parameters)
        body["messages"] = [{"role": "user", "content": _content(values)}]
        if stream:
            body["stream_options"] = {"include_usage": True}
    if stream is not None and body.setdefault("stream", stream) != stream:
        raise _refusal("the tensor stream differs from stream in chat_request", "give one of them")
    return body


def _content(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    if TEXT_INPUT not in values:
        raise _refusal("there is no prompt", f"give the tensor {TEXT_INPUT}, or {CHAT_REQUEST}")
    parts: list[dict[str, Any]] = [{"type": "image", "image": _file(each)} for each in values.get(IMAGE, [])]
    parts += [{"type": "video", "video": _file(each)} for each in values.get(VIDEO, [])]
    return [*parts, {"type": "text", "text": values[TEXT_INPUT]}]


def _options(values: Mapping[str, Any], parameters: str) -> dict[str, Any]:
    """Return the options of the answer: those of sampling_parameters, of their own tensors, of the parameters."""
    found: dict[str, Any] = {}
    for group in (
        _json_object(SAMPLING, values.get(SAMPLING, "{}")),
        {each.name: values[each.name] for each in OPTIONS if each.name in values},
        _json_object("parameters", parameters or "{}"),
    ):
        for name, value in group.items():
            if name in found:
                raise _refusal(f"{shown(name)} is given twice", "give it once")
            if name in ("messages", "model", STREAM, "stream_options"):
                raise _refusal(f"{shown(name)} is no option of an answer", f"give the whole body as {CHAT_REQUEST}")
            found[name] = value
    return found


def _value(name: str, found: list[Any]) -> Any:
    """Return the element of a tensor that has one, or all of a list; texts decoded."""
    spec = next(each for each in INPUTS if each.name == name)
    if spec.is_list:
        return found if name in (IMAGE, VIDEO) else [_text(name, each) for each in found]
    if len(found) != 1:
        raise _refusal(f"the tensor {name} has {len(found)} elements", "give one")
    return _text(name, found[0]) if spec.data_type == "TYPE_STRING" else found[0]


def _file(contents: bytes) -> bytes | str:
    """Return a file as it is; ASCII is base64 or a URL, since no image or video is that."""
    return contents.decode("ascii") if contents.isascii() else contents


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refusal(f"the tensor {name} is not UTF-8 (byte {error.start})", "encode texts as UTF-8") from error


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        found = parse_json(text.encode())
    except ApiError as error:
        raise _refusal(f"{name}: {error.message.partition('. Remedy')[0]}", "give an object of JSON") from error
    if not isinstance(found, dict):
        raise _refusal(f"{name} is {shown(json.dumps(found), 80)}", "give an object of JSON")
    return found


def _plain(value: Any) -> Any:
    """Return a scalar of numpy as Python's, and texts, which some clients send so, as bytes."""
    value = value.item() if hasattr(value, "item") else value
    return value.encode() if isinstance(value, str) else value


def _refusal(message: str, remedy: str) -> ApiError:
    return ApiError(400, f"{message}. Remedy: {remedy}", code="invalid_input")

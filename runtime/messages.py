"""Check chat messages in Hugging Face's format, and take out of them what is not text."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from runtime.arguments import reading
from runtime.errors import UsageError
from runtime.input_kinds.kind import InputKind
from runtime.input_kinds.registry import input_kinds, kind_of
from runtime.message_keys import REFUSED_PART_KEYS, check_keys, exact
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
_REFUSED_MESSAGE_KEYS = {
    "audio": "audio is not supported; pass its transcript as text",
    "function_call": "write it as tool_calls: a list of {'type': 'function', 'function': {'name', 'arguments'}}",
    "tools": "pass tools as an argument of generate or stream",
    **dict.fromkeys(("attachments", "files", "image", "images", "image_url", "parts", "text"), _PART_REMEDY),
    **dict.fromkeys(("video", "videos", "video_url"), _PART_REMEDY),
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
    "reasoning": "leave it out, or write its text as reasoning_content of the assistant's message after it",
    "item_reference": "nothing is stored: pass the item itself",
}
# Kinds of text parts, of OpenAI's two interfaces, and the key of each that holds the text.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


@dataclass(frozen=True)
class Attachment:
    """What a message part holds that is not text: its kind, and the source that the kind reads."""

    kind: InputKind
    source: Any


class Messages(NamedTuple):
    """Messages that were checked.

    Attributes:
        turns: Plain data for the template, with placeholders for what is not text.
        attachments: What the placeholders stand for, in order.
    """

    turns: list[dict[str, Any]]
    attachments: tuple[Attachment, ...]

    def then(self, other: Messages) -> Messages:
        """Return these and others after them."""
        return Messages(self.turns + other.turns, self.attachments + other.attachments)

    def filled(self) -> list[dict[str, Any]]:
        """Return copies of the messages in which parts hold what the placeholders stand for; see `InputKind.part`."""
        waiting = iter(self.attachments)

        def part_of(part: dict[str, Any]) -> dict[str, Any]:
            if part["type"] == "text":
                return dict(part)
            attachment = next(waiting)
            return attachment.kind.part(attachment.source)

        filled = []
        for turn in self.turns:
            content = turn["content"]
            parts = content if isinstance(content, str) else [part_of(part) for part in content]
            filled.append({**copy.deepcopy(turn), "content": parts})
        return filled


def _parts_of(images: Sequence[Any], videos: Sequence[Any]) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [*parts, *({"type": "video", "video": video} for video in videos)]


def user_message(prompt: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """Return one user turn: the images first, then the videos, then the prompt."""
    parts = _parts_of(images, videos)
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def system_message(text: str | None) -> list[dict[str, Any]]:
    """Return one system turn, or none."""
    return [] if text is None else [{"role": "system", "content": text}]


def asked_messages(prompt: Any, images: Any = (), videos: Any = ()) -> Messages:
    """Return what one turn of a conversation asks.

    Args:
        prompt: A string, message parts, or whole messages of any role.
        images: Images before a string or parts, as `user_message` takes them.
        videos: Videos after those.

    Raises:
        UsageError: They are no such thing.
    """
    remedy = "pass a string, a list of parts or messages, or one of them"
    with reading("the prompt", remedy):
        for name, shown_ones in (("images", images), ("videos", videos)):
            if not isinstance(shown_ones, (list, tuple)):
                raise UsageError(
                    f"{name} must be a list, got {type(shown_ones).__name__}", remedy=f"pass {name}=[{name[:-1]}]"
                )
        if isinstance(prompt, str):
            return normalise_messages(user_message(prompt, images, videos))
        given = dumped(prompt)
        given = [given] if isinstance(given, Mapping) else given
        if not isinstance(given, (list, tuple)):
            raise UsageError(f"a prompt must be text, parts or messages, got {type(prompt).__name__}", remedy=remedy)
        if given and _is_part(given[0]):
            return normalise_messages([{"role": "user", "content": [*_parts_of(images, videos), *given]}])
        if images or videos:
            raise UsageError(
                "images or videos were given beside whole messages", remedy="put them into content, as parts"
            )
        return normalise_messages(given)


def normalise_messages(messages: Any) -> Messages:
    """Check messages and split them into plain data for the template and what they hold beside text, in order.

    Args:
        messages: A list of `{"role", "content"}` with content a string or a list of parts, or a bare string for one
            user turn. Parts are `{"type": "text", "text": …}`, `{"type": "image", "image" | "url" | "path" | "base64"
            | "data": …}`, and those of OpenAI (`text`, `image_url`; `input_text`, `output_text`, `input_image`),
            langchain and Anthropic. Objects of pydantic are dumped. Null fields and fields that change no prompt are
            passed over; content that is null is empty. Not written to. `Messages` are returned as they are.

    Returns:
        The messages as fresh plain data, with placeholders for what is not text; and that.

    Raises:
        UsageError: Anything else, with its place (`messages[2].content[1]`).
    """
    if type(messages) is Messages:
        return messages
    with reading("messages", "pass plain lists, dicts and strings"):
        return _normalised(messages)


def _normalised(messages: Any) -> Messages:
    if isinstance(messages, str):
        messages = user_message(messages)
    if not isinstance(messages, Sequence) or isinstance(messages, (bytes, bytearray, memoryview)):
        raise UsageError(
            f"messages must be a list of messages or a string, got {type(messages).__name__}",
            remedy='pass [{"role": "user", "content": "…"}] or a plain string',
        )
    if not messages:
        raise UsageError("messages is empty", remedy='pass at least one {"role": "user", "content": "…"}')
    attachments: list[Attachment] = []
    count = ValueCount("the list of messages")
    count.add(len(messages))
    plain: list[dict[str, Any]] = []
    for i in range(len(messages)):  # by index, since a class of the caller's own may iterate for ever
        item = dumped(messages[i])
        message = _message(item, f"messages[{i}]", attachments, count)
        before = plain[-1] if plain else {}
        if _is_call(item) and before.get("role") == "assistant" and type(before.get("tool_calls", [])) is list:
            # The items of one answer are one turn.
            before.setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            plain.append(message)
    return Messages(plain, tuple(attachments))


def _role(message: Mapping[str, Any], place: str) -> str:
    given = message.get("role")
    if given is None:
        given = _TYPES_AS_ROLES.get(exact(message.get("type")))
    if given is None:
        raise UsageError(f"{place} has no 'role'", remedy=f"the roles are {', '.join(_ROLES)}")
    role = _OTHER_ROLES.get(exact(given), exact(given))
    if role not in _ROLES:
        # Qwen's templates leave out turns of a role they do not know.
        raise UsageError(f"{place} has the unknown role {shown(given)}", remedy=f"the roles are {', '.join(_ROLES)}")
    return role


def _message(message: Any, place: str, attachments: list[Attachment], count: ValueCount) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(
            f"{place} must be a dict, got {type(message).__name__}",
            remedy='write a message as {"role": "user", "content": "…"}',
        )
    _check_num_keys(message, place, count)
    # A client that sends every field of its class sends null for those that are not set.
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    message = _of_item(message, place)
    role = _role(message, place)
    check_keys(message, _MESSAGE_KEYS, _REFUSED_MESSAGE_KEYS, place)
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
    return {"role": role, **plain, "content": _content(content, f"{place}.content", attachments, count)}


def _of_item(item: dict[Any, Any], place: str) -> dict[Any, Any]:
    """Return the message that an item of OpenAI's Responses API is, if it is one without a role; else the same."""
    kind = exact(item.get("type"))
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
    return isinstance(item, Mapping) and item.get("role") is None and exact(item.get("type")) == "function_call"


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


def _content(content: Any, place: str, attachments: list[Attachment], count: ValueCount) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return text_data(content, place)
    if not isinstance(content, (list, tuple)):
        found = "nothing" if content is None else type(content).__name__
        raise UsageError(f"{place} must be a string or a list of parts, got {found}")
    count.add(len(content))
    # By index, as above.
    return [_part(content[i], f"{place}[{i}]", attachments, count) for i in range(len(content))]


def _is_part(value: Any) -> bool:
    """Return whether something is a part of a message, and not a message."""
    value = dumped(value)
    if not isinstance(value, Mapping) or value.get("role") is not None:
        return False
    kind = exact(value.get("type"))
    return kind in (*_TEXT_PARTS, *_REFUSED_PARTS) or kind_of(kind) is not None


def _part(part: Any, place: str, attachments: list[Attachment], count: ValueCount) -> dict[str, Any]:
    part = dumped(part)
    if not isinstance(part, Mapping):
        raise UsageError(
            f"{place} must be a dict, got {type(part).__name__}", remedy='write text as {"type": "text", "text": "…"}'
        )
    _check_num_keys(part, place, count)
    part = {key: value for key, value in part.items() if value is not None}
    kind = exact(part.get("type"))
    if kind in _TEXT_PARTS:
        key = _TEXT_PARTS[kind]
        check_keys(part, ("type", key), REFUSED_PART_KEYS, place)
        if key not in part:
            raise UsageError(f"{place} is a {kind} part without {key!r}")
        return {"type": "text", "text": text_data(part[key], f"{place}.{key}")}
    input_kind = kind_of(kind)
    if input_kind is not None:
        attachments.append(Attachment(input_kind, input_kind.source(part, place)))
        return dict(input_kind.placeholder)
    if kind in _REFUSED_PARTS:
        raise UsageError(
            f"{place} is a part of the type {kind!r}, which is not taken as a part", remedy=_REFUSED_PARTS[kind]
        )
    found = f"has the unknown type {shown(part['type'])}" if "type" in part else "has no 'type'"
    known = [*_TEXT_PARTS, *(part_type for each in input_kinds() for part_type in each.part_types)]
    raise UsageError(f"{place} {found}", remedy=f"the types are {', '.join(known)}")

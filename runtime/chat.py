"""Render the checkpoint's own chat template, in a sandbox, as transformers 5.23 renders it.

Templates come from the Hub and are untrusted. jinja2's sandbox bounds what they reach, and they see plain JSON data
only; it does not bound what they cost: `{{ 'a' * 10**9 }}` takes gigabytes while it is compiled, since jinja2 folds
constants, and two nested loops take days. So a template is compiled and rendered in a process of its own with limits
(`runtime/template_process.py`), unless its SHA-256 is in `KNOWN_TEMPLATES`: their work was read to be in proportion to
the messages, and needs no other process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from runtime.arguments import template_variables, tool_schemas
from runtime.errors import CapacityError, EngineError, UsageError
from runtime.files import read_json_object, read_small_file
from runtime.input_kinds.registry import input_kinds
from runtime.shown import shorten
from runtime.template_engine import (
    FORBIDDEN,
    LENGTH,
    MEMORY,
    REWRITTEN,
    SYNTAX,
    CompiledTemplate,
    TemplateFailure,
)
from runtime.template_process import MAX_RENDER_MEMORY_BYTES, TemplateProcess
from runtime.tools.registry import format_of

MAX_CHAT_CHARACTERS = 1 << 24
"""Longest chat, as messages and as text: 16 million characters, beyond the context of every model."""

MAX_TEMPLATE_CHARACTERS = 1 << 20
"""Longest source of a template; Qwen3-VL's have about 5,000."""

KNOWN_TEMPLATES: Mapping[str, str] = {
    "a354b1f76978dce4634c95be2dc00686b07e36faf48e1af005b5b2bce5c6e5a1": "the demo checkpoints",
}
"""SHA-256, in UTF-8, of the templates that are rendered in this process, and whose they are."""

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt")
_LONGEST_REASON = 300
_REPAIR = "repair the checkpoint's chat_template.jinja and export it again"


@dataclass(frozen=True)
class RenderedChat:
    """Hold a rendered chat.

    Attributes:
        text: What transformers' `apply_chat_template(tokenize=False)` returns.
        places: Where the template itself wrote tokens for what is not text: character position in `text`, and
            token, ascending. A token that a user typed is not among them.
    """

    text: str
    places: tuple[tuple[int, str], ...]


class ChatTemplate:
    """Compile a chat template once and render chats with it.

    Args:
        source: The jinja2 source.
        special_tokens: Variables such as `eos_token`, as the tokenizer's `special_tokens_map` passes them.

    Attributes:
        variables: Names of what the template takes from outside.
        call_format: How it asks the model to write calls of functions; None if it asks for no known format.

    Raises:
        EngineError: The source is no valid template, or compiling it exceeds the limits.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None) -> None:
        self._special_tokens = dict(special_tokens or {})
        self._compiled: CompiledTemplate | None = None
        self._process: TemplateProcess | None = None
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise EngineError(
                f"the chat template has {len(source)} characters, expected at most {MAX_TEMPLATE_CHARACTERS}",
                remedy=_REPAIR,
            )
        self.call_format = format_of(source)
        request = (source, [kind.token for kind in input_kinds()], MAX_CHAT_CHARACTERS)
        if hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest() in KNOWN_TEMPLATES:
            self._compiled = CompiledTemplate(*request)
            self.variables = self._compiled.variables
            return
        self._process = TemplateProcess(*request)
        answer = self._process.compile()
        if "kind" in answer:
            _fail(answer["kind"], answer["reason"])
        self.variables = frozenset(answer["variables"])

    @classmethod
    def from_config(cls, source: str, tokenizer_config: Mapping[str, Any]) -> ChatTemplate:
        """Take the special tokens from the contents of a `tokenizer_config.json`.

        Raises:
            EngineError: The source is no valid template.
        """
        special_tokens = {}
        for name in _SPECIAL_TOKEN_NAMES:
            token = tokenizer_config.get(name)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                special_tokens[name] = content
        return cls(source, special_tokens=special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RenderedChat:
        """Render a chat and say which tokens of images are the template's own.

        Args:
            messages: The plain messages of `normalise_messages`.
            add_generation_prompt: End with the opening of the assistant's turn.
            tools: JSON schemas of functions, for templates that know tools; none of them are as if left out.
            chat_template_kwargs: Further variables of the template.

        Raises:
            UsageError: The template refuses the messages, or does not know a variable.
            CapacityError: The messages, or the text that the template makes of them, exceed `MAX_CHAT_CHARACTERS`.
            EngineError: The template attempts what the sandbox forbids, or exceeds its limits of time and memory.
        """
        variables = {
            "documents": None,
            **self._checked_kwargs(template_variables(chat_template_kwargs) or {}),
            "messages": list(messages),
            "tools": self._checked_tools(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        _check_length(variables)
        special_tokens = {name: token for name, token in self._special_tokens.items() if name not in variables}
        try:
            if self._compiled is not None:
                text, places = self._compiled.render(special_tokens, variables)
                return RenderedChat(text, tuple(places))
            assert self._process is not None
            answer = self._process.render(special_tokens, variables)
        except TemplateFailure as failure:
            _fail(failure.kind, failure.reason)
        except (ValueError, RecursionError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"the messages cannot be handed to the chat template: {error}") from error
        if "kind" in answer:
            _fail(answer["kind"], answer["reason"])
        return RenderedChat(answer["text"], tuple((offset, token) for offset, token in answer["places"]))

    def _checked_kwargs(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        for name in kwargs:
            if name in _OWN_VARIABLES:
                raise UsageError(
                    f"chat_template_kwargs must not hold {name!r}: it has its own argument",
                    remedy=f"pass {name} as an argument" if name != "add_generation_prompt" else "leave it out",
                )
            if name not in self.variables:
                free = sorted(self.variables - {*_OWN_VARIABLES, *_SPECIAL_TOKEN_NAMES})
                raise UsageError(
                    f"the chat template has no variable {name!r}",
                    remedy=f"its variables are {', '.join(free)}" if free else "it takes none",
                )
        return dict(kwargs)

    def _checked_tools(self, tools: Any) -> list[dict[str, Any]] | None:
        schemas = tool_schemas(tools)
        if schemas is not None and "tools" not in self.variables:
            raise UsageError("the chat template knows no tools", remedy="leave tools out")
        return schemas


def template_source(folder: Path) -> str:
    """Find the template of a checkpoint or engine folder.

    It is `chat_template.jinja`, else the entry in `chat_template.json`, else the one in `tokenizer_config.json`; of
    several in one file the one named "default".

    Raises:
        EngineError: There is none, or a file cannot be read.
    """
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        try:
            # As a file opened for text is read: one kind of line end.
            return read_small_file(path).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise EngineError(f"{path}: cannot be read: {error}", remedy="write the template in UTF-8") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        settings = read_json_object(folder / name) if os.path.lexists(folder / name) else {}
        source = settings.get("chat_template")
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if isinstance(source, str):
            return source
    raise EngineError(
        f"{folder} has no chat template",
        remedy="add a chat_template.jinja, as the Instruct and Thinking checkpoints have",
    )


def _check_length(value: Any) -> None:
    """Raise if the strings in plain data hold too many characters together, before anything is made of them."""
    num_characters = 0
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            num_characters += len(item)
            if num_characters > MAX_CHAT_CHARACTERS:
                raise CapacityError(
                    f"the messages hold more than {MAX_CHAT_CHARACTERS} characters, which no context has room for",
                    remedy="shorten the messages",
                )
        elif isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _fail(kind: str, reason: str) -> NoReturn:
    """Raise what a template's failure is in this project's tree."""
    reason = shorten(reason, _LONGEST_REASON)
    if kind == SYNTAX:
        raise EngineError(f"the chat template is not valid jinja2, {reason}", remedy=_REPAIR)
    if kind == FORBIDDEN:
        raise EngineError(
            f"the chat template attempts what the sandbox forbids: {reason}", remedy="do not trust this checkpoint"
        )
    if kind == MEMORY:
        raise EngineError(
            f"the chat template was stopped: it took more than {MAX_RENDER_MEMORY_BYTES >> 20} MiB of memory",
            remedy=f"do not trust this checkpoint, or {_REPAIR}",
        )
    if kind == LENGTH:
        raise CapacityError(
            f"the chat template wrote {reason} characters, expected at most {MAX_CHAT_CHARACTERS}",
            remedy=f"shorten the messages; if they are short, {_REPAIR}",
        )
    if kind == REWRITTEN:
        tokens = " and ".join(kind.token for kind in input_kinds())
        raise UsageError(
            f"the chat template does not write {tokens} in the messages as it is, so typed image tokens cannot be "
            "told from attached images",
            remedy=f"leave {tokens} out of the messages",
        )
    raise UsageError(
        f"the chat template refuses these messages: {reason}",
        remedy="give messages of the kind that this model was trained on; chat_template.jinja says which it takes",
    )

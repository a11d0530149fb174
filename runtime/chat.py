"""Render the checkpoint's own chat template, in a sandbox, as transformers 5.23 renders it.

The environment (options, extensions, filters, globals) follows `transformers/utils/chat_template_utils.py`. Templates
come from the Hub and are untrusted: they run in jinja2's immutable sandbox and see plain JSON data only.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from runtime.errors import EngineError, UsageError
from runtime.plain_data import plain_data

IMAGE_TOKEN = "<|image_pad|>"
"""What a template writes for an image; the tokenizer has one id for it."""

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt")


@dataclass(frozen=True)
class RenderedChat:
    """Hold a rendered chat.

    Attributes:
        text: What transformers' `apply_chat_template(tokenize=False)` returns.
        image_offsets: Character positions in `text` of the image tokens that the template itself wrote, ascending. An
            image token that a user typed is not among them.
    """

    text: str
    image_offsets: tuple[int, ...]


class ChatTemplate:
    """Compile a chat template once and render chats with it.

    Args:
        source: The jinja2 source.
        special_tokens: Variables such as `eos_token`, as the tokenizer's `special_tokens_map` passes them.

    Raises:
        EngineError: The source is no valid template.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens or {})
        self._environment = _build_environment()
        self._template = self._compile(source)
        undeclared = jinja2.meta.find_undeclared_variables(self._environment.parse(source))
        self.variables = frozenset(undeclared - {*self._environment.globals, "strftime_now"})
        self._marked = self._compile_marked(0)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTemplate:
        """Read template and special tokens from a checkpoint or engine folder.

        Raises:
            EngineError: There is no template, or a file cannot be read.
        """
        folder = Path(folder)
        return cls.from_config(template_source(folder), _read_json(folder / "tokenizer_config.json"))

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
        """Render a chat and say which image tokens are the template's own.

        To tell them from typed ones without looking at what users wrote, the template is rendered a second time from a
        source in which the image token is replaced by a marker that is not in the text. The messages are the same in
        both, so a template that inspects them takes the same path; that the two results agree is checked.

        Args:
            messages: The plain messages of `normalise_messages`.
            add_generation_prompt: End with the opening of the assistant's turn.
            tools: JSON schemas of functions, for templates that know tools.
            chat_template_kwargs: Further variables of the template.

        Raises:
            UsageError: The template refuses the messages, or does not know a variable.
        """
        variables = {
            "documents": None,
            **self._special_tokens,
            **self._checked_kwargs(chat_template_kwargs or {}),
            "messages": list(messages),
            "tools": None if tools is None else self._checked_tools(tools),
            "add_generation_prompt": add_generation_prompt,
            # One clock reading for both renderings.
            "strftime_now": datetime.datetime.now().strftime,
        }
        text = self._render(self._template, variables)
        if IMAGE_TOKEN not in text:
            return RenderedChat(text, ())
        marker, marked_template = self._marked_for(text)
        marked_tokens = {name: token.replace(IMAGE_TOKEN, marker) for name, token in self._special_tokens.items()}
        pieces = self._render(marked_template, {**variables, **marked_tokens}).split(marker)
        if IMAGE_TOKEN.join(pieces) != text:
            raise UsageError(
                f"the chat template treats {IMAGE_TOKEN} in the messages in a way of its own, so typed image tokens "
                "cannot be told from attached images",
                remedy=f"leave {IMAGE_TOKEN} out of the messages",
            )
        offsets = []
        end = 0
        for piece in pieces[:-1]:
            offsets.append(end + len(piece))
            end = offsets[-1] + len(IMAGE_TOKEN)
        return RenderedChat(text, tuple(offsets))

    def _marked_for(self, text: str) -> tuple[str, jinja2.Template]:
        """Return a marker that is not in the text, and the template that writes it; normally the one at hand."""
        number = 0
        marked = self._marked
        while marked[0] in text:
            number += 1
            marked = self._compile_marked(number)
        return marked

    def _compile_marked(self, number: int) -> tuple[str, jinja2.Template]:
        # Letters and digits only: it must stay whole wherever a template can write a string.
        marker = f"TemplateImageSlot{number}"
        return marker, self._compile(self._source.replace(IMAGE_TOKEN, marker))

    def _compile(self, source: str) -> jinja2.Template:
        try:
            return self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise EngineError(
                f"the chat template is not valid jinja2, line {error.lineno}: {error.message}",
                remedy="repair the checkpoint's chat_template.jinja and export it again",
            ) from error

    def _render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        try:
            return template.render(**variables)
        except jinja2.exceptions.SecurityError as error:
            raise EngineError(
                f"the chat template attempts what the sandbox forbids: {error}", remedy="do not trust this checkpoint"
            ) from error
        except Exception as error:  # a template can raise anything its expressions can
            raise UsageError(f"the chat template refuses these messages: {error}") from error

    def _checked_kwargs(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        for name in kwargs:
            if name in _OWN_VARIABLES:
                raise UsageError(f"chat_template_kwargs must not hold {name!r}: it has its own argument")
            if name not in self.variables:
                free = sorted(self.variables - {*_OWN_VARIABLES, *_SPECIAL_TOKEN_NAMES})
                raise UsageError(
                    f"the chat template has no variable {name!r}",
                    remedy=f"its variables are {', '.join(free)}" if free else "it takes none",
                )
        return {name: plain_data(value, f"chat_template_kwargs.{name}") for name, value in kwargs.items()}

    def _checked_tools(self, tools: Sequence[Mapping[str, Any]]) -> list[Any]:
        if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
            raise UsageError("tools must be a list of JSON schemas (dicts)")
        if "tools" not in self.variables:
            raise UsageError("the chat template knows no tools", remedy="leave tools out")
        return [plain_data(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def template_source(folder: Path) -> str:
    """Find the template of a checkpoint or engine folder.

    It is `chat_template.jinja`, else the entry in `chat_template.json`, else the one in `tokenizer_config.json`; of
    several in one file the one named "default".

    Raises:
        EngineError: There is none, or a file cannot be read.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EngineError(f"cannot read {path}: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        source = _read_json(folder / name).get("chat_template")
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if isinstance(source, str):
            return source
    raise EngineError(
        f"{folder} has no chat template",
        remedy="add a chat_template.jinja, as the Instruct and Thinking checkpoints have",
    )


class _GenerationTag(jinja2.ext.Extension):
    """Accept `{% generation %}…{% endgeneration %}`, which marks what an assistant wrote for training, and pass it."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares the attribute, as a plain set)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Return the block as a scope of its own, as transformers' call block is."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_pass"), [], [], body).set_lineno(line)

    def _pass(self, caller: Any) -> str:
        return str(caller())


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace, without attributes that begin with an underscore (as in transformers)."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No parameter has a name, so that `namespace(self=…)` works, as in jinja2.
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"attribute {name!r} of a namespace begins with an underscore")


class _DictFunction:
    """`dict` as a template may call it, without the attributes of the type (as in transformers)."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _build_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes HTML characters.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, dict=_DictFunction(), namespace=_Namespace)
    return environment


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} if there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise EngineError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content

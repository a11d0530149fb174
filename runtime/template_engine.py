"""Compile and render one chat template with jinja2, in its sandbox, as transformers 5.23 renders it.

The environment (options, extensions, filters, globals) follows `transformers/utils/chat_template_utils.py`. Templates
see plain JSON data only. The sandbox bounds what a template reaches, not what it costs: `runtime/chat.py` decides which
templates are rendered in this process and which by `runtime/template_worker.py`, a process with limits, which loads
this file by its path. So it imports jinja2 and the standard library alone.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

SYNTAX, FORBIDDEN, REFUSED, REWRITTEN, MEMORY, LENGTH = (
    "syntax",
    "forbidden",
    "refused",
    "rewritten",
    "memory",
    "length",
)

# Stands for a token in a second rendering. Letters and digits only: it stays whole wherever a template writes a string.
MARKER = "TemplateSlot{number}Kind{index}End"


class TemplateFailure(Exception):
    """Say why a template cannot be compiled or rendered; `runtime/chat.py` makes an error of the project's tree of it.

    Args:
        kind: One of the constants above.
        reason: The words of jinja2 or of the template.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class CompiledTemplate:
    """Compile a template once and render chats with it.

    Args:
        source: The jinja2 source.
        tokens: What the template writes in place of what is not text, such as an image.
        max_characters: Longest text that `render` returns.

    Attributes:
        variables: What the template takes from outside.

    Raises:
        TemplateFailure: The source is no valid template, or memory ran out while jinja2 folded its constants.
    """

    def __init__(self, source: str, tokens: Sequence[str], max_characters: int) -> None:
        self._source = source
        self._tokens = tokens
        self._max_characters = max_characters
        self._environment = _build_environment()
        self._template = self._compile(source)
        undeclared = jinja2.meta.find_undeclared_variables(self._environment.parse(source))
        self.variables = frozenset(undeclared - {*self._environment.globals, "strftime_now"})
        self._marked = self._compile_marked(0)

    def render(
        self, special_tokens: Mapping[str, str], variables: Mapping[str, Any]
    ) -> tuple[str, list[tuple[int, str]]]:
        """Render a chat and find the tokens that the template itself wrote.

        To tell them from typed ones without looking at what users wrote, the template is rendered a second time from a
        source in which the tokens are replaced by markers that are not in the text. The messages are the same in both,
        so a template that inspects them takes the same path; that the two results agree is checked.

        Args:
            special_tokens: Variables such as `eos_token`.
            variables: All others; they win.

        Returns:
            The text, and the places of the template's own tokens: offset and token, ascending.

        Raises:
            TemplateFailure: The template raised, did what the sandbox forbids, wrote too much, or treats typed tokens
                in a way of its own.
        """
        # One clock reading for both renderings.
        given = {**special_tokens, **variables, "strftime_now": datetime.datetime.now().strftime}
        text = self._render(self._template, given)
        if not any(token in text for token in self._tokens):
            return text, []
        markers, marked_template = self._marked_for(text)
        marked_tokens = {name: self._with_markers(token, markers) for name, token in special_tokens.items()}
        marked_text = self._render(marked_template, {**given, **marked_tokens})
        token_of = dict(zip(markers, self._tokens, strict=True))
        places: list[tuple[int, str]] = []
        plain = ""
        for piece in re.split(f"({'|'.join(markers)})", marked_text):
            if piece in token_of:
                places.append((len(plain), token_of[piece]))
            plain += token_of.get(piece, piece)
        if plain != text:
            raise TemplateFailure(REWRITTEN, "")
        return text, places

    def _marked_for(self, text: str) -> tuple[list[str], jinja2.Template]:
        """Return markers that are not in the text, and the template that writes them; normally the one at hand."""
        number = 0
        marked = self._marked
        while any(marker in text for marker in marked[0]):
            number += 1
            marked = self._compile_marked(number)
        return marked

    def _compile_marked(self, number: int) -> tuple[list[str], jinja2.Template]:
        markers = [MARKER.format(number=number, index=index) for index in range(len(self._tokens))]
        return markers, self._compile(self._with_markers(self._source, markers))

    def _with_markers(self, text: str, markers: Sequence[str]) -> str:
        for token, marker in zip(self._tokens, markers, strict=True):
            text = text.replace(token, marker)
        return text

    def _compile(self, source: str) -> jinja2.Template:
        try:
            return self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFailure(SYNTAX, f"line {error.lineno}: {error.message}") from error
        except MemoryError as error:
            raise TemplateFailure(MEMORY, "") from error
        except Exception as error:  # Python's own compiler has limits too: nested blocks, digits, names
            raise TemplateFailure(SYNTAX, f"{type(error).__name__}: {error}") from error

    def _render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        try:
            text = template.render(**variables)
        except jinja2.exceptions.SecurityError as error:
            raise TemplateFailure(FORBIDDEN, str(error)) from error
        except MemoryError as error:
            raise TemplateFailure(MEMORY, "") from error
        except Exception as error:  # a template can raise anything its expressions can
            raise TemplateFailure(REFUSED, str(error)) from error
        if len(text) > self._max_characters:
            raise TemplateFailure(LENGTH, str(len(text)))
        return text


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

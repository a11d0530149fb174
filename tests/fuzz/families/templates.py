"""Chat templates: reaches for Python's insides, work without end, and random programs of the same parts."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from fuzz.family import Recipe
from runtime.template_engine import MARKER

_REACHES = (
    *("''.__class__.__mro__", "().__class__.__base__.__subclasses__()", "messages.__class__", "''|attr('__class__')"),
    *("['']|map(attribute='__class__')|list", "'{0.__class__.__mro__}'.format('')", "'%s'|format(messages.__init__)"),
    *("''['__class__']", "dict.__init__.__globals__", "namespace.__init__.__globals__", "raise_exception.__globals__"),
    *("raise_exception.__code__", "raise_exception|attr('__globals__')", "strftime_now.__self__", "lipsum.__globals__"),
    *("cycler.__init__.__globals__.os.popen('id').read()", "joiner.__init__.__globals__", "self.__init__.__globals__"),
    *("self._TemplateReference__context", "(messages|map('upper')).gi_frame", "messages.append(1)", "messages.clear()"),
    *(
        "messages[0].update({'a': 1})",
        "dict.fromkeys.__self__",
        "range.__class__",
        "'{a.__class__}'.format_map({'a': ''})",
    ),
    *("(''|safe).format.__globals__", "('{0.__class__}'|safe).format(1)", "''|attr('\\x5f\\x5fclass\\x5f\\x5f')"),
    *("['a']|map('attr', '__class__')|list", "messages|groupby('__class__')", "messages|sort(attribute='__class__')"),
    *("messages|sum(attribute='__class__')", "messages|map(attribute='role.__class__.__mro__')|list", "environment"),
    *("config", "request", "undefinedfn()", "1/0", "caller()", "super()", "None()", "'x'.join(5)", "messages[99].role"),
    *("messages[0]['content'][0]['image'].__class__", "'%(a)s' % {'a': 1}", "messages|tojson(indent=messages)"),
    *("strftime_now()", "strftime_now('\\ud800')", "'\\ud800'", "raise_exception('no')", "raise_exception()"),
    *("raise_exception(messages)", "raise_exception('\\ud800')", "raise_exception('\\x1b]0;x\\x07\\x1b[2J')"),
    *("[1, 2]|xmlattr", "'a'|urlize", "'<|image'~'_pad|>'", "'<|image_pad|>'|reverse", "'<|image_pad|>'|length"),
)
_WORK = (
    *("'%1000000000d' % 1", "raise_exception('x'*100000000)", "'a'*10**9", "'a'*10**12", "[1]*10**9", "10**10**8"),
    *(
        "('a'*10**8)|list|length",
        "9**9**9",
        "(2**100000000)|string|length",
        "'%2000000000d' % 1",
        "'a'|center(2000000000)",
    ),
    *("'{:2000000000}'.format(1)", "'a'|indent(2000000000)", "lipsum(n=100000)", "lipsum(n=1, min=10**8, max=10**8+1)"),
    *(
        "range(99999)|list|batch(1)|list|length",
        "'a'.rjust(10**10)",
        "'a'.zfill(10**10)",
        "messages|tojson(indent=10**9)",
    ),
    *("['a'*10**6]*10**4", "['a'*10**6]*10**4|join", "('a'*10**6).replace('', 'b'*10**4)", "('a'*50000)|wordwrap(1)"),
    *("('a,'*10**7).split(',')|length", "('a.b '*100000)|urlize", "('<'*100000)|striptags", "range(10**9)|list"),
    *("strftime_now('%c'*10**8)|length", "range(10**9)|sum", "range(1000000000)|length", "'x'*20000000"),
    *("dict.fromkeys(range(99999))|length", "'<|image_pad|>'*5000000", "1" + "+1" * 100_000, "a" + ".b" * 100_000),
    *("(" * 5000 + "1" + ")" * 5000, "-" * 100_000 + "1", "[" * 3000 + "]" * 3000, "'a'~'b'" * 1 + "~'c'" * 50_000),
    *("x.y" + "[0]" * 50_000, "1" + " if 1 else 1" * 20_000, "'" + "a" * 10_000_000 + "'", "1" + "|string" * 20_000),
)
EVERY_MARKER = "{% for i in range(99999) %}" + MARKER.format(number="{{ i }}", index=0) + " {% endfor %}<|image_pad|>"
"""Writes the markers that the engine would take, one after the other."""
_STATEMENTS = (
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(10**5) %}{% for j in range(10**5) %}x{% endfor %}{% endfor %}",
    "{% set ns=namespace(x='a') %}{% for i in range(40) %}{% set ns.x=ns.x+ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns=namespace(x='a') %}{% for i in range(40) %}{% set ns.x=ns.x~ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns=namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x=ns.x+ns.x %}{% endfor %}",
    "{% set ns=namespace(x={}) %}{% for i in range(99999) %}{% set ns.x=dict(ns.x, **{i|string: ns.x}) %}{% endfor %}",
    "{% set x='x'*100000000 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "{% macro a() %}{{ a() }}{{ a() }}{% endmacro %}{{ a() }}",
    "{% macro a(n) %}{% if n %}{{ a(n-1) }}{{ a(n-1) }}{% endif %}{% endmacro %}{{ a(40) }}",
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% macro m() %}{% endmacro %}{{ m._func }}{{ m._environment }}",
    "{% for x in [1] %}{{ loop._iterator }}{{ loop.__class__ }}{% endfor %}",
    "{% set x=namespace(__class__=1) %}{{ x.__class__ }}{{ x._Namespace__attrs }}",
    "{% import 'os' as os %}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{% debug %}",
    "{% generation %}x{% endgeneration %}",
    "{% generation %}",
    "{%- if true -%}" * 5000 + "{% endif %}" * 5000,
    "{% for a in b %}" * 200 + "{% endfor %}" * 200,
    "{# " * 100_000,
    "{{ x }}" * 200_000,
    "{{" * 100_000,
    "{% raw %}" * 1000,
    "a" * 5_000_000,
    "{{ <|image_pad|> }}",
    f"{{{{ '{MARKER.format(number=0, index=0)}'*10 }}}}<|image_pad|>",
    EVERY_MARKER,
)
_ATOMS = (
    *(
        "1",
        "'a'",
        "messages",
        "messages[0]",
        "messages[0].content",
        "none",
        "[]",
        "{}",
        "range(9)",
        "10**6",
        "x",
        "true",
    ),
    *("'%s'", "'{}'", "add_generation_prompt", "namespace(a=1)", "dict(a=1)", "strftime_now('%Y')", "1.5", "'é'*9"),
)
_FILTERS = (
    *(
        "tojson",
        "length",
        "string",
        "list",
        "join",
        "upper",
        "trim",
        "first",
        "last",
        "int",
        "float",
        "abs",
        "sort",
        "unique",
    ),
    *(
        "reverse",
        "items",
        "default('x')",
        "replace('a', 'b')",
        "indent(9)",
        "center(999)",
        "wordcount",
        "batch(2)",
        "e",
    ),
    *(
        "map('upper')",
        "selectattr('role')",
        "map(attribute='role')",
        "groupby('role')",
        "sum",
        "max",
        "round(3)",
        "pprint",
    ),
    *(
        "format(1)",
        "truncate(3)",
        "wordwrap(3)",
        "urlize",
        "striptags",
        "xmlattr",
        "dictsort",
        "random",
        "filesizeformat",
    ),
)
_OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "is not", "and", "or", "not in")
_LEAKS = ("<class", "<function", "<built-in", "<bound", "<module", "subprocess", "<method")


def setup(engine: Path, folder: Path) -> None:
    """Import what renders."""
    import runtime.chat  # noqa: F401


def make(random: Random) -> Recipe:
    """Return the pieces of a template."""
    kind = random.randrange(10)
    if kind < 2:
        return {"edits": ["{{ " + random.choice(_REACHES) + " }}"]}
    if kind < 4:
        return {"edits": ["{{ " + random.choice(_WORK) + " }}"]}
    if kind < 6:
        return {"edits": [random.choice(_STATEMENTS)]}
    return {"edits": [_piece(random) for _ in range(random.randrange(1, 6))]}


def _piece(random: Random) -> str:
    match random.randrange(8):
        case 0:
            return f"{{% set x = {_expression(random, 3)} %}}"
        case 1:
            return f"{{% for x in {_expression(random, 2)} %}}{_piece(random)}{{% endfor %}}"
        case 2:
            return f"{{% if {_expression(random, 2)} %}}{_piece(random)}{{% endif %}}"
        case 3:
            return random.choice(("<|image_pad|>", "text", "{% endif %}", "{# x #}", "{{", "%}", "\n", "{%- else %}"))
    return "{{ " + _expression(random, 4) + " }}"


def _expression(random: Random, depth: int) -> str:
    if not depth or random.random() < 0.2:
        return random.choice(_ATOMS) if random.random() < 0.9 else random.choice(_REACHES)
    match random.randrange(5):
        case 0 | 1:
            return f"({_expression(random, depth - 1)})|{random.choice(_FILTERS)}"
        case 2:
            return f"({_expression(random, depth - 1)})[{_expression(random, depth - 1)}]"
        case 3:
            return f"[{_expression(random, depth - 1)}, {_expression(random, depth - 1)}]"
    return f"({_expression(random, depth - 1)} {random.choice(_OPERATORS)} {_expression(random, depth - 1)})"


def size(recipe: Recipe) -> tuple[int, int]:
    """Return the bytes of the source."""
    return sum(map(len, recipe["edits"])), 0


def run(recipe: Recipe, context: Any) -> str:
    """Compile and render.

    Raises:
        AssertionError: The text shows an object of Python's insides.
    """
    from runtime.chat import ChatTemplate

    template = ChatTemplate("".join(recipe["edits"]), special_tokens={"eos_token": "</s>"})
    content = [{"type": "image", "image": "<image>"}, {"type": "text", "text": "hi"}]
    text = template.render([{"role": "user", "content": content}]).text
    assert not any(leak in text for leak in _LEAKS), f"the text shows an object: {text[:200]}"
    return f"text of {len(text)}"

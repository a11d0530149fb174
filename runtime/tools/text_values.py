"""Rules of a grammar for text that stands in a call as it is, not as a JSON string, and follows a schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.errors import UsageError
from runtime.shown import shown
from runtime.structured.schema_checks import referred
from runtime.tools.grammar import literal

# What ends a value, and the call around it, wherever it stands.
_ENDS = ("</parameter>", "</tool_call>")
_NO_END = r"~/(?s:.*)<\/(parameter|tool_call)>(?s:.*)/"
_MOST_LEVELS = 8
_NOT_FOLLOWED = ("allOf", "not", "if", "format", "contentEncoding", "contentMediaType")
_LARGEST_LENGTH = 1 << 16
# Beside an alternative, they would be ignored.
_NARROWING = ("enum", "const", "pattern", "minLength", "maxLength")


def text_rules(name: str, schema: Any, root: Mapping[str, Any], after: str) -> list[str]:
    """Return rules for text and what stands behind it.

    Args:
        name: Of the first rule; names of the others begin so.
        schema: What the text follows, as the string that it is; values that are no strings are not written.
        root: What references refer into.
        after: Ends the text; it holds a mark that the text may not hold.

    Raises:
        UsageError: The schema says something that is not followed, or allows no text.
    """
    options = _options(schema, root)
    if not options:
        raise UsageError(f"tool_choice: no text follows the schema {shown(schema)}", remedy="change that schema")
    alternatives, rules = [], []
    for index, option in enumerate(options):
        part = f"{name}_{index}"
        alternatives.append(part)
        if isinstance(option, str):
            rules.append(f"{part}: {literal(option + after)}")
        else:
            # Lazy: a text that goes on as far as it may would take its own end in.
            rules += [f"{part}[lazy]: {part.upper()} {literal(after)}", f"{part.upper()}: {' & '.join(option)}"]
    return [f"{name}: {' | '.join(alternatives)}", *rules]


def _options(schema: Any, root: Mapping[str, Any], depth: int = 0) -> list[str | tuple[str, ...]]:
    """Return the texts that a schema allows: whole texts, and regexes that a text has to match together."""
    if not isinstance(schema, Mapping):
        return [] if schema is False else [_any_text({})]
    if depth > _MOST_LEVELS:
        raise UsageError("tool_choice: a schema has choices within choices without end", remedy="make it simpler")
    if isinstance(schema.get("$ref"), str):
        return _options(referred(root, schema["$ref"]), root, depth + 1)
    if unknown := [key for key in _NOT_FOLLOWED if key in schema]:
        raise UsageError(
            f"tool_choice: {unknown[0]} of {shown(schema)} is not followed in text that is no JSON string",
            remedy="leave it out, or use pattern or enum",
        )
    choices = [each for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list) for each in schema[key]]
    if choices:
        if beside := [key for key in _NARROWING if key in schema]:
            raise UsageError(
                f"tool_choice: {beside[0]} beside anyOf or oneOf is not followed in text that is no JSON string",
                remedy="move it into each of the choices",
            )
        found = [option for each in choices for option in _options(each, root, depth + 1)]
        return list(dict.fromkeys(found))
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        return [_whole(value) for value in values if isinstance(value, str)]
    kinds = schema.get("type", "string")
    return [_any_text(schema)] if "string" in (kinds if isinstance(kinds, list) else [kinds]) else []


def _whole(text: str) -> str:
    if any(mark in text for mark in _ENDS):
        raise UsageError(
            f"tool_choice: the value {shown(text)} holds a mark that ends a value", remedy="leave that value out"
        )
    return text


def _any_text(schema: Mapping[str, Any]) -> tuple[str, ...]:
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if not _is_length(least) or not (most is None or _is_length(most)) or (most is not None and least > most):
        raise UsageError(
            f"tool_choice: minLength {shown(least)} and maxLength {shown(most)} are no lengths of a text",
            remedy=f"pass whole numbers up to {_LARGEST_LENGTH}",
        )
    length = "*" if most is None and not least else f"{{{least},{'' if most is None else most}}}"
    regexes = [f"/(?s:.{length})/", _NO_END]
    if "pattern" in schema:
        regexes.append(_pattern(schema["pattern"]))
    return tuple(regexes)


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_LENGTH


def _pattern(pattern: Any) -> str:
    """Return a schema's pattern, which is searched for, as a regex that a whole text matches."""
    if not isinstance(pattern, str) or "\n" in pattern:
        raise UsageError(f"tool_choice: the pattern {shown(pattern)} is none", remedy="pass a regex on one line")
    starts, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith(r"\$")
    inside = pattern[starts : len(pattern) - ends]
    if (starts or ends) and "|" in inside:
        raise UsageError(
            f"tool_choice: in the pattern {shown(pattern)} an anchor stands beside a choice",
            remedy="write a choice of several texts as enum",
        )
    escaped = inside.replace(r"\/", "/").replace("/", r"\/")
    return f"/{'' if starts else '(?s:.*)'}({escaped}){'' if ends else '(?s:.*)'}/"

"""What is checked of a JSON schema before it is compiled: its size, its depth, and that a value of it can end.

A schema whose every value holds another value of the same schema, without an end, has no finite value: a model that
follows it would write until its room is used up. The compiler takes such a schema, so it is found here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from runtime.errors import UsageError
from runtime.shown import shown

MAX_SCHEMA_DEPTH = 64
"""Most levels of lists and dicts in a schema."""

_LARGEST = 1 << 53

MAX_SCHEMA_NODES = 50_000
"""Most dicts and lists of a schema; one that is referred to from several places counts each time."""


def check_schema(name: str, schema: Any) -> None:
    """Check a JSON schema, whose size was checked.

    Raises:
        UsageError: It is no schema, or no value of it can end.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, Mapping):
        raise UsageError(f"{name} must be a JSON schema, got {shown(schema)}", remedy='such as {"type": "object"}')
    if not _can_end(schema):
        raise UsageError(
            f"{name} has no value that ends: it requires a value of itself inside each of its values",
            remedy="take a reference that recurses out of `required`, or allow null or an empty list in its place",
        )


def check_size(name: str, schema: Any) -> None:
    """Check how large and how deep a schema is, before anything else looks at all of it.

    Raises:
        UsageError: It is too large or too deep.
    """
    num_nodes, waiting = 0, [(schema, 1)]
    while waiting:
        node, depth = waiting.pop()
        num_nodes += 1
        if depth > MAX_SCHEMA_DEPTH or num_nodes > MAX_SCHEMA_NODES:
            raise UsageError(
                f"{name} has more than {MAX_SCHEMA_DEPTH} levels, or more than {MAX_SCHEMA_NODES} lists and dicts",
                remedy="make the schema smaller; parts that repeat go into $defs",
            )
        for child in node.values() if isinstance(node, Mapping) else node if isinstance(node, (list, tuple)) else ():
            if isinstance(child, int) and abs(child) > _LARGEST:
                raise UsageError(
                    f"{name} holds the number {shown(child)}; larger ones than 2^53 are not followed exactly",
                    remedy="write such numbers as strings",
                )
            if isinstance(child, (Mapping, list, tuple)):
                waiting.append((child, depth + 1))


def _can_end(root: Mapping[str, Any]) -> bool:
    """Return whether a finite value may follow a schema.

    A reference can end if what it refers to can. That is asked again and again, from "none can", until nothing
    changes: the least fixed point, as for the productive symbols of a context-free grammar.
    """
    targets = {reference: referred(root, reference) for reference in set(_references(root))}
    users: dict[str, list[str]] = {}
    for reference, target in targets.items():
        for used in set(_references(target)):
            users.setdefault(used, []).append(reference)
    ends: set[str] = set()
    waiting = list(targets)
    while waiting:
        reference = waiting.pop()
        if reference not in ends and _ends(targets[reference], ends):
            ends.add(reference)
            waiting += users.get(reference, ())  # nothing else can have changed
    return _ends(root, ends)


def _ends(schema: Any, ends: set[str]) -> bool:
    """Return whether a value of a schema can end, if the references in `ends` can; True for what is not known."""
    if not isinstance(schema, Mapping):
        return True
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in ends:
        return False
    if not all(_ends(each, ends) for each in _listed(schema, "allOf")):
        return False
    for key in ("anyOf", "oneOf"):
        options = _listed(schema, key)
        if options and not any(_ends(each, ends) for each in options):
            return False
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, (list, tuple)) else None
    if "enum" in schema or "const" in schema:
        return True
    if kinds is None:
        # Where the keywords of one type stand alone, values of the others follow the schema as well; the compiler
        # then takes the type that the keywords belong to, and so does this.
        kinds = [kind for kind, keys in _KEYWORDS.items() if any(key in schema for key in keys)]
    return not kinds or any(_KINDS[kind](schema, ends) if kind in _KINDS else True for kind in kinds)


def _object_ends(schema: Mapping[str, Any], ends: set[str]) -> bool:
    properties, others = schema.get("properties"), schema.get("additionalProperties", True)
    known = properties if isinstance(properties, Mapping) else {}
    patterns = schema.get("patternProperties")
    patterns = patterns if isinstance(patterns, Mapping) else {}

    def value_of(key: Any) -> Any:
        matching = [value for pattern, value in patterns.items() if _matches(pattern, key)]
        return known.get(key, matching[0] if matching else others)

    required = _listed(schema, "required")
    least = schema.get("minProperties", 0)
    if isinstance(least, (int, float)) and least > len(known) + len(patterns) and not _ends(others, ends):
        return False
    return all(_ends(value_of(key), ends) for key in required)


def _matches(pattern: Any, key: Any) -> bool:
    """Return whether a property's name matches a pattern that is simple enough to be sure."""
    is_plain = isinstance(pattern, str) and re.fullmatch(r"\^?[\w-]*\$?", pattern) is not None
    return is_plain and isinstance(key, str) and re.search(pattern, key) is not None


def _array_ends(schema: Mapping[str, Any], ends: set[str]) -> bool:
    least = schema.get("minItems", 0)
    if not isinstance(least, (int, float)) or least <= 0:
        return True
    first = _listed(schema, "prefixItems")
    needed = first[: int(min(least, len(first)))]
    if least > len(first):
        needed = [*needed, schema.get("items", True)]
    return all(_ends(each, ends) for each in needed)


_KINDS = {"object": _object_ends, "array": _array_ends}
_KEYWORDS = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}


def _references(schema: Any) -> Iterator[str]:
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            waiting += node.values()
        elif isinstance(node, (list, tuple)):
            waiting += node


def referred(root: Mapping[str, Any], reference: str) -> Any:
    """Return what a reference refers to; True, which any value follows, for what the compiler has to judge."""
    if not reference.startswith("#"):
        return True
    node: Any = root
    for part in reference[1:].split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and key in node:
            node = node[key]
        elif isinstance(node, (list, tuple)) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            return True
    return node


def _listed(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return list(value) if isinstance(value, (list, tuple)) else []

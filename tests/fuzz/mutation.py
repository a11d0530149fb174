"""Mutations of JSON values and of bytes, written down as edits that can be applied again, and left out one by one."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

Edit = list[Any]
"""The name of an operation and its arguments, all of them JSON values."""

# Numbers beyond 4300 digits cannot be printed by Python: they stand in the bytes, see TOKENS.
WEIRD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**12, 10**30, 10**400, 1.5, 0.0, -0.0, 1e308, -1e-320, float("nan"), float("inf"), -float("inf")),
    *("", "a", "0", "1", "true", "null", "\ud800", "\x00", "\x1b[2J", "\u202e", "\u2028", "<|image_pad|>", "a" * 5000),
    *("/etc/passwd", "../../x", "/dev/zero", "default", "mrope", "yarn", "gelu", "silu", "qwen3_vl_moe", "qwen3_vl"),
    *("float16", "bfloat16", "float64", "auto", "sdpa", "{{ 7 * 7 }}"),
    *([], {}, [[]], [None], [0], [1, 2, 3], [-1], ["a"], [1.5] * 3, [True], [10**30], [0] * 2000, ["x" * 500] * 20),
    *({"a": 1}, {"": {}}, {"__class__": 1}, {"type": "default"}, {"\ud800": 1}, {"x" * 2000: 1}),
)
WHOLE: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"0",
    "text": b'"a"',
    "open": b"{",
    "object": b"{}",
    "utf-16": b"\xff\xfe\x00",
    "deep list": b"[" * 100_000 + b"]" * 100_000,
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nan": b"NaN",
    "digits": b"1" * 5000,
    "digits within": b'{"a":' + b"9" * 5000 + b"}",
    "zeros": bytes(100),
    "true": b"true",
    "twice": b'{"a":1,"a":2}',
    "long": b'{"a":"' + b"x" * 20_000_000 + b'"}',
    "wide": b"[" + b"0," * 3_000_000 + b"0]",
    "keys": b"{" + b",".join(b'"%d":0' % i for i in range(300_000)) + b"}",
}
TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\x00", b"\xff", b"\\ud800", b"9" * 400, b"9" * 5000, b"-"),
    *(b"1e999", b"\xef\xbb\xbf", b"\n" * 100, b"\x1b[31m"),
)


def json_edits(random: Random, value: Any, extra_keys: Sequence[str]) -> list[Edit]:
    """Return one to three edits of a JSON value."""
    value = copy.deepcopy(value)
    edits: list[Edit] = []
    for _ in range(random.choice((1, 1, 1, 1, 2, 3))):
        edit = _json_edit(random, value, extra_keys)
        value = apply_json(value, [edit])
        edits.append(edit)
    return edits


def _json_edit(random: Random, value: Any, extra_keys: Sequence[str]) -> Edit:
    places = list(paths_of(value))
    path = random.choice(places)
    if not path and random.random() < 0.8:
        path = random.choice(places)
    found = _at(value, path)
    match random.randrange(9):
        case 4 if path:
            return ["delete", path]
        case 5 if isinstance(found, dict):
            return ["add", path, random.choice([*extra_keys, "x"]), random.randrange(len(WEIRD))]
        case 5 | 7 if isinstance(found, int | float) and not isinstance(found, bool):
            return ["number", path, random.choice(sorted(_NUMBERS))]
        case 5 if isinstance(found, str):
            return ["string", path, random.choice(sorted(_STRINGS))]
        case 6:
            return ["copy", path, random.choice(places)]
    return ["set", path, random.randrange(len(WEIRD))]


_NUMBERS = {
    "negative": lambda x: -x,
    "more": lambda x: x + 1,
    "less": lambda x: x - 1,
    "double": lambda x: x * 2,
    "thousandfold": lambda x: x * 1000,
    "text": str,
    "listed": lambda x: [x],
    "zero": lambda x: 0,
}
_STRINGS = {
    "longer": lambda x: x + "x",
    "shorter": lambda x: x[:-1],
    "upper": str.upper,
    "listed": lambda x: [x],
    "repeated": lambda x: x * 100,
}


def apply_json(value: Any, edits: Sequence[Edit]) -> Any:
    """Return the value with the edits; one whose place is no longer there changes nothing."""
    value = copy.deepcopy(value)
    for name, path, *arguments in edits:
        try:
            if name == "set":
                value = with_value(value, path, copy.deepcopy(WEIRD[arguments[0]]))
            elif name == "delete":
                del _at(value, path[:-1])[path[-1]]
            elif name == "add":
                _at(value, path)[arguments[0]] = copy.deepcopy(WEIRD[arguments[1]])
            elif name == "copy":
                value = with_value(value, path, copy.deepcopy(_at(value, arguments[0])))
            else:
                change = _NUMBERS[arguments[0]] if name == "number" else _STRINGS[arguments[0]]
                value = with_value(value, path, change(_at(value, path)))
        except (KeyError, IndexError, TypeError, OverflowError):
            continue
    return value


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[list[Any]]:
    """Yield the path to each place of a JSON value, its root included; of a long list to the first places only."""
    yield list(path)
    if isinstance(value, dict):
        for key in value:
            yield from paths_of(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 20)):
            yield from paths_of(value[index], (*path, index))


def _at(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def with_value(value: Any, path: Sequence[Any], new: Any) -> Any:
    """Put another value into a place, and return the whole."""
    if not path:
        return new
    _at(value, path[:-1])[path[-1]] = new
    return value


def encoded(value: Any) -> bytes:
    """Return the JSON text of a value, lone surrogates as they are escaped."""
    return json.dumps(value).encode()


def byte_edits(random: Random, size: int, tokens: Sequence[bytes] = TOKENS, head: int | None = None) -> list[Edit]:
    """Return one to four edits of so many bytes.

    Args:
        random: Chooses.
        size: Of what is edited.
        tokens: What is put in.
        head: Most edits fall into so many first bytes.
    """
    return [_byte_edit(random, max(1, size), tokens, head) for _ in range(random.choice((1, 1, 1, 2, 4)))]


def _byte_edit(random: Random, size: int, tokens: Sequence[bytes], head: int | None) -> Edit:
    position = random.randrange(min(head, size) if head and random.random() < 0.7 else size)
    match random.randrange(8):
        case 0:
            return ["cut", position]
        case 1 | 2:
            return ["byte", position, random.choice((0, 1, 127, 128, 255, random.randrange(256)))]
        case 3:
            return ["insert", position, _b64(random.randbytes(random.choice((1, 4, 50))))]
        case 4:
            return ["remove", position, random.choice((1, 2, 10, 200))]
        case 5:
            return ["repeat", position, random.randrange(size), random.choice((1, 10, 100))]
        case 6:
            return ["bit", position, random.randrange(8)]
    return ["insert", position, _b64(random.choice(tokens))]


def apply_bytes(data: bytes, edits: Sequence[Edit]) -> bytes:
    """Return the bytes with the edits; a place beyond the end is one within."""
    changed = bytearray(data)
    for name, *arguments in edits:
        if name == "whole":
            changed = bytearray(WHOLE[arguments[0]])
            continue
        position = arguments[0] % (len(changed) + 1)
        if name == "cut":
            del changed[position:]
        elif name == "insert":
            changed[position:position] = base64.b64decode(arguments[1])
        elif name == "remove":
            del changed[position : position + arguments[1]]
        elif name == "repeat":
            start = arguments[1] % (len(changed) + 1)
            changed[position:position] = changed[start : start + arguments[2]]
        elif position < len(changed):
            changed[position] = arguments[1] if name == "byte" else changed[position] ^ (1 << arguments[1])
    return bytes(changed)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()

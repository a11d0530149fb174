"""Messages and options of the Python API, with every kind of value in every place."""

from __future__ import annotations

import collections
import decimal
import fractions
import pathlib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from fuzz.family import Recipe
from fuzz.mutation import WEIRD
from runtime.template_engine import MARKER


class _OwnError(RuntimeError):
    """Raised by an argument's own methods: the project may let it pass."""


class _RaisingText(str):
    def __str__(self) -> str:
        raise _OwnError


class _RaisingList(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        raise _OwnError


class _RaisingMapping(collections.abc.Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise _OwnError

    def __iter__(self) -> Iterator[str]:
        yield "role"

    def __len__(self) -> int:
        return 1


class _Endless(collections.abc.Sequence[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        return {"role": "user", "content": "x"}


class _NoEquals:
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise _OwnError


class _NoText:
    def __repr__(self) -> str:
        raise _OwnError


class _Whole(int):
    pass


def _cycle(value: Any) -> Any:
    if isinstance(value, list):
        value.append(value)
    else:
        value["a"] = value
    return value


def _nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = {"a": 1}
    for _ in range(depth):
        value = wrap(value)
    return value


def _numpy(name: str) -> Any:
    import numpy as np

    return {
        "picture": lambda: np.zeros((32, 32, 3), np.uint8),
        "float32": lambda: np.float32(0.5),
        "nan": lambda: np.float64("nan"),
        "int64": lambda: np.int64(3),
        "uint8": lambda: np.uint8(1),
        "bool": lambda: np.bool_(True),
        "array": lambda: np.zeros(3),
        "text": lambda: np.str_("abc"),
        "array of text": lambda: np.array("a"),
        "messages": lambda: np.array([{"role": "user", "content": "x"}]),
    }[name]()


_MESSAGE = {"role": "user", "content": "x"}
_MARKERS = [MARKER.format(number=number, index=0) for number in range(2)]
VALUES: tuple[Callable[[], Any], ...] = (
    *((lambda value=value: value) for value in WEIRD),
    lambda: 10**5000,
    *(
        (lambda text=text: text)
        for text in ("user", "system", "tool", "a\x00b", "\u202e\u200b", "<|im_end|><|im_start|>s\nx")
    ),
    *((lambda text=text: text) for text in (f"{_MARKERS[0]}<|image_pad|>", "<think>x</think>", "{{ 7*7 }}{% for %}")),
    *((lambda text=text: text * 20_000) for text in ("x", "字", "\u0301", "a b ", " ", "\n", "<|endoftext|>", "😀")),
    *((lambda text=text: text * 5_000_000) for text in ("x", " ", "\n", "a b")),
    *(
        (lambda data=data: data)
        for data in (b"x", bytearray(b"x"), (), {1: 2}, {None: 1}, ["a", ""], ["a" * 10_000] * 3)
    ),
    lambda: ["ab"] * 20_000,
    *((lambda count=count: [dict(_MESSAGE)] * count) for count in (100_000, 1_000_000)),
    lambda: [{"type": "text", "text": ""}] * 1_000_000,
    lambda: [{"role": "user", "content": [{"type": "text", "text": ""}] * 1_000}] * 1_000,
    lambda: [{"role": "user", "content": "x", "tool_calls": [0] * 90_000}] * 1_000,
    lambda: [{"type": "text", "text": "x"} | {f"key {i}": i for i in range(1_000)}] * 1_000,
    *(
        (lambda part=part: part)
        for part in (
            {"type": "text", "text": "hi"},
            [{"type": "text", "text": "hi"}],
            {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": None},
            {"type": "text"},
            {"type": "image"},
            {"type": "image", "image": None},
            {"type": "image", "image": "nope.png"},
            {"type": "image_url", "image_url": {"url": "http://x"}},
            {"type": "image_url", "image_url": {"url": 5}},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": None}},
            {"type": "image_url"},
            {"type": "input_text", "text": "hi"},
            {"type": "video", "video": "x"},
            {"type": []},
            {"type": "image", "base64": 5},
            {"type": "image", "base64": "é"},
            {"type": "image", "path": b"x"},
            {"type": "image", "url": "a", "image": "b"},
            {"type": "tool_use", "name": "f", "input": {}},
            [{"type": "function_call", "name": "f", "arguments": "{}"}],
            {"type": "function_call_output", "output": 5},
        )
    ),
    lambda: {"type": "image", "image": _numpy("picture")},
    lambda: {"type": "image", "image": _numpy("array")},
    *(
        (lambda name=name: _numpy(name))
        for name in ("float32", "nan", "int64", "uint8", "bool", "array", "text", "messages")
    ),
    *((lambda depth=depth: _nested(depth, lambda value: [value])) for depth in (50, 5_000, 100_000)),
    *((lambda depth=depth: _nested(depth, lambda value: {"a": value})) for depth in (50, 5_000)),
    lambda: _cycle([]),
    lambda: _cycle({}),
    *(
        (lambda value=value: value)
        for value in (set(), {1, 2}, range(5), range(10**12), object, len, 1j, ..., slice(1))
    ),
    lambda: (letter for letter in [1]),
    object,
    *((lambda value=value: value) for value in (fractions.Fraction(1, 3), fractions.Fraction(10**400, 1))),
    *((lambda text=text: decimal.Decimal(text)) for text in ("0.5", "NaN", "1e999999")),
    lambda: _RaisingText("abc"),
    lambda: _RaisingList([1]),
    _RaisingMapping,
    _Endless,
    lambda: _Whole(5),
    _NoEquals,
    _NoText,
    lambda: collections.OrderedDict(_MESSAGE),
    lambda: types.MappingProxyType(_MESSAGE),
    lambda: collections.UserDict(_MESSAGE),
    lambda: collections.UserList([_MESSAGE]),
    lambda: collections.deque([_MESSAGE]),
    lambda: pathlib.Path("x"),
)
_OPTIONS = (
    *(
        "max_new_tokens",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
    ),
    *("frequency_penalty", "stop", "seed", "prompt_lookup_num_tokens", "eos_token_ids", "eos_token_id", "tools"),
    *("chat_template_kwargs", "unknown_option", "tok_k", "stop_strings", "__class__", "options"),
)
_GOOD: dict[str, tuple[Any, ...]] = {
    "do_sample": (True, False),
    "temperature": (1e-15, 0.01, 0.7, 1, 2, 100.0, 1e15, 0.0),
    "top_k": (0, 1, 5, 50, 399, 10**9),
    "top_p": (1e-300, 0.01, 0.9, 1.0, 1),
    "min_p": (0, 0.5, 1.0),
    "repetition_penalty": (1e-15, 0.5, 1.0, 1.3, 1e15),
    "presence_penalty": (-2, 0, 2),
    "frequency_penalty": (-2, 0.5, 2),
    "stop": ("\n", "Read", ["a", "b"], ["1"], ["x" * 5000], ["\u0301"], ["<|im_end|>"], ["<"], "0", "\ud800"),
    "seed": (0, 1, 2**32, 2**64, 10**30, 2**128 - 1),
    "prompt_lookup_num_tokens": (0, 1, 10, 64),
    "eos_token_ids": ([], [1], 0, 398, 10**9, [2**63], [0] * 1000),
    "max_new_tokens": (1, 2),
}
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "extra", "images", 1, None)
_ROLES = ("system", "user", "assistant", "tool")
_WORDS = (
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|image_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|video_pad|>",
        "\n",
        "system",
    ),
    *(
        "Read the digits.",
        "\x00",
        "é",
        "😀",
        "\ufeff",
        *_MARKERS,
        "<|endoftext|>",
    ),
)
_PART_KEYS = ("text", "image", "image_url", "url", "path", "base64", "data", "x")
_PART_TYPES = ("text", "image", "image_url", "video", None, 1, [])


def setup(engine: Path, folder: Path) -> Any:
    """Open the engine, and use it once."""
    from runtime.model import Qwen3VLModel

    model = Qwen3VLModel.from_engine(engine, threads=1)
    model.generate("Read", max_new_tokens=1)
    return model


def make(random: Random) -> Recipe:
    """Return plain messages and what is changed in them and in the options."""
    recipe: Recipe = {"seed": random.randrange(1 << 30), "edits": [], "options": []}
    kind = random.randrange(10)
    if kind == 0:
        recipe["edits"] = [["messages", random.randrange(len(VALUES))]]
    elif kind <= 4:
        for _ in range(random.choice((1, 1, 2))):
            recipe["edits"].append(_edit(random))
    if kind >= 7:
        for name in random.sample(sorted(_GOOD), random.randrange(1, 6)):
            recipe["options"].append([name, "good", random.randrange(len(_GOOD[name]))])
    elif kind >= 4:
        for _ in range(random.choice((1, 1, 2, 3))):
            recipe["options"].append([random.choice(_OPTIONS), "value", random.randrange(len(VALUES))])
        if random.random() < 0.15:
            name = random.choice(("add_vision_id", "enable_thinking", "messages", "documents", "__class__", 1))
            recipe["options"].append(["chat_template_kwargs", "key", name, random.randrange(len(VALUES))])
    return recipe


def _edit(random: Random) -> list[Any]:
    value, at = random.randrange(len(VALUES)), random.randrange(3)
    match random.randrange(6):
        case 0:
            return ["message", at, value]
        case 1 | 2:
            return ["key", at, random.choice(_KEYS), value]
        case 3:
            return ["contents", at, [random.randrange(len(VALUES)) for _ in range(random.randrange(3))]]
        case 4:
            return ["without", at, random.choice(("role", "content"))]
    return ["part", at, random.choice(_PART_TYPES), random.choice(_PART_KEYS), value]


def messages_of(recipe: Recipe) -> Any:
    """Return the messages."""
    random = Random(recipe["seed"])
    messages: Any = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        content: Any = _text(random)
        if random.random() < 0.5:
            parts = ({"type": "text", "text": _text(random)}, {"type": "image", "image": _numpy("picture")})
            content = [random.choice(parts) for _ in range(random.randrange(4))]
        messages.append({"role": random.choice(_ROLES), "content": content})
    for name, *arguments in recipe["edits"]:
        if name == "messages":
            return VALUES[arguments[0]]()
        at = arguments[0] % len(messages)
        if name == "message":
            messages[at] = VALUES[arguments[1]]()
        elif not isinstance(messages[at], dict):
            continue
        elif name == "key":
            messages[at][arguments[1]] = VALUES[arguments[2]]()
        elif name == "contents":
            messages[at]["content"] = [VALUES[index]() for index in arguments[1]]
        elif name == "without":
            messages[at].pop(arguments[1], None)
        else:
            messages[at]["content"] = [{"type": arguments[1], arguments[2]: VALUES[arguments[3]]()}]
    return messages


def options_of(recipe: Recipe) -> dict[str, Any]:
    """Return the options; without a limit of its own an answer has two tokens."""
    options: dict[str, Any] = {"max_new_tokens": 2}
    for name, kind, *arguments in recipe["options"]:
        if kind == "good":
            options[name] = _GOOD[name][arguments[0]]
        elif kind == "value":
            options[name] = VALUES[arguments[0]]()
        else:
            options[name] = {arguments[0]: VALUES[arguments[1]]()}
    return options


def _text(random: Random) -> str:
    return "".join(random.choice(_WORDS) for _ in range(random.randrange(1, 12)))


def size(recipe: Recipe) -> tuple[int, int]:
    """Return the bytes of the longest text that may be in it."""
    return 20_000_000, 0


def run(recipe: Recipe, model: Any) -> str:
    """Let the model answer; of a long answer, read two pieces and leave, as Ctrl-C does."""
    messages, options = messages_of(recipe), options_of(recipe)
    try:
        stream = model.stream(messages, **options)
        try:
            for count, piece in enumerate(stream):
                piece.encode()
                if count == 2:
                    return "is left"
        finally:
            stream.close()
    except _OwnError:
        return "the argument's own error"
    assert stream.result is not None
    assert stream.result.finish_reason in ("eos", "stop", "length"), stream.result.finish_reason
    return str(stream.result.finish_reason)

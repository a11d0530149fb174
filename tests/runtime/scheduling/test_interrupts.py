"""Ctrl-C in the middle of a call: no lock stays taken, no request stays behind, and the engine answers others."""

from __future__ import annotations

import itertools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.serving import serving
from runtime.model import Qwen3VLModel

TRACED = tuple(
    f"/{each}"
    for each in (
        "runtime/scheduling/",
        "runtime/stream.py",
        "runtime/calls.py",
        "runtime/conversation.py",
        "runtime/model.py",
        "threading.py",
        "concurrent/futures/",
    )
)
OPTIONS: dict[str, Any] = {"max_new_tokens": 2, "eos_token_ids": ()}

CALLS: dict[str, Callable[[Qwen3VLModel], object]] = {
    "generate": lambda model: model.generate("Hi", **OPTIONS),
    "stream": lambda model: list(model.stream("Hi", **OPTIONS)),
    "generate_batch": lambda model: model.generate_batch(["Hi", "Hi"], **OPTIONS),
    "chat": lambda model: model.chat(**OPTIONS).ask("Hi"),
    "logits": lambda model: model.logits("Hi"),
    "encode_images": lambda model: model.encode_images([]),
    "statistics": lambda model: model.statistics(),
}


def is_in_del(frame: types.FrameType | None) -> bool:
    """Whether `__del__` runs, or what it called: Python would print the interrupt there and go on."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


class Interrupt:
    """Raise KeyboardInterrupt where a function begins or returns, for the `number`th time in this thread.

    There CPython looks for signals, so that is where Ctrl-C appears.
    """

    def __init__(self, number: int) -> None:
        self.left = number
        self.place = ""

    def __call__(self, frame: types.FrameType, event: str, _: object) -> Any:
        code = frame.f_code
        if not any(each in code.co_filename for each in TRACED) or is_in_del(frame):
            return None
        if event in ("call", "return"):
            self.left -= 1
            if self.left == 0:
                self.place = f"{event} of {code.co_qualname}"
                raise KeyboardInterrupt
        return self


@pytest.fixture
def model(tiny_engine: Path) -> Iterator[Qwen3VLModel]:
    opened = Qwen3VLModel.from_engine(tiny_engine, threads=1, max_context=256)
    model = serving(opened)
    model.generate("Hi", max_new_tokens=1)
    yield model


def answers(model: Qwen3VLModel) -> bool:
    """Return whether another thread gets an answer."""
    found: list[object] = []
    other = threading.Thread(target=lambda: found.append(model.generate("Hi", max_new_tokens=1)), daemon=True)
    other.start()
    other.join(300)
    return bool(found)


@pytest.mark.portable
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_moment_disturbs_nobody_else(model: Qwen3VLModel, name: str) -> None:
    num_interrupted = 0
    for number in itertools.count(1):
        interrupt = Interrupt(number)
        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            CALLS[name](model)
        except KeyboardInterrupt:
            num_interrupted += 1
        finally:
            sys.settrace(before)
        assert answers(model), interrupt.place
        if interrupt.left > 0:
            break  # there were fewer such moments
    assert num_interrupted > 2
    closing = threading.Thread(target=model.close, daemon=True)
    closing.start()
    closing.join(300)
    assert not closing.is_alive()
    statistics = model.statistics()
    assert {each: statistics[each] for each in ("running", "waiting", "waiting_tokens")} == {
        "running": 0,
        "waiting": 0,
        "waiting_tokens": 0,
    }

"""How requests end that are not answered: what their readers get, and what the errors say."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.clock import Clock
from helpers.serving import serving
from runtime.errors import DeadlineError, UsageError
from runtime.model import Qwen3VLModel

pytestmark = pytest.mark.portable
LONG: dict[str, Any] = {"max_new_tokens": 100_000, "eos_token_ids": ()}


@pytest.fixture(scope="module")
def opened(tiny_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(tiny_engine, threads=1)


@pytest.fixture
def model(opened: Qwen3VLModel) -> Iterator[Qwen3VLModel]:
    model = serving(opened)
    yield model
    model.close(drain=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_error_of_a_deadline_says_how_far_the_answer_was(model: Qwen3VLModel, clock: Clock) -> None:
    with pytest.raises(DeadlineError, match="was over before"):
        model.generate("Hi", timeout_s=0)
    stream = model.stream("Hi", timeout_s=3600, **LONG)
    next(stream)
    clock.skip(4000)
    with pytest.raises(DeadlineError, match=r"was over after [1-9]\d* tokens"):
        stream.wait()


def test_the_time_counts_from_the_call_on_and_not_from_the_first_piece(model: Qwen3VLModel, clock: Clock) -> None:
    stream = model.stream("Hi", timeout_s=3600, **LONG)
    clock.skip(4000)
    with pytest.raises(DeadlineError, match="was over before it was queued"):
        stream.wait()


def test_each_reader_of_a_stream_that_fails_gets_the_error(model: Qwen3VLModel, clock: Clock) -> None:
    stream = model.stream("Hi", timeout_s=3600, **LONG)
    raised: list[Exception] = []

    def read() -> None:
        try:
            for _ in stream:
                pass
        except DeadlineError as error:
            raised.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    while not model.statistics()["decoding"]:
        time.sleep(0.001)
    clock.skip(4000)
    for reader in readers:
        reader.join(60)
    assert len(raised) == 3
    with pytest.raises(DeadlineError) as caught:
        stream.wait()
    # Errors of their own: a traceback would hold what another reader holds.
    assert len({id(each) for each in (*raised, caught.value)}) == 4


@pytest.mark.parametrize("given", [{"timeout_s": "soon"}, {"timeout_s": float("nan")}, {"drain": "no"}], ids=str)
def test_bad_arguments_of_close_are_refused_by_name(model: Qwen3VLModel, given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        model.close(**given)
    assert model.generate("Hi", max_new_tokens=1).token_ids


@pytest.mark.parametrize("timeout_s", [-1.0, 1e30, float("inf")])
def test_close_takes_any_time(model: Qwen3VLModel, timeout_s: float) -> None:
    assert model.generate("Hi", max_new_tokens=1).token_ids
    model.close(timeout_s=timeout_s)
    with pytest.raises(UsageError, match="was closed"):
        model.generate("Hi")


@pytest.mark.parametrize("call", ["generate", "generate_batch", "ask"])
def test_a_callback_that_cannot_be_called_is_refused_before_the_work(model: Qwen3VLModel, call: str) -> None:
    name = "on_done" if call == "generate_batch" else "on_piece"
    owner: Any = model.chat() if call == "ask" else model
    with pytest.raises(UsageError, match=f"{name} must be a function"):
        getattr(owner, call)("Hi" if name == "on_piece" else ["Hi"], **{name: 3})
    assert model.statistics()["prompts"] == 0

"""How requests end that are not answered: what their readers get, and what the errors say."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.serving import serving
from runtime.errors import DeadlineError, UsageError
from runtime.model import Qwen3VLModel

pytestmark = pytest.mark.portable
LONG: dict[str, Any] = {"max_new_tokens": 3000, "eos_token_ids": ()}


@pytest.fixture(scope="module")
def opened(tiny_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(tiny_engine, threads=1)


@pytest.fixture
def model(opened: Qwen3VLModel) -> Iterator[Qwen3VLModel]:
    model = serving(opened)
    yield model
    model.close(drain=False)


def test_the_error_of_a_deadline_says_how_far_the_answer_was(model: Qwen3VLModel) -> None:
    with pytest.raises(DeadlineError, match="was over before"):
        model.generate("Hi", timeout_s=0)
    stream = model.stream("Hi", timeout_s=0.25, **LONG)
    time.sleep(0.05)  # the time counts from the call on, and not from the first piece
    with pytest.raises(DeadlineError, match=r"was over after \d+ tokens"):
        stream.wait()


def test_each_reader_of_a_stream_that_fails_gets_the_error(model: Qwen3VLModel) -> None:
    stream = model.stream("Hi", timeout_s=0.3, **LONG)
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

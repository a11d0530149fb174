"""Many threads on one model: each call gets its own answer, however the calls beside it end."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from helpers import PICTURES
from runtime.errors import UsageError
from runtime.model import Qwen3VLModel

IMAGE = PICTURES / "held_out_0.png"
QUESTIONS = ("Read the digits.", "How many digits are there?", "Read")
NUM_THREADS = 8


def asked(question: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": str(IMAGE)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def model(demo_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(demo_engine, threads=1)


@pytest.fixture(scope="module")
def answers(model: Qwen3VLModel) -> dict[str, list[int]]:
    return {question: answer(model, question) for question in QUESTIONS}


def answer(model: Qwen3VLModel, question: str) -> list[int]:
    return model.generate(asked(question), max_new_tokens=8, do_sample=False).token_ids


def in_threads(work: Callable[[int], None]) -> list[BaseException]:
    """Run `work` in threads, with their numbers; return what they raised. None may hang."""
    raised: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    return raised


def test_each_thread_gets_the_answer_to_its_question(model: Qwen3VLModel, answers: dict[str, list[int]]) -> None:
    found: list[tuple[str, list[int]]] = []

    def work(number: int) -> None:
        for turn in range(3):
            question = QUESTIONS[(number + turn) % len(QUESTIONS)]
            found.append((question, answer(model, question)))

    assert in_threads(work) == []
    assert len(found) == 3 * NUM_THREADS
    assert all(answers[question] == token_ids for question, token_ids in found)


def leave_early(model: Qwen3VLModel) -> None:
    stream = model.stream(asked(QUESTIONS[0]), max_new_tokens=8, do_sample=False)
    next(stream)
    stream.close()


def forget(model: Qwen3VLModel) -> None:
    stream = model.stream(asked(QUESTIONS[0]), max_new_tokens=8, do_sample=False)
    next(stream)
    del stream  # reference counting closes it


def close_from_a_timer(model: Qwen3VLModel) -> None:
    stream = model.stream(asked(QUESTIONS[0]), max_new_tokens=8, do_sample=False)
    timer = threading.Timer(0.005, stream.close)
    timer.start()
    for _ in stream:
        pass
    timer.join()


def raise_while_reading(model: Qwen3VLModel) -> None:
    def reader() -> Iterator[str]:
        yield from model.stream(asked(QUESTIONS[0]), max_new_tokens=8, do_sample=False)

    with pytest.raises(ZeroDivisionError):
        for _ in reader():
            raise ZeroDivisionError


def be_refused(model: Qwen3VLModel) -> None:
    with pytest.raises(UsageError, match="temperature"):
        model.generate(asked(QUESTIONS[0]), temperature=-1)


def test_calls_that_end_early_disturb_no_other(model: Qwen3VLModel, answers: dict[str, list[int]]) -> None:
    ways = (leave_early, forget, close_from_a_timer, raise_while_reading, be_refused)
    wrong: list[list[int]] = []

    def work(number: int) -> None:
        random = Random(number)
        for _ in range(6):
            random.choice(ways)(model)
            token_ids = answer(model, QUESTIONS[1])
            if token_ids != answers[QUESTIONS[1]]:
                wrong.append(token_ids)

    assert in_threads(work) == []
    assert wrong == []


def test_a_stream_begun_in_one_thread_and_read_in_another_gives_the_same_answer(
    model: Qwen3VLModel, answers: dict[str, list[int]]
) -> None:
    stream = model.stream(asked(QUESTIONS[0]), max_new_tokens=8, do_sample=False)
    next(stream)
    reader = threading.Thread(target=lambda: list(stream), daemon=True)
    reader.start()
    reader.join(60)
    assert not reader.is_alive() and stream.result is not None
    assert stream.result.token_ids == answers[QUESTIONS[0]]


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no VmRSS")


def test_calls_leave_no_memory_behind(model: Qwen3VLModel) -> None:
    def calls(count: int) -> None:
        for _ in range(count):
            leave_early(model)
            be_refused(model)
            with pytest.raises(ValueError):
                model.generate([{"role": "user", "content": [{"type": "image", "image": b"x" * 1_000_000}]}])
        gc.collect()

    calls(20)
    before = resident_bytes()
    calls(60)
    assert resident_bytes() - before < 30 << 20  # the images that were refused alone are 60 MB

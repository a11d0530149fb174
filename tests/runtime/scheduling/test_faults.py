"""What goes wrong in one request, in a caller, or in the engine: a clear error, and nothing lost of the others."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import ROOT
from helpers.clock import Clock
from helpers.serving import WrappedSession, asked, held_until_submitted, serving
from runtime.answer import Generation
from runtime.errors import CapacityError, DeadlineError, EngineError, ImageError, OverloadError, UsageError
from runtime.model import Qwen3VLModel
from runtime.sampling import Sampler

PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
# Answers of exactly so many tokens.
TEXT = {"eos_token_ids": (), "max_new_tokens": 8}
NO_END = {"eos_token_ids": (), "max_new_tokens": 100_000}


class FaultySession(WrappedSession):
    """Raises what it is told to, in one of its calls; `None` lets a call pass."""

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        self.faults: dict[str, Iterator[BaseException | None]] = {}
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        whole = getattr(self.wrapped, name)
        if name not in ("vision", "prefill", "decode"):
            return whole

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            fault = next(self.faults.get(name, iter(())), None)
            if fault is not None:
                raise fault
            return whole(*arguments)

        return call


def always(error: Callable[[], BaseException]) -> Iterator[BaseException]:
    while True:
        yield error()


@pytest.fixture(scope="module")
def opened(tiny_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(tiny_engine, threads=1)


@pytest.fixture
def session(opened: Qwen3VLModel) -> FaultySession:
    return FaultySession(opened.session)


@pytest.fixture
def model(opened: Qwen3VLModel, session: FaultySession) -> Iterator[Qwen3VLModel]:
    model = serving(opened, session=session, max_context=2048)
    yield model
    model.close(drain=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(scope="module")
def expected(opened: Qwen3VLModel) -> list[int]:
    return opened.generate("Read", **TEXT).token_ids


def check_usable(model: Qwen3VLModel, expected: list[int]) -> None:
    """Check that nothing runs or waits and that the next request is answered."""
    assert model.generate("Read", **TEXT).token_ids == expected
    with ThreadPoolExecutor(1) as other:
        assert other.submit(model.generate, "Read", **TEXT).result(60).token_ids == expected
    statistics = model.statistics()
    assert [statistics[name] for name in ("waiting", "waiting_tokens", "running", "decoding")] == [0, 0, 0, 0]


# Requests


@pytest.mark.portable
def test_want_of_memory_for_a_rehearsal_fails_no_request(
    model: Qwen3VLModel, session: FaultySession, expected: list[int]
) -> None:
    num_tried = 0

    def rehearse_decode(*arguments: Any) -> None:
        nonlocal num_tried
        num_tried += 1
        raise CapacityError("out of memory", remedy="less")

    vars(session)["rehearse_decode"] = rehearse_decode
    check_usable(model, expected)
    model.warm_up()
    assert num_tried == 1


@pytest.mark.portable
def test_bad_members_of_a_batch_fail_alone(model: Qwen3VLModel, expected: list[int]) -> None:
    prompts = [
        "Read",
        asked("Read", b"no image"),
        "Read",
        asked("Read", "missing.png"),
        [{"role": 5}],
        "x " * 9000,
        "Read",
    ]
    seen: list[int] = []
    outcomes = model.generate_batch(prompts, on_done=lambda number, _: seen.append(number), **TEXT)
    kinds = [type(each) for each in outcomes]
    assert kinds == [Generation, ImageError, Generation, ImageError, UsageError, CapacityError, Generation]
    assert all(each.token_ids == expected for each in outcomes if isinstance(each, Generation))
    assert seen == list(range(len(prompts)))
    check_usable(model, expected)


@pytest.mark.portable
def test_more_bad_prompts_than_the_queue_has_places(opened: Qwen3VLModel, expected: list[int]) -> None:
    """Their errors are kept until the end, and hold no place in the queue."""
    model = serving(opened, max_queue=2, max_context=2048)
    outcomes = model.generate_batch([asked("Read", b"no image")] * 8 + ["Read"], **TEXT)
    assert [type(each) for each in outcomes] == [ImageError] * 8 + [Generation]
    assert model.statistics()["waiting"] == 0
    model.close()  # answers what waits, and does not wait for what failed
    with pytest.raises(UsageError, match="closed"):
        model.generate("Read")


@pytest.mark.portable
def test_an_answer_that_fills_the_context_ends_with_length(opened: Qwen3VLModel, expected: list[int]) -> None:
    model = serving(opened, max_context=64)
    num_tokens = len(model.prepare("Read").prompt.input_ids)
    prompts = ["Read", "Read " * 8, "Read it"]
    outcomes = model.generate_batch(prompts, **NO_END)
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        assert isinstance(outcome, Generation)
        assert outcome.finish_reason == "length"
        assert len(outcome.token_ids) + len(model.prepare(prompt).prompt.input_ids) == 64
    assert len(outcomes[0].token_ids) == 64 - num_tokens  # type: ignore[union-attr]
    check_usable(model, expected)
    model.close()


@pytest.mark.portable
def test_a_reader_that_stops_reading_holds_up_nobody(model: Qwen3VLModel, expected: list[int]) -> None:
    streams = [model.stream("Count", eos_token_ids=(), max_new_tokens=300) for _ in range(4)]
    pieces = [next(stream) for stream in streams]
    check_usable_beside = [model.generate("Read", **TEXT).token_ids for _ in range(3)]
    assert check_usable_beside == [expected] * 3
    # They ended all the same, and what nobody read is one answer's text each.
    assert [stream.wait().finish_reason for stream in streams] == ["length"] * 4  # type: ignore[union-attr]
    texts = [piece + "".join(stream) for piece, stream in zip(pieces, streams, strict=True)]
    assert len(set(texts)) == 1 and texts[0] == streams[0].result.text  # type: ignore[union-attr]


@pytest.mark.portable
def test_ten_thousand_requests_at_once(opened: Qwen3VLModel, expected: list[int]) -> None:
    model = serving(opened, max_queue=50, max_context=256)

    async def one() -> str:
        try:
            answer = await model.agenerate("Read", eos_token_ids=(), max_new_tokens=2)
            assert answer.token_ids == expected[:2]
            return "answered"
        except OverloadError as error:
            assert error.retry_after_s > 0 and "max_queue is 50" in error.message and "ask again in" in str(error)
            return "refused"

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*(one() for _ in range(10_000)))

    # One holds the engine until the queue has filled up, so that the rest is refused.
    with held_until_submitted(model, 50):
        outcomes = asyncio.run(all_of_them())
    statistics = model.statistics()
    answered = outcomes.count("answered")
    assert answered + outcomes.count("refused") == 10_000 and answered >= 50
    assert statistics["requests"]["length"] == answered and statistics["refused"] == 10_000 - answered > 0
    check_usable(model, expected)
    model.close()


@pytest.mark.portable
def test_prompts_that_wait_are_bounded_in_tokens(opened: Qwen3VLModel, expected: list[int]) -> None:
    model = serving(opened, max_sequences=1, max_queue_tokens=100, max_context=2048)
    long = "Read " * 60
    with model.stream("Read", **NO_END) as stream, ThreadPoolExecutor(1) as other:
        next(stream)
        waiting = other.submit(model.generate, long, **TEXT)  # one may always wait
        while not model.statistics()["waiting_tokens"]:
            time.sleep(0.001)
        with pytest.raises(OverloadError, match="max_queue_tokens is 100"):
            model.generate(long, **TEXT)
        stream.close()
        assert len(waiting.result(60).token_ids) == 8
    check_usable(model, expected)
    model.close()


# Callers


@pytest.mark.portable
def test_callbacks_that_raise_stop_their_own_answer_alone(model: Qwen3VLModel, expected: list[int]) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.generate("Count", on_piece=fail, **NO_END)
    with pytest.raises(ZeroDivisionError):
        model.generate_batch(["Read", *["Count"] * 20], on_done=fail, eos_token_ids=(), max_new_tokens=200)
    check_usable(model, expected)
    assert model.statistics()["requests"]["cancelled"] >= 1


@pytest.mark.portable
@pytest.mark.parametrize("timeout_s", [-1, 0, 1e-9])
def test_deadlines_in_the_past(model: Qwen3VLModel, expected: list[int], timeout_s: float) -> None:
    with pytest.raises(DeadlineError, match=r"^the time for this answer was over before it was queued\n.*timeout_s"):
        model.generate("Read", timeout_s=timeout_s, **TEXT)
    outcomes = model.generate_batch(["Read"] * 2, timeout_s=timeout_s, **TEXT)
    assert [type(each) for each in outcomes] == [DeadlineError] * 2
    check_usable(model, expected)


@pytest.mark.portable
def test_a_deadline_in_the_middle_of_an_answer(model: Qwen3VLModel, expected: list[int], clock: Clock) -> None:
    stream = model.stream("Count", timeout_s=3600, **NO_END)
    beside = model.stream("Count", eos_token_ids=(), max_new_tokens=100)
    pieces = [next(stream)]
    with pytest.raises(DeadlineError, match=r"was over after \d+ tokens"):
        for piece in stream:
            pieces.append(piece)
            if len(pieces) == 5:
                assert beside.wait() is not None
                clock.skip(4000)
    with pytest.raises(DeadlineError):  # whoever reads on is told, too
        next(stream)
    assert stream.result is None
    check_usable(model, expected)
    assert model.statistics()["requests"]["expired"] == 1


@pytest.mark.portable
def test_a_deadline_of_one_that_waits(opened: Qwen3VLModel, expected: list[int], clock: Clock) -> None:
    model = serving(opened, max_sequences=1, max_context=2048)
    with model.stream("Count", **NO_END) as stream, ThreadPoolExecutor(1) as other:
        next(stream)
        waiting = other.submit(model.generate, "Read", timeout_s=3600, **TEXT)
        while not model.statistics()["waiting_tokens"]:
            time.sleep(0.001)
        clock.skip(4000)
        with pytest.raises(DeadlineError, match="was over after 0 tokens"):
            waiting.result(60)
    check_usable(model, expected)
    model.close()


@pytest.mark.portable
def test_tasks_that_are_cancelled_free_their_slot(opened: Qwen3VLModel, expected: list[int]) -> None:
    model = serving(opened, max_sequences=1, max_context=2048)

    async def cancel_one() -> None:
        task = asyncio.create_task(model.agenerate("Count", **NO_END))
        while not model.statistics()["decoding"]:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await model.agenerate("Read", **TEXT)).token_ids == expected

    asyncio.run(cancel_one())
    check_usable(model, expected)
    assert model.statistics()["requests"]["cancelled"] == 1
    model.close()


@pytest.mark.portable
def test_a_loop_that_is_closed_while_it_waits(model: Qwen3VLModel, session: FaultySession, expected: list[int]) -> None:
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # it would tell of the task that is lost below
    entered, leave = threading.Event(), threading.Event()

    def hold_one() -> Iterator[None]:
        entered.set()
        assert leave.wait(60)
        yield None

    session.faults["decode"] = hold_one()
    task = loop.create_task(model.agenerate("Count", eos_token_ids=(), max_new_tokens=30))
    while not entered.is_set():
        loop.run_until_complete(asyncio.sleep(0.001))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    leave.set()
    # The answer goes on; whom its end is to wake is not there any more.
    while model.statistics()["running"]:
        time.sleep(0.001)
    assert model.statistics()["requests"]["length"] == 1
    del task
    gc.collect()
    check_usable(model, expected)


@pytest.mark.portable
def test_several_loops_share_a_model(model: Qwen3VLModel, expected: list[int]) -> None:
    async def in_a_loop() -> list[list[int]]:
        answers = await asyncio.gather(*(model.agenerate("Read", **TEXT) for _ in range(6)))
        return [answer.token_ids for answer in answers]

    with ThreadPoolExecutor(3) as pool:
        found = [each.result(60) for each in [pool.submit(asyncio.run, in_a_loop()) for _ in range(3)]]
    assert found == [[expected] * 6] * 3


# The engine


@pytest.mark.portable
@pytest.mark.parametrize("method", ["vision", "prefill", "decode"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), MemoryError()], ids=["error", "memory"])
def test_a_call_that_fails_once_ends_its_sequences_alone(
    model: Qwen3VLModel, session: FaultySession, expected: list[int], method: str, error: Exception
) -> None:
    session.faults[method] = iter([error])
    kind = CapacityError if isinstance(error, MemoryError) else EngineError
    with pytest.raises(kind, match="not enough memory" if kind is CapacityError else "the engine failed .*broken"):
        model.generate(asked("Read", PICTURE), **TEXT)
    check_usable(model, expected)
    assert model.statistics()["requests"]["failed"] == 1


@pytest.mark.portable
def test_a_step_that_fails_ends_the_batch_and_no_more(
    model: Qwen3VLModel, session: FaultySession, expected: list[int]
) -> None:
    session.faults["decode"] = iter([None] * 30 + [RuntimeError("broken")])
    with held_until_submitted(model, 6):
        outcomes = model.generate_batch(["Count"] * 6, eos_token_ids=(), max_new_tokens=60)
    failed = [each for each in outcomes if isinstance(each, EngineError)]
    assert 1 <= len(failed) <= 4  # of those that ran; the others came after
    assert all(isinstance(each, Generation) and len(each.token_ids) == 60 for each in outcomes if each not in failed)
    # Each reader has an error of its own.
    assert len({id(each) for each in failed}) == len(failed)
    check_usable(model, expected)


@pytest.mark.portable
@pytest.mark.parametrize("method", ["prefill", "decode"])
def test_an_engine_that_always_fails_says_so(model: Qwen3VLModel, session: FaultySession, method: str) -> None:
    session.faults[method] = always(lambda: RuntimeError("broken"))
    messages: list[str] = []
    for _ in range(6):
        with pytest.raises(EngineError) as caught:
            model.generate("Read", **TEXT)
        messages.append(caught.value.message)
    assert all(message.startswith("the engine failed (RuntimeError: broken)") for message in messages[:3])
    assert all(message.startswith("the engine has failed and takes no more requests") for message in messages[3:])
    num_calls = len(session.calls)
    for call in (
        lambda: model.logits("Read"),
        lambda: next(model.stream("Read")),
        lambda: asyncio.run(model.agenerate("Read")),
        lambda: model.encode_images(model.prepare(asked("Read", PICTURE)).images),
    ):
        with pytest.raises(EngineError, match="has failed and takes no more requests"):
            call()
    assert all(isinstance(each, EngineError) for each in model.generate_batch(["Read"] * 3))
    assert len(session.calls) == num_calls
    assert model.statistics()["requests"]["failed"] == 3


@pytest.mark.portable
def test_want_of_memory_is_no_death(model: Qwen3VLModel, session: FaultySession, expected: list[int]) -> None:
    """Images that are too large for the machine, one after the other, fail each alone."""
    session.faults["vision"] = iter([MemoryError() for _ in range(8)])
    for number in range(8):
        with pytest.raises(CapacityError, match="not enough memory"):
            model.generate(asked("Read", PICTURE + np.uint8(number)), **TEXT)
    check_usable(model, expected)


@pytest.mark.portable
def test_those_that_run_beside_a_dying_engine_are_told(model: Qwen3VLModel, session: FaultySession) -> None:
    session.faults["prefill"] = itertools.chain([None], always(lambda: RuntimeError("broken")))
    with model.stream("Count", **NO_END) as stream:
        next(stream)
        for _ in range(3):
            with pytest.raises(EngineError, match=r"^the engine failed \(RuntimeError: broken\)"):
                model.generate("Read")
        with pytest.raises(EngineError, match=r"^the engine failed \(RuntimeError: broken\)"):
            list(stream)
    with pytest.raises(EngineError, match="takes no more requests"):
        model.generate("Read")


@pytest.mark.portable
def test_a_prompt_that_never_began_may_be_dropped(
    opened: Qwen3VLModel, session: FaultySession, expected: list[int]
) -> None:
    """Also where rows of answers are not kept, since prompts run in other weights."""
    capabilities = {**opened.manifest.capabilities, "prefill_min_tokens": 64}
    manifest = replace(opened.manifest, capabilities=capabilities)
    model = serving(opened, session=session, manifest=manifest, prefill_chunk=4, max_context=256)
    entered, leave = threading.Event(), threading.Event()

    def chunks() -> Iterator[None]:
        yield None
        entered.set()  # the second chunk of the first prompt: all are admitted, and one has begun
        assert leave.wait(60)
        yield None

    session.faults["prefill"] = chunks()
    streams = [model.stream("Count " * 20, **TEXT) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        with held_until_submitted(model, 4):
            readers = [pool.submit(stream.wait) for stream in streams]
            assert entered.wait(60)
            assert (model.statistics()["running"], model.statistics()["prompts"]) == (4, 1)
        for stream in streams:
            stream.close()
        leave.set()
        assert [reader.result(60) for reader in readers] == [None] * 4
    check_usable(model, expected)
    assert model.statistics()["requests"]["cancelled"] == 4
    model.close()


@pytest.mark.portable
def test_a_sampler_that_fails_is_not_the_engines_death(
    model: Qwen3VLModel, monkeypatch: pytest.MonkeyPatch, expected: list[int]
) -> None:
    def fail(*_: object) -> int:
        raise EngineError("the engine gave logits that are not finite", remedy="none")

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "next", fail)
        for _ in range(5):
            with pytest.raises(EngineError, match="not finite"):
                model.generate("Read", **TEXT)
    check_usable(model, expected)


@pytest.mark.portable
def test_an_image_that_many_wait_for_is_encoded_once(model: Qwen3VLModel, session: FaultySession) -> None:
    prompts = [asked(f"Read {number}", PICTURE) for number in range(4)]
    # Beside an image of another size, which the tower is at when the others come.
    prompts.insert(0, asked("Read", np.concatenate([PICTURE, PICTURE])))
    with held_until_submitted(model, 5):
        outcomes = model.generate_batch(prompts, **TEXT)
    assert all(isinstance(each, Generation) for each in outcomes)
    assert session.calls.count("vision") == 2


@pytest.mark.portable
def test_closing_answers_what_was_accepted(opened: Qwen3VLModel) -> None:
    model = serving(opened, max_sequences=1)
    with ThreadPoolExecutor(3) as pool:
        with held_until_submitted(model, 3) as all_submitted:
            answers = [pool.submit(model.generate, "Read", **TEXT) for _ in range(3)]
            assert all_submitted.wait(60)
        model.close()
        assert [len(each.result(60).token_ids) for each in answers] == [8, 8, 8]
    with pytest.raises(UsageError, match="the model was closed"):
        model.generate("Read")


@pytest.mark.portable
@pytest.mark.parametrize("timeout_s", [None, 0.05])
def test_closing_at_once_tells_those_that_run_and_wait(opened: Qwen3VLModel, timeout_s: float | None) -> None:
    model = serving(opened, max_sequences=1, max_context=2048)
    with ThreadPoolExecutor(2) as pool:
        stream = model.stream("Count", **NO_END)
        next(stream)
        waiting = pool.submit(model.generate, "Read", **TEXT)
        while not model.statistics()["waiting_tokens"]:
            time.sleep(0.001)
        # Or after a time in which not all can be answered.
        model.close(drain=timeout_s is not None, timeout_s=timeout_s)
        with pytest.raises(UsageError, match="the model was closed"):
            list(stream)
        with pytest.raises(UsageError, match="the model was closed"):
            waiting.result(60)
    model.close()  # once more does nothing


@pytest.mark.portable
def test_a_model_lives_as_long_as_its_streams(opened: Qwen3VLModel) -> None:
    def worker_threads() -> int:
        return sum(thread.name == "qwen3vl-worker" for thread in threading.enumerate())

    before = worker_threads()
    stream = serving(opened, max_context=256).stream("Count", eos_token_ids=(), max_new_tokens=50)
    gc.collect()
    first = next(stream)
    assert worker_threads() == before + 1
    assert first + "".join(stream) == stream.result.text  # type: ignore[union-attr]
    del stream
    gc.collect()
    assert worker_threads() == before


EXIT = """
import contextlib, sys, threading, time
import numpy as np
from qwen3_vl import Qwen3VLModel, UsageError
model = Qwen3VLModel.from_engine(sys.argv[1], threads=1)
image = {"type": "image", "image": np.random.default_rng(0).integers(0, 256, (640, 640, 3), np.uint8)}
stream = model.stream("Count", eos_token_ids=(), max_new_tokens=100000)
next(stream)
others = [model.stream([{"role": "user", "content": [image]}], eos_token_ids=()) for _ in range(3)]
def read(stream):
    with contextlib.suppress(UsageError):  # the model was closed: Python may end before the reader is told, or after
        list(stream)
threads = [threading.Thread(target=read, args=(each,), daemon=True) for each in others]
for thread in threads: thread.start()
# A thread that is still at its image when Python ends could not start another one, and would say so.
while model.statistics()["running"] < 4: time.sleep(0.001)
print("running", flush=True)
"""


@pytest.mark.portable
def test_a_process_ends_while_streams_run(tiny_engine: Path) -> None:
    command = [sys.executable, "-c", EXIT, str(tiny_engine)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "running\n", "")


FORKS = """
import os, sys
from qwen3_vl import Qwen3VLModel, UsageError
model = Qwen3VLModel.from_engine(sys.argv[1], threads=1)
stream = model.stream("Count", eos_token_ids=(), max_new_tokens=100000)
next(stream)
for number in range(12):
    if os.fork() == 0:
        refused = 0
        for call in (lambda: next(stream), lambda: model.generate("Read"), model.statistics):
            try:
                call()
            except UsageError as error:
                refused += "was forked from it" in error.message
        model.close()
        sys.exit(10 + refused)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
stream.close()
print(len(model.generate("Read", eos_token_ids=(), max_new_tokens=3).token_ids))
"""


@pytest.mark.portable
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
def test_forks_while_a_stream_runs_are_refused_and_end(tiny_engine: Path) -> None:
    """Whatever lock the worker holds at that moment."""
    command = [sys.executable, "-W", "ignore", "-c", FORKS, str(tiny_engine)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["13"] * 12 + ["3"], "")

"""Calls that cannot end well: forks, want of memory, interrupts; one error, and a model that still answers."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import ROOT
from runtime.errors import CapacityError
from runtime.model import Qwen3VLModel

PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
MESSAGES = [
    {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Read the digits."}]}
]


@pytest.fixture(scope="module", params=[1, 2])
def model(request: pytest.FixtureRequest, tiny_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(tiny_engine, threads=request.param)


def report(results: Any, call: Any) -> None:
    try:
        results.put(("answered", str(call())))
    except BaseException as error:
        results.put((type(error).__name__, str(error)))


def in_a_fork(call: Any) -> tuple[str, str]:
    """Return what a call gives in a process forked from here; the process has to end by itself."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    worker = context.Process(target=report, args=(results, call))
    worker.start()
    try:
        found: tuple[str, str] = results.get(timeout=300)
        worker.join(300)
        assert worker.exitcode == 0
    finally:
        worker.kill()
    return found


@pytest.mark.portable
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
def test_a_model_answers_only_in_the_process_that_opened_it(model: Qwen3VLModel) -> None:
    expected = model.generate(MESSAGES, max_new_tokens=4).token_ids
    stream = model.stream(MESSAGES, max_new_tokens=4)
    prepared = model.prepare(MESSAGES)
    for call in (
        lambda: model.generate(MESSAGES, max_new_tokens=4),
        lambda: model.stream(MESSAGES),
        lambda: model.logits(MESSAGES),
        lambda: model.encode_images(prepared.images),
        lambda: model.statistics(),
        lambda: next(stream),
    ):
        kind, words = in_a_fork(call)
        assert kind == "UsageError" and "was forked from it" in words and "in each worker process" in words
    assert in_a_fork(lambda: len(model.prepare(MESSAGES).prompt.input_ids)) == (
        "answered",
        str(len(prepared.prompt.input_ids)),
    )
    # What a `with` block does at its end, or a program that ends: nothing of the other process is touched.
    assert in_a_fork(model.close) == in_a_fork(stream.close) == ("answered", "None")
    assert model.generate(MESSAGES, max_new_tokens=4).token_ids == expected
    stream.close()


@pytest.mark.portable
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
def test_a_fork_while_another_thread_generates(model: Qwen3VLModel) -> None:
    is_done = threading.Event()

    def work() -> None:
        while not is_done.is_set():
            model.generate(MESSAGES, max_new_tokens=8)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(3):
            assert in_a_fork(lambda: model.generate("Read", max_new_tokens=1))[0] == "UsageError"
    finally:
        is_done.set()
        thread.join()


@pytest.mark.portable
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("is_used", [False, True])
def test_a_forked_process_ends_like_any_other(tiny_engine: Path, threads: int, is_used: bool) -> None:
    # Python frees what a module holds when it ends; an engine freed there would wait for threads that a fork leaves.
    code = (
        "import os, sys\n"
        "from qwen3_vl import Qwen3VLModel\n"
        "model = Qwen3VLModel.from_engine(sys.argv[1], threads=int(sys.argv[2]))\n"
        "if sys.argv[3] == 'True': model.generate('Read', max_new_tokens=2)\n"
        "if os.fork() == 0: sys.exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]), model.generate('Read', max_new_tokens=2).finish_reason)\n"
    )
    command = [sys.executable, "-c", code, str(tiny_engine), str(threads), str(is_used)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split()[0] == "7", done.stderr


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from qwen3_vl import Qwen3VLModel
from runtime.errors import CapacityError

model = Qwen3VLModel.from_engine(sys.argv[1], threads=1, max_pixels=2560000)
expected = model.generate("Read", max_new_tokens=4).token_ids
pixels = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), dtype=np.uint8)
messages = [{"role": "user", "content": [{"type": "image", "image": pixels}]}]
free = resource.getrlimit(resource.RLIMIT_AS)
for megabytes in (20, 60):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), free[1]))
    try:
        model.generate(messages, max_new_tokens=1)
        print("answered")
    except CapacityError as error:
        print("not enough memory" in error.message and "remedy" in str(error) and len(error.message) < 500)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, free)
    assert model.generate("Read", max_new_tokens=4).token_ids == expected
"""


@pytest.mark.portable
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory in use is not known on this system")
def test_want_of_memory_is_an_error_and_the_model_answers_again(demo_engine: Path) -> None:
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(demo_engine)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert len(found) == 2 and found[0] == "True" and set(found) <= {"True", "answered"}


@pytest.mark.portable
def test_interrupts_at_any_moment_leave_a_model_that_answers(tiny_engine: Path) -> None:
    model = Qwen3VLModel.from_engine(tiny_engine, threads=1)
    expected = model.generate(MESSAGES, max_new_tokens=12).token_ids
    draw = random.Random(7)
    num_interrupted = 0
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        for _ in range(100):
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.02 * draw.random())
            try:
                model.generate(MESSAGES, max_new_tokens=12)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                num_interrupted += 1
            assert model.generate(MESSAGES, max_new_tokens=12).token_ids == expected
    finally:
        signal.signal(signal.SIGALRM, before)
    assert num_interrupted > 5


@pytest.mark.portable
def test_a_prompt_far_too_long_is_refused_at_once(tiny_engine: Path) -> None:
    model = Qwen3VLModel.from_engine(tiny_engine)
    with pytest.raises(CapacityError, match=r"characters, and the first .* tokens already.*\n.*raise max_context"):
        model.generate("word " * 1_000_000, max_new_tokens=1)
    with pytest.raises(CapacityError, match="the messages hold more than 16777216 characters"):
        model.generate("x" * 20_000_000, max_new_tokens=1)
    with pytest.raises(CapacityError):
        model.generate([{"role": "user", "content": "hi"}] * 100_000, max_new_tokens=1)
    assert model.generate("Read", max_new_tokens=1).token_ids


@pytest.mark.portable
def test_no_more_images_are_read_once_they_exceed_the_context(tiny_engine: Path) -> None:
    model = Qwen3VLModel.from_engine(tiny_engine, max_context=10)
    image = {"type": "image", "image": PICTURE}
    broken = {"type": "image", "image": b"not an image"}
    with pytest.raises(
        CapacityError, match=r"image\(s\) or temporal patches alone are .* visual tokens: max_context is 10"
    ):
        model.generate([{"role": "user", "content": [image] * 40 + [broken]}])

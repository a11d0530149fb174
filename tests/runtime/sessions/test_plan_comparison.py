"""What the comparison of own kernels with ONNX Runtime finds, when it is made, and what the rehearsal makes."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.bundle import Bundle
from helpers.engines import build
from helpers.host_cuda import HostDevice, Work
from helpers.host_plan import BATCHES, write_host_plan
from helpers.plan_session import CONFIG, NEAR, PROMPTS, filled, inputs_of, opened, steps
from runtime.errors import EngineError
from runtime.ort_cache import OrtDeviceCache
from runtime.sessions.ort_cuda import OrtCudaSession

CAPACITY = 512
ROWS = 3  # valid rows of each slot before a rehearsal


class Counting(HostDevice):
    """A device that counts the steps that were compared: before each, what steps give is made invalid."""

    num_compared = 0

    def fill(self, address: int, byte: int, num_bytes: int, stream: int) -> None:
        self.num_compared += byte == 0xFF and self.allocation_at(address).num_bytes == num_bytes == self.logits_bytes
        super().fill(address, byte, num_bytes, stream)

    logits_bytes = 4 * 4 * CONFIG.text.vocab_size  # of four slots


def decode(session: OrtCudaSession, cache: OrtDeviceCache, pasts: list[int], slot: int = 0) -> np.ndarray:
    ids = [[30 + slot + b] for b in range(len(pasts))]
    return session.decode(inputs_of(ids, pasts), cache, slot)[:, 0]


def new_cache(session: OrtCudaSession, num_rows: int = CAPACITY - 1, slots: int = 4) -> OrtDeviceCache:
    """Return a cache whose slots hold as many rows of prompts."""
    cache = session.new_cache(CAPACITY, slots)
    random = np.random.default_rng(1)
    for slot in range(slots):
        ids = random.integers(0, CONFIG.text.vocab_size, (1, num_rows))
        session.prefill(inputs_of(ids.tolist(), [0]), cache, slot)
    return cache


# What is found


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("logits", "logits of sequence 0 are off by"),
        ("append", "beside the new one of sequence 0 were written"),
        ("scale", "the new keys of layer 1 of sequence 0 are off by"),
        ("candidates", "the largest logits of sequence 0 are not the largest of all"),
        ("nothing", "logits of sequence 0 are off by nan"),
        ("no logits", "logits of sequence 0 are off by nan"),
        ("slot", "are off by"),
    ],
)
def test_a_plan_that_computes_something_else_is_switched_off_loudly(
    plain: Path, planned: Callable[[str], Path], caplog: pytest.LogCaptureFixture, fault: str, expected: str
) -> None:
    memory = HostDevice()
    session, reference = opened(planned(fault), memory), opened(plain)
    caches = filled(session), filled(reference)
    with caplog.at_level(logging.WARNING):
        found = steps(session, caches[0], 2, 1)
    assert "the decode plan is switched off" in caplog.text
    assert expected in caplog.text
    assert session.decode_kernels == "onnxruntime"
    assert expected in str(session.decode_plan_problem)
    assert "graph" not in memory.leaks(), "what was recorded is of no use"
    for given, wanted in zip(found, steps(reference, caches[1], 2, 1), strict=True):
        np.testing.assert_allclose(given, wanted, atol=NEAR, err_msg="ONNX Runtime's answer stands")
    for index in range(CONFIG.text.num_layers):
        for given, wanted in zip(caches[0].layer(index), caches[1].layer(index), strict=True):
            np.testing.assert_allclose(given[:, :, :7], wanted[:, :, :7], atol=NEAR)
    events = memory.take_events()
    assert events.count("whole_step") == 3, "three steps are asked, whose answers are ONNX Runtime's"


def test_other_rounding_is_let_pass(planned: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    session, right = opened(planned("rounding")), opened(planned(""))
    cache, expected = new_cache(session), new_cache(right)
    with caplog.at_level(logging.WARNING):
        found = decode(session, cache, [200, 40])
        session.rehearse_decode(cache, [400] * 4)
    assert (session.decode_kernels, caplog.text) == ("own", "")
    wanted = decode(right, expected, [200, 40])
    assert not np.array_equal(found, wanted)
    np.testing.assert_allclose(found, wanted, atol=0.01 * np.ptp(wanted))


def test_a_wrong_expert_is_found(demo_moe_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = build(demo_moe_bundle, "ort-cuda-fp16", tmp_path / "engine")
    kernels = {}
    for fault in ("", "expert"):
        folder = write_host_plan(Path(shutil.copytree(engine, tmp_path / f"planned{fault}")), fault=fault)
        session = opened(folder)
        cache = session.new_cache(32, 2)
        session.rehearse_decode(cache, [0, 0])
        kernels[fault] = session.decode_kernels
    assert kernels == {"": "own", "expert": "onnxruntime"}
    assert "are off by" in caplog.text


class OtherGraph(HostDevice):
    """A device on which a recorded step lacks its last kernel; launched one by one, all run."""

    def end_capture(self, stream: int) -> int:
        self._streams[stream].recording.pop()  # type: ignore[union-attr]
        return super().end_capture(stream)


def test_it_is_the_recorded_step_that_is_compared(planned: Callable[[str], Path]) -> None:
    session = opened(planned(""), OtherGraph())
    steps(session, filled(session), 1, 0)
    assert "logits of sequence 0 are off by nan" in str(session.decode_plan_problem)
    session = opened(planned(""), OtherGraph(), cuda_graphs=False)
    steps(session, filled(session), 1, 0)
    assert session.decode_plan_problem is None


class OfOneCache(HostDevice):
    """A device on which the graphs recorded after the first two do something else."""

    num_graphs = 0

    def end_capture(self, stream: int) -> int:
        self.num_graphs += 1
        if self.num_graphs > 2:
            recording: list[Work] = self._streams[stream].recording  # type: ignore[assignment]
            recording.pop()
        return super().end_capture(stream)


def test_a_step_that_is_recorded_for_another_cache_is_compared_too(planned: Callable[[str], Path]) -> None:
    session = opened(planned(""), OfOneCache())
    for capacity, problem in ((32, False), (1000, False), (2000, True)):
        cache = session.new_cache(capacity, 2)
        for prompt in PROMPTS[:2]:
            session.prefill(inputs_of([prompt], [0]), cache)
        for past in (4, 5, 6):
            decode(session, cache, [past])
        assert (session.decode_plan_problem is not None) == problem


def test_a_step_that_cannot_be_recorded_is_onnx_runtimes(planned: Callable[[str], Path]) -> None:
    class Refusing(HostDevice):
        def launch_kernel(self, *args: Any, **keywords: Any) -> None:
            raise EngineError("CUDA failed: not permitted", remedy="restart")

    session = opened(planned(""), Refusing())
    steps(session, filled(session), 1, 0)
    assert "not permitted, while the decode step was recorded" in str(session.decode_plan_problem)
    session = opened(planned(""), Refusing(), batch_invariant=True)
    with pytest.raises(EngineError, match="while the decode step was recorded") as caught:
        steps(session, filled(session), 1, 0)
    assert "without batch_invariant" in str(caught.value.remedy)


# When steps are compared


@pytest.mark.parametrize(
    ("pasts", "compared"),
    [
        # Without a past, attention is hardly asked.
        ([[0], [0], [1], [2], [15]], [1, 0, 1, 0, 0]),
        ([[100], [5], [16], [127], [128], [200], [128]], [1, 0, 0, 0, 1, 0, 0]),
        # Sequences of one length say nothing of those of several; these say both.
        ([[20, 20], [20, 21], [20, 20], [30, 22]], [1, 1, 0, 0]),
        ([[20, 30], [20, 20], [200, 200], [200, 200], [200, 190]], [1, 0, 1, 0, 1]),
        # Another batch is another step; three run as four do.
        ([[20], [20, 30], [20, 30, 40], [20, 30, 40, 50], [20]], [1, 1, 1, 0, 0]),
    ],
)
def test_a_step_is_compared_when_it_is_harder_than_those_that_were(
    planned: Callable[[str], Path], pasts: list[list[int]], compared: list[int]
) -> None:
    memory = Counting()
    session = opened(planned(""), memory)
    cache = new_cache(session)
    found = []
    for each in pasts:
        before = memory.num_compared
        decode(session, cache, each)
        found.append(memory.num_compared - before)
    assert found == compared
    assert session.decode_kernels == "own"


def test_a_fault_that_even_steps_do_not_show_is_found_by_an_uneven_one(
    plain: Path, planned: Callable[[str], Path]
) -> None:
    session, reference = opened(planned("uneven")), opened(plain)
    cache, expected = new_cache(session), new_cache(reference)
    for _ in range(2):
        decode(session, cache, [200, 200])
    assert session.decode_plan_problem is None
    for _ in range(3):
        found = decode(session, cache, [30, 200])
        np.testing.assert_allclose(found, decode(reference, expected, [30, 200]), atol=NEAR)
    assert "are off by" in str(session.decode_plan_problem)


# The rehearsal


def test_a_rehearsal_compares_one_step_of_each_batch_and_no_other_is_compared_then(
    planned: Callable[[str], Path],
) -> None:
    memory = Counting()
    session = opened(planned(""), memory)
    cache = new_cache(session, ROWS)
    held = [cache.layer(index) for index in range(CONFIG.text.num_layers)]
    memory.take_events()
    session.rehearse_decode(cache, [ROWS] * 4)
    events = memory.take_events()
    assert memory.num_compared == events.count("whole_step") == events.count("begin_capture") == len(BATCHES)
    for index, before in enumerate(held):
        for now, then in zip(cache.layer(index), before, strict=True):
            assert np.array_equal(now[:, :, :ROWS], then[:, :, :ROWS]), "valid rows"
            assert np.isfinite(now).all()
            (*_, other, longest) = now
            assert not np.array_equal(longest[:, ROWS:200], other[:, ROWS:200]), "slots are told apart"
    for pasts in ([3], [3, 4], [3, 400], [500, 10, 20], [3, 3, 3, 3], [510, 2, 30, 100]):
        decode(session, cache, pasts)
    assert memory.num_compared == len(BATCHES)
    session.rehearse_decode(cache, [ROWS] * 4)
    assert memory.num_compared == len(BATCHES), "it is known"


def test_a_rehearsal_needs_no_more_slots_than_sequences(planned: Callable[[str], Path]) -> None:
    memory = Counting()
    session = opened(planned(""), memory)
    cache = new_cache(session, ROWS)
    session.rehearse_decode(cache, [ROWS] * 3)
    assert memory.num_compared == 3, "3 sequences run as 4"
    for index in range(CONFIG.text.num_layers):
        for each in cache.layer(index):
            assert not each[3, :, ROWS + 13 :].any(), "no row of another slot was written"


@pytest.mark.parametrize(
    "fault",
    ["split", "uneven", "slot", "first slots", "append", "scale", "logits", "candidates", "no logits"],
)
def test_a_rehearsal_finds_faults(planned: Callable[[str], Path], fault: str) -> None:
    session = opened(planned(fault))
    cache = new_cache(session, ROWS)
    held = [cache.layer(index) for index in range(CONFIG.text.num_layers)]
    session.rehearse_decode(cache, [ROWS] * 4)
    assert session.decode_kernels == "onnxruntime"
    for index, before in enumerate(held):
        for now, then in zip(cache.layer(index), before, strict=True):
            assert np.array_equal(now[:, :, :ROWS], then[:, :, :ROWS])
            assert np.isfinite(now).all(), "nothing that is blank stays"


def test_a_rehearsal_of_what_must_be_kept_fails(planned: Callable[[str], Path]) -> None:
    session = opened(planned("split"), batch_invariant=True)
    with pytest.raises(EngineError, match="batch_invariant: the engine's own kernels are switched off"):
        session.rehearse_decode(new_cache(session, ROWS), [ROWS] * 4)

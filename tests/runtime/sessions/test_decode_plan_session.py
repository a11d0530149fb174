"""Decode steps of own kernels in the session of ONNX Runtime on CUDA, on the host: what runs them, and when not."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from helpers import PICTURES
from helpers.host_cuda import HostDevice
from helpers.host_device import device_of
from helpers.host_plan import CODE_NAME, read_plan, write_host_plan, write_plan
from helpers.plan_session import CONFIG, KERNELS, NEAR, filled, inputs_of, opened, steps
from runtime.device_weights import DeviceWeights
from runtime.errors import CapacityError, EngineError, UsageError
from runtime.manifest import Manifest
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.session import SessionOptions
from runtime.sessions import ort_cuda
from runtime.sessions.ort_cuda import OrtCudaSession


@pytest.mark.parametrize(("num", "slot"), [(1, 0), (1, 4), (2, 1), (3, 2), (4, 1)])
def test_steps_from_any_slot_are_those_of_the_engine_without_a_plan(
    plain: Path, planned: Callable[[str], Path], num: int, slot: int
) -> None:
    memory = HostDevice()
    session, expected = opened(planned(""), memory), opened(plain)
    caches = filled(session), filled(expected)
    memory.take_events()
    found = steps(session, caches[0], num, slot)
    for given, wanted in zip(found, steps(expected, caches[1], num, slot), strict=True):
        np.testing.assert_allclose(given, wanted, atol=NEAR)
    events = memory.take_events()
    assert (events.count("whole_step"), events.count("begin_capture"), events.count("launch")) == (3, 1, 3)
    assert (session.decode_kernels, session.decode_plan_problem, session.decode_recorded) == ("own", None, True)
    for index in range(CONFIG.text.num_layers):
        for given, wanted in zip(caches[0].layer(index), caches[1].layer(index), strict=True):
            np.testing.assert_allclose(given[:, :, :8], wanted[:, :, :8], atol=NEAR)


def test_the_largest_logits_come_from_the_plan(planned: Callable[[str], Path]) -> None:
    memory = HostDevice()
    session = opened(planned(""), memory)
    cache = filled(session)
    steps(session, cache, 2, 1, count=2)
    memory.take_events()
    rows = session.decode_top(inputs_of([[40], [41]], [6, 6]), cache, 1)
    assert [name for name in memory.take_events() if name in KERNELS] == KERNELS
    for (row,) in rows:
        whole = row.fetch()
        assert np.array_equal(row.values, np.sort(whole)[::-1][: len(row.values)])
        assert np.array_equal(whole[row.ids], row.values)


def test_a_batch_that_the_plan_has_not_is_filled_up_by_its_last_row(planned: Callable[[str], Path]) -> None:
    session = opened(planned(""))
    assert [session.decode_batch(n, 5) for n in (1, 3, 5)] == [1, 3, 5], "no idle slot is asked for"
    cache = filled(session)
    held = [cache.layer(index) for index in range(CONFIG.text.num_layers)]
    for each in steps(session, cache, 3, 2):
        assert np.isfinite(each).all()
    for index, before in enumerate(held):
        for now, then in zip(cache.layer(index), before, strict=True):
            assert np.array_equal(now[:2], then[:2]), "no other slot was written"
            assert not np.array_equal(now[2:], then[2:])


def test_more_sequences_than_the_plan_has_run_in_onnx_runtime(plain: Path, planned: Callable[[str], Path]) -> None:
    memory = HostDevice()
    session, expected = opened(planned(""), memory), opened(plain)
    caches = filled(session), filled(expected)
    memory.take_events()
    for given, wanted in zip(steps(session, caches[0], 5, 0), steps(expected, caches[1], 5, 0), strict=True):
        np.testing.assert_allclose(given, wanted, atol=NEAR)
    assert not set(KERNELS) & set(memory.take_events())
    assert session.decode_kernels == "own", "smaller batches still run it"


def test_calls_of_several_tokens_run_in_onnx_runtime(planned: Callable[[str], Path]) -> None:
    memory = HostDevice()
    session = opened(planned(""), memory)
    cache = filled(session)
    memory.take_events()
    session.decode(inputs_of([[5, 6]], [4]), cache)
    assert not set(KERNELS) & set(memory.take_events())


def test_without_cuda_graphs_kernels_are_launched_one_by_one(planned: Callable[[str], Path]) -> None:
    memory = HostDevice()
    session = opened(planned(""), memory, cuda_graphs=False)
    cache = filled(session)
    memory.take_events()
    steps(session, cache, 2, 0)
    events = memory.take_events()
    assert not {"begin_capture", "launch"} & set(events)
    assert events.count("whole_step") == 3
    assert session.decode_recorded is False


def test_batch_invariant_takes_the_other_launches(planned: Callable[[str], Path]) -> None:
    memory = HostDevice()
    session = opened(planned(""), memory, batch_invariant=True)
    cache = filled(session)
    memory.take_events()
    steps(session, cache, 1, 0)
    assert [name for name in memory.take_events() if name in KERNELS] == ["embed_rows", *KERNELS] * 3


def test_batch_invariant_is_no_promise_that_is_broken(planned: Callable[[str], Path]) -> None:
    with pytest.raises(EngineError, match=r"batch_invariant: .* this GPU has 8\.6") as caught:
        opened(planned(""), HostDevice(compute_capability="8.6"), batch_invariant=True)
    assert "without batch_invariant" in str(caught.value.remedy)
    session = opened(planned(""), batch_invariant=True)
    with pytest.raises(CapacityError, match="at most 4 sequences can step together, asked for 5"):
        steps(session, filled(session), 5, 0)
    session = opened(planned("logits"), batch_invariant=True)
    cache = filled(session)
    for _ in range(2):
        with pytest.raises(EngineError, match="batch_invariant: the engine's own kernels are switched off"):
            steps(session, cache, 2, 0)


def test_the_plan_is_switched_off_on_request(planned: Callable[[str], Path]) -> None:
    memory = HostDevice()
    session = opened(planned(""), memory, decode_plan=False)
    cache = filled(session)
    steps(session, cache, 1, 0)
    assert not set(KERNELS) & set(memory.take_events())
    assert session.decode_plan_problem == "it was opened with decode_plan=False"
    assert not session.decodes_anywhere(1)


# One copy of the weights


@pytest.mark.parametrize("message", ["Failed to allocate memory for requested buffer", "initializer on another device"])
def test_where_onnx_runtime_does_not_take_the_weights_it_opens_without_the_plan(
    plain: Path, planned: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    message: str,
) -> None:  # fmt: skip
    memory, make, give_to = HostDevice(), onnxruntime.InferenceSession, DeviceWeights.give_to
    given: list[Any] = []

    def noted(weights: DeviceWeights, options: Any, device_name: str) -> None:
        give_to(weights, options, device_name)
        given.append(options)

    def refusing(path: str, options: Any, **keywords: Any) -> Any:
        if any(options is each for each in given):
            raise RuntimeError(message)
        return make(path, options, **keywords)

    monkeypatch.setattr(DeviceWeights, "give_to", noted)
    monkeypatch.setattr(onnxruntime, "InferenceSession", refusing)
    with caplog.at_level(logging.WARNING):
        session = opened(planned(""), memory)
    assert given
    assert message in caplog.text
    assert message in str(session.decode_plan_problem)
    reference = opened(plain)
    for found, wanted in zip(
        steps(session, filled(session), 1, 0), steps(reference, filled(reference), 1, 0), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=NEAR)
    session.close()
    gc.collect()
    assert memory.leaks() == []


# What does not fit, and what fails


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ({"compute_capability": "8.6"}, "is for compute capability 8.9, and this GPU has 8.6"),
        ({"compute_capability": "9.0"}, "is for compute capability 8.9, and this GPU has 9.0"),
        ({"driver_version": "11.8"}, "needs a driver of CUDA 12.0 or later, and this one is of 11.8"),
    ],
)
def test_a_gpu_or_driver_without_kernels_decodes_in_onnx_runtime(
    planned: Callable[[str], Path], caplog: pytest.LogCaptureFixture, device: dict[str, str], expected: str
) -> None:
    memory = HostDevice(**device)
    with caplog.at_level(logging.WARNING):
        session = opened(planned(""), memory)
    assert expected in caplog.text
    assert expected in str(session.decode_plan_problem)
    steps(session, filled(session), 1, 0)
    assert not set(KERNELS) & set(memory.take_events())


def test_code_of_another_gpu_than_the_plan_says_decodes_in_onnx_runtime(plain: Path, tmp_path: Path) -> None:
    folder = write_host_plan(Path(shutil.copytree(plain, tmp_path / "engine")), capability="9.0")
    memory = HostDevice()
    session = opened(folder, memory)
    assert session.decode_plan_problem == "the machine code is for another GPU"
    steps(session, filled(session), 1, 0)
    session.close()
    gc.collect()
    assert "module" not in memory.leaks()


def test_missing_code_is_an_error(plain: Path, tmp_path: Path) -> None:
    folder = write_host_plan(Path(shutil.copytree(plain, tmp_path / "engine")))
    (folder / CODE_NAME).unlink()
    with pytest.raises(EngineError, match=r"decode_plan_sm89\.bin: missing"):
        opened(folder)


def test_a_plan_of_another_decoder_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = write_host_plan(Path(shutil.copytree(plain, tmp_path / "engine")))
    write_plan(folder, read_plan(folder) | {"decoder": "0" * 64})
    with pytest.raises(EngineError, match=r"decode_plan.json.decoder is .*, expected the SHA-256") as caught:
        opened(folder)
    assert "--no-decode-plan" in str(caught.value.remedy)
    assert opened(folder, decode_plan=False).decode_kernels == "onnxruntime"


class Failing(HostDevice):
    """A device one of whose functions fails from some call on."""

    def __init__(self, name: str, error: BaseException) -> None:
        super().__init__()
        self.failing: tuple[str, BaseException] | None = None
        self._later = name, error

    def break_down(self) -> None:
        self.failing = self._later

    def _fail(self, name: str) -> None:
        if self.failing is not None and self.failing[0] == name:
            raise self.failing[1]

    def end_capture(self, stream: int) -> int:
        if not self.is_recording:
            raise EngineError("CUDA failed: illegal state", remedy="restart")
        graph = super().end_capture(stream)
        try:
            self._fail("end_capture")
        except BaseException:
            self.free_graph(graph)
            raise
        return graph

    def launch(self, graph: int, stream: int) -> None:
        self._fail("launch")
        super().launch(graph, stream)

    def launch_kernel(self, *args: Any, **keywords: Any) -> None:
        self._fail("launch_kernel")
        super().launch_kernel(*args, **keywords)


def test_without_memory_to_record_a_step_its_kernels_run_one_by_one(
    plain: Path, planned: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    memory = Failing("end_capture", CapacityError("the GPU is out of memory", remedy="--max-context"))
    session, expected = opened(planned(""), memory), opened(plain)
    memory.break_down()
    with caplog.at_level(logging.WARNING):
        found = steps(session, filled(session), 1, 0)
    assert "no memory for the recorded decode step of 1 sequences" in caplog.text
    for given, wanted in zip(found, steps(expected, filled(expected), 1, 0), strict=True):
        np.testing.assert_allclose(given, wanted, atol=NEAR)
    assert (session.decode_kernels, session.decode_recorded) == ("own", False)


def test_a_kernel_that_the_gpu_refuses_at_first_is_switched_off(planned: Callable[[str], Path]) -> None:
    memory = Failing("launch_kernel", EngineError("CUDA failed: invalid value", remedy="restart"))
    session = opened(planned(""), memory)
    cache = filled(session)
    memory.break_down()
    steps(session, cache, 1, 0)
    assert "CUDA failed: invalid value" in str(session.decode_plan_problem)


@pytest.mark.parametrize(
    "error", [CapacityError("the GPU is out of memory", remedy="--max-context"), KeyboardInterrupt()]
)
def test_a_comparison_that_breaks_off_leaves_the_rows_of_onnx_runtime(
    planned: Callable[[str], Path], error: BaseException
) -> None:
    memory = Failing("launch_kernel", error)
    whole, broken = opened(planned("")), opened(planned(""), memory)
    caches = filled(whole), filled(broken)
    steps(whole, caches[0], 1, 0, count=1)
    memory.break_down()
    with pytest.raises(type(error)):
        steps(broken, caches[1], 1, 0)
    for index in range(CONFIG.text.num_layers):
        for given, wanted in zip(caches[1].layer(index), caches[0].layer(index), strict=True):
            np.testing.assert_allclose(given[0, :, :5], wanted[0, :, :5], atol=NEAR)


def test_a_gpu_that_vanishes_is_an_error_and_no_other_answer(planned: Callable[[str], Path]) -> None:
    memory = Failing("launch", EngineError("CUDA failed: cudaErrorUnknown", remedy="restart the program"))
    session = opened(planned(""), memory)
    cache = filled(session)
    steps(session, cache, 1, 0)
    memory.break_down()
    with pytest.raises(EngineError, match="cudaErrorUnknown"):
        steps(session, cache, 1, 0)


class Gone(HostDevice):
    """A device that is not there any more from some launch on."""

    is_gone = False

    def launch(self, graph: int, stream: int) -> None:
        self.is_gone = True
        self.synchronize(stream)

    def synchronize(self, stream: int) -> None:
        if self.is_gone:
            self._streams[stream].queue.clear()  # it is lost
            raise EngineError("CUDA failed: cudaErrorDeviceUnavailable", remedy="restart the program")
        super().synchronize(stream)


def test_a_gpu_that_vanishes_while_a_step_is_compared_is_an_error_too(planned: Callable[[str], Path]) -> None:
    memory = Gone()
    session = opened(planned(""), memory)
    cache = filled(session)
    with pytest.raises(EngineError, match="cudaErrorDeviceUnavailable") as caught:
        steps(session, cache, 1, 0)
    assert "restart the program" in str(caught.value.remedy)
    assert session.decode_plan_problem is None, "it is not the plan's fault"


@pytest.mark.parametrize("name", ["batch_invariant", "weights_twice"])
def test_options_of_the_plan_are_refused_without_one(
    plain: Path, planned: Callable[[str], Path], demo_engine: Path, name: str
) -> None:
    for folder, more in ((plain, {}), (demo_engine, {}), (planned(""), {"decode_plan": False})):
        with pytest.raises(UsageError, match=f"{name}: it is of the decode plan"):
            Qwen3VLModel.from_engine(folder, **{name: True}, **more)
    with pytest.raises(UsageError, match=r"decode_plan=False: .* does not run on a GPU"):
        Qwen3VLModel.from_engine(demo_engine, decode_plan=False)


def test_answers_and_statistics(plain: Path, planned: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostDevice()

    def on_host(folder: Path, manifest: Manifest, options: SessionOptions) -> OrtCudaSession:
        return OrtCudaSession(folder, manifest, options, device=device_of(memory))

    monkeypatch.setattr(ort_cuda, "open_session", on_host)
    prompts = [user_message("Read the digits.", [PICTURES / f"held_out_{i}.png"]) for i in range(2)]
    with Qwen3VLModel.from_engine(plain) as model:
        expected = [model.generate(each, max_new_tokens=6).token_ids for each in prompts]
        assert model.statistics()["decode_plan_problem"] == "the engine has no decode plan"
    memory.take_events()
    with Qwen3VLModel.from_engine(planned(""), max_sequences=3) as model:
        model.warm_up()
        events = memory.take_events()
        assert events.count("begin_capture") == 3, "steps of 1, 2 and 4 sequences are compared and recorded"
        assert [each.token_ids for each in model.generate_batch(prompts, max_new_tokens=6)] == expected
        found = model.statistics()
    assert (found["decode_kernels"], found["decode_plan_problem"]) == ("own", None)
    events = memory.take_events()
    assert events.count("whole_step") >= 4
    assert "begin_capture" not in events


def test_nothing_is_left_behind(planned: Callable[[str], Path]) -> None:
    memory = HostDevice()
    session = opened(planned(""), memory)
    cache = filled(session)
    steps(session, cache, 2, 0)
    assert "module" in memory.leaks()
    del cache, session
    gc.collect()
    assert memory.leaks() == []
    memory = HostDevice(total_bytes=1_000_000)
    with pytest.raises(CapacityError, match="out of memory"):
        opened(planned(""), memory)
    gc.collect()
    assert memory.leaks() == []

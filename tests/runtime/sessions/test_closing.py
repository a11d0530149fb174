"""What a session of ONNX Runtime on CUDA frees, and in which order: when it is closed, dropped, or fails to open."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from helpers.host_cuda import HostDevice
from helpers.plan_session import filled, inputs_of, opened, steps
from runtime.device_weights import DeviceWeights
from runtime.errors import CapacityError, EngineError, UsageError


class Watching(HostDevice):
    """A device that notes what is still there when the weights, which ONNX Runtime reads in place, are freed.

    Attributes:
        decoders: ONNX Runtime's sessions that were given weights.
        too_early: What was there.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.decoders: list[weakref.ref[onnxruntime.InferenceSession]] = []
        self.weights: set[int] = set()
        self.too_early: list[str] = []

    def free(self, address: int) -> None:
        if address in self.weights:
            self.too_early += [each for each in self.leaks() if each in ("graph", "module")]
            self.too_early += ["decoder" for each in self.decoders if each() is not None]
        super().free(address)

    def free_stream(self, stream: int) -> None:
        self.too_early += [f"{each} after the stream" for each in self.leaks() if each != "stream"]
        super().free_stream(stream)


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> Watching:
    memory = Watching()
    watch(memory, monkeypatch)
    return memory


def watch(memory: Watching, patch: pytest.MonkeyPatch) -> None:
    make, give_to = onnxruntime.InferenceSession, DeviceWeights.give_to
    with_weights: list[Any] = []

    def noted(path: str, *args: Any, **keywords: Any) -> Any:
        session = make(path, *args, **keywords)
        if any(options is each for options in args for each in with_weights):
            memory.decoders.append(weakref.ref(session))
        return session

    def given(weights: DeviceWeights, options: Any, device_name: str) -> None:
        memory.weights |= set(weights.addresses.values())
        with_weights.append(options)
        give_to(weights, options, device_name)

    patch.setattr(onnxruntime, "InferenceSession", noted)
    patch.setattr(DeviceWeights, "give_to", given)


@pytest.mark.parametrize("is_closed", [False, True])
@pytest.mark.parametrize("batches", [[], [1], [1, 2, 5]])
def test_what_was_recorded_goes_before_the_decoder_and_that_before_its_weights(
    planned: Callable[[str], Path], watching: Watching, is_closed: bool, batches: list[int]
) -> None:
    session = opened(planned(""), watching)
    cache = filled(session)
    for batch in batches:
        steps(session, cache, batch, 0)
    del cache
    gc.collect()
    assert len(watching.decoders) == 1
    if is_closed:
        session.close()
        assert watching.leaks() == []
    del session
    gc.collect()
    assert (watching.leaks(), watching.too_early) == ([], [])
    assert not any(each() for each in watching.decoders)


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_cache_that_somebody_holds_keeps_its_rows_alone(
    planned: Callable[[str], Path], watching: Watching, is_closed: bool
) -> None:
    session = opened(planned(""), watching)
    cache, other = filled(session), filled(session)
    for batch in (1, 5):
        steps(session, cache, batch, 0)
    if is_closed:
        session.close()
        for ids in ([[5, 6]], [[5]]):  # ONNX Runtime's, and a step of own kernels
            with pytest.raises(UsageError, match="the engine was closed"):
                session.decode(inputs_of(ids, [4]), cache)
        with pytest.raises(UsageError, match="the engine was closed"):
            session.rehearse_decode(cache, [4])
    del session
    gc.collect()
    assert [each for each in watching.too_early if "stream" not in each] == []
    assert set(watching.leaks()) == {"device", "pinned"}
    assert not any(each() for each in watching.decoders)
    del cache, other
    gc.collect()
    assert watching.leaks() == []


@pytest.mark.parametrize("is_planned", [False, True])
def test_whatever_fails_while_an_engine_is_opened_leaves_nothing(
    planned: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, is_planned: bool
) -> None:
    class Failing(Watching):
        """Its n-th call that takes something fails."""

        calls_left = 0

        def _count(self) -> None:
            self.calls_left -= 1
            if self.calls_left == 0:
                raise self.make_error()

        make_error: Callable[[], BaseException]

        def alloc(self, num_bytes: int) -> int:
            self._count()
            return super().alloc(num_bytes)

        def pinned(self, num_bytes: int) -> Any:
            self._count()
            return super().pinned(num_bytes)

        def load_module(self, code: bytes) -> int:
            self._count()
            return super().load_module(code)

    def out_of_memory() -> CapacityError:
        return CapacityError("out of memory", remedy="less")

    num_without_plan = 0
    for calls in itertools.count(1, 3 if is_planned else 1):
        memory = Failing()
        memory.make_error = out_of_memory if calls % 2 else KeyboardInterrupt
        memory.calls_left = calls
        with monkeypatch.context() as patch:
            watch(memory, patch)
            try:
                session = opened(planned(""), memory, decode_plan=is_planned)
            except (CapacityError, KeyboardInterrupt):
                pass
            else:
                if memory.calls_left > 0:
                    break
                num_without_plan += session.decode_kernels == "onnxruntime"
                session.close()
            gc.collect()
            assert (memory.leaks(), memory.too_early) == ([], []), f"in call {calls}"
    assert calls > (30 if is_planned else 1), "it was tried"
    assert (num_without_plan > 0) == is_planned


@pytest.mark.parametrize("name", ["vision.onnx", "decoder.onnx"])
def test_a_graph_that_does_not_open_leaves_nothing(
    planned: Callable[[str], Path], watching: Watching, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make = onnxruntime.InferenceSession

    def refuse(path: str, *args: Any, **keywords: Any) -> Any:
        if Path(path).name == name:
            raise RuntimeError("No such operator")
        return make(path, *args, **keywords)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(EngineError, match="No such operator"):
        opened(planned(""), watching)
    gc.collect()
    assert (watching.leaks(), watching.too_early) == ([], [])

"""The tuner on real sessions: what it asks an engine, sabotaged engines, and the session of CUDA on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.build_options import BuildOptions
from engines.bundle import Bundle
from helpers.engines import build
from helpers.host_cuda import HostDevice
from helpers.host_device import CPU
from helpers.host_engine import build_host_engine
from helpers.host_graphs import HostGraphs
from qwen3vl_export.parity.limits import limits_of
from qwen3vl_export.parity.verify import PLAIN_GREEDY
from qwen3vl_export.tune.answers import Answer, deviation
from qwen3vl_export.tune.openings import Openings
from qwen3vl_export.tune.rig import SEQUENCES, Rig, token_s
from qwen3vl_export.tune.search import Search
from qwen3vl_export.tune.settings import (
    Effect,
    Facts,
    Metric,
    Setting,
    chunk_candidates,
    physical_cores,
    settings_of,
    thread_candidates,
)
from runtime.contract import DecoderInputs, FloatArray
from runtime.errors import CapacityError, EngineError
from runtime.manifest import Manifest
from runtime.session import KVCache, SessionOptions
from runtime.sessions import ort_cpu, ort_cuda, tensorrt
from runtime.tuning import Tuning

BUDGET_S = 10
close = Openings.close
FACTS = Facts(8, 4, 512, 1100, None, True, 0.1)


@pytest.fixture(scope="module")
def rig(demo_engine: Path) -> Iterator[Rig]:
    rig = Rig(demo_engine, BUDGET_S)
    yield rig
    rig.close()


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> list[SessionOptions]:
    """Let engines that are opened with two threads give wrong logits; and note how engines are opened."""
    opened: list[SessionOptions] = []
    open_session = ort_cpu.open_session

    class Wrong(ort_cpu.OrtCpuSession):
        def decode(self, inputs: DecoderInputs, cache: KVCache, slot: int = 0) -> FloatArray:
            return np.roll(super().decode(inputs, cache, slot), 1, axis=-1)

    def open_changed(folder: Path, manifest: Manifest, options: SessionOptions) -> ort_cpu.OrtCpuSession:
        opened.append(options)
        return (Wrong if options.threads == 2 else open_session)(folder, manifest, options)

    monkeypatch.setattr(ort_cpu, "open_session", open_changed)
    return opened


def test_the_reference_answer_is_that_of_the_model(rig: Rig, demo_engine: Path) -> None:
    from runtime.model import Qwen3VLModel

    answer = rig.answer(Tuning())
    model = Qwen3VLModel.from_engine(demo_engine)
    prompt = rig.workload.long.prompt
    images = len(rig.workload.images)
    assert images == 4 and answer.logits.shape == (len(answer.tokens), model.config.text.vocab_size)
    from qwen3vl_export.bench.measure import messages
    from qwen3vl_export.bench.points import Point

    asked = messages(Point(rig.sizes.long_tokens, 2, 1, (256, 256), images), 0)
    assert model.prepare(asked).prompt.input_ids == prompt.input_ids
    found = model.generate(asked, max_new_tokens=len(answer.tokens), **PLAIN_GREEDY)
    assert tuple(found.token_ids) == answer.tokens


@pytest.mark.parametrize(
    "tuning",
    [
        Tuning(threads=2),
        Tuning(prefill_chunk=64),
        Tuning(vision_patches=1),
        Tuning(draft_cost=0.1),
        Tuning(prefill_chunk=48, vision_patches=300, draft_cost=0.3),
    ],
    ids=str,
)
def test_settings_answer_as_the_defaults_do(tuning: Tuning, rig: Rig) -> None:
    _, limits = limits_of(rig.manifest)
    expected = rig.answer(Tuning())
    far = deviation(rig.answer(tuning, expected.tokens), expected, limits)
    assert far.refusal(Effect.ROUNDING, limits) == "" and far.logits_scaled < 1e-4 and far.total == len(expected.tokens)


def test_chunks_and_images_of_a_call_are_those_of_the_setting(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, vision = ort_cpu.OrtCpuSession.prefill, ort_cpu.OrtCpuSession.vision
    chunks: list[int] = []
    segments: list[int] = []

    def note_prefill(session: Any, inputs: DecoderInputs, *rest: Any) -> FloatArray:
        chunks.append(inputs.input_ids.shape[1])
        return prefill(session, inputs, *rest)

    def note_vision(session: Any, inputs: Any) -> FloatArray:
        segments.append(len(inputs.pixel_values))
        return vision(session, inputs)

    monkeypatch.setattr(ort_cpu.OrtCpuSession, "prefill", note_prefill)
    monkeypatch.setattr(ort_cpu.OrtCpuSession, "vision", note_vision)
    rig.answer(Tuning(prefill_chunk=100, vision_patches=2 * len(rig.workload.images[0].patches)))
    total = len(rig.workload.long.prompt.input_ids)
    assert chunks == [100] * (total // 100) + [total % 100] * (total % 100 > 0) and segments == [2, 2]


def test_every_time_is_measured_with_the_clock_it_is_given(demo_engine: Path) -> None:
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            self.now += 0.5
            return self.now

    rig = Rig(demo_engine, 60, clock=Clock())
    try:
        for metric in Metric:
            taken = rig.time(Tuning(), metric)
            assert taken == 0.5 if metric is not Metric.DRAFTS else 0 < taken < 0.5, metric
        # Each of these calls takes as long as one of a single position.
        assert rig.facts().draft_cost == 0.01 and rig.facts().long_tokens == len(rig.workload.long.prompt.input_ids)
    finally:
        rig.close()


def test_whole_requests_go_through_the_model_as_it_is_opened(rig: Rig) -> None:
    times = rig.request(Tuning(prefill_chunk=64), 1)
    assert set(times) == {"ttft_s", "image_s", "prefill_s", "tpot_s"} and min(times.values()) > 0
    assert times["ttft_s"] >= times["image_s"] + times["prefill_s"]


def test_at_most_two_openings_are_held(demo_engine: Path, changed: list[SessionOptions]) -> None:
    rig = Rig(demo_engine, BUDGET_S, {"max_context": 1024})
    try:
        assert rig.holds_two
        for threads in (None, 1, None, 1):
            rig.time(Tuning(threads=threads), Metric.STEP)
        assert [each.threads for each in changed] == [None, 1]
        for threads in (3, None, 1):
            rig.time(Tuning(threads=threads), Metric.STEP)
        assert [each.threads for each in changed] == [None, 1, 3, None, 1]
    finally:
        rig.close()


def test_a_context_without_room_is_an_error(demo_engine: Path) -> None:
    with pytest.raises(CapacityError, match="has no room for the prompts that are timed"):
        Rig(demo_engine, BUDGET_S, {"max_context": 128})


def test_pages_that_the_kernel_does_not_give_are_no_candidate(
    demo_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_cpu, "use_huge_pages", lambda before: 0)
    rig = Rig(demo_engine, BUDGET_S)
    with pytest.raises(EngineError, match="the kernel gives no huge pages"):
        rig.time(Tuning(huge_pages=True), Metric.STEP)
    rig.close()


class Faster:
    """A rig whose every candidate takes half the time, and answers as its engine does."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    def time(self, tuning: Tuning, metric: Metric) -> float:
        return 1.0 if tuning == Tuning() else 0.5

    def request(self, tuning: Tuning, index: int) -> dict[str, float]:
        return {"ttft_s": self.time(tuning, Metric.STEP)}

    def answer(self, tuning: Tuning, tokens: Sequence[int] = ()) -> Answer:
        return self._rig.answer(tuning, tokens)


def test_an_engine_that_answers_wrongly_with_a_candidate_is_not_opened_with_it(
    demo_engine: Path, changed: list[SessionOptions]
) -> None:
    rig = Rig(demo_engine, BUDGET_S)
    _, limits = limits_of(rig.manifest)
    threads = Setting("threads", 1, (2, 3), (Metric.STEP,), Effect.ROUNDING)
    outcome = Search(Faster(rig), limits, lambda: 0.0, 1.0).run([threads])
    rig.close()
    wrong, right = outcome.choices[0].trials
    assert wrong.verdict.startswith("refused: ") and "tokens differ" in wrong.verdict
    assert right.verdict == "chosen" and outcome.tuning == Tuning(threads=3)
    assert {each.threads for each in changed} == {None, 2, 3}


# Candidates


def test_candidates_are_those_that_may_tell_something() -> None:
    assert chunk_candidates(FACTS) == (256, 1024, 2048)
    assert chunk_candidates(dataclasses.replace(FACTS, long_tokens=300)) == (256,)
    assert chunk_candidates(dataclasses.replace(FACTS, prefill_chunk=2048, long_tokens=4000)) == (256, 512, 1024)
    assert thread_candidates(FACTS, 8) == (7, 4)
    assert thread_candidates(dataclasses.replace(FACTS, cores=2, physical_cores=2), 2) == (1,)
    assert thread_candidates(dataclasses.replace(FACTS, cores=1, physical_cores=1), 1) == ()
    assert thread_candidates(FACTS, 4) == (8, 7)


def test_logical_cores_of_one_physical_core_count_once(tmp_path: Path) -> None:
    for core in range(4):
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{core % 2},{core % 2 + 2}\n")
    assert physical_cores([0, 1, 2, 3], tmp_path) == 2
    assert physical_cores([0, 2], tmp_path) == 1
    assert physical_cores([0, 1, 2, 3], tmp_path / "none") == 4


def test_what_computes_something_else_is_tried_on_request_alone(tiny_engine: Path) -> None:
    manifest = Manifest.read(tiny_engine)
    two = dataclasses.replace(manifest, capabilities={**manifest.capabilities, "prefill_min_tokens": 2})

    def names(manifest: Manifest, *, allow_approximate: bool) -> set[str]:
        return {each.name for each in settings_of(manifest, FACTS, allow_approximate=allow_approximate)}

    assert "separate_prefill" not in names(two, allow_approximate=False)
    assert "separate_prefill" not in names(manifest, allow_approximate=True)
    assert names(two, allow_approximate=True) - names(two, allow_approximate=False) == {"separate_prefill"}


def test_threads_that_the_user_asks_for_are_not_tried(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.read(tiny_engine)
    for value, is_tried in (("2", False), ("", True)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        found = {each.name for each in settings_of(manifest, FACTS, allow_approximate=False)}
        assert ("threads" in found) == is_tried


def test_the_cost_that_was_measured_drafts_best() -> None:
    cheap = {1: 1.0, 2: 1.02, 3: 1.04, 5: 1.08, 9: 1.16}
    dear = {1: 1.0, 2: 1.5, 3: 2.0, 5: 3.0, 9: 5.0}
    for call_s, own, other in ((cheap, 0.02, 0.5), (dear, 0.5, 0.02)):
        assert token_s(call_s, own, 0.9) < token_s(call_s, other, 0.9)
    assert token_s(dear, 0.5, 0.3) == 1.0


# CUDA, on the host


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> list[tuple[SessionOptions, Any]]:
    """Open engines of ort-cuda on the host, whose provider records graphs; note how."""
    opened: list[tuple[SessionOptions, Any]] = []

    def check(folder: Path, manifest: Manifest, options: SessionOptions) -> ort_cuda.OrtCudaSession:
        device = dataclasses.replace(CPU, memory=HostDevice, decoder_options={"enable_cuda_graph": "1"})
        device = device if options.cuda_graphs else dataclasses.replace(device, decoder_options={})
        session = ort_cuda.OrtCudaSession(folder, manifest, options, device=device)
        opened.append((options, session))
        return session

    monkeypatch.setattr(ort_cuda, "open_session", check)
    return opened


def test_an_engine_of_a_gpu_is_measured_on_the_host(
    demo_bundle: Bundle, tmp_path: Path, on_host: list[tuple[SessionOptions, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = HostGraphs(monkeypatch)
    rig = Rig(build(demo_bundle, "ort-cuda-fp16", tmp_path / "engine"), BUDGET_S)
    _, limits = limits_of(rig.manifest)
    settings = settings_of(rig.manifest, rig.facts(), allow_approximate=False)
    names = [each.name for each in settings]
    assert names[:3] == ["cuda_graphs", "every_batch", "sdpa_kernel"] and "huge_pages" not in names
    for metric in Metric:
        assert rig.time(Tuning(), metric) > 0
    expected = rig.answer(Tuning())
    for setting in settings[:3]:
        tuning = setting.of(Tuning(), setting.candidates[0])
        far = deviation(rig.answer(tuning, expected.tokens), expected, limits)
        assert far.refusal(setting.effect, limits) == "", setting.name
    graphs.take_runs()
    recorded = {}
    for value in (None, True):
        rig.time(Tuning(every_batch=value), Metric.STEPS)
        recorded[value] = set(graphs.take_runs()) - {None}
    assert recorded == {None: {4}, True: {SEQUENCES}}
    rig.time(Tuning(cuda_graphs=False), Metric.STEPS)
    assert set(graphs.take_runs()) <= {None, SEQUENCES} and not on_host[-1][0].cuda_graphs
    rig.close()


def test_an_engine_that_cannot_be_measured_is_closed(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(Openings, "close", lambda self: closed.append(self) or close(self))
    with pytest.raises(CapacityError, match="no room for the prompts"):
        Rig(demo_engine, BUDGET_S, {"max_context": 100})
    assert len(closed) == 1


def test_an_engine_of_tensorrt_is_measured_on_the_host(
    demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BuildOptions(max_context=1024, max_batch=2, prefill_chunk=64, patch_buckets=(256, 1024))
    folder = build_host_engine(demo_bundle, tmp_path / "engine", options)
    monkeypatch.setattr(tensorrt, "CudaDevice", HostDevice)
    rig = Rig(folder, BUDGET_S)
    settings = settings_of(rig.manifest, rig.facts(), allow_approximate=True)
    assert [each.name for each in settings] == ["cuda_graphs", "draft_cost"]
    for metric in settings[0].metrics:
        assert rig.time(Tuning(cuda_graphs=False), metric) > 0
    _, limits = limits_of(rig.manifest)
    expected = rig.answer(Tuning())
    for tuning in (Tuning(cuda_graphs=False), Tuning(draft_cost=0.1)):
        assert deviation(rig.answer(tuning, expected.tokens), expected, limits).refusal(Effect.ROUNDING, limits) == ""
    assert rig.request(Tuning(cuda_graphs=False), 0)["tpot_s"] > 0
    rig.close()


def test_the_provider_is_given_its_attention_kernel(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[Any] = []
    monkeypatch.setattr(ort_cuda, "OrtCudaSession", lambda *_, device: devices.append(device))
    monkeypatch.setattr(ort_cuda, "check_paths", lambda *_: None)
    manifest = Manifest.read(tiny_engine)
    for kernel in (None, "1"):
        ort_cuda.open_session(tiny_engine, manifest, SessionOptions(sdpa_kernel=kernel))
    plain, chosen = devices
    assert "sdpa_kernel" not in plain.options and chosen.options == {**plain.options, "sdpa_kernel": "1"}
    assert chosen.decoder_options == plain.decoder_options

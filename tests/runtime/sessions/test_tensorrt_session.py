"""The TensorRT session end to end, on the host implementations of CUDA and TensorRT that check it."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime.sessions.tensorrt as tensorrt_session
from engines.build_options import BuildOptions
from engines.bundle import Bundle
from helpers import PICTURES, host_tensorrt
from helpers.garbage import set_aside
from helpers.host_cuda import HostDevice
from helpers.host_engine import build_host_engine, with_capabilities
from runtime.contract import DecoderInputs, join_embeds, no_visual_embeds, on_host
from runtime.device_arrays import DeviceEmbeds
from runtime.errors import CapacityError, EngineError, UsageError
from runtime.generation import decode_steps, prefill
from runtime.generation_config import GenerationOptions
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel
from runtime.sampling import Sampler

CAPACITY, MAX_BATCH, CHUNK, BUCKETS = 640, 4, 16, (64, 256)
NOISE = np.random.default_rng(0).integers(0, 256, (192, 160, 3), np.uint8)


def user(text: str, *images: Any) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


PICTURE = str(PICTURES / "held_out_0.png")
MESSAGES = {
    "picture": user("Read the digits.", PICTURE),
    "text": user("Say the digits from one to nine, one after the other, in words and not in figures."),
    "two sizes": user("Read the digits.", PICTURE, NOISE),
}
READ = MESSAGES["picture"]


@pytest.fixture(scope="module")
def folder(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = BuildOptions(max_context=CAPACITY, max_batch=MAX_BATCH, prefill_chunk=CHUNK, patch_buckets=BUCKETS)
    engine = build_host_engine(demo_bundle, tmp_path_factory.mktemp("host") / "engine", options)
    set_aside()  # each test here searches for garbage
    return engine


@pytest.fixture(scope="module")
def reference(demo_engine: Path) -> Qwen3VLModel:
    return Qwen3VLModel.from_engine(demo_engine, threads=2)


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def model(folder: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[Qwen3VLModel]:
    monkeypatch.setattr(tensorrt_session, "CudaDevice", lambda: device)
    # What ran before must not shorten a prompt whose calls are counted.
    model = Qwen3VLModel.from_engine(folder, prefix_cache=False, vision_cache_bytes=0)
    yield weakref.proxy(model)  # pytest would hold it, and with it the cache
    model.close()
    model.session.close()
    del model
    gc.collect()  # the model, then what its end let go
    gc.collect()
    assert device.leaks() == []


def steps_of(device: HostDevice) -> list[str]:
    """What happened since the last question, but copies and what they wait for."""
    return [event for event in device.take_events() if event.startswith(("run", "begin", "launch"))]


@pytest.mark.parametrize("messages", MESSAGES.values(), ids=MESSAGES)
def test_answers_are_those_of_the_float32_engine(
    model: Qwen3VLModel, reference: Qwen3VLModel, messages: Any, device: HostDevice
) -> None:
    expected, found = (each.generate(messages, max_new_tokens=24) for each in (reference, model))
    assert found.token_ids == expected.token_ids
    chunks = [event for event in device.events if event.startswith("run 1 1x")]
    assert len(chunks) > 1, "the prompt is longer than a chunk"


@pytest.mark.parametrize("messages", MESSAGES.values(), ids=MESSAGES)
def test_logits_are_those_of_the_float32_engine(model: Qwen3VLModel, reference: Qwen3VLModel, messages: Any) -> None:
    expected, found = reference.logits(messages), model.logits(messages)
    assert found.shape == expected.shape
    norms = np.linalg.norm(expected, axis=-1) * np.linalg.norm(found, axis=-1)
    assert ((expected * found).sum(-1) / norms).min() >= 0.9995


def test_an_image_runs_in_the_profile_of_its_size(model: Qwen3VLModel, device: HostDevice) -> None:
    model.encode_images(model.prepare(MESSAGES["two sizes"]).images)
    runs = steps_of(device)
    patches = [int(run.split("x")[1]) for run in runs]
    assert [run.split()[1] for run in runs] == ["0", "1"]
    assert patches[0] <= BUCKETS[0] < patches[1] <= BUCKETS[1]


def test_embeddings_of_images_stay_on_the_device(model: Qwen3VLModel, device: HostDevice) -> None:
    prepared = model.prepare(MESSAGES["two sizes"])
    device.take_events()
    parts = [model.session.vision(model.preparation.vision_inputs(image)) for image in prepared.images]
    assert "to_host" not in device.take_events()
    embeds = join_embeds(parts)
    assert isinstance(embeds, DeviceEmbeds) and embeds.shape[1] == prepared.num_visual_tokens
    logits = []
    for each in (embeds, on_host(embeds)):
        inputs = prepared.decoder_inputs(each)
        cache = model.session.new_cache(inputs.num_cache_rows)
        device.take_events()
        logits.append(prefill(model.session, cache, inputs, chunk=CHUNK))
        moves = device.take_events().count("copy_pieces")
        assert (moves > 0) == isinstance(each, DeviceEmbeds), "a chunk of both images joins them"
    assert np.array_equal(*logits)


def test_the_second_step_of_a_cache_is_recorded_and_all_later_ones_launched(
    model: Qwen3VLModel, device: HostDevice
) -> None:
    step, recorded = ["run 0 1x1"], ["begin_capture", "launch", "run 0 1x1"]
    launched = ["launch", "run 0 1x1"]
    num_steps = len(model.generate(READ).token_ids) - 1
    assert num_steps == 4
    events = steps_of(device)
    assert events[-8:] == step + recorded + launched + launched
    # The next answer runs in the same cache.
    model.generate(READ)
    assert steps_of(device)[-8:] == 4 * launched


def test_nothing_is_replayed_across_caches(model: Qwen3VLModel, device: HostDevice) -> None:
    steps = [[[40]], [[50]]]
    caches = [calls_of(model, [[16, 17, 18]], steps) for _ in range(2)]
    for calls in caches:
        for each in calls:
            each()
    # The shape is set up by the first step of the first cache, so that of the second is recorded.
    events = [event for event in steps_of(device) if event != "run 0 1x1"]
    assert events == ["run 1 1x3", "begin_capture", "launch", "run 1 1x3", "begin_capture", "launch", "launch"]
    assert device.leaks().count("graph") == 2
    del caches, calls, each
    gc.collect()
    assert "graph" not in device.leaks(), "a graph goes with its cache"


def test_a_recorded_step_outlives_drafts_that_run_in_another_profile(
    model: Qwen3VLModel, reference: Qwen3VLModel, device: HostDevice
) -> None:
    expected, found = (tokens_with_drafts(each) for each in (reference, model))
    assert found == expected
    events = steps_of(device)
    assert events.count("begin_capture") == 1
    behind = events[events.index("begin_capture") :]
    assert "launch" in behind[behind.index("run 1 1x3") :], "no step was launched behind a draft"


def tokens_with_drafts(model: Qwen3VLModel) -> list[int]:
    """Return 16 tokens after the picture, the end of the answer passed over; every fourth call has two drafts."""

    class Wrong:
        num_calls = 0

        def append(self, token_id: int) -> None:
            pass

        def draft(self, room: int) -> list[int]:
            self.num_calls += 1
            return [] if self.num_calls % 4 else [20, 21]

    prepared = model.prepare(READ)
    ids, embeds = prepared.prompt.input_ids, model.encode_images(prepared.images)
    cache = model.session.new_cache(len(ids) + 20)
    logits = prefill(model.session, cache, prepared.decoder_inputs(embeds), chunk=CHUNK)[-1]
    sampler = Sampler(GenerationOptions())
    top = sampler.can_use_top(model.manifest.capabilities.get("top_k", 0))
    delta = prepared.positions.delta
    steps = decode_steps(model.session, cache, logits, len(ids), delta, embeds[:, :1], sampler.next, Wrong(), top)
    return list(islice(steps, 16))


def test_past_and_present_share_an_address_and_nothing_else_does(
    model: Qwen3VLModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: list[dict[str, int]] = []
    execute = host_tensorrt.IExecutionContext.execute_async_v3

    def recording(context: Any, stream: int) -> bool:
        tables.append(dict(context._addresses))
        return execute(context, stream)

    monkeypatch.setattr(host_tensorrt.IExecutionContext, "execute_async_v3", recording)
    model.generate(READ)
    decoder = [table for table in tables if "input_ids" in table]
    layers = model.config.text.num_layers
    caches = {}
    for table in decoder:
        pasts = {name: address for name, address in table.items() if name.startswith("past_key_values.")}
        assert len(pasts) == 2 * layers
        assert {name.replace("past_", "present_"): address for name, address in pasts.items()}.items() <= table.items()
        assert len(set(table.values())) == len(table) - len(pasts)
        caches[tuple(pasts.values())] = True
    assert len(caches) == 1, "a cache never moves"
    prefill, step = decoder[0], decoder[-1]
    assert prefill["logits"] != step["logits"], "a growing prompt must not move what a step is recorded with"


def test_the_cache_holds_what_the_float32_engine_caches(model: Qwen3VLModel, reference: Qwen3VLModel) -> None:
    def keys_and_values(each: Qwen3VLModel) -> tuple[list[np.ndarray], Any]:
        prepared = each.prepare(READ)
        ids = prepared.prompt.input_ids
        cache = each.session.new_cache(len(ids))
        prefill(each.session, cache, prepared.decoder_inputs(each.encode_images(prepared.images)), chunk=CHUNK)
        layers = [cache.layer(i) for i in range(each.config.text.num_layers)]
        return [array[:, :, : len(ids)] for pair in layers for array in pair], cache

    expected, _ = keys_and_values(reference)
    found, cache = keys_and_values(model)
    assert cache.capacity == CAPACITY
    for left, right in zip(expected, found, strict=True):
        assert right.dtype == np.float32
        assert np.linalg.norm(left - right) <= 0.01 * np.linalg.norm(left)
    assert not cache.layer(0)[0][:, :, len(model.prepare(READ).prompt.input_ids) :].any(), "zeros after the prompt"
    assert cache.num_bytes == 2 * sum(array[:, :, :1].size * CAPACITY for array in found)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5, "temperature": 1.5, "top_p": 0.9, "seed": 3}])
def test_tokens_are_the_same_with_and_without_the_whole_row(
    model: Qwen3VLModel, device: HostDevice, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    counts = []
    for is_whole in (False, True):
        device.take_events()
        monkeypatch.setattr(Sampler, "can_use_top", (lambda *_: False) if is_whole else Sampler.can_use_top)
        counts.append((model.generate(READ, max_new_tokens=12, **options), device.take_events().count("to_host")))
    (found, few), (expected, many) = counts
    assert found.token_ids == expected.token_ids
    assert many - few == len(found.token_ids) - 1, "every step of the second copies its row"


@pytest.mark.parametrize("batch", range(1, MAX_BATCH + 1))
def test_a_batch_gives_each_sequence_its_own_logits(model: Qwen3VLModel, device: HostDevice, batch: int) -> None:
    prompts = [[16, 17, 18], [20], [21, 22, 23, 24, 25, 26, 27], [30, 31]][:batch]
    new = [[40 + b, 50 + b, 60 + b] for b in range(batch)]
    together = run_batch(model, prompts, new)
    assert steps_of(device).count("begin_capture") == 1
    for b in range(batch):
        alone = run_batch(model, prompts[b : b + 1], new[b : b + 1])
        assert np.abs(alone[0] - together[b]).max() <= 0.02 * np.abs(alone[0]).max()
        assert np.array_equal(alone[0].argmax(-1), together[b].argmax(-1))


def run_batch(model: Qwen3VLModel, prompts: list[list[int]], new: list[list[int]]) -> np.ndarray:
    """Logits [B, 1 + steps, vocab] of a right-padded prefill and steps of the whole batch."""
    steps = [[tokens[i : i + 1] for tokens in new] for i in range(len(new[0]))]
    return np.concatenate([call() for call in calls_of(model, prompts, steps)], axis=1)


def test_the_largest_logits_are_those_of_the_row_and_of_this_call_alone(model: Qwen3VLModel) -> None:
    cache = model.session.new_cache(8)
    embeds = no_visual_embeds(model.config)

    def top(ids: list[int], past: int) -> Any:
        return model.session.decode_top(DecoderInputs.text(np.array([ids]), np.array([past]), embeds), cache)[0]

    last, last_ids = None, None
    for past, ids in ((0, [16, 17, 18]), (3, [19]), (4, [20]), (5, [21])):
        rows = top(ids, past)
        assert len(rows) == len(ids)
        for row in rows:
            whole = row.fetch()
            assert row.vocab_size == len(whole) == model.config.text.vocab_size
            assert np.array_equal(row.values, np.sort(whole)[::-1][: len(row.values)])
            assert np.array_equal(whole[row.ids], row.values)
        if last is not None:
            with pytest.raises(AssertionError, match="an earlier call"):
                last.fetch()
            assert np.array_equal(last.ids, last_ids), "the next call has overwritten what this one returned"
        last, last_ids = rows[0], rows[0].ids.copy()


def test_a_missing_wait_shows(model: Qwen3VLModel, device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = model.session.new_cache(8)
    step = DecoderInputs.text(np.array([[16]]), np.array([0]), no_visual_embeds(model.config))
    right = model.session.decode_top(step, cache)[0][0]
    with monkeypatch.context() as patch:
        patch.setattr(device, "synchronize", lambda stream: None)
        stale = model.session.decode_top(step, cache)[0][0]
    assert len(set(stale.ids.tolist())) == 1
    assert not np.array_equal(stale.ids, right.ids)
    device.synchronize(model.session._stream)


def test_a_refused_run_is_an_error_with_the_librarys_words(
    model: Qwen3VLModel, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = host_tensorrt.IExecutionContext.execute_async_v3

    def refuse_while_recording(context: Any, stream: int) -> bool:
        return context._refuse("kernel not found") if device.is_recording else execute(context, stream)

    with monkeypatch.context() as patch:
        patch.setattr(host_tensorrt.IExecutionContext, "execute_async_v3", refuse_while_recording)
        expected = r"(?s)decoder\.plan: the run in profile decode failed \(kernel not found\).*cuda_graphs=False"
        with pytest.raises(EngineError, match=expected):
            model.generate(READ)
    assert not device.is_recording
    assert model.generate(READ).text == "1654"


@pytest.mark.parametrize("name", ["begin_capture", "enqueue", "end_capture"])
def test_an_interrupt_while_a_step_is_recorded_ends_the_recording(
    model: Qwen3VLModel, device: HostDevice, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Programs that call a session themselves do so in the thread that Ctrl-C interrupts."""
    call = getattr(HostDevice, name)

    def interrupted(host: HostDevice, *args: Any) -> Any:
        """Stop once: after the call, or before it if it is the one that ends the recording."""
        if not (host.is_recording or name == "begin_capture"):
            return call(host, *args)
        patch.undo()
        if name != "end_capture":
            call(host, *args)
        raise KeyboardInterrupt

    steps = [[[40]], [[50]], [[60]]]
    expected = [each() for each in calls_of(model, [[16, 17, 18]], steps)]
    gc.collect()
    calls = calls_of(model, [[16, 17, 18]], steps)
    calls[0]()
    with monkeypatch.context() as patch:
        patch.setattr(HostDevice, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            calls[1]()
    assert not device.is_recording
    assert "graph" not in device.leaks()
    device.synchronize(model.session._stream)
    for each, logits in zip(calls[1:], expected[1:], strict=True):
        assert np.array_equal(each(), logits)


def test_a_step_that_cannot_be_recorded_is_said_once_and_runs(
    model: Qwen3VLModel, device: HostDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert model.session.decode_recorded is None
    monkeypatch.setattr(host_tensorrt.IExecutionContext, "is_stream_capturable", lambda context, stream: False)
    assert [model.generate(READ).text for _ in range(2)] == ["1654"] * 2
    assert "begin_capture" not in device.events
    assert model.session.decode_recorded is False
    assert [record.levelname for record in caplog.records if "CUDA graph" in record.message] == ["WARNING"]


def test_a_recorded_step_is_reported(model: Qwen3VLModel, caplog: pytest.LogCaptureFixture) -> None:
    model.generate(READ)
    assert model.session.decode_recorded is True
    assert not caplog.records


def test_steps_run_without_cuda_graphs_on_request(
    folder: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tensorrt_session, "CudaDevice", lambda: device)
    model = Qwen3VLModel.from_engine(folder, cuda_graphs=False)
    assert model.generate(READ).text == "1654"
    assert "begin_capture" not in device.events
    assert model.session.decode_recorded is False
    assert not caplog.records
    model.session.close()


def test_an_engine_that_streams_its_weights_answers(
    folder: Path, tmp_path: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(folder, tmp_path / "engine")
    with_capabilities(Manifest.read(folder), weight_streaming=True).write(copy)
    monkeypatch.setattr(tensorrt_session, "CudaDevice", lambda: device)
    model = Qwen3VLModel.from_engine(copy)
    assert model.generate(READ).text == "1654"
    model.session.close()


def test_recorded_steps_of_two_batches_take_turns(model: Qwen3VLModel, device: HostDevice) -> None:
    """A graph holds only while its context keeps its shapes, so each batch has its own."""
    prompts = {1: [[16, 17, 18]], 2: [[20, 21], [30, 31, 32]]}
    steps = {batch: [[[40 + 10 * i + b] for b in range(batch)] for i in range(4)] for batch in prompts}
    expected = {batch: [each() for each in calls_of(model, prompts[batch], steps[batch])] for batch in prompts}
    device.take_events()
    turns = zip(*(calls_of(model, prompts[batch], steps[batch]) for batch in prompts), strict=True)
    for turn, calls in enumerate(turns):
        for batch, each in zip(prompts, calls, strict=True):
            assert np.array_equal(each(), expected[batch][turn]), (batch, turn)
    events = steps_of(device)
    assert (events.count("begin_capture"), events.count("launch")) == (2, 8)


def calls_of(model: Qwen3VLModel, prompts: list[list[int]], steps: list[list[list[int]]]) -> list[Callable[[], Any]]:
    """Return the calls of a prefill and of each step, to be made in this order, each of which gives logits."""
    batch, longest = len(prompts), max(map(len, prompts))
    lengths = np.array(list(map(len, prompts)))
    cache = model.session.new_cache(longest + len(steps), batch)
    embeds = no_visual_embeds(model.config)

    def call(ids: np.ndarray, past: np.ndarray, asked: np.ndarray) -> np.ndarray:
        return model.session.decode(DecoderInputs.text(ids, past, embeds, logits_positions=asked), cache)

    padded = np.array([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    first = partial(call, padded, np.zeros(batch, np.int64), lengths[:, None] - 1)
    zeros = np.zeros((batch, 1), np.int64)
    return [first, *(partial(call, np.array(ids), lengths + i, zeros) for i, ids in enumerate(steps))]


def test_requests_beside_each_other_get_the_answers_that_they_get_alone(
    folder: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_session, "CudaDevice", lambda: device)
    model = Qwen3VLModel.from_engine(folder)
    prompts = [*MESSAGES.values(), READ]
    alone = [model.generate(each, max_new_tokens=12).token_ids for each in prompts]
    device.take_events()
    for _ in range(2):  # the second time, prompts take rows over that lie in other slots
        together = model.generate_batch(prompts, max_new_tokens=12)
        assert [each.token_ids for each in together] == alone
    batches = {int(event.split()[2].split("x")[0]) for event in steps_of(device) if event.startswith("run 0")}
    assert len(batches) > 1, "several sequences stepped together"
    model.close()
    model.session.close()


def test_an_image_beyond_every_profile_says_how_to_build(model: Qwen3VLModel) -> None:
    with pytest.raises(CapacityError, match=r"I = 1, P = \d+: patches-64 takes I 1, P 4 to 64; patches-256") as caught:
        model.generate(user("Read.", np.tile(NOISE, (4, 4, 1))))
    assert "lower max_pixels" in str(caught.value.remedy)
    assert "--max-patches" in str(caught.value.remedy)


@pytest.mark.parametrize(("capacity", "batch"), [(CAPACITY + 1, 1), (8, MAX_BATCH + 1)])
def test_a_cache_beyond_the_engine_says_how_to_build(model: Qwen3VLModel, capacity: int, batch: int) -> None:
    with pytest.raises(CapacityError, match=f"built for {CAPACITY} tokens and {MAX_BATCH} sequences") as caught:
        model.session.new_cache(capacity, batch)
    assert "--max-context or --max-batch" in str(caught.value.remedy)


def test_a_context_beyond_the_engine_is_refused_at_once(folder: Path) -> None:
    with pytest.raises(UsageError, match=f"expected 1 to {CAPACITY}, the capacity that the engine was built with"):
        Qwen3VLModel.from_engine(folder, max_context=CAPACITY + 1)


def test_a_prompt_beyond_the_engine_names_its_rebuild(model: Qwen3VLModel) -> None:
    with pytest.raises(CapacityError, match="leaves no room for an answer") as caught:
        model.generate(user("nine " * 2 * CAPACITY))
    assert str(caught.value.remedy).startswith("build the engine again with --max-context above")
    assert "raise max_context" not in str(caught.value.remedy)


def test_the_default_context_is_the_engines(model: Qwen3VLModel) -> None:
    assert model.max_context == CAPACITY


def test_an_engine_that_nobody_holds_is_freed(
    folder: Path, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_session, "CudaDevice", lambda: device)
    model = Qwen3VLModel.from_engine(folder)
    model.generate(READ)
    assert device.leaks()
    del model
    gc.collect()
    assert device.leaks() == []


def test_too_little_memory_for_a_cache_leaves_nothing_behind(model: Qwen3VLModel, device: HostDevice) -> None:
    before = device.leaks()
    device.total_bytes -= device.memory_info()[0] - 3 * CAPACITY * 256  # three of the eight buffers
    with pytest.raises(CapacityError, match="out of memory"):
        model.session.new_cache(8)
    assert device.leaks() == before


def test_too_little_memory_to_open_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = HostDevice(total_bytes=4096)
    monkeypatch.setattr(tensorrt_session, "CudaDevice", lambda: device)
    with pytest.raises(CapacityError, match="out of memory"):
        Qwen3VLModel.from_engine(folder)
    assert device.leaks() == []

"""An image on its way through a session of a GPU: pixels up as grey levels, embeddings that never leave the device."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import PIL.Image
import pytest

from engines import registry
from engines.bundle import Bundle
from engines.passes.normalise_pixels import NormalisePixelsPass
from engines.quantize.formats import WeightFormats
from engines.target import Target
from helpers import PICTURES
from helpers.engines import build
from helpers.host_cuda import HostDevice
from helpers.lowered_fixtures import lower_to
from qwen3vl_export.parity.lowered import open_model
from runtime import generation
from runtime.contract import DecoderInputs, FloatArray, LevelInputs, on_host
from runtime.device_arrays import DeviceEmbeds, Rows
from runtime.errors import UsageError
from runtime.manifest import Manifest
from runtime.messages import user_message
from runtime.model import Qwen3VLModel
from runtime.ort_device import Device
from runtime.session import SessionOptions
from runtime.sessions import ort_cuda
from runtime.sessions.ort_cuda import OrtCudaSession
from runtime.vision_inputs import inputs_of_segments

TARGET = "ort-cuda-fp16"
PICTURES_OF_ONE_GRID = [
    np.asarray(PIL.Image.open(PICTURES / f"held_out_{i}.png").convert("RGB").resize((192, 160))) for i in range(3)
]


class TracingDevice(HostDevice):
    """A host device that notes how many bytes go up and down."""

    def __init__(self) -> None:
        super().__init__()
        self.up_bytes = self.down_bytes = 0

    def to_device(self, address: int, array: np.ndarray, stream: int) -> None:
        self.up_bytes += array.nbytes
        super().to_device(address, array, stream)

    def to_host(self, array: np.ndarray, address: int, stream: int) -> None:
        self.down_bytes += array.nbytes
        super().to_host(array, address, stream)

    def take_bytes(self) -> tuple[int, int]:
        found = self.up_bytes, self.down_bytes
        self.up_bytes = self.down_bytes = 0
        return found


@dataclasses.dataclass
class Opened:
    model: Qwen3VLModel
    device: TracingDevice

    @property
    def session(self) -> OrtCudaSession:
        session = self.model.session
        assert isinstance(session, OrtCudaSession)
        return session


def float_target() -> Target:
    """The target as it was before: pixels are normalised on the host."""
    target = registry.get(TARGET)

    def passes(formats: WeightFormats) -> list[Any]:
        return [each for each in target.passes(formats) if not isinstance(each, NormalisePixelsPass)]

    return dataclasses.replace(target, passes=passes, normalises_pixels=False)


def opened(folder: Path, **options: Any) -> Opened:
    device = TracingDevice()
    on_cpu = Device("CPUExecutionProvider", "cpu", lambda: device)  # type: ignore[arg-type, return-value]

    def open_session(folder: Path, manifest: Manifest, options: SessionOptions) -> OrtCudaSession:
        return OrtCudaSession(folder, manifest, device=on_cpu)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort_cuda, "open_session", open_session)
        return Opened(Qwen3VLModel.from_engine(folder, **options), device)


@pytest.fixture(scope="module")
def folder(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(demo_bundle, TARGET, tmp_path_factory.mktemp("levels") / "engine")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Opened:
    return opened(folder)


@pytest.fixture(scope="module")
def older(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """An engine that takes normalised pixels."""
    return opened(build(demo_bundle, float_target(), tmp_path_factory.mktemp("floats") / "engine"))


def message(num_images: int) -> list[dict[str, Any]]:
    return user_message("Read the digits.", PICTURES_OF_ONE_GRID[:num_images])


def embeds_of(engine: Opened, num_images: int) -> tuple[DeviceEmbeds, Callable[[Any], DecoderInputs]]:
    """Return the embeddings of images of one call, and what makes a prompt of them."""
    prepared = engine.model.prepare(message(num_images))
    inputs = inputs_of_segments(prepared.images, engine.model.config.vision, takes_levels=True)
    assert isinstance(inputs, LevelInputs)
    return engine.session.vision(inputs), lambda embeds: prepared.decoder_inputs(embeds, all_logits=True)


def prefill(engine: Opened, inputs: DecoderInputs, chunk: int = 512) -> FloatArray:
    cache = engine.session.new_cache(inputs.num_cache_rows)
    return generation.prefill(engine.session, cache, inputs, chunk=chunk)


def test_the_engine_says_what_it_takes(engine: Opened, older: Opened) -> None:
    assert engine.model.manifest.capabilities["pixels"] == "uint8"
    assert "pixels" not in older.model.manifest.capabilities


@pytest.mark.parametrize("num_images", [1, 3])
def test_embeddings_of_levels_are_those_of_normalised_pixels_to_the_bit(
    engine: Opened, older: Opened, num_images: int
) -> None:
    ours, others = engine.model.prepare(message(num_images)).images, older.model.prepare(message(num_images)).images
    assert {image.patches.dtype.name for image in ours} == {"uint8"}
    assert {image.patches.dtype.name for image in others} == {"float32"}
    for image, other in zip(ours, others, strict=True):
        assert image.digest == other.digest and np.array_equal(image.pixel_values, other.pixel_values)
        assert np.array_equal(image.levels, other.levels)
    found = engine.model.encode_images(ours)
    assert np.array_equal(found, older.model.encode_images(others))
    # Images that the other one has processed.
    assert np.array_equal(found, engine.model.encode_images(others))
    assert np.array_equal(found, older.model.encode_images(ours))


def test_a_video_is_equal_to_the_bit_too(engine: Opened, older: Opened) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    content = [{"type": "video", "video": list(frames), "fps": 2}, {"type": "text", "text": "What is it?"}]
    found = [each.model.prepare([{"role": "user", "content": content}]).images for each in (engine, older)]
    assert len(found[0]) == len(found[1]) > 1
    assert np.array_equal(engine.model.encode_images(found[0]), older.model.encode_images(found[1]))


def test_a_quarter_of_the_bytes_goes_up(engine: Opened, older: Opened) -> None:
    taken = {}
    for each in (engine, older):
        (image,) = each.model.prepare(message(1)).images
        each.device.take_bytes()
        each.session.vision(each.model.preparation.vision_inputs(image))
        taken[each.model.manifest.capabilities.get("pixels")], _ = each.device.take_bytes()
    num_values = image.patches.size
    scale_bytes = 3 * image.patches.shape[1] * 4
    assert taken[None] - taken["uint8"] == 3 * num_values - scale_bytes


@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("chunk", [512, 40, 7])
def test_prefill_reads_embeddings_where_the_vision_tower_wrote_them(
    engine: Opened, num_images: int, chunk: int
) -> None:
    engine.device.take_bytes()
    embeds, inputs = embeds_of(engine, num_images)
    assert len(embeds.parts) == num_images
    assert engine.device.take_bytes()[1] == 0
    found = prefill(engine, inputs(embeds), chunk)
    up_bytes, down_bytes = engine.device.take_bytes()
    assert down_bytes == 0 and up_bytes < embeds.nbytes / 4, "neither down nor up again"
    copy = on_host(embeds)
    assert engine.device.take_bytes()[1] == embeds.nbytes
    assert np.array_equal(found, prefill(engine, inputs(copy), chunk))


def test_a_wrong_row_of_the_second_image_changes_the_logits(engine: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    embeds, inputs = embeds_of(engine, 2)
    expected = prefill(engine, inputs(embeds))
    at = Rows.at
    monkeypatch.setattr(Rows, "at", lambda rows, first: at(rows, first - (type(rows) is Rows and first > 0)))
    assert not np.array_equal(prefill(engine, inputs(embeds)), expected)


def test_one_image_is_bound_in_place_and_of_several_what_a_chunk_needs(
    engine: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeds, inputs = embeds_of(engine, 3)
    each_rows = embeds.parts[0].shape[1]
    bound: list[tuple[int, int]] = []
    bind = onnxruntime.IOBinding.bind_input

    def noted(binding: Any, name: str, device: str, index: int, dtype: Any, shape: Any, address: int) -> None:
        if name == "visual_embeds":
            bound.append((shape[1], address))
        bind(binding, name, device, index, dtype, shape, address)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_input", noted)
    prompt = inputs(embeds)
    rows = prompt.visual_rows[0]
    starts = [int(np.flatnonzero(rows == i * each_rows)[0]) for i in range(3)]
    cache = engine.session.new_cache(prompt.num_cache_rows)
    for start, stop in ((0, starts[1]), (starts[1], starts[1] + 2), (starts[1] + 2, starts[2] + 1)):
        engine.session.prefill(prompt.chunk(start, stop), cache)
    assert bound[:2] == [(each_rows, embeds.parts[0].address), (each_rows, embeds.parts[1].address)]
    rows_joined, address = bound[2]
    assert rows_joined == 2 * each_rows and address not in {part.address for part in embeds.parts}


def test_answers_are_those_with_embeddings_on_the_host(engine: Opened, folder: Path) -> None:
    prompts = [message(1), message(3), message(2)]
    expected = [engine.model.generate(each, max_new_tokens=12).token_ids for each in prompts]
    together = engine.model.generate_batch(prompts, max_new_tokens=12)
    assert [each.token_ids for each in together] == expected
    other = opened(folder, vision_cache_bytes=0)
    vision, made = other.session.vision, []

    def on_the_host(inputs: Any) -> FloatArray:
        made.append(on_host(vision(inputs)))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(other.session, "vision", on_the_host)
        assert [other.model.generate(each, max_new_tokens=12).token_ids for each in prompts] == expected
    assert made, "they came from the host"
    other.model.close()


def test_kept_embeddings_are_counted_as_device_memory_and_given_back(folder: Path) -> None:
    level_bytes = opened_bytes(folder)
    one = opened(folder, vision_cache_bytes=2 * level_bytes)
    for image in PICTURES_OF_ONE_GRID:
        one.model.generate(user_message("Read the digits.", [image]), max_new_tokens=2)
    kept = one.model.statistics()["vision_cache"]
    assert (kept["num_bytes"], kept["device_bytes"], kept["evictions"]) == (2 * level_bytes, 2 * level_bytes, 1)
    one.device.take_bytes()
    again = one.model.generate(user_message("Read the digits.", [PICTURES_OF_ONE_GRID[2]]), max_new_tokens=2)
    assert again.stats.cached_images == 1
    assert one.device.take_bytes()[1] < level_bytes, "only logits came down"
    session, device = one.session, one.device
    one.model.close()
    session.close()
    del one, session
    gc.collect()
    assert device.leaks() == []


def opened_bytes(folder: Path) -> int:
    """Return the bytes of one picture's embeddings."""
    config = Manifest.read(folder).model
    picture = opened(folder)
    (image,) = picture.model.prepare(message(1)).images
    picture.model.close()
    return config.num_visual_levels * image.num_visual_tokens * config.text.hidden_size * 4


def test_nothing_is_waited_for_but_what_goes_up(engine: Opened) -> None:
    prepared = engine.model.prepare(message(1))
    engine.device.take_events()
    embeds = engine.session.vision(engine.model.preparation.vision_inputs(prepared.images[0]))
    assert engine.device.take_events() == ["to_device"] * 6 + ["synchronize"]
    inputs = prepared.decoder_inputs(embeds)
    cache = engine.session.new_cache(inputs.num_cache_rows)
    engine.device.take_events()
    engine.session.prefill(inputs, cache)
    assert engine.device.take_events() == ["to_device"] * 5 + ["synchronize"]


def test_lowered_graphs_take_grey_levels_too(engine: Opened, demo_bundle: Bundle, tmp_path: Path) -> None:
    lowered = lower_to(demo_bundle, registry.get(TARGET), tmp_path / "lowered")
    model = open_model(lowered)
    (image,) = model.prepare(message(1)).images
    assert image.patches.dtype == np.uint8
    found, expected = model.encode_images([image]), engine.model.encode_images([image])
    # Rounded to float16 after each node, where the engine's kernels are fused; measured 0.0005.
    assert np.abs(found - expected).max() <= 0.002 * np.abs(expected).max()
    model.close()


def test_an_image_of_no_grey_levels_is_refused(engine: Opened, older: Opened) -> None:
    (image,) = older.model.prepare(message(1)).images
    between = dataclasses.replace(image, patches=image.pixel_values + np.float32(0.001))
    with pytest.raises(UsageError, match="no grey levels") as caught:
        engine.model.encode_images([between])
    assert "pass the image itself" in str(caught.value.remedy)
    older.model.encode_images([between])

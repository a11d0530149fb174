"""A sliding window on each kind of KV cache: rows that move, keys that turn, and whole answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runtime.sessions.tensorrt as tensorrt_session
from demo_training.prompts import training_prompts
from engines.build_options import BuildOptions
from engines.bundle import Bundle
from helpers.engines import build, requantized
from helpers.host_cuda import HostDevice
from helpers.host_device import CPU
from helpers.host_engine import build_host_engine
from helpers.serving import asked
from helpers.sliding_reference import PIXELS, WINDOW, answered, distance, windowed, with_positions
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.eager import load
from qwen3vl_export.modeling import rotary_frequencies, rotary_table
from qwen3vl_export.ops.rotary import rotate
from runtime.cache_types import CacheType
from runtime.device_buffers import Staging
from runtime.device_cache import DeviceKVCache
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel
from runtime.rotary import moved_keys
from runtime.session import SessionOptions
from runtime.sessions import ort_cuda
from runtime.sessions.ort_cpu import OrtKVCache
from runtime.sessions.ort_cuda import OrtCudaSession

LAYERS, SHAPE = 2, (3, 2, 40, 8)
LIMITS = {"int8": 0.06, "int4": 0.8, "ort_cuda": 0.01, "tensorrt": 0.01}
"""Of the logits of an answer, over their spread; measured 0.02, 0.5, 0.002 and 0.001. Rows that stay give 1.1."""
QUESTION = "Say where each of the digits is. "
PROMPT, MANY = asked(QUESTION * 2, *PIXELS), asked(QUESTION * 70, PIXELS[0])
"""A prompt that outgrows the window, and one that runs its sinks and its end alone."""


def test_moved_keys_are_those_of_later_positions() -> None:
    config = Checkpoint.open("demo").config.text
    inv_freq, axes = (torch.from_numpy(each) for each in rotary_frequencies(config))
    keys = np.random.default_rng(0).standard_normal((1, 7, 2, config.head_dim), np.float32)
    # An image's: time, height and width differ, and move alike.
    positions = torch.from_numpy(np.random.default_rng(1).integers(0, 500, (3, 1, 7)))

    def at(positions: torch.Tensor) -> np.ndarray:
        cos, sin = (each.numpy() for each in rotary_table(positions, inv_freq, axes))
        return rotate(keys, cos, sin)

    found = moved_keys(at(positions), 1234, config.rope_theta)
    np.testing.assert_allclose(found, at(positions + 1234), atol=2e-3)  # angles of 1734 in float32
    np.testing.assert_allclose(moved_keys(found, -1234, config.rope_theta), at(positions), atol=1e-5)
    assert np.abs(moved_keys(at(positions), 1235, config.rope_theta) - at(positions + 1234)).max() > 0.1


def host_cache(dtype: str) -> DeviceKVCache:
    device = HostDevice()
    return DeviceKVCache(device, Staging(device, device.new_stream()), LAYERS, SHAPE, dtype)


SCALES = np.random.default_rng(2).uniform(0.02, 0.03, (LAYERS, 2, SHAPE[1], SHAPE[3])).astype(np.float32)
CACHES: dict[str, tuple[Callable[[], Any], float]] = {
    "float32": (lambda: OrtKVCache([CacheType("float32", 32)] * LAYERS, SHAPE), 0),
    "float16 of the CPU": (lambda: OrtKVCache([CacheType("float16", 16)] * LAYERS, SHAPE), 2e-3),
    "int8": (lambda: OrtKVCache([CacheType("int8", 8)] * LAYERS, SHAPE, SCALES), 0.015),
    "int4": (lambda: OrtKVCache([CacheType("uint8", 4)] * LAYERS, SHAPE, SCALES * 16), 0.24),
    "float16": (lambda: host_cache("float16"), 2e-3),
    "bfloat16": (lambda: host_cache("bfloat16"), 8e-3),
}
"""And what rounding may change in a number of size 2."""


def layers(cache: Any) -> np.ndarray:
    return np.array([cache.layer(index) for index in range(LAYERS)])


@pytest.mark.parametrize("kind", CACHES)
def test_rows_move_within_a_slot_and_keys_are_written_alone(kind: str) -> None:
    make, rounding = CACHES[kind]
    cache = make()
    keys_LKRH = np.random.default_rng(3).uniform(-2, 2, (LAYERS, SHAPE[1], SHAPE[2], SHAPE[3])).astype(np.float32)
    for slot in range(3):
        cache.write_keys(slot, 0, keys_LKRH * (slot + 1) / 3)
    before = layers(cache)
    np.testing.assert_allclose(before[:, 0, 2], keys_LKRH, atol=rounding)
    np.testing.assert_array_equal(cache.read_keys(1, 5, 9), before[:, 0, 1, :, 5:14])
    assert cache.read_keys(1, 0, 0).shape == (LAYERS, SHAPE[1], 0, SHAPE[3])
    expected = before.copy()
    for source, target, num_rows in ((9, 4, 31), (20, 1, 7), (5, 4, 6)):
        cache.move_rows(1, source, target, num_rows)
        expected[:, :, 1, :, target : target + num_rows] = expected[:, :, 1, :, source : source + num_rows].copy()
        np.testing.assert_array_equal(layers(cache), expected)
    cache.write_keys(2, 3, expected[:, 0, 0, :, 1:6])
    expected[:, 0, 2, :, 3:8] = expected[:, 0, 0, :, 1:6]
    np.testing.assert_array_equal(layers(cache), expected)


def opened(kind: str, demo_engine: Path, bundle: Bundle, folder: Path, patch: pytest.MonkeyPatch) -> Qwen3VLModel:
    options: dict[str, Any] = {"max_sequences": 1, "kept_sequences": 0}
    if kind in ("int8", "int4"):
        engine = requantized(demo_engine, folder, int(kind[3:]), training_prompts(12))
        return Qwen3VLModel.from_engine(engine, **options)
    if kind == "ort_cuda":

        def on_cpu(path: Path, manifest: Manifest, _: SessionOptions) -> OrtCudaSession:
            return OrtCudaSession(path, manifest, device=CPU)

        patch.setattr(ort_cuda, "open_session", on_cpu)
        return Qwen3VLModel.from_engine(build(bundle, "ort-cuda-fp16", folder), **options)
    patch.setattr(tensorrt_session, "CudaDevice", HostDevice)
    sizes = BuildOptions(max_context=128, max_batch=1, prefill_chunk=32, patch_buckets=(64,))
    return Qwen3VLModel.from_engine(build_host_engine(bundle, folder, sizes), **options)


@pytest.mark.parametrize("kind", LIMITS)
def test_answers_are_those_of_an_explicit_mask(
    demo_engine: Path, demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    plain = opened(kind, demo_engine, demo_bundle, tmp_path / "engine", monkeypatch)
    chunk, manifest = plain.limits.prefill_chunk, with_positions(plain.manifest, 112)
    slide = partial(windowed, plain, manifest=manifest, prefill_chunk=chunk, last_chunk=chunk, kept_sequences=0)
    model, torch_model = slide(max_sequences=1), load(Checkpoint.open("demo"))
    assert distance(torch_model, model, answered(model, PROMPT, 60, logprobs=True)) < LIMITS[kind]
    assert model.statistics()["dropped_rows"] > 2 * WINDOW.block
    assert distance(torch_model, model, answered(model, MANY, 4, logprobs=True)) < LIMITS[kind]
    monkeypatch.setattr(type(model.session.new_cache(WINDOW.tokens)), "move_rows", lambda *_: None)
    broken = slide(max_sequences=1)
    assert distance(torch_model, broken, answered(broken, PROMPT, 60, logprobs=True)) > LIMITS[kind]

"""An engine with our own kernels: how it opens, where its weights are, and what its cache holds."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import registry
from engines.build import build_engine
from engines.bundle import Bundle
from engines.kernel_sets import OWN, with_kernels
from engines.quantize.cache_ranges import CacheQuantization, quantize_cache
from helpers import PICTURES
from helpers.mappings import mapping
from helpers.own_kernels import needs_own_kernels
from runtime import native
from runtime.contract import DecoderInputs
from runtime.errors import EngineError
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel
from runtime.session import Session, SessionOptions, open_session

pytestmark = needs_own_kernels
IMAGE = PICTURES / "held_out_0.png"
READ: Any = [{"role": "user", "content": [{"type": "image", "image": str(IMAGE)}, {"type": "text", "text": "Read"}]}]


@pytest.fixture(scope="module")
def engine(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "engine"
    build_engine(demo_bundle, with_kernels(registry.get("ort-cpu-int4"), OWN), folder)
    return folder


@pytest.fixture(scope="module")
def half_engine(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a KV cache in float16."""
    folder = tmp_path_factory.mktemp("half") / "engine"
    shutil.copytree(engine, folder)
    target = with_kernels(registry.get("ort-cpu-int4"), OWN)
    quantize_cache(folder, Manifest.read(engine), CacheQuantization(16, ()), target).write(folder)
    return folder


def with_capabilities(engine: Path, folder: Path, **changed: Any) -> Path:
    shutil.copytree(engine, folder)
    manifest = Manifest.read(folder)
    dataclasses.replace(manifest, capabilities={**manifest.capabilities, **changed}).write(folder)
    return folder


def session_of(engine: Path) -> Session:
    return open_session(engine, Manifest.read(engine), SessionOptions(threads=1))


def call(session: Session, cache: Any, ids_BS: list[list[int]], pasts: list[int], slot: int = 0) -> np.ndarray:
    """Logits of all positions, [B, S, vocab], and the cache holds the tokens."""
    ids = np.array(ids_BS)
    positions_BS = np.array(pasts)[:, None] + np.arange(ids.shape[1])
    inputs = DecoderInputs(
        input_ids=ids,
        position_ids=np.stack([positions_BS] * 3),
        visual_rows=np.full(ids.shape, -1),
        visual_embeds=np.zeros((3, 1, 192), np.float32),
        past_lengths=np.array(pasts),
        logits_positions=np.tile(np.arange(ids.shape[1]), (len(ids), 1)),
    )
    return session.decode(inputs, cache, slot)


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are read from /proc")
def test_its_weights_stay_in_their_files(engine: Path) -> None:
    model = Qwen3VLModel.from_engine(engine, threads=2)
    assert model.generate(READ, max_new_tokens=3).token_ids
    for name in ("decoder.onnx.data", "vision.onnx.data"):
        sizes = mapping(engine / name)
        assert sizes["Size"] > 0.9 * (engine / name).stat().st_size, "it is mapped"
        assert sizes["Rss"] > 0.5 * sizes["Size"], "and read there"
        assert sizes["Anonymous"] == 0, "and written by nobody"


def test_operators_of_another_version_are_refused(engine: Path, tmp_path: Path) -> None:
    later = with_capabilities(engine, tmp_path / "engine", custom_ops="qwen3vl.cpu.2")
    expected = r"uses the operators 'qwen3vl\.cpu\.2', which this version does not have; it has qwen3vl\.cpu"
    with pytest.raises(EngineError, match=expected) as caught:
        Qwen3VLModel.from_engine(later)
    assert "install the version that built the engine" in str(caught.value.remedy)


def test_a_later_kernel_is_refused(engine: Path, tmp_path: Path) -> None:
    later = with_capabilities(engine, tmp_path / "engine", kernels=["MatMulInt4", "MatMulInt2"])
    with pytest.raises(EngineError, match="cannot test: MatMulInt2"):
        Qwen3VLModel.from_engine(later)


def test_an_engine_that_does_not_say_that_it_uses_them_is_refused(engine: Path, tmp_path: Path) -> None:
    other = tmp_path / "engine"
    shutil.copytree(engine, other)
    manifest = Manifest.read(other)
    left = {name: value for name, value in manifest.capabilities.items() if name != "custom_ops"}
    dataclasses.replace(manifest, capabilities=left).write(other)
    with pytest.raises(EngineError, match=r"vision\.onnx: ONNX Runtime .* does not open it"):
        Qwen3VLModel.from_engine(other)


def test_without_the_library_it_is_said_how_to_get_it(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, missing = native.load, engine / "none.so"
    monkeypatch.setattr(native, "load", lambda path: load(missing))
    with pytest.raises(EngineError, match="the library of own kernels is missing") as caught:
        Qwen3VLModel.from_engine(engine)
    assert "make setup" in str(caught.value.remedy)


def test_weights_that_are_cut_off_are_named(engine: Path, tmp_path: Path) -> None:
    cut = tmp_path / "engine"
    shutil.copytree(engine, cut)
    data = cut / "decoder.onnx.data"
    data.write_bytes(data.read_bytes()[:-64])
    with pytest.raises(EngineError, match=r"decoder\.onnx\.data: \d+ bytes, expected \d+"):
        Qwen3VLModel.from_engine(cut)


def test_weights_that_are_cut_off_behind_the_check_do_not_open(engine: Path, tmp_path: Path) -> None:
    cut = tmp_path / "engine"
    shutil.copytree(engine, cut)
    data = cut / "decoder.onnx.data"
    data.write_bytes(data.read_bytes()[:-8192])
    with pytest.raises(EngineError, match=r"decoder\.onnx: ONNX Runtime .* does not open it .*out of bounds"):
        session_of(cut)


def test_portable_code_answers_the_same_and_is_warned_of(engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = native.isa()
    if before == native.PORTABLE:
        pytest.skip("this processor runs nothing else")
    model = Qwen3VLModel.from_engine(engine)
    expected = model.logits(READ)
    assert "portable code" not in caplog.text
    native.use(native.PORTABLE)
    try:
        found = Qwen3VLModel.from_engine(engine).logits(READ)
    finally:
        native.use(before)
    assert "portable code" in caplog.text
    assert np.array_equal(found, expected)


def test_chunks_of_several_sequences_run_at_once(engine: Path) -> None:
    """With a past each, and bit for bit as they do alone."""
    session = session_of(engine)
    prompts, chunks = [[1, 2, 3], [4, 5, 6, 7, 8]], [[9, 10, 11], [12, 13, 14]]
    pasts = [len(prompt) for prompt in prompts]
    alone = []
    for prompt, chunk in zip(prompts, chunks, strict=True):
        cache = session.new_cache(16)
        call(session, cache, [prompt], [0])
        alone.append(call(session, cache, [chunk], [len(prompt)])[0])
    cache = session.new_cache(16, 2)
    for slot, prompt in enumerate(prompts):
        call(session, cache, [prompt], [0], slot)
    assert np.array_equal(call(session, cache, chunks, pasts), np.stack(alone))


def test_a_cache_in_float16_takes_half_the_bytes_and_reads_as_float32(engine: Path, half_engine: Path) -> None:
    rows = [list(range(1, 12))]
    caches, logits = [], []
    for folder in (engine, half_engine):
        session = session_of(folder)
        caches.append(session.new_cache(32))
        logits.append(call(session, caches[-1], rows, [0]))
    assert caches[0].num_bytes == 2 * caches[1].num_bytes
    for index in range(4):
        for exact, half in zip(*(cache.layer(index) for cache in caches), strict=True):
            assert half.dtype == exact.dtype == np.float32 and half[:, :, :11].any()
            # Layers behind the first see values that were rounded before.
            assert np.allclose(half, exact, rtol=0, atol=(1e-3 if index == 0 else 2e-2) * np.abs(exact).max())
    assert np.linalg.norm(logits[1] - logits[0]) < 0.01 * np.linalg.norm(logits[0])


def test_a_model_with_a_cache_in_float16_plans_half_the_bytes(engine: Path, half_engine: Path) -> None:
    peaks = [Qwen3VLModel.from_engine(each).generate(READ, max_new_tokens=2).stats for each in (engine, half_engine)]
    assert peaks[0].peak_cache_bytes == 2 * peaks[1].peak_cache_bytes > 0

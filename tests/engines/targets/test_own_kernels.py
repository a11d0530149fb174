"""Engines with our own CPU kernels, end to end: against float32, with every cache, calibrated, with experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from demo_training.prompts import training_prompts
from engines.build import build_engine
from engines.bundle import Bundle
from engines.quantize.cache_ranges import CacheQuantization
from engines.quantize.calibration import calibrate
from helpers import PICTURES
from helpers.engines import build
from helpers.own_kernels import needs_own_kernels
from helpers.targets import own
from runtime.contract import DecoderInputs, no_visual_embeds
from runtime.generation import prefill
from runtime.model import Qwen3VLModel

pytestmark = needs_own_kernels
INT8 = own("ort-cpu-int8")
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": str(PICTURES / "held_out_0.png")},
            {"type": "text", "text": "Read the digits."},
        ],
    }
]


@pytest.fixture(scope="module")
def int8_engine(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(demo_bundle, INT8, tmp_path_factory.mktemp("own") / "engine")


def logits(engine: Path, chunk: int = 512) -> np.ndarray:
    """Return the logits of all tokens of the prompt, float32 [S, vocab]."""
    model = Qwen3VLModel.from_engine(engine)
    prepared = model.prepare(MESSAGES)
    inputs = prepared.decoder_inputs(model.encode_images(prepared.images), all_logits=True)
    return prefill(model.session, model.session.new_cache(inputs.num_cache_rows), inputs, chunk=chunk)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_logits_are_those_of_float32_but_for_8_bits(int8_engine: Path, demo_engine: Path) -> None:
    expected, found = logits(demo_engine), logits(int8_engine)
    assert error(found, expected) < 0.01
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.95


def test_where_a_prompt_is_cut_changes_next_to_nothing(int8_engine: Path) -> None:
    """One new token is attended in another order than several; what is rounded to 8 bits may then fall otherwise."""
    whole = logits(int8_engine)
    for chunk in (1, 7, 16):
        assert error(logits(int8_engine, chunk), whole) < 3e-3


@pytest.mark.parametrize("num_new", [1, 5])
def test_company_changes_no_bit(num_new: int, int8_engine: Path) -> None:
    """Three sequences in one call, with pasts of different lengths, against each of them alone."""
    model = Qwen3VLModel.from_engine(int8_engine)
    ids_BS = np.random.default_rng(5).integers(0, model.config.text.vocab_size, (3, 40))
    lengths = np.array([31, 0, 17], np.int64)
    embeds = no_visual_embeds(model.config)

    def step(rows: slice) -> np.ndarray:
        cache = model.session.new_cache(48, 3)
        for slot, length in enumerate(lengths[rows]):
            if length:
                past = DecoderInputs.text(ids_BS[rows][slot : slot + 1, :length], np.zeros(1, np.int64), embeds)
                model.session.prefill(past, cache, slot)
        starts = lengths[rows]
        new_BS = np.stack([ids[n : n + num_new] for ids, n in zip(ids_BS[rows], starts, strict=True)])
        return model.session.decode(DecoderInputs.text(new_BS, starts, embeds), cache)

    together = step(slice(0, 3))
    for b in range(3):
        np.testing.assert_array_equal(step(slice(b, b + 1))[0], together[b])


@pytest.mark.parametrize(("bits", "limit"), [(16, 3e-3), (8, 0.02), (4, 0.2)])
def test_a_cache_in_fewer_bits(bits: int, limit: float, int8_engine: Path, demo_bundle: Bundle, tmp_path: Path) -> None:
    prompts: Sequence = () if bits == 16 else training_prompts(12)
    folder = tmp_path / "engine"
    build_engine(demo_bundle, INT8, folder, cache=CacheQuantization(bits, prompts))
    model = Qwen3VLModel.from_engine(folder)
    cache, text = model.session.new_cache(100), model.config.text
    assert cache.num_bytes == 100 * 2 * text.num_layers * text.num_kv_heads * text.head_dim * bits // 8
    found = logits(folder)
    assert 0 < error(found, logits(int8_engine)) < limit
    if bits > 4:
        assert model.generate(MESSAGES).text == "1654"
    # A chunk that misread the cache would be off by whole logits.
    assert error(logits(folder, 7), found) < limit


def test_calibrated_codes_are_multiplied_as_they_are(demo_bundle: Bundle, demo_engine: Path, tmp_path: Path) -> None:
    """Calibration runs ONNX Runtime's own operators, and rounds by the blocks of our kernels."""
    target, expected = own("ort-cpu-int4"), logits(demo_engine)
    errors = {}
    (tmp_path / "work").mkdir()
    calibration = calibrate(demo_bundle, target, training_prompts(8), tmp_path / "work")
    for name, bundle in (("plain", demo_bundle), ("calibrated", calibration.applied_to(demo_bundle))):
        errors[name] = error(logits(build(bundle, target, tmp_path / name)), expected)
    assert errors["calibrated"] < 0.7 * errors["plain"]


def test_experts_stay_with_onnx_runtime(demo_moe_bundle: Bundle, tmp_path: Path) -> None:
    model = Qwen3VLModel.from_engine(build(demo_moe_bundle, own("ort-cpu-int4"), tmp_path / "engine"))
    kernels = set(model.manifest.capabilities["kernels"])
    assert {"QMoE.4", "QMoE.8", "MatMulInt4", "DecodeAttention"} <= kernels
    assert model.generate(MESSAGES).text == "1654"

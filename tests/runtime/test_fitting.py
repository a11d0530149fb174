"""Engines that are opened with less than was asked for, since not all of it fits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import CapacityError, UsageError
from runtime.manifest import Manifest
from runtime.memory_plan import Planner, Work
from runtime.model import Qwen3VLModel
from runtime.tuning import Tuning

LEAST = Work(256, images=(256,), prompts_with_images=1, chunk=64)
ONE = Work(4096, images=(1024,), prompts_with_images=1)


def planned(engine: Path, work: Work) -> int:
    return Planner.of(Manifest.read(engine), 1).plan(work).total_bytes


def test_nothing_changes_where_all_fits(demo_engine: Path) -> None:
    with (
        Qwen3VLModel.from_engine(demo_engine, threads=1) as plain,
        Qwen3VLModel.from_engine(demo_engine, threads=1, fit=True, max_memory=1 << 40) as fitted,
    ):
        assert fitted.limits == plain.limits and fitted.image_config == plain.image_config
        assert "fitted" not in fitted.statistics() and "fit=" not in repr(fitted)


def test_what_costs_least_is_given_up_first(demo_engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    limit = planned(demo_engine, ONE)
    with pytest.raises(CapacityError):
        Qwen3VLModel.from_engine(demo_engine, threads=1, max_memory=limit, max_sequences=8)
    with Qwen3VLModel.from_engine(demo_engine, threads=1, max_memory=limit, max_sequences=8, fit=True) as model:
        assert (model.max_context, model.limits.max_sequences, model.limits.kept_sequences) == (4096, 1, 0)
        assert model.limits.prefill_chunk == 512 and model.image_config.max_pixels == 1024 * 256
        fitted = model.statistics()["fitted"]
        assert fitted["max_sequences"] == {"wanted": 8, "chosen": 1} and "max_context" not in fitted
    (note,) = [each for each in caplog.messages if "to fit" in each]
    assert "max_sequences 1 in place of 8" in note


def test_the_context_comes_last_and_what_is_opened_answers(demo_engine: Path) -> None:
    limit = planned(demo_engine, Work(1000, images=(256,), prompts_with_images=1, chunk=64))
    with Qwen3VLModel.from_engine(demo_engine, threads=1, max_memory=limit, fit=True) as model:
        assert 1000 <= model.max_context < 4096 and model.limits.last_chunk == 64
        assert 256 * 256 <= model.image_config.max_pixels < 300 * 300 and "fit=True" in repr(model)
        assert model.generate([{"role": "user", "content": "Hi"}], max_new_tokens=2).stats.new_tokens >= 1


def test_a_tuned_chunk_does_not_take_the_room_of_an_image(demo_engine: Path) -> None:
    limit = planned(demo_engine, Work(1000, images=(256,), prompts_with_images=1, chunk=64))
    tuned = Tuning(prefill_chunk=512, vision_patches=64)
    with Qwen3VLModel.from_engine(demo_engine, threads=1, max_memory=limit, fit=True, tuned=tuned) as model:
        assert (model.limits.prefill_chunk, model.limits.last_chunk, model.limits.vision_patches) == (64, 64, 64)
        picture = np.zeros((256, 256, 3), np.uint8)
        message = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Hi"}]}
        assert model.generate([message], max_new_tokens=1).stats.new_tokens == 1


def test_the_least_image_is_not_smaller_than_min_pixels(demo_engine: Path) -> None:
    sizes = {"min_pixels": 300 * 300, "max_pixels": 500 * 500}
    limit = planned(demo_engine, Work(256, images=(352,), prompts_with_images=1, chunk=64))
    with Qwen3VLModel.from_engine(demo_engine, threads=1, max_memory=limit, fit=True, **sizes) as model:
        assert model.image_config.min_pixels == 300 * 300 <= model.image_config.max_pixels < 310 * 310
    with pytest.raises(CapacityError, match="with the least settings"):
        Qwen3VLModel.from_engine(demo_engine, threads=1, max_memory=limit - 200_000, fit=True, **sizes)


def test_a_tuned_chunk_is_what_is_wanted(demo_engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuned, alone = Tuning(prefill_chunk=1024), {"max_sequences": 1, "kept_sequences": 0, "vision_cache_bytes": 0}
    options = {"threads": 1, "fit": True, "tuned": tuned, **alone}
    limit = planned(demo_engine, dataclasses.replace(ONE, chunk=1024))
    with Qwen3VLModel.from_engine(demo_engine, max_memory=limit, **options) as model:
        assert (model.limits.prefill_chunk, model.limits.last_chunk) == (1024, 1024)
        assert "fitted" not in model.statistics()
    limit = planned(demo_engine, Work(4096, images=(256,), prompts_with_images=1, chunk=512))
    with Qwen3VLModel.from_engine(demo_engine, max_memory=limit, **options) as model:
        assert 512 <= model.limits.prefill_chunk == model.limits.last_chunk < 1024
        assert model.statistics()["fitted"]["prefill_chunk"]["wanted"] == 1024
    assert not [each for each in caplog.messages if "does not hold chunks" in each]


def test_below_the_least_it_is_refused(demo_engine: Path) -> None:
    with pytest.raises(CapacityError, match="with the least settings") as caught:
        Qwen3VLModel.from_engine(demo_engine, threads=1, max_memory=planned(demo_engine, LEAST) - 1, fit=True)
    assert "use a smaller model" in (caught.value.remedy or "")


def test_a_gpu_has_to_be_given_a_limit(gpu_engine: Path) -> None:
    with pytest.raises(UsageError, match="how much it may take is not known") as caught:
        Qwen3VLModel.from_engine(gpu_engine, fit=True)
    assert "max_memory" in (caught.value.remedy or "")
    with pytest.raises(UsageError, match="fit"):
        Qwen3VLModel.from_engine(gpu_engine, fit="yes")

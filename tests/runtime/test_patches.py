"""Patches: how they are cut, and that frames come back from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from runtime.image_config import ImageProcessorConfig
from runtime.image_processor import process_image, segment
from runtime.patches import assemble_frames, patchify
from runtime.resize import resize

pytestmark = pytest.mark.portable

# Settings as every published Qwen3-VL has them.
QWEN3 = ImageProcessorConfig(16, 2, 2, 65536, 1 << 24, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
QWEN2 = ImageProcessorConfig()
PLAIN = replace(QWEN2, do_normalize=False)
RAW = replace(PLAIN, do_rescale=False)
THREE_FRAMES = replace(QWEN3, temporal_patch_size=3)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def naive_patches(frames: list[np.ndarray], config: ImageProcessorConfig) -> np.ndarray:
    """Cut patches one by one, in the order that the docstring gives, with float32 arithmetic on each value."""
    side, merge = config.patch_size, config.merge_size
    frames = frames + [frames[-1]] * (config.temporal_patch_size - len(frames))
    stack_FHWC = np.stack(frames).astype(np.float32)
    if config.do_normalize:
        factor = np.float32(1 / config.rescale_factor if config.do_rescale else 1)
        mean, std = (np.array(v, np.float32) * factor for v in (config.image_mean, config.image_std))
        stack_FHWC = (stack_FHWC - mean) / std
    elif config.do_rescale:
        stack_FHWC = stack_FHWC * np.float32(config.rescale_factor)
    found = []
    for top in range(0, stack_FHWC.shape[1], side * merge):
        for left in range(0, stack_FHWC.shape[2], side * merge):
            for row in range(top, top + side * merge, side):
                for column in range(left, left + side * merge, side):
                    part = stack_FHWC[:, row : row + side, column : column + side]
                    found.append(part.transpose(3, 0, 1, 2).ravel())
    return np.stack(found)


@pytest.mark.parametrize("config", [QWEN3, QWEN2, PLAIN, RAW, THREE_FRAMES])
@pytest.mark.parametrize("tokens", [(1, 1), (3, 5), (60, 1), (1, 80), (23, 25)])
def test_patches_are_those_of_a_plain_loop_to_the_bit(config: ImageProcessorConfig, tokens: tuple[int, int]) -> None:
    height, width = (side * config.factor for side in tokens)
    frames = [noise(height, width, seed) for seed in range(2)]
    for given in (frames[:1], frames):
        found = patchify(given, config)
        expected = naive_patches(given, config)
        assert found.shape == expected.shape and found.dtype == np.float32
        assert (found.view(np.uint32) == expected.view(np.uint32)).all()


def test_frames_that_are_views_are_cut_like_their_copies() -> None:
    whole = noise(128, 192)
    for view in (whole[::-1], whole[:, ::-1], whole[..., ::-1], whole[::2, 64:128]):
        assert (patchify([view], QWEN3) == patchify([view.copy()], QWEN3)).all()


@pytest.mark.parametrize("config", [QWEN3, QWEN2, PLAIN, RAW, THREE_FRAMES])
def test_frames_come_back_from_patches(config: ImageProcessorConfig) -> None:
    frames = [noise(3 * config.factor, 4 * config.factor, seed) for seed in range(2)]
    processed = segment(frames, config)
    found = assemble_frames(processed.pixel_values, processed.grid_thw, config)
    expected = frames + frames[-1:] * (config.temporal_patch_size - 2)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one == other).all()


def test_the_picture_is_the_resized_image() -> None:
    image = noise(300, 431)
    processed = process_image(image, QWEN3)
    height, width = (side * QWEN3.patch_size for side in processed.grid_thw[1:])
    found = assemble_frames(processed.pixel_values, processed.grid_thw, QWEN3)
    assert (height, width) != image.shape[:2]
    assert all((frame == resize(image, height, width)).all() for frame in found)


def test_the_source_size_is_that_of_the_upright_image_before_it_is_resized() -> None:
    assert process_image(noise(300, 431), QWEN3).source_size == (431, 300)
    assert segment([noise(64, 96)], QWEN3).source_size == (96, 64)
    assert segment([noise(64, 96)], QWEN3, source_size=(1000, 700)).source_size == (1000, 700)


def test_the_source_size_is_that_after_exif(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    path = tmp_path / "phone.jpg"
    Image.fromarray(noise(300, 431)).save(path, exif=exif)
    assert process_image(path, QWEN3).source_size == (300, 431)

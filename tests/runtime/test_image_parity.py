"""The image processor against transformers' own: the same sources must give the same grid and the same bits."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import judge
from runtime.errors import CheckpointError
from runtime.image_config import ImageProcessorConfig, smart_resize
from runtime.image_processor import process_image
from runtime.images import load_image
from runtime.resize import BICUBIC, BILINEAR, Kernel, resize

# As published with Qwen3-VL.
QWEN3_VL: dict[str, Any] = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
SMALL = {**QWEN3_VL, "size": {"longest_edge": 200_000, "shortest_edge": 1024}}
CLIP = {"patch_size": 14}  # transformers' defaults: a mean and a deviation for each channel


def reference(source: Any, checkpoint: dict[str, Any]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return transformers' pixel_values and grid of one image."""
    processor = judge.image_processor(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision: deprecated decoder; Pillow: palette with transparency
        output = processor(images=source, return_tensors="pt")
    return output["pixel_values"].numpy(), tuple(output["image_grid_thw"][0].tolist())


def assert_same(source: Any, checkpoint: dict[str, Any] = SMALL) -> None:
    expected, grid = reference(source, checkpoint)
    found = process_image(source, ImageProcessorConfig.from_dict(checkpoint))
    assert found.grid_thw == grid
    assert found.pixel_values.dtype == np.float32
    np.testing.assert_array_equal(found.pixel_values, expected)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture() -> np.ndarray:
    rows, columns = np.mgrid[:90, :140]
    return np.stack([rows * 2 + 40, columns, 250 - rows - columns], axis=2).astype(np.uint8)


@pytest.mark.judge
@pytest.mark.parametrize("checkpoint", [QWEN3_VL, SMALL, CLIP], ids=["qwen3-vl", "small", "clip"])
@pytest.mark.parametrize("index", [0, 1], ids=["china.jpg", "flower.jpg"])
def test_photographs_are_equal(index: int, checkpoint: dict[str, Any]) -> None:
    from sklearn.datasets import load_sample_images

    photograph = load_sample_images().images[index]
    assert photograph.shape == (427, 640, 3)
    assert_same(Image.fromarray(photograph), checkpoint)
    assert_same(Image.fromarray(photograph).rotate(90, expand=True), checkpoint)
    assert_same(Image.fromarray(photograph[100:310, 50:101]), checkpoint)


@pytest.mark.judge
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 2**32 - 1))
def test_noise_of_any_size_is_equal(height: int, width: int, seed: int) -> None:
    width = min(width, 200 * height)
    height = min(height, 200 * width)
    assert_same(Image.fromarray(noise(height, width, seed=seed)))


@pytest.mark.judge
@pytest.mark.parametrize(
    ("height", "width"),
    [
        (1, 1),
        (1, 200),
        (200, 1),
        (2, 400),
        (1, 2),
        (31, 6200),
        (255, 257),
        (256, 256),
        (320, 319),
        (16, 48),
        (3000, 15),
    ],
)
@pytest.mark.parametrize("checkpoint", [QWEN3_VL, SMALL], ids=["qwen3-vl", "small"])
def test_odd_sizes_are_equal(height: int, width: int, checkpoint: dict[str, Any]) -> None:
    # As a PIL image: of an array with a side of 1 or 3 transformers guesses that it is the channel axis.
    assert_same(Image.fromarray(noise(height, width)), checkpoint)


@pytest.mark.judge
def test_black_and_white_edges_are_clamped_alike() -> None:
    assert_same(np.where(noise(150, 170) > 127, 255, 0).astype(np.uint8))


@pytest.mark.judge
@pytest.mark.parametrize(
    "step",
    [{"do_normalize": False}, {"do_rescale": False}, {"image_mean": 0.4, "image_std": 0.3}, {"do_resize": False}],
)
def test_switched_steps_are_equal(step: dict[str, Any]) -> None:
    assert_same(noise(96, 64), {**SMALL, **step})


@settings(max_examples=500, deadline=None)
@given(
    st.integers(1, 20_000), st.integers(1, 20_000), st.integers(28, 64), st.integers(1, 10**6), st.integers(1, 10**8)
)
def test_smart_resize_is_that_of_the_locked_release(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as expected

    width = min(width, 200 * height)
    height = min(height, 200 * width)
    limits = {"min_pixels": max(min_pixels, factor**2), "max_pixels": max(max_pixels, min_pixels, factor**2)}
    assert smart_resize(height, width, factor=factor, **limits) == expected(height, width, factor, **limits)


@pytest.mark.judge
@settings(max_examples=500, deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 10**6), st.integers(1, 10**8))
def test_the_number_of_patches_of_any_size(height: int, width: int, min_pixels: int, max_pixels: int) -> None:
    width = min(width, 200 * height)
    height = min(height, 200 * width)
    limits = {"min_pixels": max(min_pixels, 32**2), "max_pixels": max(max_pixels, min_pixels, 32**2)}
    processor = judge.image_processor({"patch_size": 16, "merge_size": 2})
    expected = processor.get_number_of_image_patches(height, width, {**limits, "patch_size": 16, "merge_size": 2})
    rows, columns = smart_resize(height, width, factor=32, **limits)
    assert (rows // 16) * (columns // 16) == expected


def torch_resize(image: np.ndarray, height: int, width: int, kernel: Kernel = BICUBIC) -> np.ndarray:
    import torch
    from torchvision.transforms.v2 import functional as tvf

    tensor = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    mode = tvf.InterpolationMode.BICUBIC if kernel is BICUBIC else tvf.InterpolationMode.BILINEAR
    resized = tvf.resize(tensor, [height, width], interpolation=mode, antialias=True)
    return resized.permute(1, 2, 0).numpy()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(2, 300), st.integers(2, 300), st.integers(0, 99))
def test_resize_is_equal(source_height: int, source_width: int, height: int, width: int, seed: int) -> None:
    image = noise(source_height, source_width, seed=seed)
    for kernel in (BICUBIC, BILINEAR):
        expected = torch_resize(image, height, width, kernel)
        np.testing.assert_array_equal(resize(image, height, width, kernel), expected)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((2100, 1300), (1056, 1312)),  # two strips in the horizontal pass
        ((40, 11000), (64, 11008)),  # two blocks of columns in the vertical pass
        ((300, 400), (304, 400)),  # one pass only
        ((300, 400), (300, 416)),
        ((3, 9000), (2, 32)),  # over a thousand taps
    ],
)
def test_resize_in_pieces_is_equal(source: tuple[int, int], target: tuple[int, int]) -> None:
    image = noise(*source)
    before = image.copy()
    for kernel in (BICUBIC, BILINEAR):
        np.testing.assert_array_equal(resize(image, *target, kernel), torch_resize(image, *target, kernel))
    np.testing.assert_array_equal(image, before)


def encoded(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def modes() -> dict[str, Image.Image]:
    rgba = Image.fromarray(noise(90, 140, 4))
    palette = Image.fromarray(picture()).quantize(16)
    one_index, table = palette.copy(), palette.copy()
    one_index.info["transparency"] = 3
    table.info["transparency"] = bytes(range(0, 256, 16))
    key_color = Image.fromarray(picture())
    key_color.info["transparency"] = (40, 0, 250)
    return {
        "RGB": Image.fromarray(picture()),
        "RGBA": rgba,
        "LA": rgba.convert("LA"),
        "L": rgba.convert("L"),
        "1": rgba.convert("1"),
        "P": palette,
        "P-index": one_index,
        "P-table": table,
        "RGB-key": key_color,
    }


@pytest.mark.parametrize("name", modes())
def test_png_files_are_equal(name: str, tmp_path: Path) -> None:
    image = modes()[name]
    path = tmp_path / "image.png"
    image.save(path, **{key: value for key, value in image.info.items() if key == "transparency"})
    with Image.open(path) as reopened:
        assert (reopened.info.get("transparency") is None) == (image.info.get("transparency") is None)
    assert_same(str(path))


@pytest.mark.parametrize("name", [*modes(), "CMYK", "YCbCr", "HSV", "PA"])
def test_pil_images_are_equal(name: str) -> None:
    image = modes()[name] if name in modes() else Image.fromarray(picture()).convert("P" if name == "PA" else name)
    assert_same(image.convert("PA") if name == "PA" else image)


def test_transparency_follows_the_kind_of_source(tmp_path: Path) -> None:
    pixels = np.full((40, 40, 4), (10, 20, 30, 0), np.uint8)
    path = tmp_path / "clear.png"
    Image.fromarray(pixels).save(path)
    assert_same(str(path))
    assert_same(Image.open(path))
    assert load_image(path)[0, 0].tolist() == [10, 20, 30]
    assert load_image(Image.open(path))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("mode", "format_name", "options"),
    [
        ("RGB", "JPEG", {"quality": 85}),
        ("RGB", "JPEG", {"quality": 85, "subsampling": 0}),
        ("RGB", "JPEG", {"progressive": True}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "WEBP", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("P", "GIF", {}),
    ],
)
def test_files_of_other_formats_are_equal(mode: str, format_name: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / f"image.{format_name.lower()}"
    path.write_bytes(encoded(Image.fromarray(picture()).convert(mode), format_name, **options))
    assert_same(str(path))


@pytest.mark.parametrize("format_name", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_equal(orientation: int, format_name: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    path.write_bytes(encoded(Image.fromarray(picture()), format_name, exif=exif))
    assert_same(str(path))
    assert load_image(path).shape == ((90, 140, 3) if orientation < 5 else (140, 90, 3))
    # An opened image stays as it lies, as in transformers.
    assert_same(Image.open(path))


@pytest.mark.judge
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_are_equal(channels: int) -> None:
    if channels == 4:
        judge.skip_unless(judge.release() > (5, 10), "it does not find the channel axis of four channels")
    assert_same(noise(60, 90, channels))


@pytest.mark.portable
def test_array_without_channel_axis_is_grey() -> None:
    grey = noise(60, 90, 1)
    expected = process_image(grey, ImageProcessorConfig.from_dict(SMALL))
    found = process_image(grey[..., 0], ImageProcessorConfig.from_dict(SMALL))
    np.testing.assert_array_equal(found.pixel_values, expected.pixel_values)


LIMITS = {"shortest_edge": 1024, "longest_edge": 65536}
OLDER_FORMS: dict[str, dict[str, Any]] = {
    "videos": {"do_sample_frames": True, "fps": 2, "max_frames": 768, "min_frames": 4, "num_frames": None},
    "more of videos": {"return_metadata": False, "max_video_tokens": 768, "video_metadata": None},
    "bilinear": {"resample": 2},
    "limits at the top": {"size": None, "min_pixels": 1024, "max_pixels": 65536},
    "one limit at the top": {"size": None, "min_pixels": 1024},
    "limits in both places": {"size": {"min_pixels": 1, "max_pixels": 2}, "min_pixels": 1024, "max_pixels": 65536},
    "limits mixed": {"size": {"longest_edge": 65536}, "min_pixels": 1024},
    "limits at the top win": {"size": LIMITS, "min_pixels": 4096, "max_pixels": 16384},
    "class of 4": {"image_processor_type": "Qwen2VLImageProcessor"},
    "class by its older key": {"image_processor_type": None, "feature_extractor_type": "Qwen2VLImageProcessor"},
    "numbers for all channels": {"image_mean": 0.5, "image_std": 0.25},
    "steps that are off": {"do_pad": False, "do_center_crop": False, "crop_size": None, "pad_size": None},
}


@pytest.mark.judge
@pytest.mark.parametrize("name", OLDER_FORMS)
def test_settings_of_older_releases_are_read_as_transformers_reads_them(name: str) -> None:
    judge.skip_unless(judge.release() >= (5, 10), "older ones read them in ways of their own")
    checkpoint = {key: value for key, value in {**SMALL, **OLDER_FORMS[name]}.items() if value is not None}
    for height, width in ((50, 70), (500, 300)):
        assert_same(Image.fromarray(noise(height, width)), checkpoint)


@pytest.mark.judge
@pytest.mark.parametrize("size", [{"shortest_edge": 1024}, {"longest_edge": 65536}, {"min_pixels": 1, "max_pixels": 2}])
def test_sizes_that_transformers_does_not_take_are_refused(size: dict[str, int]) -> None:
    judge.skip_unless(judge.release() >= (5, 10), "older ones read them in ways of their own")
    with pytest.raises(CheckpointError, match=r"size: .*(longest|shortest)_edge"):
        ImageProcessorConfig.from_dict({**SMALL, "size": size})
    with pytest.raises(ValueError, match="must contain 'shortest_edge' and 'longest_edge'"):
        reference(Image.fromarray(noise(50, 70)), {**SMALL, "size": size})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resample": 0}, r"resample: expected 3 \(bicubic, as every published Qwen3-VL\) or 2 \(bilinear\), found 0"),
        ({"resample": 1}, "resample: expected 3"),
        ({"resample": True}, "resample: expected 3 .* found True"),
        ({"resample": "bicubic"}, "resample: expected 3 .* found 'bicubic'"),
        (
            {"image_processor_type": "CLIPImageProcessor"},
            "image_processor_type is 'CLIPImageProcessor', expected Qwen2VL",
        ),
        ({"image_processor_type": None, "feature_extractor_type": "X"}, "feature_extractor_type is 'X'"),
        ({"size": {"height": 64, "width": 64}}, "size: expected shortest_edge and longest_edge"),
        ({"size": 64}, "size: expected shortest_edge and longest_edge in pixels, found 64"),
        ({"image_mean": [10**400] * 3}, "image_mean: expected 3 finite numbers"),
        ({"rescale_factor": 10**400}, "rescale_factor: expected a number above 0"),
        ({"min_pixels": 10**5000, "max_pixels": 10**5000}, "is no whole number|min_pixels: expected a whole number"),
        ({"\ud800": 1}, r"unknown keys '\\ud800'"),
    ],
    ids=lambda value: "",
)
def test_settings_that_make_other_pixels_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        ImageProcessorConfig.from_dict({**SMALL, **changes})
    assert caught.value.message.isprintable() and len(str(caught.value)) < 600

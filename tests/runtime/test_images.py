"""Loading of images and the settings of the processor: what is taken, and the error for what is not. No torch."""

from __future__ import annotations

import base64
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.damage import png_of_size
from runtime.errors import CapacityError, CheckpointError, ImageError, Qwen3VLError, UsageError
from runtime.image_bounds import MAX_IMAGE_PIXELS
from runtime.image_config import ImageProcessorConfig, smart_resize
from runtime.image_processor import process_image
from runtime.images import load_image

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encode(image: Image.Image, format_name: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


PNG = encode(Image.fromarray(PIXELS))
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.mark.portable
def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "an image.png"
    path.write_bytes(PNG)
    wrapped = DATA_URL[:60] + "\n" + DATA_URL[60:]
    sources = [path, str(path), path.as_uri(), PNG, bytearray(PNG), memoryview(PNG), DATA_URL, wrapped]
    sources += [DATA_URL.replace("+", "%2B"), DATA_URL.replace("data:", "DATA:"), PIXELS, PIXELS[::-1][::-1]]
    sources += [Image.fromarray(PIXELS), Image.open(path)]
    for source in sources:
        image = load_image(source)
        assert image.dtype == np.uint8 and image.flags.c_contiguous
        np.testing.assert_array_equal(image, PIXELS)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(load_image("an image.png"), PIXELS)


@pytest.mark.portable
def test_a_name_with_a_colon_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photo:1.png").write_bytes(PNG)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(load_image("photo:1.png"), PIXELS)


@pytest.mark.portable
@pytest.mark.parametrize("format_name", ["BMP", "TIFF", "PPM", "PNG", "GIF", "ICO"])
def test_lossless_formats(format_name: str) -> None:
    colors = Image.fromarray(PIXELS[:16, :16] // 128 * 255)  # eight colours: a GIF keeps them
    options = {"sizes": [(16, 16)]} if format_name == "ICO" else {}
    np.testing.assert_array_equal(load_image(encode(colors, format_name, **options)), np.array(colors))


@pytest.mark.portable
def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime")]
    for format_name in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if format_name == "WEBP" else {}
        data = encode(frames[0], format_name, save_all=True, append_images=frames[1:], **options)
        assert load_image(data)[4, 4].tolist() == [255, 0, 0]


@pytest.mark.portable
@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_high_byte(format_name: str) -> None:
    levels = np.array([[0, 255, 256, 1000, 32767, 65535]], np.uint16)
    expected = np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, axis=2)
    image = Image.fromarray(levels)
    if format_name == "PPM":
        image = image.convert("I")
    np.testing.assert_array_equal(load_image(encode(image, format_name)), expected)
    if format_name == "PNG":
        np.testing.assert_array_equal(load_image(Image.fromarray(levels)), expected)


@pytest.mark.portable
def test_loading_leaves_the_source_alone() -> None:
    image = Image.fromarray(PIXELS).quantize(8)
    image.info["transparency"] = 2
    before = np.array(image)
    load_image(image)
    assert image.info["transparency"] == 2 and image.mode == "P"
    np.testing.assert_array_equal(np.array(image), before)


@pytest.mark.portable
def test_no_warning_is_shown() -> None:
    palette = Image.fromarray(PIXELS).quantize(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(encode(palette, transparency=bytes(range(8))))
        with pytest.raises(ImageError):  # in the range in which Pillow warns
            load_image(png_of_size(10_000, 10_000), max_image_pixels=10**8)


@pytest.mark.portable
@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ("missing.png", ImageError, "no such file"),
        (".", ImageError, "found a folder"),
        ("/dev/zero", ImageError, "found a device"),
        ("a" * 5000, ImageError, "cannot be opened"),
        ("nul\0.png", ImageError, ""),
        ("", ImageError, "found a folder"),
        (b"", ImageError, "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ImageError, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ImageError, "not an image"),
        (PNG[:-60], ImageError, "damaged or cut short"),
        (PNG[:40], ImageError, "header is damaged"),
        (PNG[:60] + b"\0\0\0\0" + PNG[64:], ImageError, "damaged or cut short"),
        (encode(Image.fromarray(PIXELS), "JPEG")[:-40], ImageError, "damaged or cut short"),
        (png_of_size(64, 64), ImageError, "damaged or cut short"),
        (png_of_size(0, 5), ImageError, ""),
        (png_of_size(13_378, 13_378), CapacityError, str(MAX_IMAGE_PIXELS)),
        (png_of_size(60_000, 60_000), CapacityError, str(MAX_IMAGE_PIXELS)),
        ("http://host/cat.png", UsageError, "nothing is fetched"),
        ("HTTPS://host/cat.png", UsageError, "nothing is fetched"),
        ("s3://bucket/cat.png", UsageError, "nothing is fetched"),
        (Path("http://host/cat.png"), UsageError, "nothing is fetched"),  # pathlib makes it http:/host/cat.png
        ("http:/host/cat.png", UsageError, "scheme 'http'"),
        (Path("file:///missing.png"), UsageError, "plain path"),
        ("file://host/cat.png", UsageError, "found host 'host'"),
        ("file:///missing.png", ImageError, "no such file"),
        ("data:image/png;base64", ImageError, "comma"),
        ("data:image/png,abcd", ImageError, "base64"),
        ("data:text/plain;base64,abcd", ImageError, "text/plain"),
        ("data:image/png;base64,ab!d", ImageError, "text that is not"),
        ("data:image/png;base64,abcde", ImageError, "text that is not"),
        ("data:image/png;base64,", ImageError, "it is empty"),
        (None, UsageError, "NoneType"),
        (7, UsageError, "int"),
        ([PIXELS], UsageError, "list"),
        (Image.new("RGB", (0, 5)), ImageError, "0 x 5"),
        (Image.new("F", (5, 5)), ImageError, "mode 'F'"),
        (Image.new("I", (5, 5)), ImageError, "mode 'I'"),
        (np.zeros((0, 5, 3), np.uint8), ImageError, "5 x 0"),
        (np.zeros((3, 20, 30), np.uint8), ImageError, "channels-first"),
        (np.zeros((1, 20, 30, 3), np.uint8), ImageError, "batch"),
        (np.zeros(5, np.uint8), ImageError, "[H, W]"),
        (np.zeros((5, 5, 2), np.uint8), ImageError, "[H, W, 3]"),
        (np.zeros((5, 5, 3), np.float32), ImageError, "float32"),
        (np.full((5, 5, 3), np.nan), ImageError, "NaN"),
        (np.zeros((5, 5), np.uint16), ImageError, "uint16"),
        (np.zeros((5, 5), bool), ImageError, "bool"),
        (np.zeros((5, 5), object), ImageError, "object"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000)), CapacityError, str(MAX_IMAGE_PIXELS)),
    ],
)
def test_bad_sources(source: Any, error: type[Qwen3VLError], text: str) -> None:
    with pytest.raises(Qwen3VLError) as caught:
        load_image(source)
    assert type(caught.value) is error
    assert text in str(caught.value)
    assert caught.value.remedy
    assert len(str(caught.value)) < 500


@pytest.mark.portable
def test_a_named_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="found a named pipe"):
        load_image(tmp_path / "pipe.png")


@pytest.mark.portable
def test_a_truncated_file_opened_by_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(PNG[:-60])
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_image(Image.open(path))


CHECKPOINT: dict[str, Any] = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}


@pytest.mark.portable
def test_settings_of_a_checkpoint() -> None:
    config = ImageProcessorConfig.from_dict(CHECKPOINT)
    assert (config.min_pixels, config.max_pixels, config.patch_size, config.factor) == (65536, 16777216, 16, 32)
    assert config.image_mean == config.image_std == (0.5, 0.5, 0.5)
    assert ImageProcessorConfig.from_dict({"image_processor": CHECKPOINT, "processor_class": "x"}) == config
    older = {**CHECKPOINT, "min_pixels": 4096, "max_pixels": 8192}
    assert ImageProcessorConfig.from_dict(older) == config.with_limits(4096, 8192)
    assert ImageProcessorConfig.from_dict({**CHECKPOINT, "do_pad": None, "do_center_crop": False}) == config
    assert config.with_limits() == config
    assert config.with_limits(max_pixels=70_000).max_pixels == 70_000


@pytest.mark.portable
@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes, base64.urlsafe_b64encode])
def test_base64_without_a_prefix_is_an_image_unless_it_is_a_path(
    encode: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = encode(PNG).decode()
    assert np.array_equal(load_image(text), load_image(PNG))
    with pytest.raises(ImageError, match=r"no such file|cannot be opened"):
        load_image(text.replace("iVBOR", "aVBOR"))
    (tmp_path / "iVBORw0KGgo").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match="found a folder"):
        load_image("iVBORw0KGgo" + "/." * 40)


@pytest.mark.portable
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"resample": 1}, "resample"),
        ({"do_rescale": None, "image_mean": None}, "do_rescale, image_mean: null, which releases of transformers read"),
        ({"do_convert_rgb": False}, "do_convert_rgb"),
        ({"do_center_crop": True, "crop_size": {"height": 9, "width": 9}}, "do_center_crop"),
        ({"do_pad": True}, "do_pad"),
        ({"size": {"height": 448, "width": 448}}, "size"),
        ({"size": 448}, "size"),
        ({"size": {"shortest_edge": 9000, "longest_edge": 8000}}, "above max_pixels"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"image_std": "0.5"}, "image_std"),
        ({"patch_size": 0}, "patch_size"),
        ({"merge_size": 2.0}, "merge_size"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"sharpen": True}, "unknown keys 'sharpen'"),
        ({"image_processor": 3}, "expected an object"),
    ],
)
def test_bad_settings(change: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        ImageProcessorConfig.from_dict({**CHECKPOINT, **change})


@pytest.mark.portable
@pytest.mark.parametrize("limits", [{"max_pixels": 1000}, {"min_pixels": 0}, {"max_pixels": 1.5}, {"max_pixels": True}])
def test_bad_limits(limits: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"m\w\w_pixels"):
        ImageProcessorConfig.from_dict(CHECKPOINT).with_limits(**limits)


@pytest.mark.portable
def test_aspect_ratio_of_200_is_the_limit() -> None:
    config = ImageProcessorConfig.from_dict(CHECKPOINT)
    assert process_image(np.zeros((1, 200, 3), np.uint8), config).grid_thw == (1, 2, 228)
    with pytest.raises(ImageError, match=r"ratio of at most 200, found 201\.0"):
        process_image(np.zeros((1, 201, 3), np.uint8), config)
    with pytest.raises(ImageError, match="at least one pixel"):
        smart_resize(0, 5, factor=32, min_pixels=1, max_pixels=9)


@pytest.mark.portable
def test_no_side_vanishes() -> None:
    assert smart_resize(10, 10, factor=32, min_pixels=1, max_pixels=9999) == (32, 32)
    assert smart_resize(3, 500, factor=32, min_pixels=1, max_pixels=1) == (32, 32)


@pytest.mark.portable
def test_memory_of_the_patches_is_limited() -> None:
    config = ImageProcessorConfig.from_dict(CHECKPOINT).with_limits(min_pixels=10**8, max_pixels=10**9)
    with pytest.raises(CapacityError, match="max_pixels"):
        process_image(PIXELS, config)


@pytest.mark.portable
def test_patches_are_in_merge_order() -> None:
    config = ImageProcessorConfig(
        patch_size=2, temporal_patch_size=2, merge_size=2, min_pixels=1, do_rescale=False, do_normalize=False
    )
    image = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
    processed = process_image(image, config)
    assert processed.grid_thw == (1, 2, 4)
    assert processed.merged_grid_thw == (1, 1, 2)
    assert processed.num_visual_tokens == 2
    assert processed.pixel_values.shape == (8, 3 * 2 * 2 * 2)
    corners = [(0, 0), (0, 2), (2, 0), (2, 2), (0, 4), (0, 6), (2, 4), (2, 6)]  # the four patches of a token together
    for patch, (row, column) in zip(processed.pixel_values, corners, strict=True):
        expected = image[row : row + 2, column : column + 2].transpose(2, 0, 1)
        np.testing.assert_array_equal(patch.reshape(3, 2, 2, 2), np.stack([expected, expected], axis=1))


@pytest.mark.portable
def test_images_that_are_not_resized_must_fit() -> None:
    config = ImageProcessorConfig.from_dict({**CHECKPOINT, "do_resize": False})
    assert process_image(np.zeros((32, 64, 3), np.uint8), config).grid_thw == (1, 2, 4)
    with pytest.raises(ImageError, match="multiples of 32"):
        process_image(np.zeros((32, 65, 3), np.uint8), config)

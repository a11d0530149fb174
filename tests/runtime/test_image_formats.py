"""HEIC and AVIF images, and every form in which the text of a message holds an image file."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_from_bytes

import numpy as np
import pytest
from PIL import Image, features

from runtime.errors import CapacityError, ImageError
from runtime.images import load_image

ROOT = Path(__file__).parents[2]
# A plain picture, each quarter of a colour of its own, survives every codec.
QUARTERS = np.zeros((64, 96, 3), np.uint8)
QUARTERS[:32, :48], QUARTERS[:32, 48:], QUARTERS[32:, :48] = (200, 30, 40), (30, 180, 60), (40, 60, 220)
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF codec")


def encoded(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def heic(array: np.ndarray, mode: str = "RGB", **options: Any) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    size = (array.shape[1], array.shape[0])
    pillow_heif.encode(mode, size, array.tobytes(), buffer, quality=95, chroma=444, **options)
    return buffer.getvalue()


def assert_near(found: np.ndarray, expected: np.ndarray, most: int = 6) -> None:
    assert found.shape == expected.shape and found.dtype == np.uint8
    # Edges of colours are blurred by a codec; the quarters are not.
    assert np.percentile(np.abs(found.astype(int) - expected), 95) <= most


def test_heic_files_of_8_and_10_bits_grey_and_with_alpha() -> None:
    assert_near(load_image(heic(QUARTERS)), QUARTERS)
    assert_near(load_image(heic(QUARTERS.astype(np.uint16) * 257, "RGB;16")), QUARTERS)
    grey = QUARTERS[..., 1]
    assert_near(load_image(heic(grey, "L")), np.repeat(grey[..., None], 3, axis=2))
    transparent = np.dstack([QUARTERS, np.full(QUARTERS.shape[:2], 90, np.uint8)])
    assert_near(load_image(heic(transparent, "RGBA")), QUARTERS)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8, 2])
def test_a_turned_heic_file_is_turned_once(orientation: int) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(QUARTERS)).save(buffer, quality=95, exif=exif.tobytes())
    jpeg = encoded(Image.fromarray(QUARTERS), "JPEG", exif=exif, quality=95)
    from_heic, from_jpeg = load_image(buffer.getvalue()), load_image(jpeg)
    assert from_heic.shape == ((96, 64, 3) if orientation in (6, 8) else (64, 96, 3))
    assert_near(from_heic, from_jpeg)


def test_heic_files_are_bounded_before_they_are_decoded() -> None:
    data = heic(QUARTERS)
    enough = 64 * 96 * 24 // 8
    assert load_image(data, max_image_pixels=enough).shape == QUARTERS.shape
    with pytest.raises(CapacityError, match="HEIF of 96 x 64 pixels; expected at most 6143 pixels"):
        load_image(data, max_image_pixels=enough - 1)
    with pytest.raises(CapacityError, match="found 96 x 64 = 6144 pixels"):
        load_image(data, max_image_pixels=6143)
    with pytest.raises(ImageError, match=r"HEIC file of \d+ bytes, expected at most 30"):
        load_image(data, max_image_pixels=30)


def test_damaged_heic_files_are_refused() -> None:
    data = heic(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    for damaged in (data[:40], data[: len(data) // 2], data[:200] + bytes(len(data) - 200)):
        with pytest.raises(ImageError, match=r"damaged|not an image"):
            load_image(damaged)


def test_pillow_opens_no_more_than_before() -> None:
    pytest.importorskip("pillow_heif")
    code = (
        "import sys, io\nfrom PIL import Image\nfrom runtime.images import load_image\nImage.init()\n"
        "before = set(Image.OPEN)\nload_image(sys.stdin.buffer.read())\n"
        "assert set(Image.OPEN) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=heic(QUARTERS), cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.portable
def test_without_the_plugin_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for brands in (b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic"):
        data = (8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands + bytes(100)
        with pytest.raises(ImageError, match="needs the package pillow-heif") as caught:
            load_image(data)
        assert "install the extra `heif`" in caught.value.remedy


@pytest.mark.portable
@needs_avif
def test_avif_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = encoded(Image.fromarray(QUARTERS), "AVIF", quality=95)
    assert_near(load_image(data), QUARTERS)
    assert_near(load_image(data.replace(b"ftypavif", b"ftypmif1", 1)), QUARTERS)


def files() -> dict[str, bytes]:
    image = Image.fromarray(QUARTERS)
    names = ["BMP", "GIF", "ICO", "JPEG", "PNG", "PPM", "TIFF", "WEBP"]
    names += [name for name, feature in (("JPEG2000", "jpg_2000"), ("AVIF", "avif")) if features.check(feature)]
    return {name: encoded(image, name) for name in names}


@pytest.mark.portable
@pytest.mark.parametrize("name", sorted(files()))
def test_bare_base64_of_every_format(name: str) -> None:
    data = files()[name]
    expected = load_image(data)
    for text in (base64.b64encode(data), base64.urlsafe_b64encode(data).rstrip(b"="), base64.encodebytes(data)):
        np.testing.assert_array_equal(load_image(text.decode()), expected)


def test_bare_base64_of_heic() -> None:
    data = heic(QUARTERS)
    np.testing.assert_array_equal(load_image(base64.b64encode(data).decode()), load_image(data))


@pytest.mark.portable
@pytest.mark.parametrize(
    "form",
    [
        "data:;base64,{text}",
        "data:application/octet-stream;base64,{text}",
        "DATA:IMAGE/PNG;BASE64,{text}",
        "data:image/png;charset=utf-8;name=a.png;base64,{text}",
        "data: image/png ; base64 ,{text}",
        "data:image/png;base64,{urlsafe}",
        "data:image/png;base64,{quoted}",
        "data:image/png;base64,\n{lines}",
        "data:image/jpeg;base64,{text}",  # of another type than the file: its bytes say what it is
        "data:image/png,{percent}",
        "data:,{percent}",
    ],
)
def test_data_urls_of_every_form(form: str) -> None:
    data = encoded(Image.fromarray(QUARTERS), "PNG")
    text = base64.b64encode(data).decode()
    url = form.format(
        text=text,
        urlsafe=base64.urlsafe_b64encode(data).decode().rstrip("="),
        quoted=quote(text, safe=""),
        lines=base64.encodebytes(data).decode(),
        percent=quote_from_bytes(data),
    )
    np.testing.assert_array_equal(load_image(url), QUARTERS)


@pytest.mark.portable
@pytest.mark.parametrize("media_type", ["text/plain", "application/json", "video/mp4", "application/pdf"])
def test_data_urls_of_something_else_are_refused(media_type: str) -> None:
    with pytest.raises(ImageError, match=f"expected an image/… media type, found '{media_type}'"):
        load_image(f"data:{media_type};base64,abcd")

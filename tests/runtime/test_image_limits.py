"""What images may cost: refused from the header, bounded memory, and the same pixels as Pillow's own steps give."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from helpers import ROOT
from helpers.damage import png_of_size
from runtime.errors import CapacityError, ImageError, UsageError
from runtime.image_bounds import MAX_IMAGE_PIXELS, MOST_IMAGE_PIXELS, CountedReader
from runtime.image_config import ImageProcessorConfig
from runtime.image_processor import process_image
from runtime.images import load_image
from runtime.model import Qwen3VLModel

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)
SIDE = 1500


def encode(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def ico(contents: bytes) -> bytes:
    """Return an ICO file of one image, said to be 16 x 16."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(contents), 22) + contents


def dib(width: int, height: int) -> bytes:
    return struct.pack("<IiiHHIIiiII", 40, width, 2 * height, 1, 32, 0, 0, 0, 0, 0, 0)


def tiff(tags: list[tuple[int, int]], contents: bytes = b"") -> bytes:
    """Return a TIFF file of 32-bit tags; a value of -1 is where the contents begin."""
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = (struct.pack("<HHII", tag, 4, 1, offset if value < 0 else value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(entries) + bytes(4) + contents


def gif_of_size(width: int, height: int) -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, width, height, 0)
        + b"\2\2\x44\1\0;"
    )


def bmp_of_size(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def tiff_of_size(width: int, height: int) -> bytes:
    gray = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 9)]
    return tiff(gray)


HEADERS: dict[str, Callable[[int, int], bytes]] = {
    "PNG": png_of_size,
    "GIF": gif_of_size,
    "BMP": bmp_of_size,
    "PPM": lambda width, height: f"P6 {width} {height} 255\n".encode(),
    "TIFF": tiff_of_size,
    "ICO with PNG": lambda width, height: ico(png_of_size(width, height)),
    "ICO with BMP": lambda width, height: ico(dib(width, height)),
}


@pytest.mark.portable
@pytest.mark.parametrize("name", list(HEADERS))
@pytest.mark.parametrize(("width", "height"), [(7072, 7072), (50_000_001, 1), (13_377, 13_377), (60_000, 60_000)])
def test_the_header_is_enough(name: str, width: int, height: int) -> None:
    if name == "GIF" and width > 65_535:
        pytest.skip("a GIF has 16 bits for a side")
    with pytest.raises(CapacityError, match=f"expected at most {MAX_IMAGE_PIXELS} pixels"):
        load_image(HEADERS[name](width, height))
    with pytest.raises((ImageError, CapacityError)) as caught:
        load_image(HEADERS[name](width, height), max_image_pixels=MOST_IMAGE_PIXELS)
    # Pillow counts both of the pictures that a BMP inside of an ICO holds.
    num_pixels = width * height * (2 if name == "ICO with BMP" else 1)
    assert ("expected at most 178956970" in str(caught.value)) == (num_pixels > MOST_IMAGE_PIXELS)


@pytest.mark.portable
def test_the_limit_is_exact_and_an_option() -> None:
    png = encode(RGB, "PNG")
    assert load_image(png, max_image_pixels=2400).shape == (40, 60, 3)
    with pytest.raises(CapacityError, match=r"2399 pixels, found 60 x 40 = 2400.*\n.*raise max_image_pixels"):
        load_image(png, max_image_pixels=2399)
    config = ImageProcessorConfig()
    for source in (png, RGB, PIXELS, Image.open(io.BytesIO(png))):
        assert process_image(source, config, max_image_pixels=2400).grid_thw == (1, 4, 6)
        with pytest.raises(CapacityError, match="at most 2399 pixels"):
            process_image(source, config, max_image_pixels=2399)


@pytest.mark.portable
def test_the_option_of_a_model(demo_engine: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "image", "image": PIXELS}]}]
    assert Qwen3VLModel.from_engine(demo_engine).max_image_pixels == MAX_IMAGE_PIXELS == 50_000_000
    assert Qwen3VLModel.from_engine(demo_engine, max_image_pixels=2400).prepare(messages).images
    with pytest.raises(CapacityError, match="at most 2399 pixels"):
        Qwen3VLModel.from_engine(demo_engine, max_image_pixels=2399).prepare(messages)
    for value in (0, -1, MOST_IMAGE_PIXELS + 1, 1.5, True, "9"):
        with pytest.raises(UsageError, match=r"max_image_pixels = .*expected a whole number of 1 to 178956970"):
            Qwen3VLModel.from_engine(demo_engine, max_image_pixels=value)  # type: ignore[arg-type]


@pytest.mark.portable
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, object])
@pytest.mark.parametrize("shape", [(13_000, 13_000, 4), (10**6, 10**6, 3), (1, 2**40), (10**5, 10**5, 1)])
def test_an_array_that_is_a_view_of_one_value_is_not_looked_at(shape: tuple[int, ...], dtype: type) -> None:
    with pytest.raises(CapacityError, match="expected at most 50000000 pixels"):
        load_image(np.broadcast_to(np.zeros((), dtype), shape))


TILE = zlib.compress(bytes(30_000 * 20_000 // 8), 1)
NUMEROUS = {
    "chunks of a PNG": encode(RGB, "PNG")[:33] + chunk(b"tEXt", b"a\0b") * 500_000 + encode(RGB, "PNG")[33:],
    "comment of a PPM": b"P6\n" + b"#" * 3_000_000,
    "spaces of a PPM": b"P6\n" + b" " * 3_000_000,
    "markers of a JPEG": encode(RGB, "JPEG")[:2] + b"\xff\xfe\0\2" * 1_000_000 + encode(RGB, "JPEG")[2:],
    "fill bytes of a JPEG": encode(RGB, "JPEG")[:2] + b"\xff" * 3_000_000 + encode(RGB, "JPEG")[2:],
    "extensions of a GIF": encode(RGB.quantize(2), "GIF")[:19] + b"\x21\xfe\1a\0" * 1_000_000,
    "boxes of a JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x08free" * 500_000,
}


@pytest.mark.portable
@pytest.mark.parametrize("name", list(NUMEROUS))
def test_a_file_of_very_many_pieces_is_given_up(name: str) -> None:
    with pytest.raises(ImageError, match="made of very many small pieces"):
        load_image(NUMEROUS[name])


@pytest.mark.portable
def test_a_file_of_ordinary_pieces_is_read() -> None:
    png = encode(Image.effect_noise((1000, 1000), 90), "PNG")
    start = png.index(b"IDAT") - 4
    data = b"".join(re.findall(rb"(?s)IDAT(.*?)....(?=....I(?:DAT|END))", png))
    assert zlib.decompressobj().decompress(data[:100])  # it is the image's
    whole = Image.open(io.BytesIO(png))
    stream = zlib.compress(b"".join(b"\0" + bytes(row) for row in np.asarray(whole)))
    small = b"".join(chunk(b"IDAT", stream[i : i + 1024]) for i in range(0, len(stream), 1024))
    np.testing.assert_array_equal(load_image(png[:start] + small + chunk(b"IEND", b"")), load_image(png))


@pytest.mark.portable
def test_tiles_larger_than_the_image_are_refused() -> None:
    tags = [(256, 100), (257, 100), (258, 8), (259, 8), (262, 1), (277, 1), (322, 30_000), (323, 20_000), (324, -1)]
    with pytest.raises(CapacityError, match="found tiles of 30000 x 20000"):
        load_image(tiff([*tags, (325, len(TILE))], TILE))
    fitting = encode(RGB, "TIFF", compression="tiff_lzw")
    np.testing.assert_array_equal(load_image(fitting), PIXELS)


@pytest.mark.portable
@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_an_image_is_turned_as_pillow_turns_it(format_name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(RGB, format_name, exif=exif)
    expected = Image.open(io.BytesIO(data))
    ImageOps.exif_transpose(expected, in_place=True)
    found = load_image(data)
    np.testing.assert_array_equal(found, np.asarray(expected.convert("RGB")))
    assert found.flags.c_contiguous


@pytest.mark.portable
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_strips_give_the_pixels_of_the_whole(mode: str) -> None:
    # Wide enough for several strips, and a last one that is shorter.
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (13, 100_000, 4), dtype=np.uint8), "RGBA")
    image = wide.convert("L").convert(mode) if mode in ("1", "LA", "PA") else wide.convert("RGB").convert(mode)
    if mode == "RGBA":
        image = wide
    whole = image
    if mode in ("RGBA", "LA", "PA"):
        rgba = image.convert("RGBA")
        whole = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    np.testing.assert_array_equal(load_image(image), np.asarray(whole.convert("RGB")))


CHILD = """
import re, sys
from runtime.errors import Qwen3VLError
from runtime.image_config import ImageProcessorConfig
from runtime.image_processor import process_image

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

config = ImageProcessorConfig(patch_size=16, max_pixels=65536)
for path in sys.argv[1:]:
    contents = open(path, "rb").read()
    open("/proc/self/clear_refs", "w").write("5")  # the peak is that from here on
    before = status("VmRSS")
    assert process_image(contents, config).num_visual_tokens == 64
    print(status("VmHWM") - before)
"""


def samples() -> dict[str, bytes]:
    """Return files of SIDE x SIDE pixels, one of every kind that Pillow holds in a way of its own."""
    base = RGB.resize((SIDE, SIDE))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        f"PNG {mode}": encode(base.convert(mode), "PNG", compress_level=1) for mode in ("1", "L", "LA", "P", "RGBA")
    }
    files["PNG 16 bits"] = encode(Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)), "PNG", compress_level=1)
    files["PNG turned"] = encode(base, "PNG", compress_level=1, exif=exif)
    files["JPEG turned"] = encode(base, "JPEG", exif=exif)
    files["JPEG CMYK"] = encode(base.convert("CMYK"), "JPEG")
    files["JPEG progressive"] = encode(base, "JPEG", subsampling=2, progressive=True)
    files["GIF"] = encode(base.quantize(64), "GIF")
    files["BMP"] = encode(base, "BMP")
    files["PPM"] = encode(base, "PPM")
    files["TIFF"] = encode(base, "TIFF", compression="tiff_lzw")
    return files


@pytest.mark.portable
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be set back on this system")
def test_an_image_takes_at_most_eight_bytes_a_pixel(tmp_path: Path) -> None:
    files = {"warm": encode(RGB.resize((300, 300)), "PNG"), **samples()}
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
    paths = [str(tmp_path / name) for name in ("warm", *files)]
    done = subprocess.run([sys.executable, "-c", CHILD, *paths], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    peaks = dict(zip(("warm", *files), map(int, done.stdout.split()), strict=True))
    # Of each strip, a megabyte in several forms; the next file reuses freed memory, so a peak may be lower.
    over = {name: peak / SIDE**2 for name, peak in peaks.items() if peak > 8 * SIDE**2 + 2_000_000}
    assert over == {}
    assert max(peaks.values()) > 6 * SIDE**2  # it was measured


@pytest.mark.portable
@pytest.mark.parametrize("size", [(1, 17_000_000), (17_000_000, 1)])
def test_a_large_thin_image_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="sides of a ratio of at most 200"):
        load_image(png_of_size(*size))


@pytest.mark.portable
@pytest.mark.parametrize("head", [b"P6\n{0} {0}\n65535\n", b"P6\n{0} {0}\n100\n", b"P3\n{0} {0}\n255\n"])
def test_a_ppm_that_is_read_pixel_by_pixel_is_small(head: bytes) -> None:
    small, large = (head.decode().format(side).encode() for side in (600, 1100))
    values = b"1 " * (3 * 600 * 600) if head.startswith(b"P3") else bytes(6 * 600 * 600)
    assert load_image(small + values).shape == (600, 600, 3)
    with pytest.raises(ImageError, match="read pixel by pixel; expected at most 1048576 pixels"):
        load_image(large)


@pytest.mark.portable
@pytest.mark.parametrize(
    "chunk",
    [
        b"VP8X" + bytes(8) + (9999).to_bytes(3, "little") * 2,
        b"VP8L" + bytes(4) + b"/" + (9999 | 9999 << 14).to_bytes(4, "little") + bytes(5),
        b"VP8 " + bytes(7) + b"\x9d\x01\x2a" + (10_000).to_bytes(2, "little") * 2,
    ],
    ids=lambda chunk: chunk[:4].decode(),
)
def test_a_webp_is_refused_by_its_header(chunk: bytes) -> None:
    """Of which nothing but the header is there: Pillow makes room for the frames when it opens the file."""
    with pytest.raises(CapacityError, match="WEBP of 10000 x 10000 pixels"):
        load_image(b"RIFF" + bytes(4) + b"WEBP" + chunk)


@pytest.mark.portable
@pytest.mark.parametrize(
    ("data", "pixel_bytes"),
    [
        (encode(RGB, "WEBP"), 20),
        (encode(RGB, "JPEG", subsampling=0, progressive=True), 10),
        (encode(RGB.convert("CMYK"), "JPEG", progressive=True), 12),
    ],
)
def test_formats_whose_decoders_take_more_may_have_fewer_pixels(data: bytes, pixel_bytes: int) -> None:
    enough = -(-2400 * pixel_bytes // 8)
    assert load_image(data, max_image_pixels=enough).shape == (40, 60, 3)
    with pytest.raises(CapacityError, match=f"since its decoder takes {pixel_bytes} bytes for each"):
        load_image(data, max_image_pixels=enough - 1)


class Promises:
    def __init__(self, path: object) -> None:
        self._path = path

    def __fspath__(self) -> Any:
        return self._path


@pytest.mark.portable
@pytest.mark.parametrize(
    ("source", "error"),
    [
        (Promises(7), UsageError),
        (Promises(b"a.png"), ImageError),  # a path of bytes is one; there is no such file
        (Promises("\0"), ImageError),
        ("data:image/png;base64,\ud800", ImageError),
        ("data:image/png;base64,%ff", ImageError),
        ("file://[::1", UsageError),
        ("\ud800.png", ImageError),
        (memoryview(encode(RGB, "PNG"))[::2], ImageError),
        (memoryview(np.zeros((4, 4), np.float32)), ImageError),
    ],
)
def test_sources_that_python_itself_refuses(source: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        load_image(source)
    assert type(caught.value) is error


@pytest.mark.portable
@pytest.mark.parametrize("method", ["read", "readline"])
def test_reads_of_every_kind_are_counted(method: str) -> None:
    reader = CountedReader(io.BytesIO(b"\n" * 1000), "here")
    num_reads = 0
    with pytest.raises(ImageError, match="here: made of very many small pieces"):
        while num_reads < 1_000_000:
            num_reads += 1
            getattr(reader, method)(1)
    assert 200_000 <= num_reads <= 200_010

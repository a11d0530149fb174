"""Images: files of every format, mutated; bombs; arrays; and what is no image."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from fuzz.family import Recipe
from fuzz.mutation import apply_bytes, byte_edits

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BYTES_A_PIXEL = 8
_FORMS = ("bytes", "bytes", "file", "file", "data url", "bytearray", "memoryview", "base64", "pillow")
_MODES = (
    *("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "La", "RGBa", "PA", "RGBX", "I;16"),
    *("I;16B", "I;16L", "I;16N"),
)
_SIZES = ((0, 0), (0, 5), (5, 0), (1, 1), (64, 48), (1, 201), (201, 1), (20_000, 1), (9_000, 40), (1_500, 1_000))
_TEXTS = (
    *("", "\0", "a\0b", "a" * 300, "a" * 1_000_000, "/", "/etc", "/etc/passwd", "/dev/zero", "/dev/stdin", "/dev/tty"),
    *(
        "/proc/self/mem",
        "/proc/kmsg",
        "/dev/null",
        "/dev/fd/0",
        "file:",
        "file:///",
        "file:///etc/passwd",
        "file://host/x",
    ),
    *(
        "file:///%00",
        "file:%2e%2e/x",
        "file:///dev/zero",
        "data:",
        "data:,",
        "data:image/png",
        "data:image/png;base64,",
    ),
    *("data:image/png;base64,!!", "data:image/png;base64,AAAA", "data:text/html;base64,AAAA"),
    *("data:image/png;base64," + "A" * 10_000_000, "data:image/png;BASE64,AAAA", "data:IMAGE/PNG;x=1;base64,AAAA"),
    *("data:image/png;base64,\ud800", "data:image/png,%89PNG", "data:image/svg+xml;base64,PHN2Zy8+", "http://x/y.png"),
    *("HTTP://x", "https:/x", "ftp://x", "http:" + "a" * 5000, "://", "a://b", "//host/x", "javascript:alert(1)"),
    *(
        "http://[::1",
        "c:\\x",
        "\ud800",
        "\ud800.png",
        "~root",
        "~",
        "$HOME",
        "*",
        "\x1b[2J.png",
        "\u202egnp.exe",
        "x\ny",
    ),
)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, bits: int = 8, colour: int = 2, data: bytes = b"", extra: bytes = b"") -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + _chunk(b"IDAT", zlib.compress(data)) + _chunk(b"IEND", b"")


def _tiff(width: int, height: int) -> bytes:
    rows = min(height, 2**32 - 1)
    fields = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 200), (277, 1), (278, rows), (279, 100)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(404)


def _bmp(width: int, height: int, bits: int, compression: int) -> bytes:
    head = b"BM" + struct.pack("<IHHI", 100, 0, 0, 54)
    return head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0) + bytes(1024)


def _dots(side: int, **options: Any) -> bytes:
    from PIL import Image

    written = io.BytesIO()
    mode = options.pop("mode", "RGB")
    Image.new(mode, (side, side)).save(written, options.pop("format", "PNG"), **options)
    return written.getvalue()


_EIGHT = bytes(8 * 25)
BOMBS: dict[str, Callable[[], bytes]] = {
    "png without pixels": lambda: _png(0, 0),
    "png without columns": lambda: _png(0, 10),
    "png of 2^62 pixels": lambda: _png(2**31 - 1, 2**31 - 1),
    "png of 179 megapixels, no data": lambda: _png(13_377, 13_377),
    "png of 169 megapixels, 1 bit": lambda: _png(13_000, 13_000, 1, 0, bytes(13_000 * 1626)),
    "png of 45 megapixels, 1 bit": lambda: _dots(6_700, mode="1"),
    "png of 45 megapixels": lambda: _dots(6_700, compress_level=1),
    "png of 45 megapixels, alpha": lambda: _dots(6_700, mode="RGBA", compress_level=1),
    "png of 45 megapixels, palette": lambda: _dots(6_700, mode="P"),
    "png of 45 megapixels, 16 bits": lambda: _dots(6_700, mode="I;16", compress_level=1),
    "jpeg of 45 megapixels": lambda: _dots(6_700, format="JPEG"),
    "jpeg of 45 megapixels, cmyk": lambda: _dots(6_700, mode="CMYK", format="JPEG"),
    "tiff of 45 megapixels, float": lambda: _dots(6_700, mode="F", format="TIFF", compression="tiff_lzw"),
    "webp of 45 megapixels": lambda: _dots(6_700, format="WEBP", lossless=True, method=0),
    "gif of 45 megapixels": lambda: _dots(6_700, mode="L", format="GIF"),
    "png one pixel wide": lambda: _png(1, 10**7, 1, 0, bytes(2 * 10**7)),
    "png one pixel high": lambda: _png(10**8, 1, 1, 0, bytes(10**8 // 8 + 1)),
    "text chunk of 200 MB": lambda: _png(8, 8, data=_EIGHT, extra=_chunk(b"zTXt", b"a\0\0" + _zeros(200))),
    "profile of 200 MB": lambda: _png(8, 8, data=_EIGHT, extra=_chunk(b"iCCP", b"a\0\0" + _zeros(200))),
    "international text of 200 MB": lambda: _png(
        8, 8, data=_EIGHT, extra=_chunk(b"iTXt", b"a\0\1\0\0\0" + _zeros(200))
    ),
    "data of 300 MB": lambda: _png(8, 8, data=bytes(300 << 20)),
    "200000 chunks": lambda: _png(8, 8, data=_EIGHT, extra=_chunk(b"tEXt", b"a\0b") * 200_000),
    "ppm of 169 megapixels": lambda: b"P6\n13000 13000\n255\n" + bytes(100),
    "ppm with many digits": lambda: b"P6\n" + b"9" * 5000 + b" 1\n255\n",
    "ppm with a negative width": lambda: b"P6\n-1 5\n255\n" + bytes(15),
    "pgm with a large maximum": lambda: b"P5\n2 2\n70000\n" + bytes(8),
    "plain ppm": lambda: b"P3\n2 2\n255\n" + b"1 " * 12,
    "ppm with a comment of 10 MB": lambda: b"P6\n" + b"#" * 10_000_000,
    "pfm": lambda: b"PF\n2 2\n-1.0\n" + bytes(48),
    "gif without pixels": lambda: b"GIF89a\0\0\0\0\0\0\0;",
    "gif of 4 gigapixels": lambda: b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02\x44\x01\0;",
    "bmp of 900 megapixels": lambda: _bmp(30_000, -30_000, 24, 0),
    "bmp without pixels": lambda: _bmp(0, 0, 24, 0),
    "bmp with runs": lambda: _bmp(10_000, 10_000, 8, 1),
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) print",
    "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "pdf": lambda: b"%PDF-1.4",
    "psd": lambda: b"8BPS\0\1",
    "wmf": lambda: b"\xd7\xcd\xc6\x9a",
    "fli": lambda: b"\0\0\0\0\x11\xaf",
    "icon without images": lambda: b"\0\0\1\0\0\0",
    "icon of itself": lambda: b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + struct.pack("<II", 1000, 6),
    "jpeg 2000": lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100),
    "tiff that points to itself": lambda: b"II*\0" + struct.pack("<IHHHIII", 8, 1, 256, 3, 1, 8, 8),
    "tiff of 3600 megapixels": lambda: _tiff(60_000, 60_000),
    "tiff of 169 megapixels": lambda: _tiff(13_000, 13_000),
    "tiff one pixel wide": lambda: _tiff(1, 2**31),
    "tiff without columns": lambda: _tiff(0, 5),
    "too high": lambda: _png(1, 201, data=bytes(201 * 4)),
    "high": lambda: _png(1, 200, data=bytes(200 * 4)),
    "one pixel": lambda: _png(1, 1, data=bytes(4)),
}


def _zeros(megabytes: int) -> bytes:
    return zlib.compress(bytes(megabytes << 20))


@cache
def corpus() -> dict[str, bytes]:
    """Return small pictures of every format and mode that the runtime may meet."""
    import numpy as np
    from PIL import Image

    numbers = np.random.default_rng(0)
    rgb = Image.fromarray(numbers.integers(0, 256, (48, 64, 3), np.uint8))
    deep = Image.fromarray(numbers.integers(0, 65_536, (48, 64)).astype(np.uint16))
    rgba, palette, grey, dots = rgb.convert("RGBA"), rgb.quantize(16), rgb.convert("L"), rgb.convert("1")
    turned = Image.Exif()
    turned[0x112] = 6
    pictures: list[tuple[Any, str, dict[str, Any]]] = [
        *((image, "PNG", {}) for image in (rgb, rgba, palette, grey, dots, deep, rgb.convert("LA"))),
        *((rgb, "PNG", {"exif": turned}), (palette, "PNG", {"transparency": 3})),
        *(
            (image, "JPEG", {"progressive": flag})
            for image in (rgb, grey, rgb.convert("CMYK"))
            for flag in (False, True)
        ),
        *((rgb, kind, {"exif": turned}) for kind in ("JPEG", "WEBP")),
        *((rgba, "WEBP", {"lossless": True}), (rgb, "WEBP", {"save_all": True, "append_images": [rgb] * 3})),
        *((palette, "GIF", {}), (palette, "GIF", {"save_all": True, "append_images": [palette] * 3})),
        *(
            (rgb, "TIFF", {"compression": name})
            for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
        ),
        (dots, "TIFF", {"compression": "group4"}),
        *((rgb.convert(mode), "TIFF", {}) for mode in ("F", "I", "CMYK", "LAB", "YCbCr")),
        *((image, "BMP", {}) for image in (rgb, palette, dots)),
        *((rgba, "ICO", {}), (rgb, "PPM", {}), (grey, "PPM", {})),
    ]
    for kind in ("AVIF", "JPEG2000"):
        if kind in Image.SAVE or f".{kind.lower()}" in Image.registered_extensions():
            pictures.append((rgb, kind, {}))
    found = {}
    for number, (image, kind, options) in enumerate(pictures):
        written = io.BytesIO()
        image.save(written, kind, **options)
        found[f"{number} {kind}"] = written.getvalue()
    return found


def _arrays() -> dict[str, Callable[[], NDArray[Any]]]:
    import numpy as np

    zeros = np.zeros
    shapes = (
        (3, 4, 4),
        (4, 4, 2),
        (4, 4, 5),
        (),
        (5,),
        (0, 4, 3),
        (4, 0, 3),
        (4, 4, 0),
        (1, 4, 4, 3),
        (40, 40),
        (40, 40, 4),
    )
    types: tuple[Any, ...] = (np.float64, np.int64, bool, object, "U3", [("a", np.uint8)], np.complex64, "M8[s]")
    return {
        **{f"shape {shape}": lambda shape=shape: zeros(shape, np.uint8) for shape in shapes},
        **{f"type {kind}": lambda kind=kind: zeros((4, 4, 3), kind) for kind in types},
        "not a number": lambda: np.full((4, 4, 3), np.nan, np.float32),
        "backwards": lambda: zeros((40, 40, 3), np.uint8)[::-1, ::-1],
        "bgr": lambda: zeros((40, 40, 3), np.uint8)[:, :, ::-1],
        "one value": lambda: np.broadcast_to(np.uint8(3), (1300, 1300, 3)),
        "10^12 pixels of one value": lambda: np.broadcast_to(np.uint8(3), (10**6, 10**6, 3)),
        "169 megapixels of one value": lambda: np.broadcast_to(np.uint8(3), (13_000, 13_000, 4)),
        "2^40 columns": lambda: np.broadcast_to(np.uint8(3), (1, 2**40, 1)),
        "masked": lambda: np.ma.masked_array(zeros((4, 4, 3), np.uint8), mask=True),
    }


class _Named:
    def __init__(self, name: Any) -> None:
        self._name = name

    def __fspath__(self) -> Any:
        return self._name


def _objects() -> dict[str, Callable[[], Any]]:
    import numpy as np

    return {
        **{
            repr(value): lambda value=value: value
            for value in (None, 1, 1.5, True, (), b"", [1, 2], range(3), {"url": "x"})
        },
        **{f"path {name!r}": lambda name=name: _Named(name) for name in ("x", "http://x", "a\0", 1, b"x", "\ud800")},
        "list": lambda: [[1, 2], [3, 4]],
        "empty list": list,
        "type": lambda: object,
        "function": lambda: len,
        "number": lambda: np.uint8(3),
        "set": set,
        "view": lambda: memoryview(b""),
        "view of two dimensions": lambda: memoryview(np.zeros((4, 4), np.uint8)),
        "view of floats": lambda: memoryview(np.zeros(10, np.float32)),
        "open file": lambda: io.BytesIO(b"x"),
    }


def setup(engine: Path, folder: Path) -> tuple[Any, Path]:
    """Return the processor's settings, and a folder with special files."""
    from runtime.image_config import ImageProcessorConfig

    corpus()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "folder").mkdir()
    values = json.loads((engine / "preprocessor_config.json").read_bytes())
    return ImageProcessorConfig.from_dict(values), folder


def make(random: Random) -> Recipe:
    """Return a picture and edits, or the name of something else."""
    match random.randrange(40):
        case 0 | 1 | 2:
            return {
                "what": "bomb",
                "name": random.choice(list(BOMBS)),
                "form": random.choice(("bytes", "file")),
                "edits": [],
            }
        case 3 | 4 | 5:
            return {"what": "array", "name": random.choice(list(_arrays())), "edits": []}
        case 6 | 7 | 8:
            return {
                "what": "text",
                "text": random.choice([*_TEXTS, "HERE/pipe", "HERE/loop", "HERE/folder"]),
                "edits": [],
            }
        case 9 | 10:
            return {"what": "object", "name": random.choice(list(_objects())), "edits": []}
        case 11 | 12 | 13:
            return {"what": "mode", "mode": random.choice(_MODES), "size": random.choice(_SIZES), "edits": []}
    name = random.choice(list(corpus()))
    edits = byte_edits(random, len(corpus()[name]), head=random.choice((None, 120)))
    return {"what": "picture", "name": name, "form": random.choice(_FORMS), "edits": edits}


def _encoded(recipe: Recipe) -> bytes:
    return _bomb(recipe["name"]) if recipe["what"] == "bomb" else apply_bytes(corpus()[recipe["name"]], recipe["edits"])


@lru_cache(maxsize=1)
def _bomb(name: str) -> bytes:
    """Return a bomb; `size` makes it before the measurement begins, `run` takes the one that is there."""
    return BOMBS[name]()


def size(recipe: Recipe) -> tuple[int, int]:
    """Return the bytes of the input; an image that is taken may take 8 a pixel, and 45 megapixels are the most here."""
    taken = 45_000_000 * _BYTES_A_PIXEL if "45 megapixels" in recipe.get("name", "") else 0
    match recipe["what"]:
        case "bomb":
            return len(_bomb(recipe["name"])), taken - 300_000_000 if taken else 0
        case "text":
            return len(recipe["text"]), 0
        case "picture":
            return len(corpus()[recipe["name"]]), 0
    return 0, 0


def run(recipe: Recipe, context: tuple[Any, Path]) -> str:
    """Read the image as a message gives it, and make patches of it."""
    import numpy as np

    from runtime.image_processor import process_image
    from runtime.messages import normalise_messages

    config, folder = context
    part = _part(recipe, folder)
    if part is None:
        return "not opened by Pillow"
    _, attachments = normalise_messages([{"role": "user", "content": [part]}])
    patches = process_image(attachments[0].source, config)
    assert patches.pixel_values.dtype == np.float32 and np.isfinite(patches.pixel_values).all()
    return f"grid {patches.grid_thw}"


def _part(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    from PIL import Image

    what, form = recipe["what"], recipe.get("form", "")
    if what == "text":
        return {"type": "image", "image": recipe["text"].replace("HERE", str(folder))}
    if what == "array":
        return {"type": "image", "image": _arrays()[recipe["name"]]()}
    if what == "object":
        return {"type": "image", "image": _objects()[recipe["name"]]()}
    if what == "mode":
        try:
            return {"type": "image", "image": Image.new(recipe["mode"], tuple(recipe["size"]))}
        except ValueError:
            return None
    data = _encoded(recipe)
    if form == "base64":
        return {"type": "image", "base64": base64.b64encode(data).decode()}
    image: Any = data
    if form == "file":
        image = folder / "image"
        image.write_bytes(data)
    elif form == "data url":
        image = "data:image/png;base64," + base64.b64encode(data).decode()
    elif form in ("bytearray", "memoryview"):
        image = {"bytearray": bytearray, "memoryview": memoryview}[form](data)
    elif form == "pillow":
        try:
            image = Image.open(io.BytesIO(data))
        except Exception:  # what the caller's own call of Pillow raises is not the project's
            return None
    return {"type": "image", "image": image}

"""What reading an image may cost: its pixels, the memory of its decoder, and the pieces that a file is made of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from runtime.arguments import whole_number
from runtime.errors import CapacityError, ImageError

if TYPE_CHECKING:
    from PIL import Image

MAX_IMAGE_PIXELS = 50_000_000
"""Largest image that is decoded, unless the caller allows more."""

MOST_IMAGE_PIXELS = 178_956_970
"""Most pixels that the caller can allow: beyond, Pillow refuses."""

MAX_ASPECT_RATIO = 200
"""Largest ratio of an image's sides, itself allowed, as in transformers."""

# Smaller thin images are decoded, and refused when they are to be resized.
_THIN_PIXELS = 1 << 24
_BYTES_PER_PIXEL = 8
# Decoders of Pillow that read pixel by pixel in Python, 1.7 us each: PPM as text, or of other values than 0 to 255.
_SLOW_DECODERS, _MOST_SLOW_PIXELS = ("ppm", "ppm_plain"), 1 << 20
# Measured with Pillow 13, the largest of several kinds of files, rounded up: whole frames in the decoder's own format.
# HEIC of 10 bits takes the most of its kind, with pillow-heif 1.8.
_DECODER_BYTES = {"AVIF": 20, "HEIF": 24, "JPEG2000": 24, "WEBP": 20}
# A PNG file of 8 kB a chunk, as encoders write them, takes less than one read for 2 kB.
_MOST_READS, _BYTES_PER_READ = 200_000, 256
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # of TIFF
_SMALL_TILE_PIXELS = 1 << 20
_ICO_ENTRIES = 6, 16  # where they begin, and the bytes of one
_MOST_ICO_ENTRIES = 64
_ICO_MAGIC = b"\0\0\1\0"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def check_max_image_pixels(max_image_pixels: int) -> int:
    """Return the limit on the pixels of an image if it is one.

    Raises:
        UsageError: It is no whole number of 1 to `MOST_IMAGE_PIXELS`.
    """
    expected = f"a whole number of 1 to {MOST_IMAGE_PIXELS}"
    remedy = f"leave max_image_pixels out for {MAX_IMAGE_PIXELS}"
    return whole_number("max_image_pixels", max_image_pixels, 1, MOST_IMAGE_PIXELS, expected, remedy)


class CountedReader:
    """Read from a file, and raise when it is read in very many pieces.

    Pillow reads headers, chunks and markers in Python, some of them byte by byte, so a file that is made of nothing
    else takes minutes.
    """

    def __init__(self, file: IO[bytes], where: str) -> None:
        self._file = file
        self._where = where
        num_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        self._num_left = _MOST_READS + num_bytes // _BYTES_PER_READ

    def allow(self, num_reads: int) -> None:
        """Let so many reads more pass."""
        self._num_left += num_reads

    def read(self, size: int | None = -1) -> bytes:
        """Return bytes of the file.

        Raises:
            ImageError: It was read in too many pieces.
        """
        self._count()
        return self._file.read(-1 if size is None else size)

    def readline(self, size: int | None = -1) -> bytes:
        """Return bytes up to the end of a line.

        Raises:
            ImageError: It was read in too many pieces.
        """
        self._count()
        return self._file.readline(-1 if size is None else size)

    def _count(self) -> None:
        self._num_left -= 1
        if self._num_left < 0:
            raise ImageError(
                f"{self._where}: made of very many small pieces, which takes too long to read",
                remedy="save the image again",
            )

    def __getattr__(self, name: str) -> Any:
        """Return everything else of the file: it costs nothing to go to another place."""
        return getattr(self._file, name)


def check_decoding(image: Image.Image, reader: CountedReader, where: str, limit: int) -> None:
    """Refuse a file that takes more to decode than the size in its header says.

    Raises:
        CapacityError: Its decoder, or a tile of it, takes more memory than `limit` allows for.
        ImageError: Its tiles have no size, or its decoder is slow and the image large.
    """
    _check_decoder(image.format or "", image.width, image.height, _decoder_bytes(image), where, limit)
    tiles: list[tuple[str, ...]] = getattr(image, "tile", [])
    if tiles and tiles[0][0] in _SLOW_DECODERS:
        if image.width * image.height > _MOST_SLOW_PIXELS:
            raise ImageError(
                f"{where}: a PPM image of {image.width} x {image.height} pixels, as text or of other values than 0 to "
                f"255, which is read pixel by pixel; expected at most {_MOST_SLOW_PIXELS} pixels",
                remedy="save the image as PNG",
            )
        reader.allow(4 * image.width * image.height)
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        width, height = (tags.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_HEIGHT))
        if not (isinstance(width, int) and isinstance(height, int)):
            raise ImageError(f"{where}: tiles of {width!r:.40} x {height!r:.40}", remedy="save the image again as PNG")
        if width * height > max(_SMALL_TILE_PIXELS, 4 * image.width * image.height):
            raise too_large(where, f"found tiles of {width} x {height} = {width * height} pixels", limit)


def check_webp(file: IO[bytes], where: str, limit: int) -> None:
    """Check the size of a WebP file by its own header, since Pillow makes room for its frames while it opens it.

    Of a file of another format, nothing. The file is left at its beginning. The header is that of RFC 9649.

    Raises:
        CapacityError: Its decoder takes more memory than `limit` allows for.
    """
    file.seek(0)
    head = file.read(30)
    file.seek(0)
    if len(head) < 30 or (head[:4], head[8:12]) != (b"RIFF", b"WEBP"):
        return
    if head[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(head[start : start + 3], "little") for start in (24, 27))
    elif head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(head[start : start + 2], "little") & 0x3FFF for start in (26, 28))
    _check_decoder("WEBP", width, height, _DECODER_BYTES["WEBP"], where, limit)


def _check_decoder(kind: str, width: int, height: int, pixel_bytes: int, where: str, limit: int) -> None:
    allowed = limit * _BYTES_PER_PIXEL // max(pixel_bytes, _BYTES_PER_PIXEL)
    if width * height > allowed:
        raise CapacityError(
            f"{where}: {kind} of {width} x {height} pixels; expected at most {allowed} pixels of this kind, since its "
            f"decoder takes {pixel_bytes} bytes for each",
            remedy="save the image as PNG, make it smaller, or raise max_image_pixels",
        )


def _decoder_bytes(image: Image.Image) -> int:
    """Return the most bytes a pixel that are in memory while an opened image is decoded."""
    # Each component of a JPEG has a number, samples across, samples down and a table.
    layers: list[tuple[int, int, int, int]] = getattr(image, "layer", [])
    if image.format in ("JPEG", "MPO") and layers and image.info.get("progressive"):
        # libjpeg holds two bytes for every sample of a progressive file, beside Pillow's four for the pixel.
        across, down = (max(layer[i] for layer in layers) for i in (1, 2))
        samples = sum(layer[1] * layer[2] for layer in layers)
        return 4 + -(-2 * samples // max(1, across * down))
    return _DECODER_BYTES.get(image.format or "", _BYTES_PER_PIXEL)


def sizes_in_ico(file: IO[bytes], where: str) -> Iterator[tuple[int, int]]:
    """Yield the sizes that the images inside of an ICO file have by their own headers, PNG or BMP without its head.

    Of a file of another format, nothing. The file is left at its beginning.

    Raises:
        ImageError: It is said to hold very many images.
    """
    start, size = _ICO_ENTRIES
    file.seek(0)
    head = file.read(start)
    num_entries = int.from_bytes(head[4:], "little") if head.startswith(_ICO_MAGIC) else 0
    if num_entries > _MOST_ICO_ENTRIES:
        raise ImageError(
            f"{where}: an ICO file of {num_entries} images, expected at most {_MOST_ICO_ENTRIES}",
            remedy="save the image as PNG",
        )
    entries = file.read(num_entries * size)
    for entry in range(0, len(entries), size):
        file.seek(int.from_bytes(entries[entry + 12 : entry + 16], "little"))
        head = file.read(24)
        is_png = head.startswith(_PNG_MAGIC)
        sides = (head[16:20], head[20:24]) if is_png else (head[4:8], head[8:12])
        if int.from_bytes(head[:4], "little") == 12:  # the oldest header of BMP
            sides = (head[4:6], head[6:8])
        width, height = (int.from_bytes(side, "big" if is_png else "little", signed=not is_png) for side in sides)
        yield max(1, abs(width)), max(1, abs(height) if is_png else abs(height) // 2)
    file.seek(0)


def check_size(width: int, height: int, where: str, limit: int) -> None:
    """Refuse an empty image and one too large to decode, from the sizes in its header.

    Raises:
        ImageError: It has no pixel, or it is large and very thin: rows of a pixel take more memory than the pixels.
        CapacityError: It has more than `limit`.
    """
    if width < 1 or height < 1:
        raise ImageError(f"{where}: expected at least one pixel, found {width} x {height}", remedy="check the image")
    if width * height > limit:
        raise too_large(where, f"found {width} x {height} = {width * height} pixels", limit)
    if width * height > _THIN_PIXELS and max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            f"{where}: {width} x {height} pixels, expected sides of a ratio of at most {MAX_ASPECT_RATIO}",
            remedy="cut the image into pieces or pad it",
        )


def too_large(where: str, found: str, limit: int) -> CapacityError:
    """Return the error of an image of too many pixels."""
    raised = ", or raise max_image_pixels" if limit < MOST_IMAGE_PIXELS else ""
    return CapacityError(
        f"{where}: expected at most {limit} pixels, {found}", remedy=f"make the image smaller and try again{raised}"
    )

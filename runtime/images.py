"""Load one image from whatever a message may hold, as upright uint8 RGB, or say clearly why not.

The pixels are those of transformers 5.23's torchvision backend, which treats an encoded image and an opened one
differently; so do we, because the same message must give the same pixels:

| source | EXIF orientation | transparency |
|---|---|---|
| path, bytes, data URL | applied (`load_image_as_tensor`) | dropped: the colours stored under it are seen |
| PIL image | as the caller left it | laid over white (`convert_to_rgb`) |
| array [H, W, 4] | none | laid over white, in float32 as torchvision does |

Deviations, each on purpose:

- 16-bit greyscale keeps its high byte, as viewers and Pillow's own 16-bit colour do; transformers clips at 255 (PIL) or
  hands on uint16 values (files).
- Of an animation the first frame is taken; the torchvision backend returns all frames of a GIF.
- BMP, TIFF, PPM, ICO and JPEG 2000 files are read too, and HEIC with pillow-heif (`runtime/heif.py`).
- Arrays are [H, W] or [H, W, C]; transformers guesses between channels first and last.

Images may come from anywhere. An image of too many pixels is refused from its header. For others, the decoded image and
the RGB array are in memory at once and no other copy: 7 bytes a pixel. Some decoders take more than 8 for themselves
(`runtime/image_bounds.py`); of their formats fewer pixels are allowed, so that no image takes more than 8 bytes for
each pixel of `max_image_pixels`, 400 MB by default.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, cast
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np

from runtime.arguments import reading
from runtime.base64_text import decode_base64
from runtime.errors import CapacityError, ImageError, Qwen3VLError, UsageError
from runtime.files import NotRegularError, open_regular
from runtime.heif import is_heif, is_isobmff_image, open_heif
from runtime.image_bounds import (
    MAX_IMAGE_PIXELS,
    MOST_IMAGE_PIXELS,
    CountedReader,
    check_decoding,
    check_size,
    check_webp,
    sizes_in_ico,
    too_large,
)
from runtime.shown import shown
from runtime.urls import check_local, scheme_of

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL import Image

    ImageSource: TypeAlias = (
        str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[np.generic]
    )
    RgbImage: TypeAlias = npt.NDArray[np.uint8]

IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are tried. A list, because Pillow also knows formats that start other programs."""

_STRIP_PIXELS = 1 << 18
_SHORTEST_BASE64, _LONGEST_PATH = 60, 4096
_MAGIC = (
    *(b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\1\0"),
    *(b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),  # JPEG 2000, in a file of boxes or bare
    *(b"P%d%c" % (kind, blank) for kind in range(1, 7) for blank in b" \t\r\n"),  # PPM
)
_ORIENTATION = 0x0112  # of EXIF
# Steps through rows and columns, and whether both are exchanged then; the names of Pillow's `ImageOps.exif_transpose`.
_TURNS: Mapping[object, tuple[int, int, bool]] = {
    2: (1, -1, False),  # FLIP_LEFT_RIGHT
    3: (-1, -1, False),  # ROTATE_180
    4: (-1, 1, False),  # FLIP_TOP_BOTTOM
    5: (1, 1, True),  # TRANSPOSE
    6: (-1, 1, True),  # ROTATE_270
    7: (-1, -1, True),  # TRANSVERSE
    8: (1, -1, True),  # ROTATE_90
}


def load_image(source: ImageSource, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> RgbImage:
    """Load an image as uint8 RGB [H, W, 3].

    Args:
        source: A path, a `file:` or `data:` URL, the bytes of an image file or their base64, a PIL image, or a uint8
            array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        max_image_pixels: Images of more pixels are refused before they are decoded.

    Returns:
        uint8 [H, W, 3], C-contiguous. It may share the memory of an array given as `source`.

    Raises:
        ImageError: The image is missing, broken, empty, or of a format, shape or type that is not taken.
        CapacityError: The image has more than `max_image_pixels` pixels, or memory ran out.
        UsageError: `source` is of another type, or a URL that would have to be fetched.
    """
    limit = max_image_pixels
    if isinstance(source, np.ndarray):
        return _from_array(np.asarray(source), limit)  # a subclass, such as np.matrix, has an indexing of its own
    if isinstance(source, (bytes, bytearray, memoryview)):
        with reading("the image", "pass bytes"):
            contents = bytes(source)  # a view may skip bytes, or be released
        return _decode(io.BytesIO(contents), f"image of {len(contents)} bytes", limit)
    if isinstance(source, str):
        scheme = scheme_of(source)
        if scheme == "data":
            return _from_data_url(source, limit)
        if scheme == "file":
            return _from_path(file_of_url(source, "image"), limit)
        bare = _from_bare_base64(source)
        if bare is not None:
            return _decode(io.BytesIO(bare), f"image of {len(bare)} bytes in base64", limit)
    if isinstance(source, (str, os.PathLike)):
        source = path_text(source, "image")
        check_local(source, "image")
        return _from_path(Path(source), limit)

    from PIL import Image

    if isinstance(source, Image.Image):
        return _from_pil(source, limit)
    raise UsageError(
        f"image: expected a path, bytes, a data URL, a PIL image or a numpy array, found {type(source).__name__}",
        remedy="pass a torch tensor as a uint8 array: tensor.permute(1, 2, 0).numpy()",
    )


def _from_bare_base64(text: str) -> bytes | None:
    """Return the image file that a text is the base64 of, as transformers takes it too; None if it is a path."""
    if len(text) < _SHORTEST_BASE64 or os.path.lexists(text[:_LONGEST_PATH]):
        return None
    try:
        start = decode_base64(text[:_SHORTEST_BASE64])
        is_image = start.startswith(_MAGIC) or is_isobmff_image(start)
        return decode_base64(text) if is_image else None
    except ValueError:
        return None


def path_text(source: str | os.PathLike[Any], what: str) -> str:
    """Return a path as text, also one that is given as bytes or by an object of the caller's own.

    Raises:
        UsageError: It is none.
    """
    try:
        return os.fsdecode(source)
    except Exception as error:  # an own `__fspath__` can fail in any way
        raise UsageError(
            f"{what}: {type(source).__name__} is not a path: {type(error).__name__}: {error}", remedy="pass a string"
        ) from error


def file_of_url(url: str, what: str) -> Path:
    """Return the path of a `file:` URL.

    Raises:
        UsageError: It is none, or of another machine.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:  # of the host: brackets
        raise UsageError(
            f"{what} {shown(url)}: no file's URL: {error}", remedy="write file:///folder/name.png, or the plain path"
        ) from error
    if parts.netloc not in ("", "localhost"):
        raise UsageError(
            f"{what} {shown(url)}: expected a file on this machine, found host {parts.netloc!r}",
            remedy="write file:///folder/name.png, or the plain path",
        )
    return Path(url2pathname(parts.path))


def _from_data_url(url: str, limit: int) -> RgbImage:
    where = f"image data URL {shown(url[:40])}"
    header, comma, body = url.partition(",")
    remedy = "write data:image/png;base64, followed by the base64 text of the file"
    if not comma:
        raise ImageError(f"{where}: expected a comma before the data, found none", remedy=remedy)
    media_type, *parameters = (word.strip() for word in header[len("data:") :].lower().split(";"))
    # Clients that do not know what a file is say nothing, or that it is bytes.
    if media_type not in ("", "application/octet-stream") and not media_type.startswith("image/"):
        raise ImageError(f"{where}: expected an image/… media type, found {media_type!r}", remedy=remedy)
    if "base64" not in parameters:
        if "%" in body:  # RFC 2397: the bytes themselves
            return _decode(io.BytesIO(unquote_to_bytes(body)), where, limit)
        raise ImageError(f"{where}: expected base64 data, found none declared", remedy=remedy)
    try:
        data = decode_base64(unquote_to_bytes(body))
    except ValueError as error:
        raise ImageError(f"{where}: expected base64 data, found text that is not: {error}", remedy=remedy) from error
    return _decode(io.BytesIO(data), where, limit)


def _from_path(path: Path, limit: int) -> RgbImage:
    where = f"image {shown(path)}"
    try:
        with open(open_regular(path), "rb") as file:
            return _decode(file, where, limit)
    except FileNotFoundError as error:
        raise ImageError(
            f"{where}: no such file (working directory {shown(Path.cwd())})", remedy="check the path"
        ) from error
    except NotRegularError as error:
        remedy = "pass the path of one image" if error.strerror == "a folder" else "save it to a file"
        raise ImageError(f"{where}: expected an image file, found {error.strerror}", remedy=remedy) from error
    except (OSError, ValueError) as error:  # no permission, name too long, NUL in the name
        if isinstance(error, Qwen3VLError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(
            f"{where}: cannot be opened: {reason}",
            remedy="check the path and its permissions; base64 text needs 'data:image/png;base64,' before it",
        ) from error


def _decode(file: IO[bytes], where: str, limit: int) -> RgbImage:
    """Decode an image file as torchvision's `decode_image(mode=RGB, apply_exif_orientation=True)` does."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    reader = CountedReader(file, where)
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images, whose limit is checked below, and of what it repairs.
            warnings.simplefilter("ignore")
            for width, height in sizes_in_ico(file, where):  # Pillow decodes it while it opens it
                check_size(width, height, where, limit)
            check_webp(file, where, limit)
            if is_heif(file):
                image: Image.Image = open_heif(file, where, limit)
            else:
                names = [name for name in IMAGE_FORMATS if name in Image.OPEN]
                image = Image.open(cast(IO[bytes], reader), formats=names)
            with image:
                check_size(image.width, image.height, where, limit)
                _check_mode(image, where)
                check_decoding(image, reader, where, limit)
                image.load()
                # Once more: the image inside of an ICO file is as large as its own header says.
                check_size(image.width, image.height, where, limit)
                orientation = image.getexif().get(_ORIENTATION, 1)
                image.info.pop("transparency", None)
                rgb_HWC = _to_rgb(image)
        del image  # before the copy that turning makes
        return _upright(rgb_HWC, orientation)
    except Qwen3VLError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{where}: not an image, or its header is damaged; expected one of {', '.join(IMAGE_FORMATS)}",
            remedy="convert it to PNG or JPEG, or fetch it again",
        ) from error
    except Image.DecompressionBombError as error:
        raise too_large(where, f"found more than {MOST_IMAGE_PIXELS}", limit) from error
    except MemoryError as error:
        raise CapacityError(f"{where}: not enough memory to decode it", remedy="make the image smaller") from error
    except Exception as error:  # decoders fail in many ways: OSError, SyntaxError, struct.error, zlib.error, ...
        raise ImageError(
            f"{where}: the file is damaged or cut short: {type(error).__name__}: {error}",
            remedy="fetch or save the image again",
        ) from error


def _upright(rgb_HWC: RgbImage, orientation: object) -> RgbImage:
    """Turn an image as EXIF's orientation asks."""
    down, right, is_transposed = _TURNS.get(orientation, (1, 1, False))
    turned = rgb_HWC[::down, ::right]
    return np.ascontiguousarray(turned.transpose(1, 0, 2) if is_transposed else turned)


def _from_pil(image: Image.Image, limit: int) -> RgbImage:
    with reading("the PIL image", "pass image.convert('RGB')"):  # a class of the caller's own
        where = f"PIL image (mode {image.mode}, {image.width} x {image.height})"
        check_size(image.width, image.height, where, limit)
        _check_mode(image, where)
    try:
        image.load()
        check_size(image.width, image.height, where, limit)
        return _to_rgb(image, is_over_white=True)
    except Qwen3VLError:
        raise
    except MemoryError as error:
        raise CapacityError(f"{where}: not enough memory to convert it", remedy="make the image smaller") from error
    except Exception as error:  # a lazily opened file fails here, in any of a decoder's ways
        raise ImageError(
            f"{where}: cannot be decoded or converted to RGB: {type(error).__name__}: {error}",
            remedy="open the image again, call load() and convert('RGB')",
        ) from error


def _to_rgb(image: Image.Image, *, is_over_white: bool = False) -> RgbImage:
    """Convert a loaded PIL image to uint8 RGB, some rows at a time, transparency laid over white or dropped."""
    rgb_HWC = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        rgb_HWC[top:bottom] = _strip_to_rgb(image.crop((0, top, image.width, bottom)), is_over_white=is_over_white)
    return rgb_HWC


def _check_mode(image: Image.Image, where: str) -> None:
    """Refuse an image whose values have no known range."""
    if image.mode in ("I", "F") and not (image.mode == "I" and image.format == "PPM"):
        raise ImageError(
            f"{where}: expected 8 or 16 bits a channel, found mode {image.mode!r}, whose range of values is not known",
            remedy="scale the values to 0..255 and convert the image to mode 'L'",
        )


def _strip_to_rgb(strip: Image.Image, *, is_over_white: bool) -> RgbImage:
    from PIL import Image

    # Pillow opens 16-bit PGM as "I", scaled to 65535, and 16-bit PNG and TIFF as "I;16".
    if strip.mode.startswith("I"):
        return (np.asarray(strip) >> 8).astype(np.uint8)[..., None]
    has_alpha = strip.mode in ("RGBA", "LA", "PA") or strip.info.get("transparency") is not None
    if is_over_white and has_alpha:
        rgba = strip.convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.asarray(strip.convert("RGB"))


def _from_array(array: npt.NDArray[np.generic], limit: int) -> RgbImage:
    where = f"image array {array.dtype}{list(array.shape)}"
    is_channels_last = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if not is_channels_last:
        remedy = "pass each image of a batch on its own"
        if array.ndim == 3:
            remedy = "transpose a channels-first array: array.transpose(1, 2, 0)"
        raise ImageError(f"{where}: expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]", remedy=remedy)
    # Before anything looks at the values: an array of many pixels can be a view of one.
    check_size(array.shape[1], array.shape[0], where, limit)
    if array.dtype != np.uint8:
        remedy = "scale the values to 0..255 and convert: array.round().astype(np.uint8)"
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            remedy = "it holds NaN or infinity: remove them, scale to 0..255 and convert to uint8"
        raise ImageError(f"{where}: expected uint8 values of 0 to 255, found {array.dtype}", remedy=remedy)
    pixels: RgbImage = array.astype(np.uint8, copy=False)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] == 4:
        return _over_white(pixels)
    return np.ascontiguousarray(pixels)


def _over_white(rgba_HWC: RgbImage) -> RgbImage:
    """Lay RGBA over white in the float32 steps of `TorchvisionBackend.convert_to_rgb`, some rows at a time."""
    height, width, _ = rgba_HWC.shape
    rgb_HWC = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        part = rgba_HWC[top : top + rows].astype(np.float32) * np.float32(1.0 / 255)
        color, alpha = part[..., :3], part[..., 3:]
        mixed = color * alpha + (1 - alpha)
        rgb_HWC[top : top + rows] = (mixed * np.float32(255 + 1.0 - 1e-3)).astype(np.uint8)
    return rgb_HWC

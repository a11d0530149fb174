"""Open HEIC images, as phones write them, with pillow-heif, which is optional.

Its class is used by itself: registered with Pillow, it would change what a program that uses us can open. It turns an
image as the file's own boxes say, and takes the orientation out of its EXIF data, which says the same once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from runtime.errors import ImageError
from runtime.installation import how_to_install

if TYPE_CHECKING:
    from PIL import Image

_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"heif"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_MOST_HEADER_BYTES = 128


def is_isobmff_image(start: bytes) -> bool:
    """Return whether a file that begins so, 12 bytes or more, is HEIC or AVIF (ISO/IEC 23008-12, box `ftyp`)."""
    return start[4:8] == b"ftyp" and start[8:12] in _BRANDS | _AVIF_BRANDS


def is_heif(file: IO[bytes]) -> bool:
    """Return whether a file is HEIC, not AVIF, which Pillow reads. It is left at its beginning."""
    file.seek(0)
    head = file.read(_MOST_HEADER_BYTES)
    file.seek(0)
    if not is_isobmff_image(head):
        return False
    size = int.from_bytes(head[:4], "big")
    # Files of both kinds can have the general brand first, and their own among the compatible ones.
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, min(size, len(head)), 4))}
    return not brands & _AVIF_BRANDS


def open_heif(file: IO[bytes], where: str, max_file_bytes: int) -> Image.Image:
    """Open a HEIC file; nothing is decoded yet.

    Args:
        file: The file, which is read whole.
        where: Its name in messages.
        max_file_bytes: A larger file is refused.

    Raises:
        ImageError: pillow-heif is not installed, or the file is larger.
    """
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise ImageError(
            f"{where}: a HEIC image, which needs the package pillow-heif: {error}",
            remedy=f"{how_to_install('heif')}; or convert the image to JPEG",
        ) from error
    file.seek(0, 2)
    num_bytes = file.tell()
    file.seek(0)
    if num_bytes > max_file_bytes:
        raise ImageError(
            f"{where}: a HEIC file of {num_bytes} bytes, expected at most {max_file_bytes}",
            remedy="convert the image to JPEG",
        )
    open_file: Callable[[IO[bytes]], Image.Image] = HeifImageFile
    return open_file(file)

"""Open a video from whatever a message may hold."""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import unquote_to_bytes

import numpy as np

from runtime.arguments import reading
from runtime.base64_text import decode_base64
from runtime.errors import CapacityError, ImageError, Qwen3VLError, UsageError
from runtime.files import NotRegularError, open_regular
from runtime.images import file_of_url, path_text
from runtime.shown import shown
from runtime.still_wanted import Check, always
from runtime.urls import check_local, scheme_of
from runtime.video.animation import AnimationReader, is_animation
from runtime.video.file_reader import FileReader
from runtime.video.frame_readers import FramesReader, taken_frames
from runtime.video.reader import VideoReader

MAX_PIPE_BYTES = 4 << 30
"""Most bytes of a file object: it is copied to a temporary file first, since its owner may go on reading."""

_IMAGE_ENDINGS = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
# No video file has fewer bytes, and few paths are as long.
_SHORTEST_BASE64, _LONGEST_PATH, _BLOCK_BYTES = 400, 4096, 1 << 20


def open_video(source: Any, max_image_pixels: int, check: Check = always) -> VideoReader:
    """Open a video.

    Args:
        source: A path or `file:` URL of a video file, of an animated image or of a folder of frames; their bytes, a
            data URL, base64 text, or a file object; a list of frames, each of any form that an image may have; a uint8
            array [T, H, W] or [T, H, W, C]; an iterator of frames; an animated PIL image.
        max_image_pixels: Frames of more pixels are refused before they are decoded.
        check: Asked before each frame and each block of a file that is read; raises where they are not wanted any more.

    Raises:
        ImageError: It is missing, broken, empty, or of a format that is not taken.
        CapacityError: Its frames have too many pixels, or it has no end.
        UsageError: It is of another type, a URL that would have to be fetched, or PyAV is not installed.
    """
    if isinstance(source, np.ndarray):
        return _of_array(np.asarray(source), max_image_pixels)
    if isinstance(source, (list, tuple)):
        is_files = bool(source) and all(isinstance(each, (str, os.PathLike)) for each in source)
        return FramesReader(source, f"video of {len(source)} frames", max_image_pixels, is_sampled=is_files)
    if isinstance(source, (bytes, bytearray, memoryview)):
        with reading("the video", "pass bytes"):
            contents = bytes(source)
        return _of_file(io.BytesIO(contents), f"video of {len(contents)} bytes", max_image_pixels, check)
    if isinstance(source, (str, os.PathLike)):
        return _of_text(source, max_image_pixels, check)
    if is_one_time(source):
        source = Replayed(source)
    if isinstance(source, Replayed):
        return source.open(max_image_pixels, check)

    from PIL import Image

    if isinstance(source, Image.Image):
        return AnimationReader(source, "animated PIL image", max_image_pixels, check)
    raise UsageError(
        f"video: expected a path, bytes, a file object, a list of frames, an array or an iterator, found "
        f"{type(source).__name__}",
        remedy="pass a torch tensor as a uint8 array [frames, height, width, 3]: tensor.permute(0, 2, 3, 1).numpy()",
    )


def is_one_time(source: Any) -> bool:
    """Return whether a source can be read only once: a file object or an iterator."""
    return hasattr(source, "read") or hasattr(source, "__next__")


class Replayed:
    """A file object or an iterator of frames, read when it is first opened, and kept for later.

    A prompt whose inputs have to share a budget of tokens reads some of them twice. What is stopped before its end is
    lost as far as it was read.

    Attributes:
        source: What `is_one_time` says is one.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self._copy: Any = None

    def open(self, max_image_pixels: int, check: Check = always) -> VideoReader:
        """Open the video; errors are those of `open_video`."""
        if hasattr(self.source, "read"):
            self._copy = self._copy or _seekable(self.source, check)
            self._copy.seek(0)
            return _of_file(self._copy, "video of a file object", max_image_pixels, check, is_kept=True)
        name = "video of an iterator"
        if self._copy is None:
            self._copy = taken_frames(cast(Iterator[Any], self.source), name, max_image_pixels, check)
        return FramesReader(self._copy, name, max_image_pixels, is_sampled=False)


def _of_array(array: np.ndarray[Any, Any], limit: int) -> VideoReader:
    name = f"video array {array.dtype}{list(array.shape)}"
    if array.ndim == 3 and array.shape[2] in (1, 3, 4):
        array = array[None]
    if array.ndim not in (3, 4):
        raise ImageError(
            f"{name}: expected [T, H, W], [T, H, W, 1], [T, H, W, 3] or [T, H, W, 4]",
            remedy="pass each video of a batch on its own",
        )
    if array.ndim == 4 and array.shape[3] not in (1, 3, 4):
        raise ImageError(
            f"{name}: expected the channels last",
            remedy="transpose a channels-first array: array.transpose(0, 2, 3, 1)",
        )
    return FramesReader(array, name, limit, is_sampled=False)  # type: ignore[arg-type]


def _of_text(source: str | os.PathLike[Any], limit: int, check: Check) -> VideoReader:
    if isinstance(source, str):
        scheme = scheme_of(source)
        if scheme == "data":
            return _of_data_url(source, limit, check)
        if scheme == "file":
            return _of_path(file_of_url(source, "video"), limit, check)
        bare = _of_bare_base64(source)
        if bare is not None:
            return _of_file(io.BytesIO(bare), f"video of {len(bare)} bytes in base64", limit, check)
    text = path_text(source, "video")
    check_local(text, "video")
    return _of_path(Path(text), limit, check)


def _of_data_url(url: str, limit: int, check: Check) -> VideoReader:
    where = f"video data URL {shown(url[:40])}"
    remedy = "write data:video/mp4;base64, followed by the base64 text of the file"
    header, comma, body = url.partition(",")
    if not comma or "base64" not in header.lower().split(";")[1:]:
        raise ImageError(f"{where}: expected base64 data after a comma", remedy=remedy)
    try:
        data = decode_base64(unquote_to_bytes(body))
    except ValueError as error:
        raise ImageError(f"{where}: expected base64 data, found text that is not: {error}", remedy=remedy) from error
    return _of_file(io.BytesIO(data), where, limit, check)


def _of_bare_base64(text: str) -> bytes | None:
    """Return the file that a text is the base64 of; None if it is a path."""
    if len(text) < _SHORTEST_BASE64 or os.path.lexists(text[:_LONGEST_PATH]):
        return None
    try:
        return decode_base64(text)
    except ValueError:
        return None


def _of_path(path: Path, limit: int, check: Check) -> VideoReader:
    where = f"video {shown(path)}"
    try:
        if path.is_dir():
            return FramesReader(_frames_in(path, where), where, limit, is_sampled=True)
        return _of_file(open(open_regular(path), "rb"), where, limit, check)
    except FileNotFoundError as error:
        raise ImageError(
            f"{where}: no such file (working directory {shown(Path.cwd())})", remedy="check the path"
        ) from error
    except NotRegularError as error:
        raise ImageError(
            f"{where}: expected a video file, found {error.strerror}", remedy="save it to a file"
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, Qwen3VLError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"{where}: cannot be opened: {reason}", remedy="check the path and its permissions") from error


def _frames_in(folder: Path, where: str) -> list[Path]:
    """Return the images of a folder in the order that people count: frame_9 before frame_10."""
    frames = [path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_ENDINGS and path.name[0] != "."]
    if not frames:
        raise ImageError(f"{where}: a folder without images", remedy="pass a folder whose images are the frames")
    return sorted(frames, key=lambda path: [(int(n), "") if n.isdecimal() else (-1, n) for n in _parts(path.name)])


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"([0-9]+)", name) if part]


def _of_file(file: IO[bytes], where: str, limit: int, check: Check, *, is_kept: bool = False) -> VideoReader:
    """Open a file, which the reader closes unless it `is_kept`."""
    reader: VideoReader
    try:
        start = file.read(16)
        if not start:
            raise ImageError(f"{where}: an empty file", remedy="fetch or record it again")
        file.seek(0)
        make = AnimationReader if is_animation(start) else FileReader
        reader = make(file, where, limit, check)
        reader.owned_file = None if is_kept else file
        return reader
    except BaseException:
        if not is_kept:
            file.close()
        raise


def _seekable(source: Any, check: Check) -> IO[bytes]:
    """Return a file object that can seek and belongs to us: what was given is read once, from where it stands."""
    with reading("the video", "pass a file that was opened for reading bytes"):
        copy = cast(IO[bytes], tempfile.SpooledTemporaryFile(max_size=64 << 20))  # noqa: SIM115 (kept as long as the source)
        num_bytes = 0
        while (block := source.read(_BLOCK_BYTES)) or block is None:
            if block is None:
                raise ImageError(
                    "video of a file object: it has nothing to read yet, and does not wait",
                    remedy="pass one that waits for its data (blocking), or the bytes",
                )
            num_bytes += len(block)
            if num_bytes > MAX_PIPE_BYTES:
                raise CapacityError(
                    f"video of a file object: more than {MAX_PIPE_BYTES / 1e9:.2f} GB, without an end",
                    remedy="save it to a file, and pass its path",
                )
            copy.write(block)
            check()
        copy.seek(0)
        return copy

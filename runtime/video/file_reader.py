"""Read video files with PyAV: any container and codec of FFmpeg, no network, no file but the one that was given.

The file is decoded from its start, frame after frame: which frames there are before a place is known only then, and
frames have to be those that transformers chooses by their numbers. What is not taken is neither converted nor kept, so
memory does not grow with the length of the file.

A frame's time is its number divided by the mean rate, also where the rate varies, because that is what transformers
writes into the prompt.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from runtime.contract import IntArray
from runtime.errors import ImageError, Qwen3VLError, UsageError
from runtime.image_bounds import check_size
from runtime.installation import how_to_install
from runtime.machine import default_threads
from runtime.still_wanted import Check, always
from runtime.video.reader import VideoReader, repeats_of

if TYPE_CHECKING:
    from runtime.images import RgbImage

_LOGGER = logging.getLogger(__name__)
# Demuxers, by FFmpeg's names, of files that hold their own frames. Others open further files or addresses (hls, concat,
# dash), run programs' scripts (vapoursynth) or render text.
_CONTAINERS = (
    *("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf"),
    *("ogg", "h264", "hevc", "av1", "obu", "ivf", "m4v", "mjpeg", "gif", "apng", "nut", "mxf", "wtv", "dv", "rm"),
    *("yuv4mpegpipe", "h263", "vc1", "webp", "webp_pipe"),
)
# Of its frames, those that a header may count and nobody can decode: edits and encoders leave some.
_MISSING_SHARE, _MISSING_FRAMES = 0.02, 2
# Of the time that a header says, what a whole file may lack: encoders round, and leave out the last frame's.
_MISSING_TIME_SHARE, _MISSING_TIME_S = 0.1, 1.0
_DECODER_PIXELS = 1 << 16
_TICKS_PER_S = 1_000_000  # AV_TIME_BASE


class FileReader(VideoReader):
    """A video file.

    Args:
        file: It, open at any place, and able to seek.
        name: In messages.
        max_image_pixels: Frames of more pixels are refused before they are decoded.
        check: Asked before each frame, whether it is wanted or not; raises where the video is not wanted any more.

    Raises:
        ImageError: It is no video, or holds none.
        CapacityError: Its frames have too many pixels.
        UsageError: PyAV is not installed.
    """

    def __init__(self, file: IO[bytes], name: str, max_image_pixels: int, check: Check = always) -> None:
        self.name = name
        self._file = file
        self._max_image_pixels = max_image_pixels
        self._check = check
        container = self._open()
        try:
            stream = self._stream(container)
            rate = stream.average_rate or stream.guessed_rate
            self.fps = float(rate) if rate else None
            self.num_frames = int(stream.frames) or _count_packets(container, stream, name, check)
        except Qwen3VLError:
            raise
        except Exception as error:
            raise _damaged(name, error) from error
        finally:
            container.close()
        if self.num_frames < 1:
            raise ImageError(f"{name}: holds no frames", remedy="check the file with ffprobe, or record it again")

    def frames(self, indices: IntArray) -> Iterator[RgbImage]:
        """Decode frames in order; see `VideoReader.frames`. Of those missing at the very end the last one stands in."""
        wanted = repeats_of(indices)
        last, left = int(indices[-1]), len(indices)
        number, frame_HWC = -1, None
        container = self._open()
        try:
            stream = self._stream(container)
            for frame in container.decode(stream):
                self._check()
                number += 1
                if number in wanted:
                    frame_HWC = self.to_rgb(frame)
                    for _ in range(wanted[number]):
                        left -= 1
                        yield frame_HWC
                    if number == last:
                        return
        except (Qwen3VLError, GeneratorExit):
            raise
        except Exception as error:
            raise _damaged(self.name, error, number + 1) from error
        finally:
            container.close()
        num_missing = last - number
        if frame_HWC is None or num_missing > max(_MISSING_FRAMES, _MISSING_SHARE * self.num_frames):
            raise ImageError(
                f"{self.name}: cut short: it says {self.num_frames} frames, and {number + 1} could be decoded",
                remedy="fetch or record it again, or take a part of it with video_end",
            )
        _LOGGER.warning(
            "note: %s says %d frames, and %d could be decoded: the last one stands in for the rest",
            *(self.name, self.num_frames, number + 1),
        )
        for _ in range(left):
            yield frame_HWC

    def _open(self) -> Any:
        try:
            import av
        except ImportError as error:
            raise UsageError(
                f"{self.name}: video files are read with PyAV, which is not installed ({error})",
                remedy=f"{how_to_install('video')}; or pass a list of frames",
            ) from error

        def refuse(url: str, *_: Any) -> Any:
            raise ImageError(
                f"{self.name}: refers to another file or address, {url!r}, which is not opened",
                remedy="pass the file that holds the frames",
            )

        self._file.seek(0)
        # The whitelists are FFmpeg's own second lock: nothing but this file is opened.
        options = {"format_whitelist": ",".join(_CONTAINERS), "protocol_whitelist": "none"}
        try:
            return av.open(self._file, "r", container_options=options, io_open=refuse, metadata_errors="replace")
        except Qwen3VLError:
            raise
        except Exception as error:  # PyAV's errors, of many classes, and those of the file's own methods
            reason = getattr(error, "strerror", None) or error
            raise ImageError(
                f"{self.name}: not a video that can be read, or its header is damaged: {reason}",
                remedy="convert it to MP4 (ffmpeg -i input output.mp4), or fetch it again",
            ) from error

    def _stream(self, container: Any) -> Any:
        streams = [each for each in container.streams.video if not _is_cover(each)]
        if not streams:
            kinds = sorted({each.type for each in container.streams})
            raise ImageError(
                f"{self.name}: holds no video, only {', '.join(kinds) or 'nothing'}",
                remedy="pass a file with pictures; sound is not understood by this model",
            )
        stream = streams[0]
        check_size(stream.codec_context.width, stream.codec_context.height, self.name, self._max_image_pixels)
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = default_threads()
        # Frames may become larger on the way. Twice, since a decoder rounds both sides up.
        stream.codec_context.options = {"max_pixels": str(2 * self._max_image_pixels + _DECODER_PIXELS)}
        return stream

    def to_rgb(self, frame: Any) -> RgbImage:
        """Convert and turn a decoded frame."""
        check_size(frame.width, frame.height, self.name, self._max_image_pixels)
        frame_HWC: RgbImage = frame.to_ndarray(format="rgb24")
        # Phones record as the sensor lies, and say how it is to be turned.
        turns = _quarter_turns(frame)
        return np.ascontiguousarray(np.rot90(frame_HWC, turns)) if turns else frame_HWC


def _quarter_turns(frame: Any) -> int:
    """Return by how many right angles a frame is to be turned against the clock: `av_display_rotation_get` of FFmpeg.

    PyAV 14.0 does not have `VideoFrame.rotation` yet.
    """
    matrix = next((each for each in frame.side_data if each.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return 0
    across, down = np.frombuffer(bytes(matrix), np.int32)[:2].tolist()
    return -round(math.atan2(down, across) / (math.pi / 2)) % 4


def _is_cover(stream: Any) -> bool:
    """Return whether a stream is the picture of a piece of music, of one frame."""
    return "attached_pic" in str(getattr(stream, "disposition", "")).lower()


def _count_packets(container: Any, stream: Any, name: str, check: Check) -> int:
    """Count the frames of a file whose header does not: nearly every packet of a container holds one.

    Raises:
        ImageError: It ends long before the time that its header says.
    """
    count, end_s = 0, 0.0
    for packet in container.demux():  # sound may be longer than the pictures
        check()
        if packet.pts is not None:
            end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        # Packets of 0 bytes end a stream; those to discard come before the time at which it begins.
        count += packet.stream.index == stream.index and packet.size > 0 and not packet.is_discard
    said_s = (container.duration or 0) / _TICKS_PER_S
    if said_s - end_s > max(_MISSING_TIME_S, _MISSING_TIME_SHARE * said_s):
        raise ImageError(
            f"{name}: cut short: it says {said_s:.1f} s, and ends after {end_s:.1f} s",
            remedy="fetch or record it again",
        )
    return count


def _damaged(name: str, error: Exception, num_frames: int = 0) -> ImageError:
    after = f" after {num_frames} frames" if num_frames else ""
    return ImageError(
        f"{name}: damaged or cut short{after}: {type(error).__name__}: {error}",
        remedy="fetch or record it again, or take a part of it with video_end",
    )

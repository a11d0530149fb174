"""Short videos, written with PyAV: frames that can be told apart, in any container."""

from __future__ import annotations

import io
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]


def moving(num_frames: int, height: int = 48, width: int = 64, seed: int = 0) -> Frames:
    """Return frames [T, H, W, 3] of smooth colours that move; no two are equal."""
    rows, columns = np.mgrid[:height, :width]
    phase = np.random.default_rng(seed).integers(0, 90, 3)
    channels = [
        127 + 120 * np.sin((rows * (c + 1) + columns * 2 + 23 * np.arange(num_frames)[:, None, None] + phase[c]) / 40)
        for c in range(3)
    ]
    return np.stack(channels, axis=3).astype(np.uint8)


def encode(
    frames: Frames,
    container: str = "mp4",
    codec: str = "libx264",
    fps: float | Fraction = 10,
    times: list[int] | None = None,
    pixel_format: str = "yuv420p",
    with_sound: bool = False,
    container_options: dict[str, str] | None = None,
    **options: str,
) -> bytes:
    """Return a video file of frames [T, H, W, 3].

    Args:
        frames: The frames.
        container: FFmpeg's name of its format.
        codec: FFmpeg's name of an encoder.
        fps: Frames for each second.
        times: Time of each frame in units of 1 / fps; 0, 1, 2 and so on by default.
        pixel_format: What the encoder takes.
        with_sound: Add a track of silence.
        container_options: Options of the muxer.
        options: Options of the encoder.
    """
    import av

    rate = Fraction(fps).limit_denominator(1001)
    # A file, because a muxer that moves the header to the start opens it again.
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "clip"
        output: Any
        with av.open(str(target), "w", format=container, container_options=container_options or {}) as output:
            stream: Any = output.add_stream(codec, rate=rate, options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = pixel_format
            if with_sound:
                _add_silence(output)
            for index, array in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                frame.pts, frame.time_base = (times or range(len(frames)))[index], 1 / rate
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        return target.read_bytes()


def sound_only() -> bytes:
    """Return a file with a track of silence and no pictures."""
    import av

    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as output:
        _add_silence(output)
    return target.getvalue()


def _add_silence(output: Any) -> None:
    import av

    stream = output.add_stream("aac", rate=16000, layout="mono")
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 16000, 0
    output.mux(stream.encode(frame))
    output.mux(stream.encode())


def decoded(contents: bytes) -> Frames:
    """Return all frames of a video file as PyAV decodes them, one thread, from the start."""
    import av

    with av.open(io.BytesIO(contents)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write(folder: Path, name: str, contents: bytes) -> Path:
    """Write a file and return its path."""
    path = folder / name
    path.write_bytes(contents)
    return path


def turned(contents: bytes, quarters: int) -> bytes:
    """Return an MP4 file that says it is to be shown turned clockwise by so many right angles, as phones write it."""
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters % 4]
    matrix = np.array([cos, sin, 0, -sin, cos, 0, 0, 0, 1 << 14])
    # The matrix of the track's header (ISO 14496-12): 40 bytes after the name of the box, in 16.16 and 2.30.
    start = contents.index(b"tkhd") + 4 + 40
    return contents[:start] + (matrix << 16).astype(">i4").tobytes() + contents[start + 36 :]

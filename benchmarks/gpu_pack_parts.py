"""The archives of a GPU pack: folders as `.tar.xz`, one after the other in one stream that is cut into parts.

`pack.json` beside the parts says where each archive begins and where it is unpacked, with the SHA-256 of every part and
archive; `benchmarks/gpu/standalone.py` reads both.
"""

from __future__ import annotations

import hashlib
import lzma
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "pack.json"
FORMAT = 1
_PRESET = 6


@dataclass(frozen=True)
class Piece:
    """A folder that becomes one archive; `folder` is where it is unpacked."""

    name: str
    source: Path
    folder: str


class PartWriter:
    """A file that is only written, in parts of at most so many bytes.

    Attributes:
        parts: Name, bytes and SHA-256 of each part that is complete.
        position: Bytes written to all of them.
    """

    def __init__(self, output: Path, part_bytes: int) -> None:
        self._output, self._part_bytes = output, part_bytes
        self._file: BinaryIO | None = None
        self._room = 0
        self._digest = hashlib.sha256()
        self.parts: list[dict[str, Any]] = []
        self.position = 0

    def write(self, data: bytes) -> int:
        """Write all of it, and begin another part where one is full."""
        view = memoryview(data).cast("B")
        while view:
            if not self._room:
                self._begin()
            assert self._file is not None
            taken = view[: self._room]
            self._file.write(taken)
            self._digest.update(taken)
            self._room -= len(taken)
            self.position += len(taken)
            view = view[len(taken) :]
        return len(data)

    def close(self) -> None:
        """Complete the last part."""
        if self._file is not None:
            size = self._file.tell()
            self._file.close()
            self.parts.append(
                {"name": Path(self._file.name).name, "num_bytes": size, "sha256": self._digest.hexdigest()}
            )
            self._file = None

    def _begin(self) -> None:
        self.close()
        self._file = (self._output / f"pack.part{len(self.parts) + 1:02d}").open("wb")
        self._room, self._digest = self._part_bytes, hashlib.sha256()


class _Hashed:
    """Passes on what is written and hashes it."""

    def __init__(self, file: PartWriter) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)


def write_pack(pieces: Sequence[Piece], output: Path, part_bytes: int, description: dict[str, Any]) -> dict[str, Any]:
    """Write the parts; return what `pack.json` is to hold: format, description, parts and archives."""
    writer = PartWriter(output, part_bytes)
    archives = []
    for piece in pieces:
        start, hashed = writer.position, _Hashed(writer)
        with (
            lzma.LZMAFile(hashed, "wb", preset=_PRESET) as compressed,
            tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for path in sorted(piece.source.rglob("*")):
                archive.add(path, str(path.relative_to(piece.source)), recursive=False, filter=_same_everywhere)
        archives.append(
            {
                **{key: value for key, value in asdict(piece).items() if key != "source"},
                "offset": start,
                "num_bytes": writer.position - start,
                "sha256": hashed.digest.hexdigest(),
            }
        )
    writer.close()
    return {"format": FORMAT, **description, "parts": writer.parts, "archives": archives}


def _same_everywhere(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = 0
    return info

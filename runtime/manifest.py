"""The manifest of an engine folder: what it is, what built it, and the hash of every file.

Hashes catch damage and mix-ups, not malice: whoever can write the folder can write the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.errors import EngineError
from runtime.model_config import ModelConfig

MANIFEST_NAME = "engine.json"
LOWERED_NAME = "lowered.json"
"""The manifest of a folder that holds the lowered graphs of a target and not its engine: nothing generates with it."""
FORMAT_VERSION = 2  # 2: rotary settings
_BLOCK_BYTES = 1 << 20
_DIGEST = "sha256"


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file; `is_weights` files are compared by size alone unless a full check is asked for."""

    num_bytes: int
    sha256: str
    is_weights: bool = False


@dataclass(frozen=True)
class Manifest:
    """Describe an engine folder.

    Attributes:
        target: Name of the target, such as `ort-cpu-fp32`.
        session: Name of the module in `runtime.sessions` that opens it.
        capabilities: What the session may rely on: cache dtype, in-place update, batched chunks.
        model: Shape of the model.
        versions: Libraries that built it, by distribution name.
        source: Where the weights came from: name, revision, and a digest of every weight file's header.
        files: Every file of the folder but the manifest.
    """

    target: str
    session: str
    capabilities: Mapping[str, Any]
    model: ModelConfig
    versions: Mapping[str, str]
    source: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    format_version: int = FORMAT_VERSION

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(record.num_bytes for record in self.files.values() if record.is_weights)

    def write(self, folder: Path, name: str = MANIFEST_NAME) -> None:
        """Write the manifest into `folder`; it is the last file of an engine to be written."""
        values = asdict(self) | {"model": self.model.to_dict()}
        values[_DIGEST] = _digest_of(values)
        (folder / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, name: str = MANIFEST_NAME) -> Manifest:
        """Read the manifest of an engine folder, or of a folder of lowered graphs.

        Raises:
            EngineError: The folder or its manifest is missing or damaged, or a newer version wrote it.
        """
        path = folder / name
        if not folder.is_dir():
            raise EngineError(
                f"{folder}: no such engine folder", remedy="build one with: qwen3vl-export MODEL --output DIR"
            )
        if not path.is_file():
            if (folder / LOWERED_NAME).is_file():
                raise EngineError(
                    f"{folder}: a folder of lowered graphs ({LOWERED_NAME}), as --no-compile leaves it, and no engine",
                    remedy="`qwen3vl verify` reads it; for an engine, leave --no-compile out of the export",
                )
            raise EngineError(
                f"{folder}: {name} is missing, so this is no engine folder",
                remedy="give the folder that qwen3vl-export wrote, or build it again",
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise EngineError(f"{path}: not readable as JSON ({error})", remedy="build the engine again") from error
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise EngineError(
                f"{path}: format version {version!r}, expected {FORMAT_VERSION}",
                remedy="build the engine again with this version, or install the version that wrote it",
            )
        if values.pop(_DIGEST, None) != _digest_of(values):
            raise EngineError(
                f"{path}: altered since it was written: its own SHA-256 does not fit",
                remedy="copy the engine folder again, or build it again",
            )
        try:
            files = {name: FileRecord(**record) for name, record in values.pop("files").items()}
            return cls(model=ModelConfig.from_dict(values.pop("model")), files=files, **values)
        except (KeyError, TypeError, AttributeError) as error:
            raise EngineError(
                f"{path}: an entry is missing or unknown ({error})", remedy="build the engine again"
            ) from error

    def check(self, folder: Path, name: str = MANIFEST_NAME, *, full: bool = False) -> None:
        """Compare the folder with the manifest: weight files by size, or by hash if `full`; all others by hash.

        Only names inside the folder are looked at.

        Raises:
            EngineError: A file is missing, has another size, or other contents; the message names it.
        """
        for file, record in self.files.items():
            if Path(file).name != file or file == "..":
                raise EngineError(f"{folder / name}: {file!r} is no name of a file in the engine's folder")
            path = folder / file
            if not path.is_file():
                raise EngineError(f"{path}: missing", remedy="copy the whole engine folder, or build it again")
            found = path.stat().st_size
            if found != record.num_bytes:
                raise EngineError(
                    f"{path}: {found} bytes, expected {record.num_bytes}",
                    remedy="the file was cut or exchanged: copy the folder again, or build it again",
                )
            if (full or not record.is_weights) and sha256_of(path) != record.sha256:
                raise EngineError(
                    f"{path}: its SHA-256 is not the one in {name}",
                    remedy="the file was altered: copy the folder again, or build it again",
                )


def _digest_of(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's entries, whatever their order and spacing."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            yield block

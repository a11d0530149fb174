"""The manifest of an engine folder: what it is, what built it, and the hash of every file.

Hashes catch damage and mix-ups, not malice: whoever can write the folder can write the manifest. Its entries are
checked all the same, so that a wrong one is named here and not met later by whatever it leads to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.errors import EngineError
from runtime.files import NotRegularError, is_folder, leads_somewhere, open_regular, read_json_object
from runtime.manifest_checks import (
    check_cache_layers,
    check_capabilities,
    check_file_name,
    check_model,
    check_record,
    check_texts,
)
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

    @classmethod
    def of(cls, path: Path, *, is_weights: bool = False) -> FileRecord:
        """Return the record of a file that was just written."""
        return cls(path.stat().st_size, sha256_of(path), is_weights)


@dataclass(frozen=True)
class Manifest:
    """Describe an engine folder.

    Attributes:
        target: Name of the target, such as `ort-cpu-fp32`.
        session: Name of the module in `runtime.sessions` that opens it.
        capabilities: What the session may rely on: cache dtype, in-place update, batched chunks.
        model: Shape of the model.
        versions: Libraries that built it, by distribution name.
        source: Where the weights came from: name, revision, a digest of what the weights are, which tells checkpoints
            apart (`weights_sha256`), and one of every weight file's header.
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
            EngineError: The folder or its manifest is missing or damaged, may not be read, or a newer version wrote it.
        """
        path = folder / name
        if not is_folder(folder):
            raise EngineError(
                f"{folder}: no such engine folder", remedy="build one with: qwen3vl-export MODEL --output DIR"
            )
        if not leads_somewhere(path):
            if leads_somewhere(folder / LOWERED_NAME):
                raise EngineError(
                    f"{folder}: a folder of lowered graphs ({LOWERED_NAME}), as --no-compile leaves it, and no engine",
                    remedy="`qwen3vl verify` reads it; for an engine, leave --no-compile out of the export",
                )
            raise EngineError(
                f"{folder}: {name} is missing, so this is not an engine folder",
                remedy="give the folder that qwen3vl-export wrote, or build it again",
            )
        values = read_json_object(path, remedy="build the engine again")
        version = values.get("format_version")
        if version != FORMAT_VERSION or type(version) is not int:
            raise EngineError(
                f"{path}: format version {version!r}, expected {FORMAT_VERSION}",
                remedy="build the engine again with this version, or install the version that wrote it",
            )
        if values.pop(_DIGEST, None) != _digest_of(values):
            raise EngineError(
                f"{path}: it was altered after it was written: its SHA-256 of itself is wrong",
                remedy="copy the engine folder again, or build it again",
            )
        try:
            files = {file: FileRecord(**record) for file, record in values.pop("files").items()}
            manifest = cls(model=ModelConfig.from_dict(values.pop("model")), files=files, **values)
            manifest._check_entries()
        except EngineError as error:
            raise EngineError(f"{path}: {error.message}", remedy=error.remedy) from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise EngineError(
                f"{path}: an entry is missing or unknown ({error})", remedy="build the engine again"
            ) from error
        return manifest

    def _check_entries(self) -> None:
        """Check types and ranges.

        Raises:
            EngineError: An entry is not what `write` writes.
        """
        check_texts("target and session", {"target": self.target, "session": self.session})
        check_texts("versions", self.versions)
        if not isinstance(self.source, Mapping):
            raise EngineError(f"source is {self.source!r:.80}, expected an object", remedy="build the engine again")
        check_capabilities(self.capabilities)
        check_model(self.model)
        check_cache_layers(self.capabilities, self.model.text.num_layers)
        for name, record in self.files.items():
            check_record(name, vars(record))

    def require(self, folder: Path, *names: str) -> None:
        """Check that files which are about to be opened are among those that the manifest lists and `check` compared.

        Raises:
            EngineError: One is not.
        """
        for name in names:
            check_file_name(name)
            if name not in self.files:
                raise EngineError(
                    f"{folder / name}: not listed in {MANIFEST_NAME}, so it is not opened",
                    remedy="copy the whole engine folder, or build it again",
                )

    def check(self, folder: Path, name: str = MANIFEST_NAME, *, full: bool = False) -> None:
        """Compare the folder with the manifest: weight files by size, or by hash if `full`; all others by hash.

        Only names inside the folder are looked at.

        Raises:
            EngineError: A file is missing, has another size, or other contents; the message names it.
        """
        for file, record in self.files.items():
            try:
                check_file_name(file)
            except EngineError as error:
                raise EngineError(f"{folder / name}: {error.message}", remedy=error.remedy) from error
            path = folder / file
            try:
                found = _size(path)
            except NotRegularError as error:
                raise EngineError(
                    f"{path}: expected a file, found {error.strerror}", remedy="copy the engine folder again"
                ) from error
            except OSError as error:
                reason = "missing" if isinstance(error, FileNotFoundError) else error.strerror
                raise EngineError(
                    f"{path}: {reason}", remedy="copy the whole engine folder, or build it again"
                ) from error
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


def _size(path: Path) -> int:
    descriptor = open_regular(path)
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _blocks(path: Path) -> Iterator[bytes]:
    with open(open_regular(path), "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            yield block

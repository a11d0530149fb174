"""Where the settings that `qwen3vl tune` measured are kept: a file for each engine on each machine, read at opening.

A file is named after a digest of the engine and one of the machine, and says both again, with the versions of the
libraries it was measured with. What does not fit is ignored, and a note says how to renew it: a tuning only makes an
engine faster, so none is worth an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from runtime import __version__
from runtime.errors import EngineError
from runtime.files import read_json_object
from runtime.installation import DISTRIBUTION
from runtime.machine import available_cores, processor
from runtime.manifest import Manifest
from runtime.session import is_on_gpu
from runtime.settings import cpu_isa, user_cache_folder

_LOGGER = logging.getLogger(__name__)

FORMAT_VERSION = 1
NUM_DIGITS = 12
"""Hexadecimal digits of each digest in the name of a file."""
_LIBRARIES = ("onnxruntime", "onnxruntime-gpu")
_GPU_LIBRARIES = ("tensorrt", "tensorrt_rtx-cu12", "cuda-bindings")
_DRIVER = Path("/proc/driver/nvidia")
_LATEST = 253402300799  # the end of the year 9999, in UTC
_RENEW = "renew it with: qwen3vl tune ENGINE"


@dataclass(frozen=True)
class Key:
    """What a tuning is of.

    Attributes:
        engine: SHA-256 of what the engine's manifest says of its files and capabilities.
        machine: Processor, cores and GPUs.
        versions: Of this package and of the libraries that run engines, by distribution name.
    """

    engine: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, manifest: Manifest) -> Key:
        """Return that of an engine on this machine."""
        on_gpu = is_on_gpu(manifest)
        return cls(engine_digest(manifest), this_machine(on_gpu=on_gpu), library_versions(on_gpu=on_gpu))

    @property
    def file_name(self) -> str:
        """Name of the file; other versions of the libraries have the same, so that they replace each other's."""
        return f"{self.engine[:NUM_DIGITS]}-{_digest(self.machine)[:NUM_DIGITS]}.json"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"engine": self.engine, "machine": dict(self.machine), "versions": dict(self.versions)}


def engine_digest(manifest: Manifest) -> str:
    """Return a SHA-256 of an engine's contents: another build, or another checkpoint, has another."""
    records = {name: record.sha256 for name, record in manifest.files.items()}
    return _digest({"target": manifest.target, "capabilities": manifest.capabilities, "files": records})


def this_machine(*, on_gpu: bool, driver: Path = _DRIVER) -> dict[str, Any]:
    """Return what of this machine decides which settings are fast, as plain data.

    GPUs are asked of the files of NVIDIA's driver: no process and no CUDA context for a look into a cache.

    Args:
        on_gpu: Whether the engine runs on one.
        driver: The folder in which the driver describes itself.
    """
    cpu, features = processor()
    found: dict[str, Any] = {
        "cpu": cpu,
        "cpu_features": list(features),
        "cpu_isa": cpu_isa(),
        "cores": available_cores(),
    }
    if on_gpu:
        texts = [_text(path) for path in sorted(driver.glob("gpus/*/information"))]
        lines = [line.partition(":") for text in texts for line in text.splitlines()]
        found["gpus"] = [value.strip() for name, _, value in lines if name.strip() == "Model"]
        found["gpu_driver"] = _text(driver / "version").partition("\n")[0]
    return found


def library_versions(*, on_gpu: bool) -> dict[str, str]:
    """Return the versions of this package and of the installed libraries that run engines, on a GPU or not."""
    versions = {DISTRIBUTION: __version__}
    for name in (*_LIBRARIES, *(_GPU_LIBRARIES if on_gpu else ())):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def tuning_folder() -> Path | None:
    """Return the folder of all tunings in this user's cache; None if this user has no home."""
    user = user_cache_folder()
    return None if user is None else user / "qwen3vl" / "tuning"


def stored_values(manifest: Manifest) -> dict[str, Any] | None:
    """Return the settings that are stored for an engine on this machine, as plain data; None if none can be used.

    A note says why those that there are cannot be.
    """
    folder = tuning_folder()
    if folder is None or not _has_files(folder):
        return None
    key = Key.of(manifest)
    path = folder / key.file_name
    if not os.path.lexists(path):
        if any(folder.glob(f"{key.engine[:NUM_DIGITS]}-*.json")):
            _LOGGER.warning("note: this engine was tuned on another machine, so that is of no use here; %s", _RENEW)
        return None
    try:
        return read_stored(path, key)
    except EngineError as error:
        _LOGGER.warning("note: the tuning of this engine is ignored: %s; %s", error.message, error.remedy)
        return None


def read_stored(path: Path, key: Key | None = None) -> dict[str, Any]:
    """Return the settings of a file.

    Args:
        path: The file.
        key: What they have to be of; None for anything.

    Raises:
        EngineError: The file is damaged, of another format, or of something else.
    """
    values = read_values(path)
    if key is not None:
        for name, expected in key.to_dict().items():
            if values[name] != expected:
                raise EngineError(f"{path}: {_difference(name, values[name], expected)}", remedy=_RENEW)
    settings: dict[str, Any] = values["settings"]
    return settings


def read_values(path: Path) -> dict[str, Any]:
    """Return all that a file says.

    Raises:
        EngineError: It is damaged, or of another format.
    """
    values = read_json_object(path, remedy=_RENEW)
    version = values.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        raise EngineError(f"{path}: format version {version!r:.20}, expected {FORMAT_VERSION}", remedy=_RENEW)
    wanted = {"engine": str, "machine": dict, "versions": dict, "settings": dict, "name": str, "tuned": int}
    for name, kind in wanted.items():
        if not isinstance(values.get(name), kind):
            raise EngineError(f"{path}: {name} is missing, or of another kind", remedy=_RENEW)
    if not 0 <= values["tuned"] <= _LATEST:
        raise EngineError(f"{path}: tuned is no time in seconds since 1970", remedy=_RENEW)
    return values


def _difference(name: str, found: Any, expected: Any) -> str:
    if name == "engine":
        return "it is of another engine"
    changed = sorted(each for each in {*found, *expected} if found.get(each) != expected.get(each))
    return f"it was measured with another {' and '.join(changed)}"


def _has_files(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:  # it is not there, or this user may not look
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

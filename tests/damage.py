"""Make altered checkpoints and impossible images."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def altered(source: Path, folder: Path, **config: object) -> Path:
    """Copy a checkpoint and change config.json."""
    shutil.copytree(source, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change the tensors of a checkpoint."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size and which holds next to no data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change the contents of a JSON file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def resign(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the entries of an engine's manifest, and its own digest with them, as whoever writes the folder can."""
    values = json.loads((folder / "engine.json").read_text())
    del values["sha256"]
    change(values)
    values["sha256"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (folder / "engine.json").write_text(json.dumps(values))


def rehash(folder: Path, *names: str) -> None:
    """Write the sizes and hashes of changed files into an engine's manifest."""

    def change(values: dict[str, Any]) -> None:
        for name in names:
            contents = (folder / name).read_bytes()
            values["files"].setdefault(name, {"is_weights": False}).update(
                num_bytes=len(contents), sha256=hashlib.sha256(contents).hexdigest()
            )

    resign(folder, change)

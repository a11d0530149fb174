"""Make altered checkpoints and impossible images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.manifest import FileRecord, Manifest, sha256_of

if TYPE_CHECKING:
    import onnx


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


def scaled_weight(
    engine: Path, folder: Path, weight: str, part: slice | int = slice(None), factor: float = 1.5
) -> Path:
    """Copy an engine or a bundle, and scale a float32 weight, or a part along its first axis, in its file."""
    import onnx

    shutil.copytree(engine, folder)
    for path in sorted(folder.glob("*.onnx")):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.name == weight:
                where = {each.key: each.value for each in tensor.external_data}
                data = np.memmap(folder / where["location"], np.float32, "r+", int(where["offset"]), tuple(tensor.dims))
                data[part] *= factor
                data.flush()
                return folder
    raise AssertionError(f"{engine} has no weight {weight}")


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


def noisy_scales(engine: Path, folder: Path) -> Path:
    """Copy an engine and multiply each scale of its decoder, or of both, by a random factor of 1/4 to 4."""
    import onnx

    shutil.copytree(engine, folder)
    rng = np.random.default_rng(0)
    graphs = [path for path in (folder / "decoder.onnx", folder / "prefill.onnx") if path.exists()]
    changed = 0
    for tensor in (each for path in graphs for each in onnx.load(path, load_external_data=False).graph.initializer):
        place = {entry.key: entry.value for entry in tensor.external_data}
        if ".scales" in tensor.name and place:
            count = int(np.prod(tensor.dims))
            scales = np.memmap(folder / place["location"], np.float32, "r+", int(place["offset"]), (count,))
            scales *= np.exp2(rng.uniform(-2, 2, count)).astype(np.float32)
            scales.flush()
            changed += 1
    assert changed > 0
    return folder


def edit_graph(engine: Path, copy: Path, change: Callable[[onnx.GraphProto], int], name: str = "decoder.onnx") -> Path:
    """Copy an engine and alter one graph; `change` returns how many places it met."""
    import onnx

    shutil.copytree(engine, copy)
    path = copy / name
    model = onnx.load(path, load_external_data=False)
    assert change(model.graph) >= 4
    onnx.save(model, path)
    manifest = Manifest.read(copy)
    record = FileRecord(path.stat().st_size, sha256_of(path))
    dataclasses.replace(manifest, files={**manifest.files, path.name: record}).write(copy)
    return copy

"""Engine folders: small files and manifests changed with fitting hashes, and any file changed without."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

from fuzz.families import small_files
from fuzz.family import Recipe
from fuzz.mutation import WEIRD, apply_bytes, apply_json, byte_edits, encoded, json_edits

_MANIFEST = "engine.json"
_KEYS = ("capacity", "session", "experts", "files", "format_version", "capabilities", "model", "cache_scales")
_CAPABILITIES = (
    *(
        "capacity",
        "cache_scales",
        "prefill_min_tokens",
        "prefill_chunk",
        "logits_chunk",
        "top_k",
        "device",
        "cache_bits",
    ),
    *("cache_dtype", "max_batch"),
)
_CAPABILITY_VALUES = (
    *(
        "../../../etc/passwd",
        "/dev/zero",
        "/etc/passwd",
        "config.json",
        "float16",
        "object",
        "int8",
        "uint8",
        "V8",
        "U5",
    ),
    *("datetime64", "bfloat16", "complex64", "gpu", "cpu", "decoder.onnx", 512, 4096, 10**12),
)
_FILE_NAMES = (
    *(
        "../x",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        "extra",
        "engine.json",
        "config.json",
        "\x00",
        "\ud800",
        "decoder.onnx",
    ),
    "\x1b[2J",
)
_RECORDS: tuple[Any, ...] = (
    {"num_bytes": 1, "sha256": "x"},
    {"num_bytes": -1, "sha256": "", "is_weights": True},
    {"num_bytes": 2**70, "sha256": "", "is_weights": True},
    {"num_bytes": "1", "sha256": 1},
    {"num_bytes": 1.0, "sha256": "x", "is_weights": "no"},
    {"num_bytes": 1e30, "sha256": "", "is_weights": True},
    *({}, [], None, 5),
)
_SESSIONS: tuple[Any, ...] = (
    *(
        "",
        "__init__",
        "..",
        "os",
        "ort_cpu.x",
        "ort_cuda",
        "tensorrt",
        5,
        None,
        [],
        "ort_cpu ",
        "ORT_CPU",
        "\x00",
        "../x",
    ),
    *("a" * 5000, "ort_cpu\n", "é"),
)
_UNSIGNED = (
    *(_MANIFEST, "config.json", "tokenizer.json", "chat_template.jinja", "decoder.onnx", "vision.onnx"),
    *("decoder.onnx.data", "vision.onnx.data"),
)


def setup(engine: Path, folder: Path) -> tuple[Path, Path]:
    """Link the files of the engine into the folder, and import what opens it."""
    import numpy  # noqa: F401
    import onnxruntime  # noqa: F401

    from runtime.model import Qwen3VLModel

    for path in engine.iterdir():
        (folder / path.name).symlink_to(path)
    Qwen3VLModel.from_engine(folder, threads=1).generate("Read", max_new_tokens=1)
    return engine, folder


def make(random: Random) -> Recipe:
    """Return a change of a file, of the manifest, or of a file that then does not fit the manifest."""
    match random.randrange(6):
        case 0 | 1:
            return {"what": "file", **small_files.make(random)}
        case 2:
            return {"what": "unsigned", "file": random.choice(_UNSIGNED), "edits": byte_edits(random, 1 << 20)}
        case 3:
            edits = byte_edits(random, 12_000)
            return {"what": "manifest bytes", "file": _MANIFEST, "edits": edits}
    recipe: Recipe = {"what": "manifest", "file": _MANIFEST, "edits": []}
    match random.randrange(10):
        case 0 | 1 | 2 | 3:
            recipe["edits"] = [["seed", random.randrange(1 << 30)]]
        case 4 | 5 | 6 | 7:
            values = [*WEIRD, *_CAPABILITY_VALUES]
            for _ in range(random.choice((1, 1, 2))):
                recipe["edits"].append(["capability", random.choice(_CAPABILITIES), random.randrange(len(values))])
        case 8:
            recipe["edits"] = [["record", random.choice(_FILE_NAMES), random.randrange(len(_RECORDS))]]
        case _:
            recipe["edits"] = [["session", random.randrange(len(_SESSIONS))]]
    return recipe


def size(recipe: Recipe) -> tuple[int, int]:
    """Return the bytes of what was changed; opening the whole engine takes that of its own."""
    changed = len(small_files.contents(recipe)) if recipe["what"] == "file" else 0
    return changed, 0


def run(recipe: Recipe, context: tuple[Path, Path]) -> str:
    """Open the engine and let it answer with two tokens."""
    import numpy as np

    from runtime.model import Qwen3VLModel

    engine, folder = context
    changed = _changed(recipe, engine)
    try:
        for name, data in changed.items():
            (folder / name).unlink(missing_ok=True)
            (folder / name).write_bytes(data)
        model = Qwen3VLModel.from_engine(folder, threads=1)
        image = {"type": "image", "image": np.zeros((32, 32, 3), np.uint8)}
        question = [{"role": "user", "content": [image, {"type": "text", "text": "Read the digits."}]}]
        model.generate(question, max_new_tokens=2)
    finally:
        for name in changed:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(engine / name)
    return "answers"


def _changed(recipe: Recipe, engine: Path) -> dict[str, bytes]:
    """Return the changed files by name."""
    name = recipe["file"]
    match recipe["what"]:
        case "file":
            data = small_files.contents(recipe)
            manifest = small_files.manifest_of(engine)
            manifest["files"][name] |= {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            return {name: data, _MANIFEST: _signed(manifest)}
        case "manifest":
            return {_MANIFEST: _signed(_edited(small_files.manifest_of(engine), recipe["edits"]))}
    return {name: apply_bytes((engine / name).read_bytes(), recipe["edits"])}


def _edited(manifest: Any, edits: list[list[Any]]) -> Any:
    for name, *arguments in edits:
        if name == "seed":
            manifest = apply_json(manifest, json_edits(Random(arguments[0]), manifest, _KEYS))
        elif name == "capability":
            manifest["capabilities"][arguments[0]] = [*WEIRD, *_CAPABILITY_VALUES][arguments[1]]
        elif name == "record":
            manifest["files"][arguments[0]] = _RECORDS[arguments[1]]
        else:
            manifest["session"] = _SESSIONS[arguments[0]]
    return manifest


def _signed(manifest: Any) -> bytes:
    """Return the manifest's text with its own hash, as `Manifest.write` makes it."""
    if not isinstance(manifest, dict):
        return encoded(manifest)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return encoded({**manifest, "sha256": digest})

"""Headers of weight files, and the index of shards."""

from __future__ import annotations

import json
import os
import socket
import struct
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from fuzz.families.small_files import CHECKPOINT
from fuzz.family import Recipe
from fuzz.mutation import WHOLE, apply_bytes, apply_json, byte_edits, encoded, json_edits

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADERS = (
    *(b"", b"{}", b"[]", b"null", b"1", b'{"a":1}', b'{"__metadata__":1}', b"\xff\xfe{}", b"\xef\xbb\xbf{}"),
    *(WHOLE[name] for name in ("deep list", "deep object", "long", "wide", "keys")),
    *(
        b'{"a":{"dtype":%s,"shape":%s,"data_offsets":%s}}' % fields
        for fields in (
            (b'"F32"', b"[]", b"[0,4]"),
            (b'"F32"', b"[0]", b"[0,0]"),
            (b'["F32"]', b"[1]", b"[0,4]"),
            (b"{}", b"[1]", b"[0,4]"),
            (b"null", b"[1]", b"[0,4]"),
            (b'"F32"', b'"12"', b'"04"'),
            (b'"F32"', b"{}", b'{"0":0,"1":4}'),
            (b'"F32"', b"[4294967296,4294967296,4294967296]", b"[0,0]"),
            (b'"F32"', b"[9223372036854775808]", b"[0,0]"),
            (b'"F32"', b"[" + b"1," * 100_000 + b"1]", b"[0,4]"),
            (b'"F32"', b"[1]", b"[0," + b"9" * 5000 + b"]"),
            (b'"\\u001b[2J"', b"[1]", b"[0,4]"),
        )
    ),
    b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
)
_LENGTHS = (0, 1, 2**31, 2**40, 2**63, 2**64 - 1, 100 << 20, (100 << 20) + 1)
_DTYPES = (
    *(
        "F64",
        "F16",
        "F32",
        "I8",
        "U8",
        "BOOL",
        "F8_E4M3",
        "F8_E5M2",
        "",
        "bf16",
        None,
        1,
        [],
        {},
        "I64",
        "\ud800",
        "F4",
    ),
    "BF16" * 1000,
)
_SHAPES: tuple[Any, ...] = (
    *([], [0], [-1], [2**32, 2**32], [2**64], [1.0], ["1"], None, "x", {}, [10**30], [2**31, 2**33, 0], [True, 1]),
)
_SHARDS = (
    *("../../etc/passwd", "/etc/passwd", "..", ".", " ", "", "a/b", "./model.safetensors", "pipe", "link", "device"),
    *("folder", "loop", "model.safetensors\x00", "\ud800", "a" * 300, "*", "socket", "proc", "dangling", "memory"),
    "shard.safetensors",
)


@cache
def _parts() -> tuple[dict[str, Any], int]:
    """Return the header of the demo's weights, and the bytes of its data."""
    with (CHECKPOINT / _WEIGHTS).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        return header, file.seek(0, os.SEEK_END) - 8 - length


def setup(engine: Path, folder: Path) -> tuple[Path, Any]:
    """Link the small files, and put what an index may name beside them."""
    import qwen3vl_export.checkpoint  # noqa: F401

    for path in CHECKPOINT.iterdir():
        if path.suffix not in (".md", ".safetensors"):
            (folder / path.name).symlink_to(path)
    links = {"shard.safetensors": str(CHECKPOINT / _WEIGHTS), "link": "/etc/passwd", "device": "/dev/zero"}
    links |= {"proc": "/proc/self/maps", "memory": "/proc/self/mem", "loop": "loop", "dangling": "nowhere"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / "socket"))
    return folder, listening


def make(random: Random) -> Recipe:
    """Return a weight file with a changed header, or an index."""
    header, num_bytes = _parts()
    tail = random.choice((num_bytes, num_bytes, num_bytes, num_bytes + 1, num_bytes - 1, 0, 10))
    keys = list(header)
    match random.randrange(10):
        case 0 | 1:
            size = 8 + len(encoded(header))
            head = random.choice((8, 16, 200, size))
            return {"what": "bytes", "tail": tail, "edits": byte_edits(random, size, head=head)}
        case 2:
            return {"what": "length", "tail": tail, "length": random.choice(_LENGTHS), "edits": []}
        case 3:
            return {"what": "header", "tail": tail, "header": random.randrange(len(_HEADERS)), "edits": []}
        case 4 | 5 | 6 | 7:
            edits = [_tensor_edit(random, keys, header) for _ in range(random.choice((1, 1, 2)))]
            return {"what": "tensors", "tail": tail, "edits": edits}
    edits = []
    if random.random() < 0.5:
        names = random.sample(keys, random.choice((1, 1, 2)))
        edits = [["shard", name, random.choice(_SHARDS)] for name in names]
    elif random.random() < 0.5:
        edits = [["all", random.choice(_SHARDS)]]
    else:
        edits = json_edits(random, _index(keys[:5]), ["weight_map"])
    return {"what": "index", "tail": 0, "edits": edits}


def _tensor_edit(random: Random, keys: list[str], header: dict[str, Any]) -> list[Any]:
    key = random.choice(keys)
    match random.randrange(9):
        case 0:
            return ["shift", key, random.choice((-4, 4, 2**31, 2**63, -(10**9)))]
        case 1:
            return ["swap", key]
        case 2:
            return ["end", key, 2 ** random.choice((31, 32, 63, 64, 100))]
        case 3:
            return ["as", key, random.choice(keys)]
        case 4:
            return ["field", key, "shape", random.choice(_SHAPES)]
        case 5:
            return ["field", key, "dtype", random.choice(_DTYPES)]
        case 6:
            return [
                "rename",
                key,
                random.choice(("2", ".qweight", ".weight_scale_inv", " ", "\x00", "\ud800", "\x1b[2J")),
            ]
        case 7:
            return ["without", key]
    return ["json", json_edits(random, {key: header[key]}, ["x"])]


def _index(keys: list[str]) -> dict[str, Any]:
    return {"metadata": {"total_size": _parts()[1]}, "weight_map": {key: "shard.safetensors" for key in keys}}


def contents(recipe: Recipe) -> bytes:
    """Return the bytes of the index, or of the weight file without its data."""
    header, _ = _parts()
    plain = encoded(header)
    match recipe["what"]:
        case "bytes":
            return apply_bytes(struct.pack("<Q", len(plain)) + plain, recipe["edits"])
        case "length":
            return struct.pack("<Q", recipe["length"]) + plain
        case "header":
            text = _HEADERS[recipe["header"]]
            return struct.pack("<Q", len(text)) + text
        case "tensors":
            text = encoded(_edited(header, recipe["edits"]))
            text += b" " * (-len(text) % 8)
            return struct.pack("<Q", len(text)) + text
    index = _index(list(header))
    for name, *arguments in recipe["edits"]:
        if name == "shard":
            index["weight_map"][arguments[0]] = arguments[1]
        elif name == "all":
            index["weight_map"] = dict.fromkeys(header, arguments[0])
        else:
            index = apply_json(index, [[name, *arguments]])
    return encoded(index)


def _edited(header: dict[str, Any], edits: list[list[Any]]) -> Any:
    header = json.loads(json.dumps(header))
    for name, *arguments in edits:
        if name == "json":
            changed = apply_json(header, arguments[0])
            if not isinstance(changed, dict):
                return changed
            header = changed
            continue
        key = arguments[0]
        entry = header.get(key)
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(offsets, list) or len(offsets) != 2:
            continue
        begin, end = offsets
        if not isinstance(begin, int) or not isinstance(end, int):
            continue
        if name == "shift":
            entry["data_offsets"] = [begin + arguments[1], end + arguments[1]]
        elif name == "swap":
            entry["data_offsets"] = [end, begin]
        elif name == "end":
            entry["data_offsets"] = [begin, arguments[1]]
        elif name == "as":
            other = header.get(arguments[1])
            entry["data_offsets"] = other.get("data_offsets") if isinstance(other, dict) else None
        elif name == "field":
            entry[arguments[1]] = arguments[2]
        elif name == "rename":
            header[key + arguments[1]] = dict(entry)
        else:
            del header[key]
    return header


def size(recipe: Recipe) -> tuple[int, int]:
    """Return the bytes of the header; those of the data are not read as a whole."""
    return len(contents(recipe)), 0


def run(recipe: Recipe, context: tuple[Path, Any]) -> str:
    """Read the headers, and the blocks of a few small tensors."""
    from qwen3vl_export.checkpoint import Checkpoint

    folder, _ = context
    weights, index = folder / _WEIGHTS, folder / _INDEX
    data = contents(recipe)
    try:
        if recipe["what"] == "index":
            index.write_bytes(data)
        else:
            with weights.open("wb") as file:
                file.write(data)
                file.truncate(len(data) + recipe["tail"])
        checkpoint = Checkpoint.open(str(folder))
        _ = checkpoint.config
        _ = checkpoint.used_keys
        for key, entry in list(checkpoint.entries.items())[:6]:
            for _ in checkpoint.tensor(key, entry.shape).blocks():
                pass
        checkpoint.describe()
    finally:
        weights.unlink(missing_ok=True)
        index.unlink(missing_ok=True)
    return "is read"

"""What a GPU pack needs of graphs without weights, so that a machine without the onnx library can fill them.

`layout.json`: for each weight file its bytes and its tensors (name, kind, fan-in, dtype, shape, offset, bytes), each
place once. `manifest.json`: the engine's manifest without its files. `benchmarks/gpu/fill.py` reads both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.fill import MANIFEST
from benchmarks.gpu.measure import LAYOUT
from runtime.errors import EngineError
from runtime.manifest import Manifest

_DTYPES = {1: "float32", 2: "uint8", 10: "float16", 16: "bfloat16", 17: "float8"}  # TensorProto.DataType


def describe(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Write both files into the folder of an export without weights, and return the layout.

    Raises:
        EngineError: A weight is of a type that cannot be filled, or two overlap.
    """
    layout: dict[str, Any] = {}
    for graph in sorted(folder.glob("*.onnx")):
        for location, tensor in _tensors(graph):
            layout.setdefault(location, {"num_bytes": 0, "tensors": []})["tensors"].append(tensor)
    for name, described in layout.items():
        described["tensors"] = _distinct(folder / name, described["tensors"])
        last = described["tensors"][-1]
        described["num_bytes"] = last["offset"] + last["num_bytes"]
    (folder / LAYOUT).write_text(json.dumps(layout), encoding="utf-8")
    values = {key: value for key, value in asdict(manifest).items() if key != "files"}
    values["model"] = manifest.model.to_dict()
    values["source"] = {"name": f"random weights of {folder.name}"}
    (folder / MANIFEST).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return layout


def kind_of(name: str, dtype: str, names: set[str]) -> str:
    """Return the kind of a weight as `benchmarks.gpu.fill` has them.

    Args:
        name: The initializer's.
        dtype: Its type.
        names: Those of all initializers of the graph: scales and zero points are of the codes of the same weight.
    """
    for suffix in ("scales", "zero_points"):
        if name.endswith(f".{suffix}"):
            stem = name.removesuffix(suffix)
            if f"{stem}f8" in names:
                return f"{suffix}_float8"
            return f"{suffix}{8 if f'{stem}q8' in names else 4}"
    if dtype in ("uint8", "float8"):
        return "codes4" if name.endswith(".q4") else "codes8"
    if name.endswith(".bias"):
        return "bias"
    return "norm" if "norm" in name else "weight"


def fan_in_of(name: str, kind: str, shapes: Mapping[str, Sequence[int]]) -> int:
    """Return of how many inputs a weight, or the codes that scales belong to, makes a sum; 0 of other kinds.

    Args:
        name: The initializer's.
        kind: Its kind.
        shapes: Those of all initializers of the graph. Weights are [..., N, K]; scales [..., N, blocks of K].
    """
    if kind == "weight":
        return int(shapes[name][-1])
    if not kind.startswith("scales"):
        return 0
    suffix, codes_in_byte = {"scales4": ("q4", 2), "scales8": ("q8", 1), "scales_float8": ("f8", 1)}[kind]
    num_codes = math.prod(shapes[name.removesuffix("scales") + suffix]) * codes_in_byte
    return num_codes // math.prod(shapes[name][:-1])


def _tensors(graph: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield file and description of every weight that lies outside of a graph."""
    import onnx

    initializers = onnx.load(str(graph), load_external_data=False).graph.initializer
    shapes = {each.name: list(each.dims) for each in initializers}
    for each in initializers:
        if each.data_location != onnx.TensorProto.EXTERNAL:
            continue
        if each.data_type not in _DTYPES:
            raise EngineError(
                f"{graph}: {each.name} has element type {each.data_type}, which is not filled with random numbers",
                remedy="add the type to benchmarks/gpu_pack_graphs.py and benchmarks/gpu/fill.py",
            )
        place = {entry.key: entry.value for entry in each.external_data}
        dtype = _DTYPES[each.data_type]
        kind = kind_of(each.name, dtype, set(shapes))
        yield (
            place["location"],
            {
                "name": each.name,
                "kind": kind,
                "fan_in": fan_in_of(each.name, kind, shapes),
                "dtype": dtype,
                "shape": list(each.dims),
                "offset": int(place["offset"]),
                "num_bytes": int(place["length"]),
            },
        )


def _distinct(path: Path, tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the tensors by their places; a table that shares the bytes of another weight is left out.

    Raises:
        EngineError: Two overlap in part.
    """
    kept: list[dict[str, Any]] = []
    for each in sorted(tensors, key=lambda each: (each["offset"], len(each["name"]))):
        if kept and (each["offset"], each["num_bytes"]) == (kept[-1]["offset"], kept[-1]["num_bytes"]):
            continue
        if kept and each["offset"] < kept[-1]["offset"] + kept[-1]["num_bytes"]:
            raise EngineError(
                f"{path}: {each['name']} and {kept[-1]['name']} overlap", remedy="export the graphs again"
            )
        kept.append(each)
    return kept

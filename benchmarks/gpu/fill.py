"""Fill an engine's graphs with random weights of the right spread, and write its manifest: `fill FOLDER`.

`layout.json` in the folder says where each weight lies, of which kind it is, and of how many inputs it makes a sum
(`benchmarks/gpu_pack_graphs.py` makes it of the graphs), so nothing of ONNX is needed here. Values are the same on
every machine: all tensors of a kind are cut out of one block of random numbers, each from a place of its own. The
block's length is a prime, so no two rows of a matrix are equal, and neither are two logits.

Norms are 1 and biases small. A weight that sums n inputs has the deviation 1 / √n, so that what has the deviation 1
keeps it: each layer adds to the hidden state what the norm before it gave, and after L layers its deviation is at most
about √(2 L), far inside float16 at any depth. Codes of few bits are spread evenly and equally far to both sides of
their zero point, since a mean that is not 0 adds the same to all of a sum and grows with n, and so from layer to layer.

The manifest's hashes of weights are zeros, since nobody compares them: the folder is opened without a full check.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.measure import LAYOUT
from benchmarks.gpu.values import Values, parser
from runtime.manifest import FileRecord, Manifest
from runtime.model_config import ModelConfig

MANIFEST = "manifest.json"
_PRIME = 33_554_467  # the next after 2^25
_PIECE = 1 << 24
_BIAS_STD = 0.002
_FLOAT8_STD = 100.0  # the largest float8 (E4M3) is 448
# Of the codes -7 … 7 and -127 … 127, √((n² - 1) / 12) for n of them, and of codes that are floats.
_DEVIATIONS = {"scales4": 4.32, "scales8": 73.6, "scales_float8": _FLOAT8_STD}
_MIDDLES = {"zero_points4": 0x88, "zero_points8": 0x80}  # in 4 bits, two in a byte
_NO_HASH = "0" * 64
Bytes = NDArray[np.uint8]


class Blocks:
    """One block of random numbers for each kind of weight, made when it is first asked for.

    Args:
        elements: Length of a block; a prime.
    """

    def __init__(self, elements: int = _PRIME) -> None:
        self._elements = elements
        self._made: dict[tuple[str, str, int], Bytes] = {}
        self._random: dict[str, NDArray[np.float32]] = {}

    def get(self, tensor: Mapping[str, Any]) -> Bytes:
        """Return the bytes of the block that a tensor of the layout is cut out of."""
        kind, dtype, fan_in = tensor["kind"], tensor["dtype"], tensor["fan_in"]
        key = kind, dtype, fan_in
        if key not in self._made:
            self._made[key] = np.ascontiguousarray(self._values(kind, dtype, fan_in)).view(np.uint8)
        return self._made[key]

    def _values(self, kind: str, dtype: str, fan_in: int) -> NDArray[Any]:
        if dtype == "float8":
            return to_float8(np.float32(_FLOAT8_STD) * self._drawn(kind))
        if kind in _MIDDLES:
            return np.full(self._elements, _MIDDLES[kind], np.uint8)
        if kind == "codes4":
            low, high = _generator(kind).integers(1, 16, (2, self._elements), np.uint8)
            return low | high << 4
        if kind == "codes8":
            return _generator(kind).integers(1, 256, self._elements, np.uint8)
        if kind == "norm":
            return to_dtype(np.ones(self._elements, np.float32), dtype)
        std = _BIAS_STD if kind == "bias" else fan_in**-0.5 / _DEVIATIONS.get(kind, 1.0)
        return to_dtype(np.float32(std) * self._drawn(kind), dtype)

    def _drawn(self, kind: str) -> NDArray[np.float32]:
        """Return the numbers of a kind before they are scaled: of scales 0.8 to 1.2, else N(0, 1)."""
        if kind not in self._random:
            random = _generator(kind)
            if kind in _DEVIATIONS:
                drawn = random.uniform(0.8, 1.2, self._elements).astype(np.float32)
            else:
                drawn = random.standard_normal(self._elements, np.float32)
            self._random[kind] = drawn
        return self._random[kind]


def _generator(kind: str) -> np.random.Generator:
    return np.random.default_rng([len(kind), *kind.encode()])


def to_dtype(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Return float32 values in a stored type; bfloat16 as the upper halves, cut off."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def to_float8(values: NDArray[np.float32]) -> Bytes:
    """Return the codes of numbers as float8 (E4M3, no infinities), rounded, and cut off at the largest."""
    code = np.arange(127)  # the next one is no number
    exponent, fraction = code >> 3, code & 7
    known = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    middles = ((known[1:] + known[:-1]) / 2).astype(np.float32)
    return (np.searchsorted(middles, np.abs(values)) | np.where(values < 0, 0x80, 0)).astype(np.uint8)


def write_weights(folder: Path, layout: Mapping[str, Any], *, blocks: Blocks | None = None, threads: int = 8) -> int:
    """Write all weight files of a layout and return their bytes."""
    blocks = blocks or Blocks()
    # Blocks are made before the threads ask for them.
    for described in layout.values():
        for tensor in described["tensors"]:
            blocks.get(tensor)
    with ThreadPoolExecutor(threads) as pool:
        for name, described in layout.items():
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                os.truncate(descriptor, described["num_bytes"])
                done = [pool.submit(_write, descriptor, each, blocks.get(each)) for each in described["tensors"]]
                for each in done:
                    each.result()
            finally:
                os.close(descriptor)
    return sum(int(described["num_bytes"]) for described in layout.values())


def write_manifest(folder: Path) -> Manifest:
    """Write `engine.json` of `manifest.json`, which the pack brings, and the files of the folder."""
    values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    weights = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))
    files = {
        path.name: FileRecord(path.stat().st_size, _NO_HASH, is_weights=True)
        if path.name in weights
        else FileRecord.of(path)
        for path in sorted(folder.iterdir())
        if path.name not in (MANIFEST, LAYOUT, "engine.json") and path.is_file()
    }
    manifest = Manifest(**{**values, "model": ModelConfig.from_dict(values["model"]), "files": files})
    manifest.write(folder)
    return manifest


def _write(descriptor: int, tensor: Mapping[str, Any], block: Bytes) -> None:
    """Write one tensor, from a place in the block that its name gives."""
    item_bytes = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "float8": 1}[tensor["dtype"]]
    digest = hashlib.sha256(tensor["name"].encode()).digest()
    begin = int.from_bytes(digest[:8], "little") % (len(block) // item_bytes) * item_bytes
    position, left = int(tensor["offset"]), int(tensor["num_bytes"])
    while left:
        piece = block[begin : begin + min(left, _PIECE)]
        written = os.pwrite(descriptor, memoryview(piece), position)
        position, left, begin = position + written, left - written, (begin + written) % len(block)


def main() -> int:
    """Run the section."""
    args = parser().parse_args()
    values = Values(args.values)
    start = time.perf_counter()
    layout = json.loads((args.folder / LAYOUT).read_text(encoding="utf-8"))
    num_bytes = write_weights(args.folder, layout)
    write_manifest(args.folder)
    values["weight_bytes"] = num_bytes
    values["gb_per_s"] = round(num_bytes / 1e9 / (time.perf_counter() - start), 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The decode plan of an engine: kernels compiled ahead of time, and how a decode step launches them.

`decode_plan.json` says everything about them but the machine code, which lies in one file for each kind of GPU. What
it says is checked before anything is loaded: kernels run with the addresses that it names, and nothing checks those on
the device. The checks find damage and mix-ups, not malice: the plan brings code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineError
from runtime.files import read_json_object, read_small_file
from runtime.json_entry import Entry
from runtime.manifest import MANIFEST_NAME, Manifest
from runtime.stored_weight import ELEMENTS, StoredWeight, stored_bytes

FORMAT = 1
PLAN_NAME = "decode_plan.json"
DECODER_NAME = "decoder.onnx"
PLAN_CAPABILITY = "decode_plan"
FAST, INVARIANT = "fast", "invariant"
"""Forms of a step: the fastest for its batch, and the one whose sums do not depend on the batch."""
STEP_INPUTS = ("input_ids", "position_ids", "past_lengths", "slots")
STEP_OUTPUTS = ("logits", "top_logits", "top_ids")
CAPACITY, NULL = "capacity", "null"

_REMEDY = "build the engine again, or open it with decode_plan=False (--no-decode-plan)"
# 94 layers for six kinds of GPU and six batches have 15 MB.
_MOST_PLAN_BYTES = 64 << 20
_MOST_CODE_BYTES = 256 << 20
_MOST_BATCH, _MOST_BYTES = 1 << 10, 1 << 40
_MOST_WARPS, _MOST_SHARED_BYTES = 32, 1 << 20
# Blocks along x, y and z (CUDA C++ Programming Guide, technical specifications).
_MOST_BLOCKS = ((1 << 31) - 1, (1 << 16) - 1, (1 << 16) - 1)
_INTEGERS = {f"{sign}{bits}": (bits, sign == "i") for sign in "iu" for bits in (8, 16, 32, 64)}
_FLOATS = ("fp32", "fp64")
_CONSTANT_TYPES = ("fp32", "i64")
_POINTER = re.compile(r"\*(k)?(i1|[iu](8|16|32|64)|fp(16|32|64)|bf16|fp8e(4nv|5))")
# From here on, machine code is for one compute capability alone, not for later ones of the same generation.
_FIRST_EXACT_SM = 90

Source = str | int | float


@dataclass(frozen=True)
class Kernel:
    """A kernel's machine code for one kind of GPU.

    Attributes:
        types: Types of its arguments, as Triton writes them.
        offset: Of the code in the file of that GPU.
        num_bytes: Of the code.
        entry: Its name there.
        shared_bytes: Shared memory of a block.
        num_threads: Threads of a block.
    """

    types: tuple[str, ...]
    offset: int
    num_bytes: int
    entry: str
    shared_bytes: int
    num_threads: int


@dataclass(frozen=True)
class PlannedLaunch:
    """One launch of a step: the index of its kernel, blocks along x, y, z, and where each argument comes from."""

    kernel: int
    grid: tuple[int, int, int]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class GpuPlan:
    """The plan for one kind of GPU.

    Attributes:
        file: Name of the file with the code.
        is_dependent: All launches of a step but the first may begin before the one before them has ended.
        kernels: By their index, those that a step uses.
        steps: Launches by batch and form.
    """

    file: str
    is_dependent: bool
    kernels: Mapping[int, Kernel]
    steps: Mapping[tuple[int, str], tuple[PlannedLaunch, ...]]


class DecodePlan:
    """The plan of an engine, for all GPUs that it was made for.

    Attributes:
        batches: Batch sizes that have launches, rising.
        buffers: Memory that its kernels share: bytes, and whether it begins as zeros; by name.
        constants: Numbers that its kernels take and no file of weights holds, by name, one-dimensional.
        weights: Weights of the decoder by the name of their initializer.
        top_k: Largest logits that a step gives.
        sms: Compute capabilities that it was made for, as numbers such as 90.

    Raises:
        EngineError: The plan is missing, damaged, or belongs to another engine.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        manifest.require(folder, PLAN_NAME, DECODER_NAME)
        self._manifest = manifest
        self._checked: dict[int, GpuPlan] = {}
        path = folder / PLAN_NAME
        values = read_json_object(path, max_bytes=_MOST_PLAN_BYTES, remedy=_REMEDY)
        self._root = Entry(values, str(path), _REMEDY)
        if self._root.get("format").value != FORMAT:
            self._root.get("format").refuse(f"{FORMAT}, which this version reads")
        self._check_engine()
        self.top_k = self._root.get("top_k").integer(1, 1 << 20)
        self.batches = tuple(each.integer(1, _MOST_BATCH) for each in self._root.get("batches").values())
        if not self.batches or list(self.batches) != sorted(set(self.batches)):
            self._root.get("batches").refuse("rising integers")
        self.buffers = {
            name: (entry.get("bytes").integer(1, _MOST_BYTES), entry.get("zeroed").truth())
            for name, entry in self._root.get("buffers").items()
        }
        self.constants = {name: _constant(entry) for name, entry in self._root.get("constants").items()}
        self.weights = {name: self._weight(entry) for name, entry in self._root.get("weights").items()}
        self.sms = tuple(self._sm(name, entry) for name, entry in self._root.get("gpus").items())
        if not self.sms:
            self._root.get("gpus").refuse("at least one GPU")

    def _check_engine(self) -> None:
        """Compare with what the manifest says of the decoder that the plan was made of."""
        found, expected = self._root.get("dtype"), self._manifest.capabilities["cache_dtype"]
        if found.value != expected:
            found.refuse(f"{expected}, the type of this engine's cache")
        decoder = self._manifest.files[DECODER_NAME].sha256
        if self._root.get("decoder").value != decoder:
            self._root.get("decoder").refuse(f"the SHA-256 of this engine's {DECODER_NAME}, {decoder}")

    def _file(self, entry: Entry) -> tuple[str, int]:
        """Return a file that the manifest lists, and its size."""
        name = entry.text()
        if name not in self._manifest.files:
            entry.refuse("a file that engine.json lists")
        return name, self._manifest.files[name].num_bytes

    def _weight(self, entry: Entry) -> StoredWeight:
        file, file_bytes = self._file(entry.get("file"))
        offset = entry.get("offset").integer(0, file_bytes)
        num_bytes = entry.get("bytes").integer(1, file_bytes - offset)
        shape = tuple(each.integer(1, _MOST_BYTES) for each in entry.get("shape").values())
        kind = entry.get("onnx_type").integer(1, max(ELEMENTS))
        if kind not in ELEMENTS:
            entry.get("onnx_type").refuse(f"one of {', '.join(map(str, ELEMENTS))}")
        if stored_bytes(kind, shape) != num_bytes:
            entry.get("bytes").refuse(f"{stored_bytes(kind, shape)}, what its shape and type take")
        return StoredWeight(file, offset, num_bytes, kind, shape)

    def _sm(self, name: str, entry: Entry) -> int:
        if not re.fullmatch(r"[1-9]\d{1,2}", name):
            Entry(name, f"{PLAN_NAME}: a name in gpus", _REMEDY).refuse("a compute capability such as 90")
        self._file(entry.get("file"))
        return int(name)

    def sm_for(self, compute_capability: str) -> int | None:
        """Return the GPU whose code runs on one of this compute capability, such as `8.9`; None if there is none."""
        major, _, minor = compute_capability.partition(".")
        wanted = 10 * int(major) + int(minor)
        if wanted >= _FIRST_EXACT_SM:
            return wanted if wanted in self.sms else None
        return max((sm for sm in self.sms if sm // 10 == wanted // 10 and sm <= wanted), default=None)

    def misfit(self, compute_capability: str, driver_version: str, max_shared_bytes: int) -> str | None:
        """Say why the plan does not run on a GPU and driver; None if it does.

        Args:
            compute_capability: Of the GPU, such as `9.0`.
            driver_version: The newest CUDA version that the driver knows, such as `13.0`.
            max_shared_bytes: Shared memory of a block.
        """
        sm = self.sm_for(compute_capability)
        if sm is None:
            made_for = ", ".join(f"{each // 10}.{each % 10}" for each in self.sms)
            return f"the decode plan is for compute capability {made_for}, and this GPU has {compute_capability}"
        # Machine code runs with each driver of its major version (CUDA Compatibility, minor version compatibility).
        ptxas = self._root.get("gpus").get(str(sm)).get("ptxas")
        found = re.match(r"([0-9]{1,4})\.[0-9]", ptxas.text())
        if found is None:
            ptxas.refuse("a version such as 12.9.86")
        if int(driver_version.partition(".")[0]) < int(found[1]):
            return f"the decode plan needs a driver of CUDA {found[1]}.0 or later, and this one is of {driver_version}"
        needed = max(kernel.shared_bytes for kernel in self.for_sm(sm).kernels.values())
        if needed > max_shared_bytes:
            return (
                f"a kernel of the decode plan takes {needed} bytes of shared memory, and a block here has at most "
                f"{max_shared_bytes}"
            )
        return None

    def for_sm(self, sm: int) -> GpuPlan:
        """Return the plan for one of `sms`, checked.

        Raises:
            EngineError: An index, size or name in it leads nowhere.
        """
        if sm not in self._checked:
            self._checked[sm] = self._for_sm(sm)
        return self._checked[sm]

    def _for_sm(self, sm: int) -> GpuPlan:
        gpu, kernels = self._root.get("gpus").get(str(sm)), self._root.get("kernels").values()
        file, file_bytes = self._file(gpu.get("file"))
        most_shared = gpu.get("max_shared_bytes").integer(0, _MOST_SHARED_BYTES)
        used: dict[int, Kernel] = {}
        steps: dict[tuple[int, str], tuple[PlannedLaunch, ...]] = {}
        for batch in self.batches:
            for form in (FAST, INVARIANT):
                launches = []
                for entry in self._root.get("steps").get(str(sm)).get(str(batch)).get(form).values():
                    index_entry, grid, sources = entry.values(3)
                    index = index_entry.integer(0, len(kernels) - 1)
                    if index not in used:
                        used[index] = _kernel(kernels[index], str(sm), file_bytes, most_shared)
                    launches.append(self._launch(index, used[index], grid, sources))
                if not launches:
                    self._root.get("steps").get(str(sm)).get(str(batch)).get(form).refuse("launches")
                steps[batch, form] = tuple(launches)
        return GpuPlan(file, gpu.get("dependent_launch").truth(), used, steps)

    def _launch(self, index: int, kernel: Kernel, grid: Entry, sources: Entry) -> PlannedLaunch:
        blocks = tuple(each.integer(1, most) for each, most in zip(grid.values(3), _MOST_BLOCKS, strict=True))
        entries = sources.values(len(kernel.types))
        found = tuple(self._source(entry, kind) for entry, kind in zip(entries, kernel.types, strict=True))
        return PlannedLaunch(index, (blocks[0], blocks[1], blocks[2]), found)

    def _source(self, entry: Entry, kind: str) -> Source:
        if kind.startswith("*"):
            if not self._is_address(entry.text()):
                entry.refuse("memory that the plan or the engine has")
            return str(entry.value)
        if kind in _FLOATS:
            return entry.number()
        bits, is_signed = _INTEGERS[kind]
        if entry.value == CAPACITY and bits >= 32:
            return CAPACITY
        return entry.integer(-(1 << bits - 1) if is_signed else 0, (1 << bits - is_signed) - 1)

    def _is_address(self, source: str) -> bool:
        kind, _, name = source.partition(":")
        num_layers = self._manifest.model.text.num_layers
        known: Mapping[str, Any] = {
            "buffer": self.buffers,
            "constant": self.constants,
            "weight": self.weights,
            "step": STEP_INPUTS + STEP_OUTPUTS,
        }
        if kind in known:
            return name in known[kind]
        if kind in ("key", "value"):
            return bool(re.fullmatch(r"0|[1-9]\d{0,4}", name)) and int(name) < num_layers
        return source == NULL


def has_plan(manifest: Manifest) -> bool:
    """Return whether an engine brings a decode plan."""
    return bool(manifest.capabilities.get(PLAN_CAPABILITY))


def read_code(folder: Path, gpu: GpuPlan, manifest: Manifest) -> bytes:
    """Return the machine code of all kernels for one kind of GPU.

    Whoever opens an engine compares its files with the manifest before; what a GPU is given is compared itself, since
    nothing would notice a wrong kernel that computes something.

    Raises:
        EngineError: The file is missing, or has other contents than the manifest says.
    """
    path, record = folder / gpu.file, manifest.files[gpu.file]
    code = read_small_file(path, max_bytes=_MOST_CODE_BYTES, remedy=_REMEDY)
    if len(code) != record.num_bytes:
        raise EngineError(f"{path}: {len(code)} bytes, expected {record.num_bytes}", remedy=_REMEDY)
    if hashlib.sha256(code).hexdigest() != record.sha256:
        raise EngineError(f"{path}: its SHA-256 is not the one in {MANIFEST_NAME}", remedy=_REMEDY)
    return code


def _constant(entry: Entry) -> NDArray[Any]:
    kind, numbers = entry.get("type"), entry.get("values").values()
    if kind.value not in _CONSTANT_TYPES or not numbers:
        kind.refuse(f"{' or '.join(_CONSTANT_TYPES)}, with values")
    if kind.value == "fp32":
        return np.array([each.number() for each in numbers], np.float32)
    return np.array([each.integer(-(1 << 63), (1 << 63) - 1) for each in numbers], np.int64)


def _kernel(entry: Entry, sm: str, file_bytes: int, most_shared: int) -> Kernel:
    types = []
    for _, each in entry.get("types").items():
        kind = each.text()
        if kind not in _INTEGERS and kind not in _FLOATS and not _POINTER.fullmatch(kind):
            each.refuse("a type that a kernel can be given")
        types.append(kind)
    code = entry.get("code").get(sm)
    offset = code.get("offset").integer(0, file_bytes)
    num_bytes = code.get("bytes").integer(1, file_bytes - offset)
    name, shared = code.get("entry").text(), code.get("shared_bytes").integer(0, most_shared)
    if not name.isascii():  # half a surrogate, as JSON may have one, is no name for the driver
        code.get("entry").refuse("a name in ASCII")
    warps = entry.get("num_warps").integer(1, _MOST_WARPS)
    return Kernel(tuple(types), offset, num_bytes, name, shared, 32 * warps)

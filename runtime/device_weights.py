"""The weights of a graph in device memory of our own, which ONNX Runtime reads in place.

A weight is described to ONNX Runtime by a DLPack tensor (https://dmlc.github.io/dlpack/latest/c_api.html), which names
an address, a device and a type, and owns nothing. The memory must outlive the session that was given it.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from runtime.cuda import CudaDevice
from runtime.errors import EngineError
from runtime.files import NotRegularError, open_regular
from runtime.installation import from_extra
from runtime.stored_weight import ELEMENTS, StoredWeight

with from_extra("cuda"):
    import onnxruntime as ort

_DEVICE_TYPES = {"cpu": 1, "cuda": 2}  # kDLCPU, kDLCUDA
# Two of them: while one is copied to the device, the next piece of the file is read into the other.
_PIECE_BYTES = 8 << 20
# What a session takes on a GPU beside its weights: handles and workspaces of the libraries, the arena's first block.
_BESIDE_WEIGHTS_BYTES = 256 << 20


class DeviceWeights:
    """All weights of a graph on the device; those that lie at one place of a file are there once.

    The memory is freed by `close` or with the last reference.

    Args:
        folder: Of the files.
        weights: By the initializer's name.
        device: Where.
        stream: The copies run on it; all are done when this returns.

    Attributes:
        addresses: Device address of each weight, by name.
        num_bytes: Device memory of all.

    Raises:
        EngineError: A file is missing, or shorter than the weights in it.
        CapacityError: The device has not so much left; nothing of it stays taken.
    """

    def __init__(self, folder: Path, weights: Mapping[str, StoredWeight], device: CudaDevice, stream: int) -> None:
        self._weights = weights
        self._held: list[Any] = []
        self.addresses: dict[str, int] = {}
        self.num_bytes = 0
        places: dict[tuple[str, int, int], int] = {}
        with ExitStack() as stack:
            for name, weight in weights.items():
                place = weight.file, weight.offset, weight.num_bytes
                if place not in places:
                    places[place] = device.alloc(weight.num_bytes)
                    stack.callback(device.free, places[place])
                    self.num_bytes += weight.num_bytes
                self.addresses[name] = places[place]
            _upload(folder, places, device, stream)
            self.close = weakref.finalize(self, stack.pop_all().close)
            self.close.atexit = False  # the driver frees what a process leaves

    def give_to(self, options: ort.SessionOptions, device_name: str) -> None:
        """Let a session that is opened with these options read the weights where they are.

        Args:
            options: Of a session that must be closed before the weights are.
            device_name: `cuda`, or `cpu` if the addresses are of the host's memory.
        """
        for name, weight in self._weights.items():
            if weight.is_shared:
                value = self._as_value(self.addresses[name], weight, device_name)
                options.add_initializer(name, value)

    def _as_value(self, address: int, weight: StoredWeight, device_name: str) -> ort.OrtValue:
        code, bits = ELEMENTS[weight.onnx_type]
        shape = (ctypes.c_int64 * len(weight.shape))(*weight.shape)
        device, kind = _Device(_DEVICE_TYPES[device_name], 0), _DataType(code, bits, 1)
        tensor = _Tensor(address, device, len(weight.shape), kind, shape, None, 0)
        managed = _ManagedTensor(tensor, None, None)
        value = ort.OrtValue.from_dlpack(_new_capsule(ctypes.addressof(managed), b"dltensor", None))
        # ONNX Runtime keeps addresses of all of these.
        self._held += [shape, managed, value]
        return value


def is_second_copy(taken_bytes: int, weights_bytes: int) -> bool:
    """Return whether a session has so much device memory that it must have copied the weights it was given.

    What a session takes beside them is not known to the byte, so a copy of less than half of the weights, or of a model
    of a few hundred megabytes, is not seen.
    """
    return taken_bytes >= weights_bytes // 2 + _BESIDE_WEIGHTS_BYTES


def _upload(folder: Path, places: Mapping[tuple[str, int, int], int], device: CudaDevice, stream: int) -> None:
    with ExitStack() as stack:
        halves = []
        for _ in range(2):
            halves.append(device.pinned(_PIECE_BYTES))
            stack.callback(device.free_pinned, halves[-1])
        stack.callback(device.synchronize, stream)
        descriptors: dict[str, int] = {}
        turn = 0
        for (file, offset, num_bytes), address in places.items():
            if file not in descriptors:
                descriptors[file] = _opened(folder / file)
                stack.callback(os.close, descriptors[file])
            for start in range(0, num_bytes, _PIECE_BYTES):
                piece = halves[turn][: min(_PIECE_BYTES, num_bytes - start)]
                _read(descriptors[file], offset + start, piece.data, folder / file)
                device.synchronize(stream)  # of the other half
                device.to_device(address + start, piece, stream)
                turn = 1 - turn


def _opened(path: Path) -> int:
    try:
        return open_regular(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, NotRegularError) else error
        raise EngineError(f"{path}: cannot be read: {reason}", remedy="copy the whole engine folder again") from error


def _read(descriptor: int, offset: int, target: memoryview, path: Path) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if count == 0:
            raise EngineError(
                f"{path}: ends at byte {offset + done}, and weights lie beyond it", remedy="copy the folder again"
            )
        done += count


class _Device(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _ManagedTensor(ctypes.Structure):
    # No deleter: whoever made it keeps it.
    _fields_ = [("dl_tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

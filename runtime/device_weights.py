"""The weights of a graph in device memory of our own, which ONNX Runtime reads in place.

A weight is described to ONNX Runtime by a DLPack tensor (https://dmlc.github.io/dlpack/latest/c_api.html), which names
an address, a device and a type, and owns nothing. The memory must outlive the session that was given it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

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


class DeviceWeights:
    """All weights of a graph on the device; those that lie at one place of a file are there once.

    The memory is freed by `close`.

    Args:
        folder: Of the files.
        weights: By the initializer's name.
        device: Where.
        stream: The copies run on it; all are done when this returns.

    Attributes:
        stored: As given.
        addresses: Device address of each weight, by name.
        num_bytes: Device memory of all.

    Raises:
        EngineError: A file is missing, or shorter than the weights in it.
        CapacityError: The device has not so much left; nothing of it stays taken.
    """

    def __init__(self, folder: Path, weights: Mapping[str, StoredWeight], device: CudaDevice, stream: int) -> None:
        self.stored = weights
        # Of which the options keep addresses alone.
        self._values: list[ort.OrtValue] = []
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
            self._taken = stack.pop_all()

    def close(self) -> None:
        """Free the memory; no session that was given it may run any more."""
        self._taken.close()

    def give_to(self, options: ort.SessionOptions, device_name: str) -> None:
        """Let a session that is opened with these options read the weights where they are.

        Args:
            options: Of a session that must be closed before the weights are.
            device_name: `cuda`, or `cpu` if the addresses are of the host's memory.
        """
        for name, weight in self.stored.items():
            value = _as_value(self.addresses[name], weight, device_name)
            options.add_initializer(name, value)
            self._values.append(value)


def _as_value(address: int, weight: StoredWeight, device_name: str) -> ort.OrtValue:
    """Describe memory to ONNX Runtime, which frees the description with the last reference to the value."""
    code, bits = ELEMENTS[weight.onnx_type]
    num_dims = len(weight.shape)
    place = _raw_alloc(ctypes.sizeof(_ManagedTensor) + num_dims * ctypes.sizeof(ctypes.c_int64))
    shape = (ctypes.c_int64 * num_dims).from_address(place + ctypes.sizeof(_ManagedTensor))
    shape[:] = list(weight.shape)
    managed = _ManagedTensor.from_address(place)
    device, kind = _Device(_DEVICE_TYPES[device_name], 0), _DataType(code, bits, 1)
    managed.dl_tensor = _Tensor(address, device, num_dims, kind, ctypes.addressof(shape), None, 0)
    managed.manager_ctx, managed.deleter = None, ctypes.cast(ctypes.pythonapi.PyMem_RawFree, ctypes.c_void_p)
    return ort.OrtValue.from_dlpack(_new_capsule(place, b"dltensor", None))


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
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


class _ManagedTensor(ctypes.Structure):
    # The deleter is called with the address of all this.
    _fields_ = [("dl_tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


# They need no lock of Python's, and ONNX Runtime may call the latter from any thread.
_raw_alloc = ctypes.pythonapi.PyMem_RawMalloc
_raw_alloc.restype = ctypes.c_void_p
_raw_alloc.argtypes = [ctypes.c_size_t]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

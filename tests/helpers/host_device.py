"""The device of the session of ONNX Runtime on CUDA, on the host: the CPU provider, and checked memory."""

from __future__ import annotations

import dataclasses

import onnxruntime as ort

from helpers.host_cuda import HostDevice
from runtime.ort_device import Device

CPU = Device("CPUExecutionProvider", "cpu", HostDevice)


def keep_in_place(options: ort.SessionOptions) -> None:
    """Let the CPU provider read weights where they are: it packs them, and converts those of float16, else."""
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC


def device_of(memory: HostDevice, *, copies: bool = False) -> Device:
    """Return a device with this memory, whose provider copies the weights that it is given or not."""
    device = dataclasses.replace(CPU, memory=lambda: memory)
    return device if copies else dataclasses.replace(device, keep_in_place=keep_in_place)

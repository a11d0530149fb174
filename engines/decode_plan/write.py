"""Write a decode plan into an engine's folder: what `runtime.decode_plan` reads, and a file of code for each GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from engines.decode_plan.compile import Code, Job, compile_all, triton_version
from engines.decode_plan.decoder import Decoder
from engines.decode_plan.steps import BATCHES, FORMS, Steps
from engines.kernels.launch import Gpu, Launch, Unserved
from runtime.decode_plan import DECODER_NAME, FORMAT, PLAN_NAME
from runtime.manifest import FileRecord

# A kernel begins at a multiple of this, for the readers' sake.
_ALIGNMENT = 16
_CONSTANT_TYPES = {"float32": "fp32", "int64": "i64"}


def write_plan(
    folder: Path,
    model: ir.Model,
    decoder: Decoder,
    steps: Mapping[int, Steps],
    compiled: Callable[[list[Job]], Mapping[Job, Code]] = compile_all,
) -> dict[str, FileRecord]:
    """Compile the kernels of a plan and write it.

    Args:
        folder: The engine's.
        model: Its decoder, whose weights are references to the written file.
        decoder: What was read of it.
        steps: Launches for each GPU, by SM.
        compiled: Compiles the kernels.

    Returns:
        A record for each file written.

    Raises:
        TargetError: A kernel does not compile.
    """
    jobs = list(dict.fromkeys(Job.of(launch, each.gpu) for each in steps.values() for launch in each.launches()))
    codes = compiled(jobs)
    kernels = {kernel: {**kernel.to_dict(), "code": {}} for kernel in map(Job.for_any_gpu, jobs)}
    gpus, records = {}, {}
    for sm, each in steps.items():
        name = f"decode_plan_sm{sm}.bin"
        places = _write_code(folder / name, {job.for_any_gpu(): codes[job] for job in jobs if job.sm == sm})
        for kernel, place in places.items():
            kernels[kernel]["code"][str(sm)] = place
        records[name] = FileRecord.of(folder / name)
        gpus[str(sm)] = _described(each.gpu, name, next(codes[job].ptxas for job in jobs if job.sm == sm))
    plan = {
        "format": FORMAT,
        "versions": {"triton": triton_version()},
        "decoder": FileRecord.of(folder / DECODER_NAME).sha256,
        "dtype": decoder.dtype,
        "top_k": decoder.top_k,
        "batches": list(BATCHES),
        "buffers": _buffers(steps),
        "constants": _constants(decoder),
        "weights": _weights(model),
        "gpus": gpus,
        "kernels": list(kernels.values()),
        "steps": _rows(steps, {kernel: index for index, kernel in enumerate(kernels)}),
    }
    path = folder / PLAN_NAME
    path.write_text(json.dumps(plan, separators=(",", ":")) + "\n", encoding="utf-8")
    records[PLAN_NAME] = FileRecord.of(path)
    return records


def _described(gpu: Gpu, file: str, ptxas: str) -> dict[str, Any]:
    return {
        "file": file,
        "max_shared_bytes": gpu.shared_bytes,
        "dependent_launch": gpu.has_dependent_launch,
        "ptxas": ptxas,
    }


def _constants(decoder: Decoder) -> dict[str, Any]:
    return {
        name: {"type": _CONSTANT_TYPES[values.dtype.name], "values": values.tolist()}
        for name, values in decoder.constants.items()
    }


def _rows(steps: Mapping[int, Steps], indices: Mapping[Job, int]) -> dict[str, Any]:
    """Return the launches by GPU, batch and form: index of the kernel, grid, sources of the arguments."""

    def row(gpu: Gpu, launch: Launch) -> list[Any]:
        sources = [argument.source for argument in launch.arguments.values()]
        return [indices[Job.of(launch, gpu).for_any_gpu()], list(launch.grid), sources]

    return {
        str(sm): {
            str(batch): {form: [row(each.gpu, launch) for launch in each.of(batch, form)] for form in FORMS}
            for batch in BATCHES
        }
        for sm, each in steps.items()
    }


def _write_code(path: Path, codes: Mapping[Job, Code]) -> dict[Job, dict[str, Any]]:
    places, content = {}, bytearray()
    for kernel, code in codes.items():
        content += bytes(-len(content) % _ALIGNMENT)
        places[kernel] = {
            "offset": len(content),
            "bytes": len(code.binary),
            "entry": code.entry,
            "shared_bytes": code.shared_bytes,
        }
        content += code.binary
    path.write_bytes(content)
    return places


def _buffers(steps: Mapping[int, Steps]) -> dict[str, Any]:
    sizes: dict[str, tuple[int, bool]] = {}
    for each in steps.values():
        for name, (num_bytes, zeroed) in each.buffers.items():
            before = sizes.get(name, (0, False))
            sizes[name] = max(num_bytes, before[0]), zeroed or before[1]
    return {name: {"bytes": num_bytes, "zeroed": zeroed} for name, (num_bytes, zeroed) in sizes.items()}


def check_weights(model: ir.Model, steps: Mapping[int, Steps]) -> None:
    """Raise unless each weight that a launch reads lies in a file of its own, which a session can put on a GPU.

    Raises:
        Unserved: One lies inside the graph's own file.
    """
    stored = _weights(model)
    for each in steps.values():
        for launch in each.launches():
            for argument in launch.arguments.values():
                kind, _, name = str(argument.source).partition(":")
                if kind == "weight" and name not in stored:
                    raise Unserved(f"{name} lies inside {DECODER_NAME}, and not in a file of weights")


def _weights(model: ir.Model) -> dict[str, Any]:
    """Return where each initializer of the decoder lies that is not inside the graph's own file.

    They are the references that the graph was written with, so that the plan says what decoder.onnx says.
    """
    found = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            found[name] = {
                "file": str(tensor.location),
                "offset": tensor.offset,
                "bytes": tensor.length,
                "onnx_type": int(tensor.dtype),
                "shape": list(tensor.shape.numpy()),
            }
    return found

"""TensorRT-RTX: plans that are built without a GPU, ahead of time, and specialised when they are opened.

The library is `tensorrt-rtx-cu12` of the package index, in Python `tensorrt_rtx`; its API is TensorRT's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engines.hardware import probe
from engines.target import Availability, Compiled, Target
from engines.tensorrt import lowering
from engines.tensorrt.experts import gathered_bytes
from runtime.errors import TargetError
from runtime.installation import how_to_install

if TYPE_CHECKING:
    import onnx_ir as ir

    from engines.build_options import BuildOptions
    from runtime.model_config import ModelConfig

_LIBRARY = "tensorrt_rtx"
# All that the library builds for. One plan serves them all; 7.5 adds 0.6 MB (tensorrt_rtx 1.7.1).
_COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


def _compile(
    precision: str, folder: Path, graphs: Mapping[str, ir.Model], config: ModelConfig, options: BuildOptions
) -> Compiled:
    import tensorrt_rtx

    from engines.tensorrt.compiler import compile_plans

    chosen = options.compute_capabilities or _offered(precision)
    return compile_plans(tensorrt_rtx, folder, graphs, config, options, chosen)


def _check_options(precision: str, options: BuildOptions) -> None:
    offered = _offered(precision)
    unknown = sorted(set(options.compute_capabilities) - set(offered))
    if unknown:
        raise TargetError(
            f"compute capability {', '.join(unknown)}: trt-rtx-{precision} is built for {', '.join(offered)}",
            remedy="choose one of these; the trt-* targets build for the GPU of the machine",
        )
    chosen = options.compute_capabilities or offered
    # tensorrt_rtx 1.7.1 compiles a stripped plan's kernels while it builds: for one kind of GPU, on that GPU.
    if options.strip_weights and (len(chosen) > 1 or not probe().gpus):
        raise TargetError(
            "--strip-weights: TensorRT-RTX builds a stripped plan on the GPU that it is for, and for no other",
            remedy="on such a machine, name it too (--compute-capability 8.9); or leave --strip-weights out",
        )
    if options.version_compatible or options.hardware_compatible:
        name = "--version-compatible" if options.version_compatible else "--hardware-compatible"
        raise TargetError(
            f"{name}: TensorRT-RTX has no such plans; its wheel comes without the lean runtime that they need",
            remedy="leave it out: a plan serves all kinds of GPUs, and is built again in minutes for another version",
        )


def _offered(precision: str) -> tuple[str, ...]:
    """Return the GPUs that have the precision's type."""
    first = float(lowering.FIRST_COMPUTE_CAPABILITY.get(precision, "0"))
    return tuple(each for each in _COMPUTE_CAPABILITIES if float(each) >= first)


def _availability(precision: str) -> Availability:
    gpu = probe().gpu
    offered = _offered(precision)
    runs = gpu is not None and gpu.compute_capability in offered
    where = f"an NVIDIA GPU of SM {', '.join(offered)}" + (f", not {gpu.name}" if gpu else "")
    if importlib.util.find_spec(_LIBRARY) is None:
        return Availability(False, False, how_to_install("export", "tensorrt-rtx"))
    builds = all(importlib.util.find_spec(name) is not None for name in ("onnx_ir", "onnxscript", "torch"))
    if not builds:
        return Availability(False, runs, how_to_install("export"))
    return Availability(True, runs, "" if runs else f"builds here; to run, it needs {where}")


TARGETS = tuple(
    Target(
        name=f"trt-rtx-{precision}",
        precision=precision,
        description=f"TensorRT-RTX, built without a GPU, {description}",
        session="tensorrt",
        cache_dtype=lowering.cache_dtype(precision),
        updates_cache_in_place=True,
        batched_chunks=False,
        native_ops=lowering.NATIVE_OPS,
        passes=partial(lowering.passes, precision),
        libraries=("onnx-ir",),
        availability=partial(_availability, precision),
        top_k=lowering.TOP_K,
        prefill_workspace=gathered_bytes,
        device="gpu",
        compile=partial(_compile, precision),
        check_options=partial(_check_options, precision),
    )
    for precision, description in lowering.PRECISIONS.items()
)

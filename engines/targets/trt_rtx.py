"""TensorRT-RTX: plans that are built without a GPU, ahead of time, and specialised when they are opened.

The library is `tensorrt-rtx-cu12` of the package index, in Python `tensorrt_rtx`; its API is TensorRT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engines.hardware import probe
from engines.target import Compiled, Target, version
from engines.tensorrt import lowering
from runtime.errors import TargetError

if TYPE_CHECKING:
    import onnx_ir as ir

    from engines.build_options import BuildOptions
    from runtime.model_config import ModelConfig

# All that the library builds for. One plan serves them all; 7.5 adds 0.6 MB (tensorrt_rtx 1.7.1).
_COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


def _compile(
    offered: tuple[str, ...],
    folder: Path,
    graphs: Mapping[str, ir.Model],
    config: ModelConfig,
    options: BuildOptions,
) -> Compiled:
    import tensorrt_rtx

    from engines.tensorrt.compiler import compile_plans

    chosen = options.compute_capabilities or offered
    return compile_plans(tensorrt_rtx, folder, graphs, config, options, chosen)


def _check_options(name: str, offered: tuple[str, ...], options: BuildOptions) -> None:
    unknown = sorted(set(options.compute_capabilities) - set(offered))
    if unknown:
        raise TargetError(
            f"compute capability {', '.join(unknown)}: {name} is built for {', '.join(offered)}",
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
        option = "--version-compatible" if options.version_compatible else "--hardware-compatible"
        raise TargetError(
            f"{option}: TensorRT-RTX has no such plans; its wheel comes without the lean runtime that they need",
            remedy="leave it out: a plan serves all kinds of GPUs, and is built again in minutes for another version",
        )


def _target(precision: str, description: str) -> Target:
    name, record = f"trt-rtx-{precision}", lowering.record("trt_rtx", precision)
    least = version(record.get("min_compute_capability", ""))
    offered = tuple(each for each in _COMPUTE_CAPABILITIES if version(each) >= least)
    return Target(
        name=name,
        description=f"TensorRT-RTX, built without a GPU, {description}",
        library="tensorrt_rtx",
        extra="tensorrt-rtx",
        compute_capabilities=offered,
        compile=partial(_compile, offered),
        check_options=partial(_check_options, name, offered),
        **record,
    )


TARGETS = tuple(_target(*each) for each in lowering.PRECISIONS.items())

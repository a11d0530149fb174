"""TensorRT: plans for the GPU of the machine that builds them.

The library is `tensorrt` of the package index. Its builder measures kernels, so it needs the GPU; without one, the
lowered graphs can still be made, looked at and verified (`--no-compile`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engines.hardware import probe
from engines.target import Compiled, Target
from engines.tensorrt import lowering
from engines.tensorrt.experts import (
    MOE_LAYER_COMPUTE_CAPABILITIES,
    mixture_of_experts,
    mixture_of_experts_layer,
)
from runtime.errors import TargetError

if TYPE_CHECKING:
    import onnx_ir as ir

    from engines.build_options import BuildOptions
    from runtime.model_config import ModelConfig


def _compile(folder: Path, graphs: Mapping[str, ir.Model], config: ModelConfig, options: BuildOptions) -> Compiled:
    import tensorrt

    from engines.tensorrt.compiler import compile_plans
    from runtime.cuda import CudaDevice

    # What CUDA calls the first GPU is what the builder builds for; nvidia-smi may list another one first.
    device = CudaDevice()
    here = device.compute_capability
    if any(each != here for each in options.compute_capabilities):
        raise TargetError(
            f"compute capability {', '.join(options.compute_capabilities)}: TensorRT builds for {here}, this machine's",
            remedy="build on such a GPU, or choose a trt-rtx-* target",
        )
    uses_layer = any(node.op_type == "TRT_MoE" for graph in graphs.values() for node in graph.graph)
    if options.hardware_compatible and uses_layer:
        raise TargetError(
            "--hardware-compatible: the experts are TensorRT's own layer, which only GPUs of SM "
            f"{', '.join(MOE_LAYER_COMPUTE_CAPABILITIES)} have",
            remedy="leave it out; or build a trt-rtx-* target, whose plans serve all GPUs from SM 7.5 to 12.1",
        )
    made = compile_plans(tensorrt, folder, graphs, config, options, (here,), sets_capabilities=False)
    return replace(made, capabilities={**made.capabilities, "driver": device.driver_version, "gpu": device.name})


def _mixture_of_experts(precision: str, config: ModelConfig) -> str:
    """Return the body with TensorRT's own layer if this machine's GPU has it and the weights are in half precision."""
    gpu = probe().gpu
    has_layer = gpu is not None and gpu.compute_capability in MOE_LAYER_COMPUTE_CAPABILITIES
    return (mixture_of_experts_layer if has_layer and precision in ("fp16", "bf16") else mixture_of_experts)(config)


TARGETS = tuple(
    Target(
        name=f"trt-{precision}",
        description=f"TensorRT, {description}",
        library="tensorrt",
        extra="tensorrt",
        compile=_compile,
        builds_on_its_gpu=True,
        **lowering.record("trt", precision)
        | {"native_ops": {**lowering.NATIVE_OPS, "MixtureOfExperts": partial(_mixture_of_experts, precision)}},
    )
    for precision, description in lowering.PRECISIONS.items()
)

"""Open a decoder beside the own kernels of its decode plan, with one copy of the weights for both.

Where that is not possible, the decoder opens as it does without a plan, and the reason is kept and said.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from runtime.cuda import CudaDevice
from runtime.decode_plan import FAST, INVARIANT, DecodePlan, has_plan, read_code
from runtime.decode_plan_kernels import PlanKernels
from runtime.decode_plan_steps import PlanSteps
from runtime.device_buffers import Staging
from runtime.device_weights import DeviceWeights, is_second_copy
from runtime.errors import EngineError
from runtime.installation import from_extra
from runtime.manifest import Manifest
from runtime.session import SessionOptions

with from_extra("cuda"):
    import onnxruntime as ort

# Python shows warnings on stderr if the program sets up no logging of its own.
_LOGGER = logging.getLogger(__name__)

Opened = tuple[ort.InferenceSession, PlanSteps | None, str | None]


class OpenDecoder(Protocol):
    """Opens the decoder in ONNX Runtime, by itself or with weights that are on the device, and our stream."""

    def __call__(self, weights: DeviceWeights | None = None, stream: int = 0) -> ort.InferenceSession:
        """Open it."""


def open_with_plan(
    folder: Path,
    manifest: Manifest,
    options: SessionOptions,
    device: CudaDevice,
    staging: Staging,
    open_decoder: OpenDecoder,
    stack: ExitStack,
) -> Opened:
    """Open an engine's decoder, and its decode plan if there is one that runs here.

    Args:
        folder: The engine.
        manifest: Its manifest.
        options: How it is opened.
        device: The GPU.
        staging: Copies; kernels run on its stream.
        open_decoder: Opens the decoder.
        stack: Frees what is taken when the session is closed.

    Returns:
        The decoder; the steps of own kernels, or None; and why there are none, or None.

    Raises:
        EngineError: Plan or decoder are damaged, or `batch_invariant` cannot be kept.
        CapacityError: The GPU is out of memory.
    """
    if not (has_plan(manifest) and options.decode_plan):
        asked = "it was opened with decode_plan=False"
        return open_decoder(), None, asked if has_plan(manifest) else "the engine has no decode plan"
    plan = DecodePlan(folder, manifest)
    problem = plan.misfit(device.compute_capability, device.driver_version, device.max_shared_bytes)
    sm = plan.sm_for(device.compute_capability)
    if problem is not None or sm is None:
        return _without(open_decoder, str(problem), options)
    gpu = plan.for_sm(sm)
    code = read_code(folder, gpu, manifest)
    with ExitStack() as taken:
        weights = DeviceWeights(folder, plan.weights, device, staging.stream)
        taken.callback(weights.close)
        try:
            kernels = PlanKernels(device, staging.stream, gpu, code, plan.buffers, weights.addresses, plan.constants)
        except EngineError as error:
            taken.close()
            return _without(open_decoder, error.message, options)
        taken.callback(kernels.close)
        free_bytes = device.memory_info()[0]
        decoder = open_decoder(weights, staging.stream)
        _check_top(decoder, plan, folder)
        if is_second_copy(free_bytes - device.memory_info()[0], weights.num_bytes):
            problem = f"ONNX Runtime keeps a second copy of {weights.num_bytes / 1e9:.2f} GB of weights on the GPU"
            if not options.weights_twice:
                del decoder
                gc.collect()  # its memory has to be free before the decoder is opened again
                taken.close()
                return _without(open_decoder, problem, options)
            _LOGGER.warning("warning: %s, as weights_twice allows", problem)
        stack.push(taken.pop_all())
    return decoder, _steps(manifest, options, device, staging, kernels, plan.batches), None


def _steps(
    manifest: Manifest,
    options: SessionOptions,
    device: CudaDevice,
    staging: Staging,
    kernels: PlanKernels,
    batches: tuple[int, ...],
) -> PlanSteps:
    form = INVARIANT if options.batch_invariant else FAST
    has_experts = manifest.model.text.experts is not None
    return PlanSteps(device, staging, kernels, batches, form, has_experts=has_experts, records=options.cuda_graphs)


def _without(open_decoder: Callable[[], ort.InferenceSession], problem: str, options: SessionOptions) -> Opened:
    if options.batch_invariant:
        raise EngineError(
            f"batch_invariant: the engine's own kernels do not run here, and no others keep it: {problem}",
            remedy="open the engine without batch_invariant",
        )
    _LOGGER.warning("warning: ONNX Runtime decodes, and not the engine's own kernels, which are faster: %s", problem)
    return open_decoder(), None, problem


def _check_top(decoder: ort.InferenceSession, plan: DecodePlan, folder: Path) -> None:
    """Compare how many of the largest logits the graph and the plan give, since one memory takes both."""
    found = next(output.shape[-1] for output in decoder.get_outputs() if output.name == "top_ids")
    if found != plan.top_k:
        raise EngineError(
            f"{folder}: the decode plan gives the {plan.top_k} largest logits, and decoder.onnx {found}",
            remedy="build the engine again",
        )

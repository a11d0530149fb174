"""Open a decoder beside the own kernels of its decode plan, with one copy of the weights for both.

Where that is not possible, the decoder opens as it does without a plan, and the reason is kept and said.
"""

from __future__ import annotations

import gc
import logging
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol

from runtime.cuda import CudaDevice
from runtime.decode_plan import FAST, INVARIANT, DecodePlan, has_plan, read_code
from runtime.decode_plan_kernels import PlanKernels
from runtime.decode_plan_steps import PlanSteps
from runtime.device_buffers import Staging
from runtime.device_weights import DeviceWeights
from runtime.errors import CapacityError, EngineError
from runtime.manifest import Manifest
from runtime.ort_cache import TOP_IDS
from runtime.ort_device import Device, OpenedGraph
from runtime.session import SessionOptions
from runtime.weights_in_place import WeightsInPlace

# Python shows warnings on stderr if the program sets up no logging of its own.
_LOGGER = logging.getLogger(__name__)

Opened = tuple[OpenedGraph, PlanSteps | None, str | None]
# Of the weights' bytes, copies of one part are accepted: scales, or norms that a graph converts.
_PARTS_COPIED = 8


class OpenDecoder(Protocol):
    """Opens the decoder in ONNX Runtime, by itself or with weights that are on the device, and our stream."""

    def __call__(self, weights: DeviceWeights | None = None, stream: int = 0) -> OpenedGraph:
        """Open it."""


def open_with_plan(
    folder: Path,
    manifest: Manifest,
    options: SessionOptions,
    device: Device,
    memory: CudaDevice,
    staging: Staging,
    open_decoder: OpenDecoder,
    stack: ExitStack,
) -> Opened:
    """Open an engine's decoder, and its decode plan if there is one that runs here.

    Args:
        folder: The engine.
        manifest: Its manifest.
        options: How it is opened.
        device: Where the decoder runs.
        memory: The GPU.
        staging: Copies; kernels run on its stream.
        open_decoder: Opens the decoder.
        stack: Closes what is opened when the session is closed: the decoder before the weights that it was given.

    Returns:
        The decoder; the steps of own kernels, or None; and why there are none, or None.

    Raises:
        EngineError: Plan or decoder are damaged, or `batch_invariant` cannot be kept.
        CapacityError: The GPU is out of memory.
    """
    if not (has_plan(manifest) and options.decode_plan):
        asked = "it was opened with decode_plan=False"
        return _alone(open_decoder, stack), None, asked if has_plan(manifest) else "the engine has no decode plan"
    plan = DecodePlan(folder, manifest)
    problem = plan.misfit(memory.compute_capability, memory.driver_version, memory.max_shared_bytes)
    sm = plan.sm_for(memory.compute_capability)
    if problem is not None or sm is None:
        return _without(open_decoder, stack, str(problem), options)
    gpu = plan.for_sm(sm)
    code = read_code(folder, gpu, manifest)
    with ExitStack() as taken:
        weights = DeviceWeights(folder, plan.weights, memory, staging.stream)
        taken.callback(weights.close)
        try:
            kernels = PlanKernels(memory, staging.stream, gpu, code, plan.buffers, weights.addresses, plan.constants)
            taken.callback(kernels.close)
            decoder = open_decoder(weights, staging.stream)
            taken.callback(decoder.close)
        except (CapacityError, EngineError) as error:  # without the plan it may open all the same
            problem = error.message
        else:
            _check_top(decoder, plan, folder)
            problem = _copy_problem(decoder, weights, manifest, options, device, memory, staging)
        if problem is None:
            stack.push(taken.pop_all())
            return decoder, _steps(manifest, options, memory, staging, kernels, plan.batches), None
    gc.collect()  # what is left of the decoder has to go before it is opened again
    return _without(open_decoder, stack, str(problem), options)


def _copy_problem(
    decoder: OpenedGraph,
    weights: DeviceWeights,
    manifest: Manifest,
    options: SessionOptions,
    device: Device,
    memory: CudaDevice,
    staging: Staging,
) -> str | None:
    """Say that a session reads a copy of the weights, unless that is allowed; None if it does not."""
    cache_dtype = str(manifest.capabilities["cache_dtype"])
    try:
        with closing(WeightsInPlace(decoder, weights, manifest.model, cache_dtype, device, memory, staging)) as asked:
            copied_bytes = asked.copied_bytes()
    except (CapacityError, EngineError) as error:
        return error.message
    if copied_bytes * _PARTS_COPIED < weights.num_bytes:
        return None
    problem = (
        f"ONNX Runtime reads a second copy of {copied_bytes / 1e9:.2f} of {weights.num_bytes / 1e9:.2f} GB of weights "
        "on the GPU"
    )
    if not options.weights_twice:
        return problem
    _LOGGER.warning("warning: %s, as weights_twice allows", problem)
    return None


def _steps(
    manifest: Manifest,
    options: SessionOptions,
    memory: CudaDevice,
    staging: Staging,
    kernels: PlanKernels,
    batches: tuple[int, ...],
) -> PlanSteps:
    form = INVARIANT if options.batch_invariant else FAST
    has_experts = manifest.model.text.experts is not None
    return PlanSteps(memory, staging, kernels, batches, form, has_experts=has_experts, records=options.cuda_graphs)


def _without(open_decoder: OpenDecoder, stack: ExitStack, problem: str, options: SessionOptions) -> Opened:
    if options.batch_invariant:
        raise EngineError(
            f"batch_invariant: the engine's own kernels do not run here, and no others keep it: {problem}",
            remedy="open the engine without batch_invariant",
        )
    _LOGGER.warning("warning: ONNX Runtime decodes, and not the engine's own kernels, which are faster: %s", problem)
    return _alone(open_decoder, stack), None, problem


def _alone(open_decoder: OpenDecoder, stack: ExitStack) -> OpenedGraph:
    decoder = open_decoder()
    stack.callback(decoder.close)
    return decoder


def _check_top(decoder: OpenedGraph, plan: DecodePlan, folder: Path) -> None:
    """Compare how many of the largest logits the graph and the plan give, since one memory takes both."""
    found = next(output.shape[-1] for output in decoder.session.get_outputs() if output.name == TOP_IDS)
    if found != plan.top_k:
        raise EngineError(
            f"{folder}: the decode plan gives the {plan.top_k} largest logits, and decoder.onnx {found}",
            remedy="build the engine again",
        )

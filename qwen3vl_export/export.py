"""Checkpoint to engine, or to bundle, in one call."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

from engines.build import build_engine, check_options
from engines.build_options import BuildOptions
from engines.bundle import DECODER, VISION, Bundle
from engines.choose import AUTO, resolve_target, weight_bytes
from engines.decode_plan.options import NO_PLAN, PlanOptions, check_plan
from engines.kernel_sets import with_kernels
from engines.output import check_output, output_folder
from engines.progress import SILENT, Progress, Stage
from engines.quantize.cache_ranges import CacheQuantization, wanted_cache
from engines.quantize.calibration import calibrate, check_prompts
from engines.quantize.calibration_data import CalibrationPrompt, read_prompts
from engines.quantize.formats import BLOCKWISE
from engines.registry import get
from engines.target import Target
from engines.weight_shapes import weight_shapes
from engines.work_folder import work_folder
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.request import ExportRequest
from runtime.errors import TargetError, UsageError
from runtime.manifest import Manifest
from runtime.model_config import ModelConfig

_TRACING_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript")


@dataclass(frozen=True)
class Exported:
    """What an export made.

    Attributes:
        output: The folder.
        target: What it is for; None for a bundle.
        is_engine: Whether the runtime opens it.
        weight_bytes: Bytes of its weights.
        trace_s: Seconds until the model was traced.
        total_s: Seconds of the whole call.
        manifest: Describes the engine, or the lowered graphs; None for a bundle.
    """

    output: Path
    target: str | None
    is_engine: bool
    weight_bytes: int
    trace_s: float
    total_s: float
    manifest: Manifest | None


def export(request: ExportRequest, progress: Progress = SILENT) -> Exported:
    """Export a checkpoint; the output folder appears when it is complete, and until then an older one stays.

    All that can be refused is refused before the model is traced.

    Args:
        request: What to export, and how.
        progress: Told of the stages.

    Raises:
        UsageError: An option is of no use to the target, or the output is not a place for an engine.
        CheckpointError: The checkpoint is incomplete, damaged or not supported.
        TargetError: There is no such target, or this machine cannot build for it.
        CapacityError: The disk, or the memory that running prompts needs, is too small.
        BundleError: A weight, or what a calibration prompt makes of it, is not finite.
    """
    if not isinstance(request, ExportRequest):
        raise UsageError(f"request must be an ExportRequest, got {type(request).__name__}", remedy="pass one")
    started = time.perf_counter()
    job = _checked(request, progress)
    progress.report(Stage.TRACING, f"tracing {job.checkpoint.name}")
    bundle = make_bundle(job.checkpoint, progress, token_scores=request.token_scores)
    traced = time.perf_counter()
    manifest, num_bytes = None, 0
    if job.target is None:
        num_bytes = bundle.weight_bytes if request.weights else 0
        with output_folder(job.output, num_bytes, num_bytes // 2) as folder:
            progress.report(Stage.WRITING, f"writing {job.output}")
            bundle.write(folder, with_weights=request.weights, progress=progress)
    else:
        manifest = _build(bundle, job, job.target, progress)
        num_bytes = manifest.weight_bytes
    return Exported(
        output=job.output,
        target=None if job.target is None else job.target.name,
        is_engine=request.is_engine,
        weight_bytes=num_bytes,
        trace_s=traced - started,
        total_s=time.perf_counter() - started,
        manifest=manifest,
    )


def make_bundle(checkpoint: Checkpoint, progress: Progress = SILENT, *, token_scores: bool = False) -> Bundle:
    """Trace a checkpoint's model and refer to its weights, reading only their headers.

    Args:
        checkpoint: What to trace.
        progress: Told when the graphs are stitched together.
        token_scores: The vision graph says how much attention each visual token gets.

    Raises:
        CheckpointError: A file or a key is missing, left over, or not what config.json implies.
    """
    from qwen3vl_export.assembly import build_decoder, build_vision
    from qwen3vl_export.tracing.pieces import trace_pieces

    checkpoint.used_keys  # noqa: B018 (raises for what is missing or left over)
    assets = checkpoint.assets()
    pieces = trace_pieces(checkpoint.config, token_scores=token_scores)
    progress.report(Stage.STITCHING, "stitching the graphs together")
    graphs = {VISION: build_vision(pieces, checkpoint), DECODER: build_decoder(pieces, checkpoint)}
    taken = {name for model in graphs.values() for name in model.graph.initializers}
    assert taken.issuperset(checkpoint.weights), "the graphs do not take all weights"
    return Bundle(
        config=checkpoint.config,
        graphs=graphs,
        assets=assets,
        source=checkpoint.describe(),
        versions={name: metadata.version(name) for name in _TRACING_LIBRARIES},
    )


@dataclass(frozen=True)
class _Job:
    """A request that nothing refuses which is known before the model is traced; `target` is None for a bundle."""

    request: ExportRequest
    checkpoint: Checkpoint
    target: Target | None
    output: Path
    options: BuildOptions | None
    prompts: Sequence[CalibrationPrompt]
    cache: CacheQuantization | None
    plan: PlanOptions


def _checked(request: ExportRequest, progress: Progress) -> _Job:
    """Check what is asked for: first what needs no checkpoint, since one may have to be downloaded."""
    output = request.bundle or request.output
    if output is not None:
        check_output(output)
    named, options = _resolved(request, progress)
    target = None if named is None else with_kernels(named, request.kernels)
    if request.is_engine and target is not None:
        _check_can_build(target)
    if request.kv_scores and target is not None and not target.supports_kv_scores:
        raise UsageError(
            f"--kv-scores: the decoder of {target.name} does not give its queries",
            remedy="leave --kv-scores out, or choose a target ort-cpu-*",
        )
    if request.token_scores and target is not None and target.session != "ort_cpu":
        raise UsageError(
            f"--token-scores: {target.name} has no use for them, since engines on a GPU do not prune visual tokens",
            remedy="leave --token-scores out, or choose a target ort-cpu-*",
        )
    plan = _wanted_plan(request, target)
    prompts = [] if request.calibration is None else read_prompts(request.calibration)
    cache = _wanted_cache(request, target, prompts)
    checkpoint = Checkpoint.open(request.model, request.cache_dir)
    if named is not None:
        say = partial(progress.report, Stage.CHOOSING)
        target = with_kernels(named, request.kernels, checkpoint.config, say)
        cache = _wanted_cache(request, target, prompts)  # of these kernels, if they are others for this model
        check_options(target, options, checkpoint.config)
        output = output or Path("out") / f"{checkpoint.short_name}-{target.name}"
    assert output is not None
    check_output(output, _estimated_bytes(checkpoint, target) if request.weights else 0)
    # All that may be refused of the checkpoint, before the seconds of loading torch and of tracing.
    checkpoint.used_keys  # noqa: B018
    checkpoint.assets()
    return _Job(request, checkpoint, target, output, options, prompts, cache, plan)


def _wanted_cache(
    request: ExportRequest, target: Target | None, prompts: Sequence[CalibrationPrompt]
) -> CacheQuantization | None:
    """Return the KV cache that is asked for, None for the target's own."""
    if target is None or not request.weights:
        return None
    check_prompts(target, prompts)
    return None if request.kv_cache is None else wanted_cache(request.kv_cache, prompts, target, request.kv_cache_ratio)


def _wanted_plan(request: ExportRequest, target: Target | None) -> PlanOptions:
    """Return how a decode plan is to be made.

    Raises:
        UsageError: The target takes none, or kernels are made for no such GPU.
        TargetError: One has to be made, and triton is missing.
    """
    if target is None or not target.decode_plan:
        if request.decode_plan is not None:
            option = "--decode-plan" if request.decode_plan else "--no-decode-plan"
            raise UsageError(
                f"{option}: {'a bundle' if target is None else target.name} takes no decode plan",
                remedy="leave it out; the targets ort-cuda-* take one",
            )
        return NO_PLAN
    if not request.compile:
        given = {"--decode-plan": request.decode_plan, "--compute-capability": request.compute_capability}
        for option in (name for name, value in given.items() if value):
            raise UsageError(f"{option}: --no-compile compiles no decode plan", remedy="leave one of them out")
        return NO_PLAN
    if request.decode_plan is False and request.compute_capability:
        raise UsageError(
            "--compute-capability is for the decode plan, which --no-decode-plan leaves out", remedy="leave one out"
        )
    plan = PlanOptions(request.decode_plan, tuple(request.compute_capability or ()))
    check_plan(plan, target.name)
    return plan


def _resolved(request: ExportRequest, progress: Progress) -> tuple[Target | None, BuildOptions | None]:
    """Return the target as the registry has it, None for a bundle, and the options that it is to take."""
    options = request.build_options
    if request.bundle is not None:
        if request.target != AUTO:
            get(request.target)  # raises for a wrong name
        return None, options
    say = partial(progress.report, Stage.CHOOSING)

    def config() -> ModelConfig:
        return Checkpoint.open(request.model, request.cache_dir).config

    target = resolve_target(request.target, config, say, options=options)
    if target.decode_plan:  # whose kernels the capabilities are for, not a compiler's plans
        request = replace(request, compute_capability=None)
        options = request.build_options
    is_for_choice = request.target == AUTO and target.compile is None and not request.compiler_options
    return target, None if is_for_choice else options  # they said how much has to fit


def _check_can_build(target: Target) -> None:
    """Raise before any work if this machine cannot compile for the target.

    Raises:
        TargetError: With the command that produces the lowered graphs instead, where the hardware is what lacks.
    """
    available = target.availability()
    if not available.can_build:
        raise TargetError(f"{target.name} cannot be built on this machine", remedy=available.reason)


def _estimated_bytes(checkpoint: Checkpoint, target: Target | None) -> int:
    """Return the bytes that the weights take in an engine or, without a target, in a bundle; 0 if that is not known."""
    if "quantization_config" in checkpoint.hf_config:
        return 0  # its codes may be kept as they are
    if target is None:
        return sum(4 * math.prod(shape) for shape in weight_shapes(checkpoint.config).values())
    return weight_bytes(target, checkpoint.config)


def _build(bundle: Bundle, job: _Job, target: Target, progress: Progress) -> Manifest:
    """Calibrate, if there are prompts, and build; the calibrated weights are in a folder that then goes."""
    with contextlib.ExitStack() as stack:
        # For a cache alone, a target may keep its weights whole.
        if job.prompts and (job.cache is None or target.formats.has_products_in(BLOCKWISE)):
            progress.report(Stage.CALIBRATING, f"calibrating on {len(job.prompts)} prompts")
            work, _ = stack.enter_context(work_folder(job.output.resolve().parent))
            bundle = calibrate(bundle, target, job.prompts, work).applied_to(bundle)
        # ONNX Runtime compiles when it opens the graph, so for it the lowered graph is the engine.
        return build_engine(
            bundle,
            target,
            job.output,
            with_weights=job.request.weights,
            runnable=job.request.is_engine,
            progress=progress,
            cache=job.cache,
            options=job.options,
            plan=job.plan,
            kv_scores=job.request.kv_scores,
        )

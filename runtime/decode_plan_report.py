"""Whose kernels would run an engine's decode steps on this machine: what can be said without opening it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.cuda import CudaDevice
from runtime.decode_plan import DecodePlan, has_plan
from runtime.errors import EngineError
from runtime.manifest import Manifest

_SESSION = "ort_cuda"


@dataclass(frozen=True)
class DecodeReport:
    """What an engine brings, and what this machine makes of it.

    Attributes:
        compute_capabilities: GPUs that the engine has own kernels for.
        batches: Numbers of sequences that they step together; others are filled up.
        here: Whose kernels run decode steps on this machine: `own` or `onnxruntime`; none without a GPU.
        reason: Why not our own; none if they do.
    """

    compute_capabilities: tuple[str, ...]
    batches: tuple[int, ...]
    here: str | None
    reason: str | None


def decode_report(folder: Path, manifest: Manifest) -> DecodeReport | None:
    """Return what is known of an engine's decode kernels; None if engines of its kind bring none.

    That the kernels compute here what ONNX Runtime does is compared at the first step, and that one copy of the weights
    serves both when the engine is opened.

    Raises:
        EngineError: The plan is damaged.
    """
    if manifest.session != _SESSION:
        return None
    plan = DecodePlan(folder, manifest) if has_plan(manifest) else None
    made_for = () if plan is None else tuple(f"{sm // 10}.{sm % 10}" for sm in plan.sms)
    batches = () if plan is None else plan.batches
    try:
        device = CudaDevice("cuda")
    except EngineError as error:
        return DecodeReport(made_for, batches, None, error.message)
    if plan is None:
        return DecodeReport(made_for, batches, "onnxruntime", "the engine has no decode plan")
    reason = plan.misfit(device.compute_capability, device.driver_version, device.max_shared_bytes)
    return DecodeReport(made_for, batches, "own" if reason is None else "onnxruntime", reason)

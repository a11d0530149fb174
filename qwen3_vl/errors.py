"""The errors that calls of this package raise: `except qwen3_vl.errors.CapacityError`."""

from runtime.errors import (
    BundleError,
    CapacityError,
    CheckpointError,
    DeadlineError,
    EngineError,
    ImageError,
    OverloadError,
    ParityError,
    Qwen3VLError,
    RegressionError,
    RequestError,
    TargetError,
    UsageError,
)

__all__ = [
    "BundleError",
    "CapacityError",
    "CheckpointError",
    "DeadlineError",
    "EngineError",
    "ImageError",
    "OverloadError",
    "ParityError",
    "Qwen3VLError",
    "RegressionError",
    "RequestError",
    "TargetError",
    "UsageError",
]

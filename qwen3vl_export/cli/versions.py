"""`--version`: this package, Python, and the libraries whose releases a report of a fault should name."""

from __future__ import annotations

import platform
from importlib import metadata

from qwen3vl_export.cli.output import print_json
from runtime import __version__
from runtime.installation import DISTRIBUTION
from runtime.shown import columns

_LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu12", "torch", "onnx", "transformers")


def versions() -> dict[str, str | None]:
    """Return versions by name; None for ONNX Runtime if it is not installed. Nothing heavy is imported."""
    found: dict[str, str | None] = {DISTRIBUTION: __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name == "onnxruntime":
                found[name] = None
    return found


def print_versions(*, is_json: bool) -> None:
    """Print them, one a line or as one JSON object."""
    if is_json:
        print_json(versions())
    else:
        print("\n".join(columns([(name, version or "not installed") for name, version in versions().items()])))

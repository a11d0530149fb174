"""An engine folder for the TensorRT session whose plans `helpers.host_tensorrt` runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from engines import registry
from engines.build import build_engine
from engines.build_options import BuildOptions
from engines.bundle import Bundle
from engines.tensorrt.profiles import profiles_of
from helpers.host_tensorrt import __version__, write_plan
from runtime.manifest import LOWERED_NAME, FileRecord, Manifest, sha256_of

GRAPHS = ("vision", "decoder")
TARGET = "trt-rtx-fp16"


def build_host_engine(bundle: Bundle, folder: Path, options: BuildOptions, target: str = TARGET) -> Path:
    """Lower the bundle as for `target`, with the profiles that would be compiled, and write plans for the host."""
    import onnx

    manifest = build_engine(bundle, registry.get(target), folder, options=options, runnable=False)
    (folder / LOWERED_NAME).unlink()
    files, profiles = dict(manifest.files), {}
    for name in GRAPHS:
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        inputs = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in graph.input
        }
        profiles[name] = [each.to_dict() for each in profiles_of(name, inputs, bundle.config, options)]
        plan = folder / f"{name}.plan"
        write_plan(plan, folder / f"{name}.onnx", profiles[name])
        files[plan.name] = FileRecord(plan.stat().st_size, sha256_of(plan), is_weights=True)
    capabilities = {
        **manifest.capabilities,
        "device": "gpu",
        "library": "helpers.host_tensorrt",
        "library_version": __version__,
        "compute_capabilities": ["8.6", "8.9"],
        "profiles": profiles,
    }
    dataclasses.replace(manifest, files=files, capabilities=capabilities).write(folder)
    return folder


def with_capabilities(manifest: Manifest, **changes: Any) -> Manifest:
    return dataclasses.replace(manifest, capabilities={**manifest.capabilities, **changes})

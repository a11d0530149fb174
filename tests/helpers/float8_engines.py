"""Engines of float8 weights that the CPU provider can open, in place of the CUDA provider."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx

from qwen3vl_export.parity.float8_products import expand_float8_products
from runtime.decode_plan import PLAN_NAME
from runtime.manifest import FileRecord, Manifest, sha256_of


def expand_products(folder: Path) -> Path:
    """Replace the products of an engine's decoder that only CUDA has a kernel for; weights and decode plan stay."""
    path = folder / "decoder.onnx"
    model = onnx.load(path, load_external_data=False)
    expand_float8_products(model.graph)
    onnx.save(model, path)
    changed = {path.name: FileRecord.of(path)}
    plan = folder / PLAN_NAME
    if plan.is_file():  # it names the graph that it was made of
        text = json.loads(plan.read_text(encoding="utf-8"))
        plan.write_text(json.dumps(text | {"decoder": sha256_of(path)}), encoding="utf-8")
        changed[plan.name] = FileRecord.of(plan)
    manifest = Manifest.read(folder)
    dataclasses.replace(manifest, files={**manifest.files, **changed}).write(folder)
    return folder

"""Engines made of one bundle or of another engine: tracing takes seconds, the rest a fraction of one."""

from __future__ import annotations

import shutil
from pathlib import Path

from engines import registry
from engines.build import build_engine
from engines.bundle import Bundle
from engines.quantize.cache_ranges import CacheQuantization, quantize_cache
from engines.quantize.calibration_data import CalibrationPrompt
from engines.target import Target
from runtime.manifest import Manifest


def build(bundle: Bundle, target: str | Target, output: Path) -> Path:
    build_engine(bundle, registry.get(target) if isinstance(target, str) else target, output)
    return output


def requantized(engine: Path, output: Path, bits: int | None, prompts: list[CalibrationPrompt]) -> Path:
    shutil.copytree(engine, output)
    manifest = Manifest.read(engine)
    target = registry.get(manifest.target)
    if "custom_ops" in manifest.capabilities:
        (target,) = target.other_kernels
    quantize_cache(output, manifest, CacheQuantization(bits, prompts), target).write(output)
    return output

"""What options of ONNX Runtime's CUDA provider change: `options ENGINE`; it runs only where it is asked for.

The engine is opened without its decode plan, in a process of its own for each variant, since some are environment
variables that the provider reads once. `baseline` is how the runtime opens engines; it is measured first and last, and
what its second run takes over its first says how steady the machine was. Values: `ms` by variant and figure, `ratios`
over the mean of both baselines, `refused` (why, by variant). A ratio below 1 is faster.

The graphs have no convolution, and the decoder no layout to choose, so options of cuDNN's algorithms and of NHWC are
left out. Bits of `sdpa_kernel` are those of AttentionBackend (contrib_ops/cpu/bert/attention_common.h); XQA goes before
them in decode steps, so these are measured without it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.gpu.speed import Engine, Sizes, measure
from benchmarks.gpu.values import Values, parser
from runtime.manifest import Manifest
from runtime.ort_device import CUDA
from runtime.session import SessionOptions
from runtime.sessions.ort_cuda import OrtCudaSession

BASELINE, AGAIN = "baseline", "baseline again"
SIZES = Sizes(batches=(1, 8), grids=((48, 64), (64, 64)), repeats=30)
_CHILD_S = 60.0


@dataclass(frozen=True)
class Variant:
    """Options of the provider, and environment variables, beside those of the runtime."""

    provider: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


_WITHOUT_XQA = {"ORT_ENABLE_XQA": "0"}
VARIANTS: Mapping[str, Variant] = {
    BASELINE: Variant(),
    "ORT_ENABLE_XQA=0": Variant(environment=_WITHOUT_XQA),
    "ORT_ENABLE_XQA=0, flash": Variant({"sdpa_kernel": "1"}, _WITHOUT_XQA),
    "ORT_ENABLE_XQA=0, efficient": Variant({"sdpa_kernel": "2"}, _WITHOUT_XQA),
    "ORT_ENABLE_XQA=0, cuDNN": Variant({"sdpa_kernel": "8"}, _WITHOUT_XQA),
    "flash": Variant({"sdpa_kernel": "1"}),
    "cuDNN": Variant({"sdpa_kernel": "8"}),
    "use_tf32=0": Variant({"use_tf32": "0"}),
    "enable_skip_layer_norm_strict_mode=0": Variant({"enable_skip_layer_norm_strict_mode": "0"}),
    "without CUDA graphs": Variant({"enable_cuda_graph": "0"}),
    AGAIN: Variant(),
}


def figures(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the medians of what `benchmarks.gpu.speed` measured, by name."""
    found = {
        f"{name} {key}": step["median_ms"]
        for name in ("decode", "prefill", "vision")
        for key, step in values.get(name, {}).items()
    }
    return found | {name: values[name]["median_ms"] for name in ("decode_long", "first_token") if name in values}


def ratios(taken: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return what each variant takes over the mean of the baselines, by figure."""
    baselines = [taken[name] for name in (BASELINE, AGAIN) if name in taken]
    base = {figure: fmean(each[figure] for each in baselines) for figure in baselines[0]}
    return {
        name: {figure: round(ms / base[figure], 3) for figure, ms in each.items() if figure in base}
        for name, each in taken.items()
    }


def compare(measure_variant: Callable[[str], dict[str, float] | str], values: Any) -> None:
    """Measure all variants in turn and put what is found into `values`.

    Args:
        measure_variant: Returns milliseconds by figure, or why the variant does not run.
        values: Gets what is found, after each variant.
    """
    taken: dict[str, dict[str, float]] = {}
    refused: dict[str, str] = {}
    for name in VARIANTS:
        found = measure_variant(name)
        if isinstance(found, str):
            refused[name] = found
        else:
            taken[name] = found
        values["ms"], values["refused"] = taken, refused
        if BASELINE in refused:
            values["problems"] = [f"the engine does not run as the runtime opens it: {refused[BASELINE]}"]
            return
        values["ratios"] = ratios(taken)


def measure_here(folder: Path, name: str, values: Any) -> None:
    """Measure a variant in this process, whose environment is the variant's already."""
    device = replace(CUDA, options={**CUDA.options, **VARIANTS[name].provider})
    if "enable_cuda_graph" in VARIANTS[name].provider:
        device = replace(device, decoder_options={})

    def opener(folder: Path, manifest: Manifest, options: SessionOptions) -> OrtCudaSession:
        return OrtCudaSession(folder, manifest, options, device=device)

    engine = Engine(folder, with_plan=False, opener=opener)
    measure(engine, values, lambda *_: None, SIZES, decode_only=False)


def measure_in_child(folder: Path, name: str) -> dict[str, float] | str:
    """Measure a variant in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "values.json"
        command = [sys.executable, "-m", "benchmarks.gpu.options", str(folder), "--variant", name]
        environment = {**os.environ, **VARIANTS[name].environment}
        try:
            done = subprocess.run(
                [*command, "--values", str(output)], capture_output=True, text=True, timeout=_CHILD_S, env=environment
            )
        except subprocess.TimeoutExpired:
            return f"not done after {_CHILD_S:.0f} s"
        if done.returncode:
            lines = [each for each in done.stderr.splitlines() if each and not each.startswith(" ")]
            return lines[-1] if lines else f"exit code {done.returncode}"
        return figures(json.loads(output.read_text(encoding="utf-8")))


def main() -> int:
    """Run the section."""
    options = parser()
    options.add_argument("--variant", choices=tuple(VARIANTS), help="measure this one here, and nothing else")
    args = options.parse_args()
    values = Values(args.values)
    if args.variant is not None:
        measure_here(args.folder, args.variant, values)
    else:
        compare(lambda name: measure_in_child(args.folder, name), values)
    return 0


if __name__ == "__main__":
    sys.exit(main())

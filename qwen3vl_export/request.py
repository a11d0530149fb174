"""What an export is asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.build_options import BuildOptions
from runtime.arguments import reading, whole_number
from runtime.errors import UsageError
from runtime.option_checks import between, true_or_false

_SIZES = ("max_context", "max_batch")
_LEAST = {"max_context": 2, "max_batch": 1, "prefill_chunk": 2, "max_patches": 4}
_SWITCHES = ("strip_weights", "weight_streaming", "version_compatible", "hardware_compatible")


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and how. The command `qwen3vl-export` makes its options and their help of this.

    Attributes:
        model: A Hugging Face folder, a Hub id (owner/name[@revision]), or a shipped checkpoint: demo, demo-moe.
        target: Target to build for, as `qwen3vl targets` lists them, or auto.
        output: Engine folder to write. [default: out/MODEL-TARGET]
        bundle: Write the target-neutral graphs and weights into this folder instead of building an engine.
        calibration: Folder of prompts: *.jsonl with messages, or prompts.txt and images. Weights of few bits are
            rounded by what the prompts put into their products (GPTQ); fp8 targets need it to scale activations.
        kv_cache: Store keys and values in int8 or int4, with scales from the prompts of --calibration; or, with own
            kernels, in float16; or mixed, each layer in the kind that costs least by these prompts. All of them
            approximate. [default: the target's type]
        kv_cache_ratio: For --kv-cache mixed: most bytes, as a share of those in float16. [default: 0.4]
        kv_scores: Let the engine show the queries of the last tokens of a prompt, by which `--kv-budget` chooses the
            rows that stay. For ort-cpu-*.
        kernels: For ort-cpu-int4 and ort-cpu-int8: own, the kernels that come with this package, or ort, those of ONNX
            Runtime. [default: own, where they run]
        max_context: For compiled targets: capacity of the KV cache in tokens. [default: 4096]
        max_batch: For compiled targets: most sequences that run at once, each in a slot of the KV cache. [default: 4]
        prefill_chunk: For compiled targets: most new tokens of one call. [default: 512]
        max_patches: For compiled targets: most patches of 16 x 16 pixels of one image. Optimisation profiles are built
            for 1024, 4096 and 16384 patches, up to this limit. [default: 16384]
        decode_plan: For ort-cuda-*: --decode-plan fails where no own kernels can be compiled for decode steps;
            --no-decode-plan compiles none. [default: compiled if triton is installed]
        compute_capability: For trt-rtx-*, and the decode plan of ort-cuda-*: build for this GPU generation, such as
            8.6; may be repeated. [default: all]
        strip_weights: For trt*: leave the weights out of the plans; opening the engine puts them in.
        weight_streaming: For trt*: let weights stay in host memory, for GPUs with little memory.
        version_compatible: For trt-*: let newer versions of the library open the plans.
        hardware_compatible: For trt-*: let newer GPUs run the plans, which makes them slower.
        token_scores: For ort-cpu-*: let the vision tower say how much attention each visual token gets, by which
            --visual-token-share then chooses, too (docs/visual_pruning.md).
        compile: --no-compile stops at the lowered graphs and their weights, for other tools and for `qwen3vl verify`.
        weights: --no-weights writes the graphs alone, which nothing opens. It reads only the headers of the weights,
            but still downloads them whole from the Hub.
        cache_dir: Folder in which what is downloaded from the Hub is kept. [default: the Hub's own cache]

    Raises:
        UsageError: A size is out of range, or two of them exclude each other.
    """

    model: Annotated[str, typer.Argument(metavar="MODEL")]
    target: str = "auto"
    output: Path | None = None
    bundle: Path | None = None
    calibration: Annotated[Path | None, typer.Option(metavar="DIR")] = None
    kv_cache: Annotated[str | None, typer.Option(metavar="KIND")] = None
    kv_cache_ratio: Annotated[float | None, typer.Option(metavar="SHARE")] = None
    kv_scores: bool = False
    kernels: Annotated[str | None, typer.Option(metavar="KIND")] = None
    decode_plan: bool | None = None
    max_context: Annotated[int | None, typer.Option(min=_LEAST["max_context"])] = None
    max_batch: Annotated[int | None, typer.Option(min=_LEAST["max_batch"])] = None
    prefill_chunk: Annotated[int | None, typer.Option(min=_LEAST["prefill_chunk"])] = None
    max_patches: Annotated[int | None, typer.Option(min=_LEAST["max_patches"])] = None
    compute_capability: list[str] | None = None  # as typer takes it; held as a tuple
    strip_weights: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    token_scores: bool = False
    compile: bool = True
    weights: bool = True
    cache_dir: Annotated[Path | None, typer.Option(metavar="DIR")] = None

    def __post_init__(self) -> None:
        """Take texts for paths, and one GPU generation for several; check the sizes, and what excludes what."""
        for name in ("output", "bundle", "calibration", "cache_dir"):
            if getattr(self, name) is not None:
                with reading(name, "pass a path"):
                    object.__setattr__(self, name, Path(getattr(self, name)))
        with reading("compute_capability", 'pass a list such as ["8.6"]'):
            gpus = self.compute_capability or ()
            object.__setattr__(self, "compute_capability", (gpus,) if isinstance(gpus, str) else tuple(map(str, gpus)))
        with reading("model", "pass a path or a Hub id"):
            object.__setattr__(self, "model", os.fspath(self.model))
        for name in (*_SWITCHES, "token_scores", "kv_scores", "compile", "weights"):
            true_or_false(name, getattr(self, name))
        for name, least in _LEAST.items():
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least, None, f"at least {least}", f"leave {name} out")
        has_no_engine = self.bundle is not None or not self.weights
        if self.bundle is not None and self.output is not None:
            raise UsageError("--bundle and --output exclude each other", remedy="run the command twice")
        if self.calibration is not None and has_no_engine:
            raise UsageError(
                "--calibration changes weights, which --bundle keeps as they are and --no-weights leaves out",
                remedy="leave --calibration out",
            )
        if self.kv_cache is not None and has_no_engine:
            raise UsageError(
                "--kv-cache has to run the engine, which --bundle and --no-weights do not build",
                remedy="leave --kv-cache out",
            )
        if self.kv_cache_ratio is not None:
            if self.kv_cache is None:
                raise UsageError("--kv-cache-ratio is of --kv-cache mixed", remedy="leave it out, or add that option")
            between(0.25, 1, "leave it out for 0.4")("kv_cache_ratio", self.kv_cache_ratio)
        if self.decode_plan is not None:
            true_or_false("decode_plan", self.decode_plan)
        if self.decode_plan is not None and self.bundle is not None:
            option = "--decode-plan" if self.decode_plan else "--no-decode-plan"
            raise UsageError(f"{option} is a target's, and a bundle is for none", remedy="leave it out")
        if self.kv_scores and self.bundle is not None:
            raise UsageError("--kv-scores is of an engine, and a bundle is none", remedy="leave --kv-scores out")
        if self.kernels is not None and self.bundle is not None:
            raise UsageError("--kernels are a target's, and a bundle is for none", remedy="leave --kernels out")

    @property
    def is_engine(self) -> bool:
        """Whether something that the runtime opens is asked for."""
        return self.bundle is None and self.weights and self.compile

    @property
    def compiler_options(self) -> dict[str, Any]:
        """What was given of the options that a compiler alone takes, by their names in `BuildOptions`."""
        values = {
            "prefill_chunk": self.prefill_chunk,
            "patch_buckets": None if self.max_patches is None else BuildOptions.buckets_up_to(self.max_patches),
            "compute_capabilities": self.compute_capability or None,
            **{name: getattr(self, name) or None for name in _SWITCHES},
        }
        return {name: value for name, value in values.items() if value is not None}

    @property
    def build_options(self) -> BuildOptions | None:
        """What was given of all sizes and switches, or None if nothing was."""
        sizes = {name: getattr(self, name) for name in _SIZES if getattr(self, name) is not None}
        if "max_context" in sizes:
            sizes["prefill_chunk"] = min(BuildOptions.prefill_chunk, sizes["max_context"])
        given = sizes | self.compiler_options
        return BuildOptions(**given) if given else None

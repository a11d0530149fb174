"""What an export is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from engines.build_options import BuildOptions
from runtime.arguments import whole_number
from runtime.errors import UsageError

_SIZES = ("max_context", "max_batch")
_LEAST = {"max_context": 2, "max_batch": 1, "prefill_chunk": 2, "max_patches": 4}
_SWITCHES = ("strip_weights", "weight_streaming", "version_compatible", "hardware_compatible")


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and how. The command `qwen3vl-export` makes its options and their help of this.

    Attributes:
        model: A Hugging Face folder, a Hub id (owner/name[@revision]), or a shipped one: demo, demo-moe.
        target: What to build for: of `qwen3vl targets`, or auto.
        output: Engine folder to write. [default: out/MODEL-TARGET]
        bundle: Write the target-neutral graphs and weights here instead of building an engine.
        calibration: Round the weights of few bits by what the prompts of this folder put into their products (GPTQ),
            or, for fp8, which needs it, scale activations by it: *.jsonl with messages, or prompts.txt and images.
        kv_cache: Keep keys and values in int8 or int4, by scales from the prompts of --calibration. [default: the
            target's]
        max_context: Compiled targets: tokens that the KV cache holds. [default: 4096]
        max_batch: Compiled targets: most sequences of a decode step. [default: 4]
        prefill_chunk: Compiled targets: most new tokens of one call. [default: 512]
        max_patches: Compiled targets: most patches of 16 x 16 pixels of one image; profiles for 1024, 4096 and 16384
            up to it. [default: 16384]
        compute_capability: trt-rtx-*: build for this GPU generation, such as 8.6; repeatable. [default: all]
        strip_weights: trt*: leave the weights out of the plans; refitted when opened.
        weight_streaming: trt*: weights may stay in host memory, for small GPUs.
        version_compatible: trt*: newer versions of the library open the plans.
        hardware_compatible: trt-*: newer GPUs run the plans, slower.
        compile: --no-compile stops at the lowered graphs and their weights, to look at or to run with other tools; here
            `qwen3vl verify` alone reads them.
        weights: --no-weights writes the graphs only, which nothing opens; of the checkpoint's weights it reads the
            headers, though from the Hub it downloads them whole.

    Raises:
        UsageError: A size is out of range, or two of them exclude each other.
    """

    model: Annotated[str, typer.Argument(metavar="MODEL")]
    target: str = "auto"
    output: Path | None = None
    bundle: Path | None = None
    calibration: Annotated[Path | None, typer.Option(metavar="DIR")] = None
    kv_cache: Annotated[str | None, typer.Option(metavar="KIND")] = None
    max_context: Annotated[int | None, typer.Option(min=_LEAST["max_context"])] = None
    max_batch: Annotated[int | None, typer.Option(min=_LEAST["max_batch"])] = None
    prefill_chunk: Annotated[int | None, typer.Option(min=_LEAST["prefill_chunk"])] = None
    max_patches: Annotated[int | None, typer.Option(min=_LEAST["max_patches"])] = None
    compute_capability: list[str] | None = None  # as typer takes it; held as a tuple
    strip_weights: bool = False
    weight_streaming: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    compile: bool = True
    weights: bool = True

    def __post_init__(self) -> None:
        """Take texts for paths, and one GPU generation for several; check the sizes, and what excludes what."""
        for name in ("output", "bundle", "calibration"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))
        gpus = self.compute_capability or ()
        object.__setattr__(self, "compute_capability", (gpus,) if isinstance(gpus, str) else tuple(gpus))
        for name, least in _LEAST.items():
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least, None, f"at least {least}", f"leave {name} out")
        has_no_engine = self.bundle is not None or not self.weights
        if self.bundle is not None and self.output is not None:
            raise UsageError("--bundle and --output exclude each other", remedy="run the command twice")
        if self.calibration is not None and has_no_engine:
            raise UsageError(
                "--calibration changes weights, which --bundle keeps and --no-weights leaves out",
                remedy="leave --calibration out",
            )
        if self.kv_cache is not None and has_no_engine:
            raise UsageError(
                "--kv-cache runs the engine, which --bundle and --no-weights do not build",
                remedy="leave --kv-cache out",
            )

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

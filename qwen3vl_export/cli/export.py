"""The `qwen3vl-export` command."""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3vl_export.cli.errors import DEBUG_HELP, run_app
from qwen3vl_export.cli.output import is_terminal, note
from qwen3vl_export.cli.progress import progress
from runtime.errors import UsageError

if TYPE_CHECKING:
    from engines.build_options import BuildOptions
    from engines.bundle import Bundle
    from engines.quantize.calibration_data import CalibrationPrompt
    from engines.target import Target
    from qwen3vl_export.checkpoint import Checkpoint
    from runtime.model_config import ModelConfig

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog=DEBUG_HELP)
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face folder, a Hub id (owner/name[@revision]), or a shipped one: demo, demo-moe.",
            metavar="MODEL",
        ),
    ],
    target: Annotated[str, typer.Option(help="What to build for: of `qwen3vl targets`, or auto.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="Engine folder to write. [default: out/MODEL-TARGET]")] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Write the target-neutral graphs and weights here instead of building an engine."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Round the weights of few bits by what the prompts of this folder put into their products (GPTQ), or, "
            "for fp8, which needs it, scale activations by it: *.jsonl with messages, or prompts.txt and images.",
            metavar="DIR",
        ),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="Keep keys and values in int8 or int4, by scales from the prompts of --calibration. "
            "[default: the target's]",
            metavar="KIND",
            show_default=False,
        ),
    ] = None,
    max_context: Annotated[
        int | None, typer.Option(help="Compiled targets: tokens that the KV cache holds. [default: 4096]", min=2)
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Compiled targets: most sequences of a decode step. [default: 4]", min=1)
    ] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option(help="Compiled targets: most new tokens of one call. [default: 512]", min=2)
    ] = None,
    max_patches: Annotated[
        int | None,
        typer.Option(
            help="Compiled targets: most patches of 16 x 16 pixels of one image; profiles for 1024, 4096 and 16384 up "
            "to it. [default: 16384]",
            min=4,
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="trt-rtx-*: build for this GPU generation, such as 8.6; repeatable. [default: all]"),
    ] = None,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="trt*: leave the weights out of the plans; refitted when opened.")
    ] = False,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="trt*: weights may stay in host memory, for small GPUs.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="trt*: newer versions of the library open the plans.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="trt-*: newer GPUs run the plans, slower.")
    ] = False,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="--no-compile stops at the lowered graphs and their weights, to look at or to run with other tools; "
            "here `qwen3vl verify` alone reads them.",
        ),
    ] = True,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights/--no-weights",
            help="--no-weights writes the graphs only, which nothing opens; of the checkpoint's weights it reads the "
            "headers, though from the Hub it downloads them whole.",
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print no progress and no notes on stderr, but errors.")
    ] = False,
) -> None:
    """Export a Qwen3-VL checkpoint into an engine.

    The output folder appears when it is complete; until then an older engine stays in its place.

    --json prints one object: output, target (null for a bundle), is_engine (false for a bundle and with --no-compile
    or --no-weights), weight_bytes, trace_s, total_s.

    \b
    Examples:
      qwen3vl-export demo --output out/demo
      qwen3vl-export ./Qwen3-VL-2B-Instruct
      qwen3vl-export ./Qwen3-VL-2B-Instruct --target ort-cpu-fp32 --output engines/2b
      qwen3vl-export ./Qwen3-VL-2B-Instruct --target ort-cpu-int4 --calibration ./prompts
      qwen3vl-export ./Qwen3-VL-2B-Instruct --target ort-cpu-int4 --calibration ./prompts --kv-cache int8
      qwen3vl-export ./Qwen3-VL-2B-Instruct --target trt-rtx-fp16 --max-context 8192 --max-batch 4
      qwen3vl-export ./Qwen3-VL-2B-Instruct --target trt-fp16 --no-compile
      qwen3vl-export Qwen/Qwen3-VL-4B-Instruct@main --no-weights --json
    """
    from engines.build import build_engine, check_options
    from engines.build_options import BuildOptions
    from engines.choose import AUTO, resolve_target
    from engines.output import check_output, output_folder
    from engines.quantize.cache_ranges import wanted_cache
    from engines.quantize.calibration import blockwise_plan, check_prompts
    from engines.quantize.calibration_data import read_prompts
    from qwen3vl_export.checkpoint import Checkpoint

    started = time.perf_counter()
    if bundle is not None and output is not None:
        raise UsageError("--bundle and --output exclude each other", remedy="run the command twice")
    if calibration is not None and (bundle is not None or not weights):
        raise UsageError(
            "--calibration changes weights, which --bundle keeps and --no-weights leaves out",
            remedy="leave --calibration out",
        )
    if kv_cache is not None and (bundle is not None or not weights):
        raise UsageError(
            "--kv-cache runs the engine, which --bundle and --no-weights do not build", remedy="leave --kv-cache out"
        )
    of_compiled = {
        "prefill_chunk": prefill_chunk,
        "patch_buckets": None if max_patches is None else BuildOptions.buckets_up_to(max_patches),
        "compute_capabilities": tuple(compute_capability) if compute_capability else None,
        "strip_weights": strip_weights or None,
        "weight_streaming": weight_streaming or None,
        "version_compatible": version_compatible or None,
        "hardware_compatible": hardware_compatible or None,
    }
    options = _build_options(max_context=max_context, max_batch=max_batch, **of_compiled)
    if bundle or output:
        check_output(bundle or output)  # before anything is downloaded or read

    def shape() -> ModelConfig:
        return Checkpoint.open(model).config

    def say(text: str) -> None:
        if not (quiet or as_json):
            note(text)

    # A bundle is for no target, so there is nothing to choose.
    is_chosen = bundle is None or target != AUTO
    chosen = resolve_target(target, shape, say, options=options) if is_chosen else None
    needs_compiler = any(value is not None for value in of_compiled.values())
    if target == AUTO and chosen is not None and chosen.compile is None and not needs_compiler:
        options = None  # they said how much has to fit
    is_engine = bundle is None and weights and compile
    if is_engine:
        _check_can_build(chosen)
    prompts = read_prompts(calibration) if calibration is not None else []
    if bundle is None and weights:
        check_prompts(chosen, prompts)
    cache = None if kv_cache is None else wanted_cache(kv_cache, prompts, chosen)
    # For a cache alone, a target may keep its weights whole.
    weight_prompts = prompts if cache is None or blockwise_plan(chosen) is not None else []
    checkpoint = Checkpoint.open(model)
    if bundle is None:
        check_options(chosen, options, checkpoint.config)
    destination = bundle or output or Path("out") / f"{checkpoint.short_name}-{chosen.name}"
    check_output(destination, _estimated_bytes(checkpoint, None if bundle else chosen) if weights else 0)
    # All that may be refused of the checkpoint, before the seconds of loading torch and of tracing.
    checkpoint.used_keys  # noqa: B018
    checkpoint.assets()
    is_wanted = not quiet and (not as_json or is_terminal(sys.stderr))
    with progress(is_wanted=is_wanted) as shown:
        shown.stage(f"tracing {checkpoint.name}")
        from qwen3vl_export.export import make_bundle  # loads torch, so only once there is something to trace

        made = make_bundle(checkpoint, shown.stage)
        traced_s = time.perf_counter() - started
    with (
        _calibrated(made, chosen, weight_prompts, destination, say),
        progress(is_wanted=is_wanted) as shown,
    ):
        if bundle is not None:
            weight_bytes = made.weight_bytes if weights else 0
            with output_folder(destination, weight_bytes, weight_bytes // 2) as folder:
                shown.stage(f"writing {destination}")
                made.write(folder, with_weights=weights, progress=shown.advance)
        else:
            # ONNX Runtime compiles when it opens the graph, so for it the lowered graph is the engine.
            manifest = build_engine(
                made,
                chosen,
                destination,
                with_weights=weights,
                runnable=is_engine,
                progress=shown.advance,
                report=shown.stage,
                cache=cache,
                options=options,
            )
            weight_bytes = manifest.weight_bytes
    result = {
        "output": str(destination),
        "target": None if bundle is not None else chosen.name,
        "is_engine": is_engine,
        "weight_bytes": weight_bytes,
        "trace_s": round(traced_s, 2),
        "total_s": round(time.perf_counter() - started, 2),
    }
    if as_json:
        print(json.dumps(result))
    else:
        print(f"{destination}  ({weight_bytes / 1e6:.1f} MB of weights, {result['total_s']} s)")


def _estimated_bytes(checkpoint: Checkpoint, target: Target | None) -> int:
    """Return the bytes that the weights take in an engine or, without a target, in a bundle; 0 if that is not known."""
    from engines.choose import weight_bytes
    from engines.weight_shapes import weight_shapes

    if "quantization_config" in checkpoint.hf_config:
        return 0  # its codes may be kept as they are
    if target is None:
        return sum(4 * math.prod(shape) for shape in weight_shapes(checkpoint.config).values())
    return weight_bytes(target, checkpoint.config)


def _check_can_build(target: Target) -> None:
    """Raise before any work if this machine cannot compile for the target.

    Raises:
        TargetError: With the command that produces the lowered graphs instead, where the hardware is what lacks.
    """
    from runtime.errors import TargetError

    available = target.availability()
    if not available.can_build:
        raise TargetError(f"{target.name} cannot be built on this machine", remedy=available.reason)


def _build_options(**values: Any) -> BuildOptions | None:
    """Return the options that were given, or None if none was."""
    from engines.build_options import BuildOptions

    given = {name: value for name, value in values.items() if value is not None}
    if "max_context" in given:
        given.setdefault("prefill_chunk", min(BuildOptions.prefill_chunk, given["max_context"]))
    return BuildOptions(**given) if given else None


@contextmanager
def _calibrated(
    made: Bundle, target: Target, prompts: list[CalibrationPrompt], destination: Path, say: Callable[[str], None]
) -> Iterator[None]:
    """Calibrate with the prompts, if there are any; the rounded weights last as long as the context."""
    if not prompts:
        yield
        return
    from engines.quantize.calibration import calibrate
    from engines.work_folder import work_folder

    say(f"calibrating on {len(prompts)} prompts")
    with work_folder(destination.resolve().parent) as (work, _):
        calibrate(made, target, prompts, work)
        yield


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()

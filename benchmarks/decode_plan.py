"""`python -m benchmarks decode-plan`: what the decode kernels of every model and GPU take, as the compiler says.

Needs no GPU: kernels are compiled for the exact shapes of each model, and `cuobjdump`, which triton brings, reads
registers, stack and shared memory out of the machine code. A plan that the result has already, of the same kernels and
compiler, is not made again, so a run that was ended goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks import options
from benchmarks.decode_plan_report import MODELS, NAME, TARGETS, cells, is_current, place_of, table
from benchmarks.kernel_usage import usage_of
from benchmarks.measure import environment
from benchmarks.result_files import RESULTS, write
from benchmarks.synthetic import write_checkpoint
from engines.decode_plan.compile import Job, compile_all, source_digest, triton_version
from engines.decode_plan.graph import read_decoder
from engines.decode_plan.options import PlanOptions, plan_problem
from engines.decode_plan.steps import FAST, make_steps
from engines.kernels.fragments import BITS
from engines.kernels.launch import HALF, INT4, INT8, Gpu, Unserved, Weight
from engines.lower import lower
from engines.registry import get
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.export import make_bundle
from runtime.errors import TargetError

if TYPE_CHECKING:
    from engines.bundle import Bundle
    from engines.decode_plan.decoder import Decoder


def decode_plan(
    models: Annotated[list[str] | None, typer.Option("--model", help="Shapes; those of the table by default.")] = None,
    targets: Annotated[list[str] | None, typer.Option("--target", help="Targets; fp16, int4, fp8 by default.")] = None,
    gpus: Annotated[list[str] | None, typer.Option("--compute-capability", help="GPUs; all by default.")] = None,
    results: options.Results = RESULTS,
) -> None:
    """Compile the decode kernels of models for GPUs that need not be there, and list what they take."""
    if problem := plan_problem():
        raise TargetError(f"nothing can be compiled: {problem}", remedy="install it")
    wanted = PlanOptions(True, tuple(gpus or ())).gpus
    compiler = {"source": launches_digest(), "triton": triton_version()}
    result = {**compiler, "plans": _kept(results), "environment": environment()}
    write(NAME, result, table(result), results, shown=False)  # with what has changed since, however this run ends
    for model in models or MODELS:
        for row in _rows(model, targets or TARGETS, wanted, result):
            result["plans"] = [each for each in result["plans"] if place_of(each) != place_of(row)] + [row]
            write(NAME, result, table(result), results, shown=False)
            typer.echo("  ".join(cells(row, result)), err=True)
    write(NAME, result, table(result), results)


def launches_digest() -> str:
    """Return a digest of the source of what a plan launches: kernels, their tiles and their order."""
    digest = hashlib.sha256(source_digest().encode())
    for package, names in (("engines.kernels", None), ("engines.decode_plan", ("steps.py",))):
        for file in sorted(resources.files(package).iterdir(), key=lambda each: each.name):
            if file.name.endswith(".py") and (names is None or file.name in names):
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _kept(folder: Path) -> list[dict[str, Any]]:
    path = folder / f"{NAME}.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["plans"]) if path.is_file() else []


def _rows(
    model: str, targets: Sequence[str], gpus: Sequence[Gpu], result: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a model that a result does not have yet, of these kernels and this compiler."""
    have = {place_of(row) for row in result["plans"] if is_current(row, result)}
    bundle = None
    for name in targets:
        missing = [gpu for gpu in gpus if (model, name, gpu.sm) not in have]
        if not missing:
            continue
        target = get(name)
        bundle = bundle or _bundle(model)
        graph = lower(bundle.graphs["decoder"].clone(), target, bundle.config, target.passes(target.formats))
        for gpu in missing:
            row = {"model": model, "target": name, "sm": gpu.sm, **{key: result[key] for key in ("source", "triton")}}
            try:
                yield row | _plan(read_decoder(graph, bundle.config), gpu)
            except Unserved as error:
                yield row | {"unserved": str(error)}


def _bundle(model: str) -> Bundle:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / model, model, sparse=True)
        return make_bundle(Checkpoint.open(str(Path(folder) / model)))


def _plan(decoder: Decoder, gpu: Gpu) -> dict[str, Any]:
    steps = make_steps(decoder, gpu)
    codes = compile_all([Job.of(launch, gpu) for launch in steps.launches()])
    usages = {job: usage_of(code.binary) for job, code in codes.items()}
    return {
        "kernels": len(codes),
        "launches": len(steps.of(1, FAST)),
        "compile_s": round(sum(code.compile_s for code in codes.values()), 1),
        "code_bytes": sum(len(code.binary) for code in codes.values()),
        "weight_bytes": weight_bytes(decoder),
        "spilling_kernels": sorted({job.function for job, usage in usages.items() if usage.stack_bytes}),
        "most_registers": max(usage.registers for usage in usages.values()),
        "most_stack_bytes": max(usage.stack_bytes for usage in usages.values()),
        "most_shared_bytes": max(code.shared_bytes for code in codes.values()),
    }


def weight_bytes(decoder: Decoder) -> int:
    """Return the bytes of weights that a step of one sequence reads, norms and a row of the table left out."""
    total = _stored_bytes(decoder.head)
    for layer in decoder.layers:
        total += _stored_bytes(layer.qkv) + _stored_bytes(layer.output)
        total += sum(_stored_bytes(each) for each in (layer.gate_up, layer.down) if each is not None)
        if layer.experts is not None:
            chosen = _stored_bytes(layer.experts.gate_up) + _stored_bytes(layer.experts.down)
            total += _stored_bytes(layer.experts.router) + layer.experts.top_k * chosen
    return total


def _stored_bytes(weight: Weight) -> int:
    """Return the bytes of a weight [N, K], or of one expert's, with scales and zero points."""
    bits = BITS[weight.kind]
    if weight.kind == HALF:
        return weight.rows * weight.columns * bits // 8
    blocks = -(-weight.columns // weight.block)
    columns = blocks * weight.block if weight.kind in (INT4, INT8) else weight.columns
    scale_bytes = 2 if weight.kind in (INT4, INT8) else 4
    zeros = -(-blocks * bits // 8) if weight.zero_points else 0
    return weight.rows * (columns * bits // 8 + blocks * scale_bytes + zeros)

"""`python -m benchmarks decode-plan`: what the decode kernels of every model and GPU take, as the compiler says.

Needs no GPU: kernels are compiled for the exact shapes of each model, and `cuobjdump`, which triton brings, reads
registers, local memory (spills) and shared memory out of the machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks import options
from benchmarks.measure import environment
from benchmarks.result_files import RESULTS, markdown, write
from benchmarks.synthetic import write_checkpoint
from engines.decode_plan.compile import Code, Job, compile_all
from engines.decode_plan.graph import read_decoder
from engines.decode_plan.options import PlanOptions
from engines.decode_plan.steps import FAST, FORMS, Steps, make_steps
from engines.kernels.launch import Unserved
from engines.lower import lower
from engines.registry import get
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.export import make_bundle

if TYPE_CHECKING:
    from engines.bundle import Bundle

_MODELS = ("qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b", "qwen3-vl-32b", "qwen3-vl-30b-a3b", "qwen3-vl-235b-a22b")
_TARGETS = ("ort-cuda-fp16", "ort-cuda-bf16", "ort-cuda-int4", "ort-cuda-fp8")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Usage:
    """What a kernel takes, by `cuobjdump -res-usage`: registers of a thread, bytes of a thread's stack, of a program's
    shared memory (static, or as triton asks for it at launch)."""

    registers: int
    stack_bytes: int
    shared_bytes: int


def decode_plan(
    models: Annotated[list[str] | None, typer.Option("--model", help="Shapes; all six by default.")] = None,
    targets: Annotated[list[str] | None, typer.Option("--target", help="Targets; all that take a plan.")] = None,
    gpus: Annotated[list[str] | None, typer.Option("--compute-capability", help="GPUs; all by default.")] = None,
    results: options.Results = RESULTS,
) -> None:
    """Compile the decode kernels of models for GPUs that need not be there, and list what they take."""
    wanted = PlanOptions(True, tuple(gpus or ())).gpus
    machine = environment()
    found = []
    for model in models or _MODELS:
        bundle = _bundle(model)
        for name in targets or _TARGETS:
            for gpu in wanted:
                target = get(name)
                graph = lower(bundle.graphs["decoder"].clone(), target, bundle.config, target.passes(target.formats))
                try:
                    steps = make_steps(read_decoder(graph, bundle.config), gpu, target.top_k)
                except Unserved as error:
                    found.append({"model": model, "target": name, "sm": gpu.sm, "unserved": str(error)})
                    break
                found.append({"model": model, "target": name, "sm": gpu.sm, **_compiled(steps)})
                typer.echo(_row(found[-1]), err=True)
    result = {"plans": found, "environment": machine}
    write("decode-plan", result, table(result), results)


def _bundle(model: str) -> Bundle:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / model, model, sparse=True)
        return make_bundle(Checkpoint.open(str(Path(folder) / model)))


def _compiled(steps: Steps) -> dict[str, Any]:
    started = time.perf_counter()
    jobs = list(dict.fromkeys(Job.of(launch, steps.gpu) for launch in steps.launches()))
    with tempfile.TemporaryDirectory() as cache:  # so that all is compiled, and timed
        codes = compile_all(jobs, cache=Path(cache))
    taken = time.perf_counter() - started
    kernels = {}
    for job, code in codes.items():
        usage = usage_of(code)
        key = f"{job.function}({', '.join(f'{name}={value}' for name, value in job.constants)})"
        kernels[f"{key} warps={job.num_warps}"] = vars(usage) | {"code_bytes": len(code.binary)}
    return {
        "compile_s": round(taken, 1),
        "code_bytes": sum(len(code.binary) for code in codes.values()),
        "launches": {str(batch): len(each) for (batch, form), each in steps.by_batch.items() if form == FAST},
        "forms": list(FORMS),
        "kernels": kernels,
    }


def usage_of(code: Code) -> Usage:
    """Return what a kernel takes.

    Raises:
        ValueError: `cuobjdump` says it in other words.
    """
    tool = resources.files("triton") / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.binary)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    match = _USAGE.search(text)
    if match is None:
        raise ValueError(f"cuobjdump: {text[:200]}")
    registers, stack, shared, local = map(int, match.groups())
    return Usage(registers, stack + local, max(shared, code.shared_bytes))


def table(result: Mapping[str, Any]) -> str:
    """Return the Markdown table of a result."""
    head = [
        "model",
        "target",
        "GPU",
        "launches",
        "kernels",
        "most registers",
        "most spilled",
        "most shared",
        "code",
        "time",
    ]
    return markdown([head, *(_cells(each) for each in result["plans"])])


def _cells(plan: Mapping[str, Any]) -> list[str]:
    where = [plan["model"], plan["target"], f"{plan['sm'] // 10}.{plan['sm'] % 10}"]
    if "unserved" in plan:
        return [*where, f"none: {plan['unserved']}", *[""] * 6]
    usages = plan["kernels"].values()
    return [
        *where,
        str(plan["launches"]["1"]),
        str(len(usages)),
        str(max(each["registers"] for each in usages)),
        f"{max(each['stack_bytes'] for each in usages)} B",
        f"{max(each['shared_bytes'] for each in usages) / 1024:.0f} KiB",
        f"{plan['code_bytes'] / 1e6:.1f} MB",
        f"{plan['compile_s']:.0f} s",
    ]


def _row(plan: Mapping[str, Any]) -> str:
    return "  ".join(_cells(plan))

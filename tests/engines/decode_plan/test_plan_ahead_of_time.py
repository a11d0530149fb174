"""All kernels of the demos' decode plans, compiled for a GPU that is not there, and what the compiler says of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.kernel_usage import usage_of
from engines import registry
from engines.bundle import DECODER, Bundle
from engines.decode_plan.build import add_plan
from engines.decode_plan.compile import Code, Job, compile_all
from engines.decode_plan.graph import read_decoder
from engines.decode_plan.options import PlanOptions
from engines.decode_plan.steps import BATCHES, FAST, FORMS, INVARIANT, Steps, make_steps
from engines.external_data import write_model
from engines.kernels.launch import GPUS
from engines.lower import lower
from engines.progress import Progress
from runtime.decode_plan import DecodePlan, read_code
from runtime.manifest import Manifest

pytest.importorskip("triton")
GPU = GPUS[90]
# One row, a group of 8 columns, and four groups; both forms.
FEW = ((1, FAST), (8, FAST), (32, INVARIANT))
ALL = tuple((batch, form) for batch in BATCHES for form in FORMS)
# CUDA C++ Programming Guide, technical specifications.
REGISTERS_OF_A_MULTIPROCESSOR, MOST_REGISTERS = 65536, 255
# A spilled register costs a store and a load of the whole warp; the lookup of the embeddings has a few.
MOST_STACK_BYTES = 64


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the plans of this file keep what they have in common; nothing else was compiled there."""
    return tmp_path_factory.mktemp("kernels")


def steps_of(bundle: Bundle, name: str) -> Steps:
    target = registry.get(name)
    graph = lower(bundle.graphs[DECODER].clone(), target, bundle.config, target.passes(target.formats))
    return make_steps(read_decoder(graph, bundle.config), GPU)


def check(job: Job, code: Code) -> None:
    """Raise unless a kernel can be launched on the GPU, and keeps its numbers in registers."""
    usage = usage_of(code.binary)
    assert (usage.entry, usage.sm) == (code.entry, GPU.sm)
    assert usage.stack_bytes <= MOST_STACK_BYTES, f"{job.function}: {usage.stack_bytes} bytes of stack"
    assert usage.registers <= MOST_REGISTERS
    assert usage.registers * 32 * job.num_warps <= REGISTERS_OF_A_MULTIPROCESSOR
    assert code.shared_bytes <= GPU.shared_bytes
    assert code.ptxas.partition(".")[0].isdigit() and code.compile_s > 0


def check_all(steps: Steps, chosen: tuple[tuple[int, str], ...], cache: Path) -> None:
    jobs = {Job.of(launch, GPU) for each in chosen for launch in steps.of(*each)}
    codes = compile_all(sorted(jobs, key=repr), cache=cache)
    assert set(codes) == jobs
    for job, code in codes.items():
        check(job, code)


def check_launches(steps: Steps, expected: dict[str, int]) -> None:
    """Compare how often each file of kernels is launched in a step, in every batch and form."""
    for each in ALL:
        found = Counter(launch.module for launch in steps.of(*each))
        assert 2 <= found.pop("candidates") <= 3
        assert found == expected


CHOSEN = pytest.mark.parametrize("chosen", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])


@CHOSEN
@pytest.mark.parametrize("target", ["ort-cuda-fp16", "ort-cuda-int4"])
def test_dense_plans(target: str, chosen: tuple[tuple[int, str], ...], demo_bundle: Bundle, cache: Path) -> None:
    steps, layers = steps_of(demo_bundle, target), demo_bundle.config.text.num_layers
    check_all(steps, chosen, cache)
    check_launches(steps, {"embed": 1, "attention": layers, "product": 4 * layers + 1})


@CHOSEN
def test_a_plan_with_experts(chosen: tuple[tuple[int, str], ...], demo_moe_bundle: Bundle, cache: Path) -> None:
    steps, layers = steps_of(demo_moe_bundle, "ort-cuda-int4"), demo_moe_bundle.config.text.num_layers
    check_all(steps, chosen, cache)
    products = {"product": 2 * layers + 1, "router": layers, "experts": 2 * layers}
    check_launches(steps, {"embed": 1, "attention": layers, **products})


def test_a_kernel_that_spills_is_seen(demo_bundle: Bundle, cache: Path) -> None:
    launch = next(each for each in steps_of(demo_bundle, "ort-cuda-fp16").of(1, FAST) if each.module == "attention")
    job = Job.of(dataclasses.replace(launch, max_registers=40), GPU)
    code = compile_all([job], cache=cache)[job]
    assert usage_of(code.binary).registers <= 40
    with pytest.raises(AssertionError, match=r"attention: \d+ bytes of stack"):
        check(job, code)


def test_what_is_no_code_is_refused() -> None:
    with pytest.raises(ValueError, match="cuobjdump: 0 kernels"):
        usage_of(b"\x7fELF")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort-cuda-fp16", "ort-cuda-int4"])
def test_the_runtime_reads_what_the_build_writes(target: str, demo_bundle: Bundle, tmp_path: Path) -> None:
    """The plan's own places in the file of code lead to the kernels whose names it gives."""
    found = registry.get(target)
    model = lower(demo_bundle.graphs[DECODER].clone(), found, demo_bundle.config, found.passes(found.formats))
    files = write_model(model, tmp_path / "decoder.onnx", with_weights=True)
    files |= add_plan(tmp_path, model, found, demo_bundle.config, PlanOptions(True, ("9.0",)), Progress())
    capabilities = {"cache_dtype": found.cache_dtype, "decode_plan": True}
    manifest = Manifest(target, found.session, capabilities, demo_bundle.config, {}, {}, files)
    gpu = DecodePlan(tmp_path, manifest).for_sm(GPU.sm)
    code = read_code(tmp_path, gpu, manifest)
    for kernel in gpu.kernels.values():
        usage = usage_of(code[kernel.offset : kernel.offset + kernel.num_bytes])
        assert (usage.entry, usage.sm) == (kernel.entry, GPU.sm)
        assert kernel.shared_bytes <= GPU.shared_bytes
    assert set(gpu.steps) == set(ALL)

"""What a GPU runs that is too small for all of a model: only what fits both devices, and can be built and run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks import synthetic
from engines.build_options import BuildOptions
from engines.choose import choose_target, consider, estimate, weight_bytes
from engines.hardware import Gpu, Hardware
from engines.kernel_sets import with_kernels
from engines.registry import all_targets
from engines.split import Split, find_split
from engines.target import Target
from helpers.targets import by_name, like
from runtime.errors import CapacityError
from runtime.memory import CACHE, LIBRARIES, PREFILL, STAGING, VISION, WEIGHTS
from runtime.model_config import ModelConfig
from runtime.session import DECODE, PARTS
from runtime.session import PREFILL as PROMPTS
from runtime.session import VISION as TOWER

ADA = Gpu("Test RTX", "8.9", 24 << 30, 22 << 30, "570.1")
MACHINE = Hardware("Abacus", ("avx2",), 2, 32 << 30, gpus=(ADA,))
CUDA, CPU, PLANS = like("ort-cuda-fp16"), like("ort-cpu-int8"), like("trt-int4", "ort-cuda-int4")
CONFIG = ModelConfig.from_hf(synthetic.hf_config("qwen3-vl-2b"))
ONE = BuildOptions(max_batch=1)


def split(free_bytes: int, *targets: Target, memory_bytes: int = 32 << 30) -> Split | None:
    machine = replace(MACHINE, gpus=(replace(ADA, free_bytes=free_bytes),), memory_bytes=memory_bytes)
    choice = consider(machine, CONFIG, targets=targets)
    return find_split(machine, CONFIG, choice, targets=targets)


def whole(target: Target) -> dict[str, int]:
    return estimate(with_kernels(target, None, CONFIG), CONFIG)


@pytest.mark.parametrize("target", all_targets(), ids=by_name)
def test_the_weights_of_the_parts_are_all_weights(target: Target) -> None:
    tower, decoder = weight_bytes(target, CONFIG, {TOWER}), weight_bytes(target, CONFIG, {PROMPTS, DECODE})
    assert tower + decoder == weight_bytes(target, CONFIG) and 0 < tower < decoder
    apart = weight_bytes(target, CONFIG, {PROMPTS}) + weight_bytes(target, CONFIG, {DECODE})
    assert apart == (decoder if target.prefill_formats is not None else 2 * decoder)


def test_the_decoder_goes_to_the_gpu_before_the_vision_tower() -> None:
    parts = whole(CUDA)
    tower = weight_bytes(CUDA, CONFIG, {TOWER})
    least = sum(parts.values()) - tower - parts[VISION]
    found = split(least, CUDA, CPU)
    assert found is not None
    gpu, cpu = found.shares
    assert (gpu.device, gpu.parts, gpu.total_bytes) == ("gpu", {DECODE, PROMPTS}, least)
    assert (cpu.device, cpu.parts) == ("cpu", {TOWER})
    assert cpu.num_bytes == {
        WEIGHTS: weight_bytes(with_kernels(CPU, None, CONFIG), CONFIG, {TOWER}),
        VISION: whole(CPU)[VISION],
        LIBRARIES: whole(CPU)[LIBRARIES],
    }
    assert found.commands("Qwen/Qwen3-VL-2B-Instruct") == [
        "qwen3vl-export Qwen/Qwen3-VL-2B-Instruct --target ort-cuda-fp16 --output engines/ort-cuda-fp16",
        "qwen3vl-export Qwen/Qwen3-VL-2B-Instruct --target ort-cpu-int8 --output engines/ort-cpu-int8",
        "qwen3vl run engines/ort-cuda-fp16 PROMPT --vision-engine engines/ort-cpu-int8",
    ]


def test_a_smaller_gpu_takes_the_vision_tower() -> None:
    parts = whole(CUDA)
    least = weight_bytes(CUDA, CONFIG, {TOWER}) + parts[VISION] + parts[LIBRARIES]
    found = split(least, CUDA, CPU)
    assert found is not None
    cpu, gpu = found.shares
    assert (gpu.parts, gpu.total_bytes) == ({TOWER}, least) and cpu.parts == PARTS - {TOWER}
    assert cpu.num_bytes[CACHE] == whole(CPU)[CACHE] and STAGING not in cpu.num_bytes
    assert found.commands("M")[-1] == "qwen3vl run engines/ort-cpu-int8 PROMPT --vision-engine engines/ort-cuda-fp16"
    assert found.commands("./my models/M")[0].startswith("qwen3vl-export './my models/M' --target ort-cpu-int8 ")
    assert split(least - 1, CUDA, CPU) is None


def test_prompts_go_to_the_gpu_where_a_cache_for_many_does_not() -> None:
    """Decode steps need a cache for each sequence, prompts one slot."""
    options = BuildOptions(max_batch=64)
    machine = replace(MACHINE, memory_bytes=1 << 40)
    parts = estimate(with_kernels(CUDA, None, CONFIG), CONFIG, options=options)
    least = sum(parts.values()) - parts[CACHE] + parts[CACHE] // 64
    machine = replace(machine, gpus=(replace(ADA, free_bytes=least),))
    choice = consider(machine, CONFIG, options=options, targets=[CUDA, CPU])
    found = find_split(machine, CONFIG, choice, options=options, targets=[CUDA, CPU])
    assert found is not None
    cpu, gpu = found.shares
    assert gpu.parts == {PROMPTS, TOWER} and gpu.num_bytes[STAGING] == parts[CACHE] // 64 and PREFILL in gpu.num_bytes
    assert cpu.parts == {DECODE} and VISION not in cpu.num_bytes
    assert found.commands("M")[-1].endswith(
        "--prefill-engine engines/ort-cuda-fp16 --vision-engine engines/ort-cuda-fp16"
    )
    text = found.render("M")
    assert "cpu: decode on ort-cpu-int8, " in text and "gpu: prefill, vision on ort-cuda-fp16, " in text
    values: Any = found.to_dict()
    assert [each["runs"] for each in values] == [["decode"], ["prefill", "vision"]]
    assert all(each["total_bytes"] == sum(each["parts"].values()) <= each["limit_bytes"] for each in values)


def test_both_devices_may_hold_what_neither_does() -> None:
    parts = whole(CUDA)
    tower_on_cpu = weight_bytes(with_kernels(CPU, None, CONFIG), CONFIG, {TOWER})
    tower_on_cpu += whole(CPU)[VISION] + whole(CPU)[LIBRARIES]
    least = sum(parts.values()) - weight_bytes(CUDA, CONFIG, {TOWER}) - parts[VISION]
    assert split(least, CUDA, CPU, memory_bytes=tower_on_cpu) is not None
    assert split(least, CUDA, CPU, memory_bytes=tower_on_cpu - 1) is None
    machine = replace(MACHINE, gpus=(replace(ADA, free_bytes=least),), memory_bytes=tower_on_cpu)
    with pytest.raises(CapacityError) as caught:
        choose_target(machine, CONFIG, targets=[CUDA, CPU])
    assert "whether a GPU and the processor hold it together" in caught.value.remedy


def test_nothing_is_split_without_need_or_without_a_gpu() -> None:
    assert split(22 << 30, CUDA, CPU) is None
    machine = replace(MACHINE, gpus=())
    assert find_split(machine, CONFIG, consider(machine, CONFIG, targets=[CUDA, CPU]), targets=[CUDA, CPU]) is None
    assert split(0, CUDA, CPU, memory_bytes=4 << 30) is None, "a GPU that has the machine's memory"


@pytest.mark.parametrize(
    "target",
    [
        like("ort-cuda-fp16", runs=False),
        like("ort-cuda-fp16", builds=False),
        replace(CUDA, min_compute_capability="9.0"),
        replace(CUDA, by_name_only="for a reason"),
        PLANS,
    ],
    ids=["runs", "builds", "capability", "by name", "plans"],
)
def test_what_does_not_run_here_in_part_is_not_proposed(target: Target) -> None:
    parts = whole(CUDA)
    assert split(sum(parts.values()) - parts[VISION], target, CPU) is None
    assert split(sum(parts.values()) - parts[VISION], CUDA, CPU) is not None


def test_rows_that_cannot_move_keep_prompts_where_steps_are() -> None:
    options = BuildOptions(max_batch=64)
    parts = estimate(with_kernels(CUDA, None, CONFIG), CONFIG, options=options)
    least = sum(parts.values()) - parts[CACHE] + parts[CACHE] // 64
    machine = replace(MACHINE, gpus=(replace(ADA, free_bytes=least),), memory_bytes=1 << 40)
    codes = replace(CPU, cache_dtype="int8", kernels=None, other_kernels=())
    choice = consider(machine, CONFIG, options=options, targets=[CUDA, codes])
    found = find_split(machine, CONFIG, choice, options=options, targets=[CUDA, codes])
    assert found is not None and {each.parts for each in found.shares} == {frozenset({TOWER}), PARTS - {TOWER}}

"""The choice of a target: bytes held against real engines, order and refusals against recorded machines."""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

import configs
from benchmarks import synthetic
from engines import choose
from engines.build import build_engine
from engines.build_options import BuildOptions
from engines.bundle import Bundle
from engines.choose import AUTO, choose_target, consider, estimate, facts_of, resolve_target, weight_bytes
from engines.hardware import Gpu, Hardware
from engines.kernel_sets import with_kernels
from engines.quantize.formats import WeightFormats
from engines.registry import all_targets, get
from engines.target import Target
from engines.weight_shapes import EMBEDDING_KEY, weight_shapes
from helpers.targets import by_name, like, own, with_all_kernels
from runtime.errors import CapacityError, TargetError
from runtime.memory import CACHE, LIBRARIES, LOGITS, PREFILL, VISION, WEIGHTS
from runtime.memory_plan import Planner, Work
from runtime.model_config import ModelConfig

DENSE = [name for name in configs.names("models") if "num_experts" not in configs.load(f"models/{name}")["text_config"]]
ADA = Gpu("Test RTX", "8.9", 24 << 30, 22 << 30, "570.1")
CPU_ONLY = Hardware("Abacus", ("avx2",), 2, 32 << 30)


def shape(name: str) -> ModelConfig:
    return ModelConfig.from_hf(synthetic.hf_config(name))


GPU_FP16, GPU_INT4 = like("trt-fp16", "ort-cpu-fp32"), like("trt-int4", "ort-cpu-int4")
CPU_INT8, CPU_INT4 = like("ort-cpu-int8"), like("ort-cpu-int4")


def stored_bytes(engine: Path) -> int:
    """Bytes of all tensors in the weight files, each once, without what aligns them."""
    total = 0
    for path in engine.glob("*.onnx"):
        graph = onnx.load(path, load_external_data=False).graph
        places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer]
        total += sum({place["offset"]: int(place["length"]) for place in places if place}.values())
    return total


@pytest.mark.parametrize("target", with_all_kernels(), ids=by_name)
def test_weights_are_estimated_to_the_byte(target: Target, demo_bundle: Bundle, tmp_path: Path) -> None:
    build_engine(demo_bundle, target, tmp_path / "graphs", with_weights=False)
    stored, estimated = stored_bytes(tmp_path / "graphs"), weight_bytes(target, demo_bundle.config)
    # In half precision the estimate counts all biases and norms as float32, so it is a little too high.
    assert stored <= estimated <= (stored if target.device == "cpu" else 1.01 * stored)


_TRT = ("trt-fp16", "trt-int4", "trt-nvfp4", "trt-fp8")


_WITH_EXPERTS = map(get, ("ort-cpu-fp32", "ort-cpu-int4", "ort-cuda-fp16", "ort-cuda-int4", *_TRT))


@pytest.mark.parametrize("target", [*_WITH_EXPERTS, own("ort-cpu-int4")], ids=by_name)
def test_experts_are_estimated_to_the_byte(target: Target, demo_moe_bundle: Bundle, tmp_path: Path) -> None:
    """Of a checkpoint whose rows of experts no block of 128 divides."""
    build_engine(demo_moe_bundle, target, tmp_path / "graphs", with_weights=False)
    stored, estimated = stored_bytes(tmp_path / "graphs"), weight_bytes(target, demo_moe_bundle.config)
    assert stored <= estimated <= (stored if target.device == "cpu" else 1.01 * stored)


def test_experts_that_tensorrt_gathers_are_counted() -> None:
    config = shape("qwen3-vl-30b-a3b")
    gathered = {name: workspace_bytes(get(name), config) for name in ("trt-int4", "ort-cuda-int4")}
    # 512 tokens: 192 blocks of one expert, 3 · 768 · 2048 numbers of 2 bytes each.
    assert gathered == {"trt-int4": 192 * 3 * 768 * 2048 * 2, "ort-cuda-int4": 0}
    assert workspace_bytes(get("trt-int4"), config, prefill_chunk=2) == 16 * 3 * 768 * 2048 * 2
    assert workspace_bytes(get("trt-int4"), shape("qwen3-vl-2b")) == 0


def workspace_bytes(target: Target, config: ModelConfig, prefill_chunk: int = 512) -> int:
    """What an estimate of the prefill has beyond activations."""
    options = BuildOptions(prefill_chunk=prefill_chunk, max_batch=1)
    without = Planner(replace(facts_of(target, config, options), workspace_bytes=0))
    work = Work(4096, images=(4096,), prompts_with_images=1, chunk=prefill_chunk)
    return estimate(target, config, options=options)[PREFILL] - without.plan(work).parts[PREFILL]


def test_half_precision_takes_two_bytes_a_weight() -> None:
    config = shape("qwen3-vl-2b")
    half = replace(get("ort-cpu-fp32"), float_dtype="float16")
    vectors = sum(sizes[0] for sizes in weight_shapes(config).values() if len(sizes) == 1)
    assert weight_bytes(half, config) == weight_bytes(get("ort-cpu-fp32"), config) // 2 + 2 * vectors


def test_parts_of_an_estimate() -> None:
    config, target = shape("qwen3-vl-2b"), get("ort-cpu-fp32")
    options = BuildOptions(max_context=1000, max_batch=2)
    parts = estimate(target, config, options=options)
    # 28 layers, keys and values, 8 heads of 128, float32.
    assert parts[CACHE] == 2 * 1000 * 28 * 2 * 8 * 128 * 4
    work = Work(1000, 2, images=(4096,), prompts_with_images=1)
    planned = Planner(facts_of(target, config, options)).plan(work).parts
    assert parts == {part: planned[part] for part in (WEIGHTS, CACHE, PREFILL, VISION, LIBRARIES)}
    # The table, which is the head as well: packed for products, and mapped to look rows up.
    assert parts[WEIGHTS] == weight_bytes(target, config) + 4 * config.text.vocab_size * config.text.hidden_size
    assert LOGITS not in parts and 50e6 < parts[LIBRARIES] < 150e6
    assert estimate(GPU_FP16, config, options=options)[LIBRARIES] == 500_000_000
    # A context beyond what the model was trained for is never allocated.
    long = estimate(target, shape("tiny"), options=BuildOptions(max_context=1 << 20))
    assert long[CACHE] == estimate(target, shape("tiny"), options=BuildOptions(max_context=config_positions()))[CACHE]


def config_positions() -> int:
    return shape("tiny").text.max_positions


def test_the_largest_precision_that_fits_the_gpu_comes_first() -> None:
    config, targets = shape("qwen3-vl-2b"), [CPU_INT4, CPU_INT8, GPU_INT4, GPU_FP16]
    large = replace(CPU_ONLY, gpus=(ADA,))
    choice = choose_target(large, config, targets=targets)
    assert choice.target is GPU_FP16
    assert [(each.target, each.refusal) for each in choice.candidates] == [
        ("trt-fp16", ""),
        ("trt-int4", "trt-fp16 is preferred"),
        ("ort-cpu-int8", "trt-fp16 is preferred"),
        ("ort-cpu-int4", "trt-fp16 is preferred"),
    ]
    needed = choice.candidates[0].total_bytes
    exact = replace(CPU_ONLY, gpus=(replace(ADA, free_bytes=needed),))
    assert choose_target(exact, config, targets=targets).target is GPU_FP16
    small = replace(CPU_ONLY, gpus=(replace(ADA, free_bytes=needed - 100_000),))
    choice = choose_target(small, config, targets=targets)
    assert choice.target is GPU_INT4
    assert choice.candidates[0].refusal == "too large by 0.1 MB"


def test_a_gpu_that_is_too_small_leaves_the_cpu() -> None:
    machine = replace(CPU_ONLY, gpus=(replace(ADA, free_bytes=1 << 20),))
    assert choose_target(machine, shape("tiny"), targets=[GPU_FP16, GPU_INT4, CPU_INT8]).target is CPU_INT8


def test_a_gpu_without_memory_of_its_own_has_the_machines() -> None:
    shared = replace(CPU_ONLY, gpus=(replace(ADA, total_bytes=0, free_bytes=0),))
    choice = choose_target(shared, shape("qwen3-vl-2b"), targets=[GPU_FP16])
    assert choice.candidates[0].limit_bytes == CPU_ONLY.memory_bytes


@pytest.mark.parametrize(
    ("target", "hardware", "reason"),
    [
        (GPU_FP16, CPU_ONLY, "no GPU on this machine"),
        (
            like("trt-fp8", "ort-cpu-int8"),
            replace(CPU_ONLY, gpus=(ADA,)),
            "only by name: needs --calibration",
        ),
        (
            like("trt-nvfp4", "ort-cpu-int4"),
            replace(CPU_ONLY, gpus=(replace(ADA, compute_capability="9.0"),)),
            "needs SM 10.0, the Test RTX has 9.0",
        ),
        (
            like("trt-fp16", "ort-cpu-fp32", runs=False),
            replace(CPU_ONLY, gpus=(ADA,)),
            "cannot be run here: for a reason",
        ),
        (
            like("trt-fp16", "ort-cpu-fp32", builds=False),
            replace(CPU_ONLY, gpus=(ADA,)),
            "cannot be built here: for a reason",
        ),
        (replace(CPU_INT8, name="ort-cpu-int2", rank=None), CPU_ONLY, "only by name: configs/targets does not rank it"),
        (replace(CPU_INT8, name="abacus-int2", rank=None), CPU_ONLY, "only by name: configs/targets does not rank it"),
    ],
)
def test_why_a_target_is_refused(target: Target, hardware: Hardware, reason: str) -> None:
    choice = consider(hardware, shape("tiny"), targets=[target, CPU_INT8])
    assert {each.target: each.refusal for each in choice.candidates}[target.name] == reason
    assert choice.target is CPU_INT8
    assert reason in choice.render()


def test_compute_capabilities_are_compared_as_numbers() -> None:
    blackwell = replace(CPU_ONLY, gpus=(replace(ADA, compute_capability="10.0"),))
    target = like("trt-nvfp4", "ort-cpu-int8")
    assert consider(blackwell, shape("tiny"), targets=[target]).target is target


def test_nothing_fits() -> None:
    config, tiny_machine = shape("qwen3-vl-2b"), replace(CPU_ONLY, memory_bytes=1 << 30)
    with pytest.raises(CapacityError) as caught:
        choose_target(tiny_machine, config, targets=[CPU_INT8, CPU_INT4, GPU_FP16])
    table = consider(tiny_machine, config, targets=[CPU_INT8, CPU_INT4, GPU_FP16])
    assert table.target is None
    nearest = table.candidates[-1]
    assert nearest.target == "ort-cpu-int4"
    assert f"ort-cpu-int4, the nearest, takes {nearest.total_bytes / 1e6:,.1f} MB" in caught.value.message
    assert "the limit is 1,073.7 MB" in caught.value.message
    assert nearest.parts[WEIGHTS] == estimate(with_kernels(CPU_INT4, None), config)[WEIGHTS] > 1 << 30


def test_rows_that_no_kernel_reads_are_a_refusal() -> None:
    machine = replace(CPU_ONLY, gpus=(ADA,))
    choice = consider(machine, shape("tiny"), targets=[like("ort-cuda-int4"), CPU_INT8])
    assert choice.candidates[0].refusal.endswith("no block of 16, 32, 64, 128, 256 divides its 48 columns")
    assert choice.target is CPU_INT8


def test_nothing_is_available() -> None:
    with pytest.raises(TargetError, match="trt-fp16: no GPU on this machine"):
        choose_target(CPU_ONLY, shape("tiny"), targets=[GPU_FP16, like("ort-cpu-int8", runs=False)])


def test_a_limit_of_one_byte() -> None:
    with pytest.raises(CapacityError):
        choose_target(replace(CPU_ONLY, memory_bytes=1), shape("tiny"), targets=[CPU_INT8])


def test_every_target_has_a_place_and_a_device() -> None:
    devices = {target.session: target.device for target in all_targets()}
    assert devices | {"ort_cpu": "cpu", "ort_cuda": "gpu", "tensorrt": "gpu"} == devices
    for target in all_targets():
        assert target.device == devices[target.session] in ("cpu", "gpu")
        (candidate,) = consider(CPU_ONLY, shape("tiny"), targets=[target]).candidates
        assert "does not rank it" not in candidate.refusal
        assert min(candidate.parts[part] for part in (WEIGHTS, CACHE, VISION)) > 0 <= candidate.parts[PREFILL]


def test_resolving_a_name_reads_no_checkpoint() -> None:
    def unread() -> Any:
        raise AssertionError

    assert resolve_target("ort-cpu-int8", unread, say=lambda text: None).name == "ort-cpu-int8"
    with pytest.raises(TargetError, match="did you mean"):
        resolve_target("ort-cpu-int9", unread, say=lambda text: None)


def test_auto_reports_what_it_chose_and_the_table_if_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ort-cpu-fp32", "ort-cpu-int4", "ort-cpu-int8", "ort-cuda-fp16", "trt-fp16")
    monkeypatch.setattr(choose, "all_targets", lambda: [get(name) for name in names])
    said: list[str] = []
    target = resolve_target(AUTO, lambda: shape("tiny"), said.append, hardware=CPU_ONLY)
    assert target.name == "ort-cpu-int8"
    assert [line.partition(";")[0] for line in said] == ["--target auto: ort-cpu-int8"]
    small = replace(CPU_ONLY, memory_bytes=1 << 20)
    with pytest.raises(CapacityError):
        resolve_target(AUTO, lambda: shape("tiny"), said.append, hardware=small)
    assert said[1:] == [consider(small, shape("tiny")).render()]


def test_a_batch_that_is_asked_for_counts() -> None:
    target, config = get("ort-cpu-fp32"), shape("qwen3-vl-2b")
    alone = estimate(target, config)[CACHE]
    assert alone == estimate(target, config, options=BuildOptions(max_batch=1))[CACHE]
    assert estimate(target, config, options=BuildOptions(max_batch=3))[CACHE] == 3 * alone


@pytest.mark.parametrize(
    ("kind", "few_bits"),
    [
        # 8 bits and a scale of two bytes for each row; 4 bits in blocks of 16 with a scale of a byte, and one for all.
        ("float8", lambda rows, columns: rows * columns + 2 * rows),
        ("nvfp4", lambda rows, columns: rows * -(-columns // 16) * 9 + 2),
    ],
)
def test_floats_of_few_bits(kind: str, few_bits: Any) -> None:
    target = get("trt-nvfp4")
    tied, untied = shape("qwen3-vl-2b"), shape("qwen3-vl-8b")
    # One weight of few bits, all others unquantised.
    for key, config in (("*.layers.3.mlp.down_proj.weight", tied), (EMBEDDING_KEY, tied), (EMBEDDING_KEY, untied)):
        ((rows, columns),) = (found for name, found in weight_shapes(config).items() if fnmatch.fnmatchcase(name, key))
        floats, few = (
            weight_bytes(replace(target, formats=WeightFormats.from_rules(rules)), config)
            for rules in ([], [{"match": [key], "kind": kind}])
        )
        # The table to look up stays, and a tied head is a copy.
        saved = 2 * rows * columns if key != EMBEDDING_KEY else 0
        copied = few_bits(rows, columns) if key != EMBEDDING_KEY or config is tied else 0
        assert few == floats - saved + copied

"""TensorRT-RTX plans of the demo, really built: no GPU is needed for that."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo_training.prompts import training_prompts
from engines.build import build_engine
from engines.build_options import BuildOptions
from engines.bundle import DECODER, VISION, Bundle
from engines.hardware import Gpu, Hardware
from engines.quantize.calibration import calibrate
from engines.registry import get, load_family
from engines.tensorrt import compiler
from engines.tensorrt.checks import GraphFacts, check_graph, check_network, check_plan_size, graph_facts
from engines.tensorrt.profiles import profiles_of
from helpers.command_line import call
from qwen3vl_export.cli import export, run
from runtime.errors import CapacityError, EngineError, TargetError, UsageError
from runtime.manifest import Manifest

trt = pytest.importorskip("tensorrt_rtx")

SMALL = BuildOptions(max_context=256, prefill_chunk=64, patch_buckets=(64, 256), max_batch=2)


def built(bundle: Bundle, target: str, output: Path, options: BuildOptions = SMALL, **more: Any) -> Path:
    build_engine(bundle, get(target), output, options=options, **more)
    return output


@pytest.fixture(scope="module")
def half(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine in float16; tests that change it take a copy."""
    return built(demo_bundle, "trt-rtx-fp16", tmp_path_factory.mktemp("half") / "engine")


@pytest.fixture(scope="module")
def lowered(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(demo_bundle, "trt-rtx-int4", tmp_path_factory.mktemp("lowered") / "folder", runnable=False)


@pytest.fixture(scope="module")
def parsed(lowered: Path) -> Iterator[tuple[Any, GraphFacts]]:
    """The decoder's network, and what its graph says."""
    import onnx_ir as ir

    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(lowered / "decoder.onnx"))
    yield network, graph_facts(ir.load(lowered / "decoder.onnx"))


@pytest.mark.parametrize(
    ("precision", "first"), [("fp16", "7.5"), ("bf16", "8.0"), ("int4", "8.0"), ("fp8", "8.9"), ("nvfp4", "12.0")]
)
def test_the_demo_becomes_plans(precision: str, first: str, half: Path, demo_bundle: Bundle, tmp_path: Path) -> None:
    bundle = demo_bundle
    if precision == "fp8":
        bundle = calibrate(bundle, get("trt-rtx-fp8"), training_prompts(2), tmp_path).applied_to(bundle)
    engine = half if precision == "fp16" else built(bundle, f"trt-rtx-{precision}", tmp_path / "engine")
    manifest = Manifest.read(engine)
    manifest.check(engine, full=True)
    assert {"vision.plan", "decoder.plan"} <= {path.name for path in engine.iterdir()}
    assert not list(engine.glob("*.onnx*"))
    found = manifest.capabilities
    assert (found["library"], found["library_version"]) == ("tensorrt_rtx", trt.__version__)
    assert (found["capacity"], found["max_batch"], found["prefill_chunk"]) == (256, 2, 64)
    assert found["cache_dtype"] == ("bfloat16" if precision == "bf16" else "float16")
    assert found["compute_capabilities"][0] == first and found["compute_capabilities"][-1] == "12.1"
    decode, prefill = found["profiles"]["decoder"]
    assert decode["max"]["input_ids"] == [2, 1] and prefill["max"]["input_ids"] == [2, 64]
    assert decode["max"]["past_key_values.0.key"] == [2, 2, 256, 64]
    assert [profile["max"]["pixel_values"][1] for profile in found["profiles"]["vision"]] == [64, 256]


def test_one_bucket_begins_where_the_last_ends(demo_bundle: Bundle) -> None:
    inputs = {"pixel_values": ["I", "P", 8], "rope_cos": ["P", 4]}
    profiles = profiles_of(VISION, inputs, demo_bundle.config, SMALL)
    assert [(p.min["pixel_values"], p.max["pixel_values"]) for p in profiles] == [
        ((1, 4, 8), (1, 64, 8)),
        ((1, 68, 8), (1, 256, 8)),
    ]
    assert profiles[1].opt["rope_cos"] == (256, 4)


def test_the_network_is_the_graph(parsed: tuple[Any, GraphFacts]) -> None:
    network, facts = parsed
    assert facts.attentions == 4 and facts.cache_updates == 8
    assert facts.quantizations == 0 < facts.dequantizations == list(facts.weights.values()).count("INT4")
    assert set(facts.weights.values()) == {"FLOAT", "FLOAT16", "INT4", "INT64"} - {"INT64"}
    check_network(trt, network, facts, DECODER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: {"attentions": facts.attentions + 1}, "ATTENTION_INPUT"),
        (lambda facts: {"cache_updates": facts.cache_updates - 2}, "KV_CACHE_UPDATE"),
        (lambda facts: {"quantizations": facts.quantizations + 1}, "layers QUANTIZE"),
        (lambda facts: {"dequantizations": facts.dequantizations - 1}, "layers DEQUANTIZE"),
        (lambda facts: {"casts": frozenset(sorted(facts.casts)[1:])}, "which the graph does not"),
        (
            lambda facts: {"weights": {name: "FLOAT16" for name in facts.weights}},
            "is FLOAT in the network|is INT4 in the network",
        ),
        (lambda facts: {"weights": {**facts.weights, "model.extra": "FLOAT16"}}, "model.extra is missing"),
    ],
)
def test_a_network_that_differs_is_refused(parsed: tuple[Any, GraphFacts], change: Any, message: str) -> None:
    network, facts = parsed
    with pytest.raises(TargetError, match=message):
        check_network(trt, network, dataclasses.replace(facts, **change(facts)), DECODER)


def test_a_plan_that_is_too_large_or_too_small_is_refused() -> None:
    facts = GraphFacts({}, frozenset(), 0, 0, weight_bytes=10**9)
    check_plan_size(1_020_000_000, facts, DECODER, stripped=False)
    check_plan_size(5_000_000, facts, DECODER, stripped=True)
    for num_bytes, stripped in ((1_570_000_000, False), (500_000_000, False), (1_000_000_000, True)):
        with pytest.raises(TargetError, match="expected"):
            check_plan_size(num_bytes, facts, DECODER, stripped=stripped)


def test_an_older_engine_stays_when_a_build_fails_and_goes_when_one_succeeds(
    half: Path, demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = shutil.copytree(half, tmp_path / "engine")
    before = {path.name: path.read_bytes() for path in engine.iterdir()}

    class Full:
        """A file on a disk that becomes full."""

        def __init__(self, path: Path) -> None:
            self._left = 1_000_000

        def write(self, data: bytes) -> int:
            self._left -= len(data)
            if self._left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(data)

    real = compiler.stream_writer
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "stream_writer", lambda trt, file: real(trt, Full(file)))
        # The library itself calls such a build a success.
        with pytest.raises(CapacityError, match="the disk is full"):
            built(demo_bundle, "trt-rtx-fp16", engine)
    assert {path.name: path.read_bytes() for path in engine.iterdir()} == before
    built(demo_bundle, "trt-rtx-fp16", engine, dataclasses.replace(SMALL, max_context=128))
    assert Manifest.read(engine).capabilities["capacity"] == 128


def test_a_graph_that_lost_a_layer_or_gained_a_cast_is_refused(
    parsed: tuple[Any, GraphFacts], demo_bundle: Bundle
) -> None:
    _, facts = parsed
    check_graph(facts, demo_bundle.config, DECODER)
    for change, message in (
        ({"attentions": 3}, "3 nodes Attention, the model asks for 4"),
        ({"cache_updates": 7}, "7 nodes TensorScatter, the model asks for 8"),
        ({"stray_casts": ("up/to_float",)}, "up/to_float convert where no float32 place"),
    ):
        with pytest.raises(TargetError, match=message):
            check_graph(dataclasses.replace(facts, **change), demo_bundle.config, DECODER)


def test_options_are_refused_before_the_model_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3vl_export.export.make_bundle", lambda *_: pytest.fail("traced"))
    for options in (("--compute-capability", "abc"), ("--max-context", "100000000"), ("--strip-weights",)):
        arguments = ("demo", "--target", "trt-rtx-fp16", "--output", str(tmp_path / "engine"), *options)
        code, _, err = call(export.app, *arguments)
        assert code in (2, 6) and "traced" not in err, err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_context": 1}, "max_context = 1"),
        ({"max_context": 10**9}, "max_context = 1000000000, expected 2 to"),
        ({"prefill_chunk": 512}, "prefill_chunk = 512, expected 2 to 256"),
        ({"max_batch": 0}, "max_batch = 0"),
        ({"patch_buckets": ()}, "patch buckets"),
        ({"patch_buckets": (63,)}, "multiples of 4"),
        ({"patch_buckets": (256, 64)}, "ascending"),
    ],
)
def test_sizes_out_of_range_are_said_before_anything_is_written(
    changes: dict[str, Any], message: str, demo_bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        built(demo_bundle, "trt-rtx-fp16", tmp_path / "engine", dataclasses.replace(SMALL, **changes))
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strip-weights",), "--strip-weights: TensorRT-RTX builds a stripped plan on the GPU that it is for"),
        (("--version-compatible",), "--version-compatible: TensorRT-RTX has no such plans"),
        (("--hardware-compatible",), "--hardware-compatible: TensorRT-RTX has no such plans"),
        (("--compute-capability", "9.0"), "compute capability 9.0: trt-rtx-fp16 is built for 7.5"),
    ],
)
def test_what_the_library_cannot_is_said_in_our_words(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    code, _, err = call(export.app, "demo", "--target", "trt-rtx-fp16", "--output", str(output), *options)
    assert code == 6 and message in err and "remedy" in err
    assert not output.exists()


def test_sizes_for_a_target_that_has_none_are_refused(tmp_path: Path) -> None:
    code, _, err = call(
        export.app, "demo", "--target", "ort-cpu-fp32", "--max-batch", "2", "--output", str(tmp_path / "engine")
    )
    assert code == 2 and "ort-cpu-fp32 is not built for fixed sizes" in err


def test_the_command_passes_the_sizes_on(tmp_path: Path) -> None:
    sizes = ("--max-context", "128", "--prefill-chunk", "32", "--max-batch", "3", "--max-patches", "64")
    more = ("--compute-capability", "8.6", "--compute-capability", "12.0", "--weight-streaming")
    output = tmp_path / "engine"
    code, out, err = call(
        export.app, "demo", "--target", "trt-rtx-fp16", "--output", str(output), "--json", *sizes, *more
    )
    assert code == 0, err
    assert json.loads(out)["is_engine"] is True
    found = Manifest.read(output).capabilities
    assert (found["capacity"], found["prefill_chunk"], found["max_batch"]) == (128, 32, 3)
    assert found["compute_capabilities"] == ["8.6", "12.0"] and found["weight_streaming"] is True
    assert [profile["name"] for profile in found["profiles"]["vision"]] == ["patches-64"]


@pytest.mark.parametrize(("precision", "needs"), [("fp8", "8.9"), ("nvfp4", "10.0")])
def test_a_gpu_without_the_type_is_said_before_any_work(precision: str, needs: str) -> None:
    ampere = Hardware("Abacus", (), 2, 1 << 30, gpus=(Gpu("Test RTX", "8.6", 1 << 30, 1 << 30, "570.1"),))
    found = get(f"trt-{precision}").availability(ampere)
    assert not found.can_build and f"SM {needs} or later is needed, the Test RTX has 8.6" in found.reason
    assert "SM" not in get("trt-fp16").availability(ampere).reason


@pytest.mark.parametrize(
    ("sm", "runs"), [("8.6", {"fp16", "bf16", "int4"}), ("8.9", {"fp16", "bf16", "int4", "fp8"}), ("9.0", set())]
)
def test_plans_run_where_the_type_is(sm: str, runs: set[str]) -> None:
    machine = Hardware("Abacus", (), 2, 1 << 30, gpus=(Gpu("Test RTX", sm, 1 << 30, 1 << 30, "570.1"),))
    targets = load_family("trt_rtx")
    found = {target.precision: target.availability(machine) for target in targets}
    assert {precision for precision, each in found.items() if each.can_run} == runs
    assert all("not Test RTX" in each.reason for precision, each in found.items() if precision not in runs)


def test_without_a_gpu_the_enterprise_library_is_refused_before_any_work(tmp_path: Path) -> None:
    target = get("trt-fp16")
    if target.availability().can_build:
        pytest.skip("this machine has a GPU and TensorRT")
    code, _, err = call(export.app, "no/such-model", "--target", "trt-fp16", "--output", str(tmp_path / "engine"))
    assert code != 0
    assert "trt-fp16 cannot be built on this machine" in err and "--target trt-fp16 --no-compile" in err


def test_inspect_shows_the_profiles_and_says_that_a_plan_is_code(half: Path) -> None:
    code, out, err = call(run.app, "inspect", str(half), "--check")
    assert code == 0, err
    assert "profile decoder decode" in out and "[2, 1]" in out and "a plan is code" in out
    assert max(map(len, out.splitlines())) < 400
    code, _, err = call(run.app, "run", str(half), "Read the digits.")
    if not get("trt-rtx-fp16").availability().can_run:
        assert code != 0 and "NVIDIA" in err and "remedy" in err


def test_a_damaged_or_exchanged_plan_is_found(half: Path, tmp_path: Path) -> None:
    engine = shutil.copytree(half, tmp_path / "engine")
    plan = (engine / "decoder.plan").read_bytes()
    (engine / "decoder.plan").write_bytes(plan[:-100])
    with pytest.raises(EngineError, match=r"decoder\.plan: .* bytes, expected"):
        Manifest.read(engine).check(engine)
    (engine / "decoder.plan").write_bytes(plan[:100] + bytes([plan[100] ^ 1]) + plan[101:])
    with pytest.raises(EngineError, match=r"decoder\.plan: its SHA-256"):
        Manifest.read(engine).check(engine, full=True)

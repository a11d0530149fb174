"""What is refused of a decode plan before anything is loaded, and which GPUs it is for."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.command_line import call
from helpers.host_cuda import HostDevice
from helpers.host_plan import CODE_NAME, SM, TABLE, read_plan, write_host_plan, write_plan
from qwen3vl_export.cli.run import app
from runtime import decode_plan_report
from runtime.decode_plan import PLAN_NAME, DecodePlan, read_code
from runtime.errors import EngineError
from runtime.manifest import Manifest

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers.engines import build
    from qwen3vl_export.checkpoint import Checkpoint
    from qwen3vl_export.export import make_bundle

    bundle = make_bundle(Checkpoint.open(str(tiny_checkpoint)))
    return write_host_plan(build(bundle, "ort-cuda-fp16", tmp_path_factory.mktemp("planned") / "engine"))


@pytest.fixture
def plan(folder: Path) -> Any:
    """The plan as plain values, which is written again after the test."""
    values = read_plan(folder)
    yield copy.deepcopy(values)
    write_plan(folder, values)


def launch(values: dict[str, Any]) -> list[Any]:
    """The first launch of the step of two sequences."""
    found: list[Any] = values["steps"][SM]["2"]["fast"][0]
    return found


def step(values: dict[str, Any]) -> list[Any]:
    found: list[Any] = values["steps"][SM]["2"]["fast"][1]
    return found


FAULTS: dict[str, tuple[str, Change]] = {
    "format": (r"format is 2, expected 1", lambda p: p.update(format=2)),
    "dtype": (r"dtype is 'bfloat16', expected float16", lambda p: p.update(dtype="bfloat16")),
    "decoder": (r"decoder is 'x', expected the SHA-256", lambda p: p.update(decoder="x")),
    "no decoder": (r"decoder is None, expected the SHA-256", lambda p: p.pop("decoder")),
    "top_k": (r"top_k is 0, expected an integer", lambda p: p.update(top_k=0)),
    "no batches": (r"batches is \[\], expected rising", lambda p: p.update(batches=[])),
    "falling batches": (r"batches is \[2, 1\], expected rising", lambda p: p.update(batches=[2, 1])),
    "batch of a batch": (r"batches\[0\] is True", lambda p: p.update(batches=[True])),
    "a batch without steps": (r"steps\.89\.8 is None, expected an object", lambda p: p.update(batches=[1, 8])),
    "buffer of nothing": (r"buffers\.hidden\.bytes is 0", lambda p: p["buffers"]["hidden"].update(bytes=0)),
    "constant": (
        r"constants\.x\.values\[0\] is .*, expected a finite number",
        lambda p: p["constants"].update(x={"type": "fp32", "values": [10**400]}),
    ),
    "zeroed": (r"zeroed is 1, expected true or false", lambda p: p["buffers"]["hidden"].update(zeroed=1)),
    "weights": (r"weights is \[\], expected an object", lambda p: p.update(weights=[])),
    "weight's file": (r"file is '\.\./x', expected a file that", lambda p: p["weights"][TABLE].update(file="../x")),
    "weight beyond its file": (
        r"embed_tokens\.weight\.bytes is \d+, expected an integer of 1 to \d+",
        lambda p: p["weights"][TABLE].update(bytes=10**6),
    ),
    "weight's type": (r"onnx_type is 8, expected one of", lambda p: p["weights"][TABLE].update(onnx_type=8)),
    "weight's shape": (r"bytes is \d+, expected 2, what", lambda p: p["weights"][TABLE].update(shape=[1])),
    "gpu": (r"a name in gpus is '8.9'", lambda p: p["gpus"].update({"8.9": {}})),
    "no gpu": (r"gpus is a dict of 0, expected at least one", lambda p: p.update(gpus={})),
    "name of a kernel": (
        r"kernels\[0\]\.code\.89\.entry is .*, expected a name in ASCII",
        lambda p: p["kernels"][0]["code"][SM].update(entry="\ud800"),
    ),
    "code file": (r"gpus\.89\.file is 'y'", lambda p: p["gpus"][SM].update(file="y")),
    "dependent": (r"dependent_launch is None", lambda p: p["gpus"][SM].pop("dependent_launch")),
    "unknown kernel": (r"fast\[0\]\[0\] is 2, expected an integer of 0 to 1", lambda p: launch(p).__setitem__(0, 2)),
    "negative kernel": (r"fast\[0\]\[0\] is -1", lambda p: launch(p).__setitem__(0, -1)),
    "code beyond its file": (
        r"kernels\[1\]\.code\.89\.bytes is \d+, expected an integer of 1",
        lambda p: p["kernels"][1]["code"][SM].update(offset=p["kernels"][1]["code"][SM]["offset"] + 1),
    ),
    "no code": (r"kernels\[0\]\.code\.89 is None", lambda p: p["kernels"][0].update(code={})),
    "shared memory": (
        r"kernels\[0\]\.code\.89\.shared_bytes is 170000, expected an integer of 0 to 101376",
        lambda p: p["kernels"][0]["code"][SM].update(shared_bytes=170_000),
    ),
    "warps": (r"num_warps is 64", lambda p: p["kernels"][0].update(num_warps=64)),
    "type": (r"types\.table is '\*fp8'", lambda p: p["kernels"][0]["types"].update(table="*fp8")),
    "grid of two": (r"fast\[0\]\[1\] is \[1, 1\], expected a list of 3", lambda p: launch(p).__setitem__(1, [1, 1])),
    "grid": (r"\[1\]\[1\] is 65536, expected an integer of 1 to 65535", lambda p: launch(p)[1].__setitem__(1, 65536)),
    "empty grid": (r"\[1\]\[0\] is 0, expected", lambda p: launch(p)[1].__setitem__(0, 0)),
    "too few arguments": (r"fast\[0\]\[2\] is .*, expected a list of 3", lambda p: launch(p)[2].pop()),
    "unknown buffer": (r"is 'buffer:x', expected memory", lambda p: launch(p)[2].__setitem__(2, "buffer:x")),
    "unknown weight": (r"is 'weight:x', expected memory", lambda p: launch(p)[2].__setitem__(1, "weight:x")),
    "unknown input": (r"is 'step:x', expected memory", lambda p: launch(p)[2].__setitem__(0, "step:x")),
    "number as pointer": (r"is 0, expected a string", lambda p: launch(p)[2].__setitem__(0, 0)),
    "layer": (r"is 'key:99', expected memory", lambda p: step(p)[2].__setitem__(10, "key:99")),
    "pointer as number": (r"is 'null', expected an integer", lambda p: step(p)[2].__setitem__(9, "null")),
    "large number": (r"is 2147483648, expected an integer", lambda p: step(p)[2].__setitem__(9, 1 << 31)),
    "no launches": (r"invariant is \[\], expected launches", lambda p: p["steps"][SM]["2"].update(invariant=[])),
    "no form": (r"invariant is None, expected a list", lambda p: p["steps"][SM]["2"].pop("invariant")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_leads_nowhere_is_refused(folder: Path, plan: dict[str, Any], fault: str) -> None:
    message, change = FAULTS[fault]
    change(plan)
    write_plan(folder, plan)
    with pytest.raises(EngineError, match=message) as caught:
        DecodePlan(folder, Manifest.read(folder)).for_sm(int(SM))
    assert "build the engine again" in str(caught.value.remedy)
    assert PLAN_NAME in caught.value.message


def test_a_whole_plan_is_taken(folder: Path) -> None:
    plan = DecodePlan(folder, Manifest.read(folder))
    gpu = plan.for_sm(int(SM))
    assert (plan.batches, plan.sms, set(gpu.kernels)) == ((1, 2, 4), (89,), {0, 1})
    assert [each.kernel for each in gpu.steps[2, "invariant"]] == [0, 0, 1]
    code = read_code(folder, gpu, Manifest.read(folder))
    assert len(code) == sum(kernel.num_bytes for kernel in gpu.kernels.values())


def test_a_truncated_plan_and_truncated_code_are_refused(folder: Path, plan: dict[str, Any]) -> None:
    path, manifest = folder / PLAN_NAME, Manifest.read(folder)
    gpu = DecodePlan(folder, manifest).for_sm(int(SM))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EngineError, match="not readable as JSON"):
        DecodePlan(folder, manifest)
    with pytest.raises(EngineError, match=r"decode_plan\.json: \d+ bytes, expected"):
        manifest.check(folder)
    path.write_bytes(whole)
    code = folder / CODE_NAME
    whole = code.read_bytes()
    code.write_bytes(whole[:-1])
    with pytest.raises(EngineError, match=r"decode_plan_sm89\.bin: \d+ bytes, expected"):
        read_code(folder, gpu, manifest)
    code.unlink()
    with pytest.raises(EngineError, match=r"decode_plan_sm89\.bin: missing"):
        read_code(folder, gpu, manifest)
    code.write_bytes(whole)


def test_other_code_of_the_same_size_is_not_loaded(folder: Path) -> None:
    manifest, code = Manifest.read(folder), folder / CODE_NAME
    gpu = DecodePlan(folder, manifest).for_sm(int(SM))
    whole = code.read_bytes()
    code.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(EngineError, match=r"decode_plan_sm89\.bin: its SHA-256 is not the one in engine\.json"):
            read_code(folder, gpu, manifest)
    finally:
        code.write_bytes(whole)


def test_a_manifest_without_the_decoder_is_refused(folder: Path) -> None:
    manifest = Manifest.read(folder)
    files = {name: record for name, record in manifest.files.items() if name != "decoder.onnx"}
    with pytest.raises(EngineError, match=r"decoder\.onnx: not listed in engine\.json"):
        DecodePlan(folder, dataclasses.replace(manifest, files=files))


def test_a_plan_that_the_manifest_does_not_list_is_not_opened(folder: Path) -> None:
    manifest = Manifest.read(folder)
    files = {name: record for name, record in manifest.files.items() if name != PLAN_NAME}
    with pytest.raises(EngineError, match=r"not listed in engine\.json"):
        DecodePlan(folder, dataclasses.replace(manifest, files=files))


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        *(("8.0", 80), ("8.6", 86), ("8.7", 86), ("8.9", 89), ("9.0", 90), ("10.0", 100), ("12.0", 120)),
        *(("7.5", None), ("10.3", None), ("12.1", None), ("11.0", None)),
    ],
)
def test_code_runs_on_later_gpus_of_its_generation_before_hopper(
    folder: Path, plan: dict[str, Any], capability: str, expected: int | None
) -> None:
    for name in (80, 86, 90, 100, 120):
        plan["gpus"][str(name)] = plan["gpus"][SM]
    write_plan(folder, plan)
    found = DecodePlan(folder, Manifest.read(folder))
    assert found.sm_for(capability) == expected
    if expected is None:
        assert "is for compute capability 8.9, 8.0, 8.6, 9.0" in str(found.misfit(capability, "13.0", 1 << 20))


def test_a_driver_that_is_too_old_is_named_with_the_version_that_is_needed(folder: Path, plan: dict[str, Any]) -> None:
    for ptxas, needed in (("12.9.86", "12.0"), ("13.0.88", "13.0")):
        plan["gpus"][SM]["ptxas"] = ptxas
        write_plan(folder, plan)
        found = DecodePlan(folder, Manifest.read(folder))
        assert found.misfit("8.9", needed, 1 << 20) is None
        expected = f"needs a driver of CUDA {needed} or later, and this one is of 11.8"
        assert expected in str(found.misfit("8.9", "11.8", 1 << 20))
    plan["gpus"][SM]["ptxas"] = "9" * 5000 + ".1"  # more digits than Python makes a number of
    write_plan(folder, plan)
    with pytest.raises(EngineError, match=r"ptxas is '9+.*, expected a version"):
        DecodePlan(folder, Manifest.read(folder)).misfit("8.9", "13.0", 99 << 10)
    plan["gpus"][SM]["ptxas"] = "new"
    write_plan(folder, plan)
    with pytest.raises(EngineError, match=r"ptxas is 'new', expected a version"):
        DecodePlan(folder, Manifest.read(folder)).misfit("8.9", "13.0", 1 << 20)


def test_more_shared_memory_than_the_gpu_has_does_not_fit(folder: Path, plan: dict[str, Any]) -> None:
    plan["kernels"][0]["code"][SM]["shared_bytes"] = 90_000
    write_plan(folder, plan)
    found = DecodePlan(folder, Manifest.read(folder))
    assert found.misfit("8.9", "13.0", 101_376) is None
    assert "takes 90000 bytes of shared memory" in str(found.misfit("8.9", "13.0", 65_536))


# What is said without opening an engine


@pytest.mark.parametrize(
    ("device", "here", "reason"),
    [
        (HostDevice(), "own", None),
        (HostDevice(compute_capability="9.0"), "onnxruntime", "and this GPU has 9.0"),
        (EngineError("no NVIDIA driver is loaded on this machine"), None, "no NVIDIA driver"),
    ],
)
def test_inspect_says_whose_kernels_decode_here(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: HostDevice | EngineError,
    here: str | None,
    reason: str | None,
) -> None:
    def found(extra: str) -> HostDevice:
        if isinstance(device, EngineError):
            raise device
        return device

    monkeypatch.setattr(decode_plan_report, "CudaDevice", found)
    report = json.loads(call(app, "inspect", str(folder), "--json")[1])["decode_kernels"]
    assert (report["compute_capabilities"], report["batches"], report["here"]) == (["8.9"], [1, 2, 4], here)
    assert report["reason"] is None if reason is None else reason in report["reason"]
    (line,) = [each for each in call(app, "inspect", str(folder))[1].splitlines() if each.startswith("decode  ")]
    assert "own kernels for compute capability 8.9; batches 1, 2, 4; here: " in line
    assert reason is None or reason in line


def test_an_engine_without_a_plan_says_so(folder: Path, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_plan_report, "CudaDevice", lambda extra: HostDevice())
    manifest = Manifest.read(folder)
    capabilities = {name: value for name, value in manifest.capabilities.items() if name != "decode_plan"}
    report = decode_plan_report.decode_report(folder, dataclasses.replace(manifest, capabilities=capabilities))
    assert report is not None
    assert (report.compute_capabilities, report.here) == ((), "onnxruntime")
    assert report.reason == "the engine has no decode plan"
    assert decode_plan_report.decode_report(tiny_engine, Manifest.read(tiny_engine)) is None
    assert "decode  " not in call(app, "inspect", str(tiny_engine))[1]

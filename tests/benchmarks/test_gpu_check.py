"""The GPU check on recorded commands: order, failures, time-outs, result files, the page; without a GPU for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from benchmarks import gpu_check, plans
from benchmarks.__main__ import app, main
from benchmarks.gpu_check import BENCH, BUILD, FAILED, INSPECT, PASSED, SKIPPED, VERIFY, Done, Outcome
from engines.hardware import Gpu, Hardware
from engines.registry import get
from engines.target import Target
from helpers import ROOT
from helpers.targets import like
from runtime.errors import TargetError
from runtime.manifest import Manifest

GPU = Gpu("NVIDIA H200", "9.0", 140 << 30, 139 << 30, "570.1")
MACHINE = Hardware("Abacus", (), 2, 24 << 30, (GPU,))
BENCHED = {"ttft_p50_s": 0.0421, "tokens_per_s": 87.65}
CHECKS = [{"name": "good", "passed": True}, {"name": "bad", "passed": False}]
PLANS = {"decoder": {"num_layers": 40}, "vision": {"num_layers": 2}}
SAID = {
    BUILD: {"output": "/somewhere", "target": "t", "weight_bytes": 5},
    VERIFY: {"passed": True, "precision": "fp16", "checks": CHECKS[:1]},
    INSPECT: PLANS,
    BENCH: BENCHED,
}


def step_of(command: Sequence[str]) -> str:
    if "benchmarks.plans" in command:
        return INSPECT
    if "benchmarks" in command:
        return "synthetic"
    return next((name for name in (VERIFY, BENCH) if name in command), BUILD)


class Commands:
    """Answers each step as recorded and remembers what was run; a build leaves plans behind."""

    def __init__(self, plans: bool = True, **answers: Done) -> None:
        self.plans = plans
        self.answers = answers
        self.ran: list[tuple[str, list[str], float]] = []

    def __call__(self, command: Sequence[str], timeout_s: float) -> Done:
        name = step_of(command)
        self.ran.append((name, list(command), timeout_s))
        if name == BUILD and self.plans:
            folder = Path(command[command.index("--output") + 1])
            folder.mkdir(parents=True)
            (folder / "decoder.plan").touch()
        return self.answers.get(name, Done(0, f"note\n{json.dumps(SAID.get(name))}\n", "", 1.0))

    @property
    def steps(self) -> list[str]:
        return [name for name, _, _ in self.ran]


def named(name: str, *, available: bool = True) -> Target:
    return replace(like("ort-cpu-fp32", runs=available, reason="no library"), name=name)


def check(
    tmp_path: Path,
    run: gpu_check.Runner,
    *targets: Target,
    sources: Sequence[str] = ("demo",),
    machine: Hardware = MACHINE,
) -> Any:
    work = tmp_path / "work"
    work.mkdir()
    results = tmp_path / "results"
    outcomes = gpu_check.check(sources, targets, machine, run=run, results=results, work=work)
    assert list(work.glob("*/engine")) == []
    files = sorted(results.glob("*")) if results.is_dir() else []
    return outcomes, [json.loads(path.read_text()) for path in files], [path.name for path in files]


def test_all_steps_in_order_with_the_public_commands(tmp_path: Path) -> None:
    commands = Commands()
    (outcome,), (result,), (file,) = check(tmp_path, commands, named("trt-fp16"))
    assert commands.steps == [BUILD, VERIFY, INSPECT, BENCH]
    build, verify, inspect, bench = (command for _, command, _ in commands.ran)
    engine = build[build.index("--output") + 1]
    assert build[1:] == [
        *("-m", "qwen3vl_export.cli.export", "demo", "--target", "trt-fp16", "--output", engine, "--json"),
    ]
    assert verify[1:] == ["-m", "qwen3vl_export.cli.run", "verify", engine, "--checkpoint", "demo", "--json"]
    assert inspect[1:] == ["-m", "benchmarks.plans", engine]
    assert bench[1:] == ["-m", "qwen3vl_export.cli.run", "bench", engine, "--json"]
    assert outcome.result == PASSED and outcome.why == ""
    assert file == f"demo_nvidia-h200_trt-fp16_{result['date']}.json"
    assert result["gpu"] == "NVIDIA H200" and result["machine"]["gpus"][0]["compute_capability"] == "9.0"
    assert (result["model"], result["target"], result["result"]) == ("demo", "trt-fp16", PASSED)
    assert result["values"][BUILD] == {"target": "t", "weight_bytes": 5}  # no path
    assert result["values"][VERIFY] == {"passed": True, "precision": "fp16", "num_checks": 1, "failed": []}
    assert result["values"][BENCH] == BENCHED
    assert list(result["steps"]) == [BUILD, VERIFY, INSPECT, BENCH]
    assert result["steps"][BUILD] == {"exit_code": 0, "seconds": 1.0}


def test_an_engine_without_plans_is_not_inspected(tmp_path: Path) -> None:
    commands = Commands(plans=False)
    check(tmp_path, commands, named("ort-cuda-fp16"))
    assert commands.steps == [BUILD, VERIFY, BENCH]


def test_an_engine_of_onnxruntime_on_cuda_is_timed_like_those_of_a_pack(tmp_path: Path, gpu_engine: Path) -> None:
    commands = Commands(plans=False)

    def run(command: Sequence[str], timeout_s: float) -> Done:
        if "benchmarks.gpu.speed" in command:
            commands.ran.append((gpu_check.SPEED, list(command), timeout_s))
            return Done(1, '{"finite": true}', "error: weights twice\n", 1.0)
        done = commands(command, timeout_s)
        if step_of(command) == BUILD:
            folder = Path(command[command.index("--output") + 1])
            folder.mkdir(parents=True)
            replace(Manifest.read(gpu_engine), session="ort_cuda").write(folder)
        return done

    (outcome,), (result,), _ = check(tmp_path, run, named("ort-cuda-fp16"))
    assert commands.steps == [BUILD, VERIFY, BENCH, gpu_check.SPEED]
    engine = commands.ran[0][1][commands.ran[0][1].index("--output") + 1]
    assert commands.ran[-1][1][1:4] == ["-m", "benchmarks.gpu.speed", engine]
    assert (outcome.result, outcome.why) == (FAILED, "speed: weights twice")
    assert result["values"][gpu_check.SPEED] == {"finite": True}


def test_a_failed_build_ends_its_target_and_no_other(tmp_path: Path) -> None:
    def run(command: Sequence[str], timeout_s: float) -> Done:
        if "trt-fp16" in command:
            return Done(6, "", f"tracing\nerror: no kernel in {ROOT}/x\n  remedy: none\n", 2.0)
        return commands(command, timeout_s)

    commands = Commands()
    outcomes, results, _ = check(tmp_path, run, named("trt-fp16"), named("trt-int4"))
    assert [each.result for each in outcomes] == [FAILED, PASSED]
    assert outcomes[0].why == f"build: no kernel in {ROOT}/x"
    assert list(outcomes[0].steps) == [BUILD]
    assert results[0]["steps"][BUILD]["error"] == "tracing\nerror: no kernel in ./x\n  remedy: none"


def test_an_engine_out_of_parity_fails_and_is_timed_all_the_same(tmp_path: Path) -> None:
    report = json.dumps({"passed": False, "checks": CHECKS})
    commands = Commands(verify=Done(9, report, "error: does not agree\n", 3.0))
    (outcome,), (result,), _ = check(tmp_path, commands, named("trt-fp16"))
    assert commands.steps == [BUILD, VERIFY, INSPECT, BENCH]
    assert (outcome.result, outcome.why) == (FAILED, "verify: does not agree")
    assert result["values"][VERIFY]["failed"] == [CHECKS[1]]
    assert result["values"][BENCH] == BENCHED


@pytest.mark.parametrize(
    ("done", "why"),
    [
        (Done(-11, "", "", 1.0), "verify: killed by signal SIGSEGV"),
        (Done(1, "", "Traceback\n", 1.0), "verify: exit code 1"),
        (Done(0, "no json\n", "", 1.0), "verify: printed no JSON"),
    ],
)
def test_other_ways_to_fail(done: Done, why: str, tmp_path: Path) -> None:
    (outcome,), _, _ = check(tmp_path, Commands(verify=done), named("trt-fp16"))
    assert (outcome.result, outcome.why) == (FAILED, why)


def test_a_target_that_is_out_of_time_is_left_there(tmp_path: Path) -> None:
    commands = Commands(verify=Done(None, "", "", 1800.0))
    (outcome, other), _, _ = check(tmp_path, commands, named("trt-fp16"), named("trt-int4"))
    assert commands.steps == [BUILD, VERIFY, BUILD, VERIFY]
    assert outcome.why == other.why == "verify: not done when the target's 1800 s were over"


def test_steps_share_the_time_of_their_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 500))
    monkeypatch.setattr(gpu_check, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    commands = Commands()
    gpu_check.check_target(Outcome("demo", "trt-fp16"), "demo", tmp_path / "engine", commands, 1800)
    assert [timeout for _, _, timeout in commands.ran] == [1300, 800, 300, 0]


def test_what_is_not_available_or_does_not_fit_is_skipped_with_its_reason(tmp_path: Path) -> None:
    commands = Commands()
    large = (named("trt-fp16"), named("trt-int4", available=False))
    small = replace(MACHINE, gpus=(replace(GPU, free_bytes=24_000_000_000),))
    outcomes, results, _ = check(tmp_path, commands, *large, sources=["qwen3-vl-32b"], machine=small)
    assert [each.result for each in outcomes] == [SKIPPED, SKIPPED]
    assert outcomes[0].why.startswith("takes about 1") and outcomes[0].why.endswith("the GPU has 24.0 GB free")
    assert outcomes[1].why == "no library"
    assert commands.ran == [] and results == []


def test_a_size_gets_random_weights_once(tmp_path: Path) -> None:
    commands = Commands()
    outcomes, _, files = check(tmp_path, commands, named("trt-fp16"), named("trt-int4"), sources=["qwen3-vl-2b"])
    assert [each.result for each in outcomes] == [PASSED, PASSED]
    assert commands.steps.count("synthetic") == 1 and commands.steps[0] == "synthetic"
    folder = commands.ran[0][1][4]
    assert commands.ran[0][1][1:] == ["-m", "benchmarks", "synthetic", folder, "--model", "qwen3-vl-2b"]
    assert commands.ran[1][1][3] == folder
    assert files[0].startswith("qwen3-vl-2b_nvidia-h200_trt-fp16_")


def test_a_checkpoint_that_cannot_be_read_fails_and_the_demo_goes_on(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    sources = [str(tmp_path / "broken"), "demo"]
    outcomes, _, _ = check(tmp_path, Commands(), named("trt-fp16"), sources=sources)
    assert [each.result for each in outcomes] == [FAILED, PASSED]
    assert "config.json" in outcomes[0].why and outcomes[0].model == "broken"


def test_the_page(tmp_path: Path) -> None:
    report = json.dumps({"passed": False, "checks": CHECKS})

    def run(command: Sequence[str], timeout_s: float) -> Done:
        return (failing if "int4" in " ".join(command) else passing)(command, timeout_s)

    passing, failing = Commands(), Commands(build=Done(8, "", "error: no room\n", 61.0))
    targets = [named("trt-fp16"), named("trt-int4"), named("trt-fp8", available=False)]
    outcomes, _, _ = check(tmp_path, run, *targets)
    text = gpu_check.page(outcomes, MACHINE)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "demo trt-fp16 passed 1 1/1 40+2 42 87.7" in lines
    assert "demo trt-int4 FAILED 61 - - - -" in lines
    assert "demo trt-fp8 skipped - - - - -" in lines
    assert "demo trt-int4: build: no room" in lines
    assert lines[-1] == "1 passed, 1 FAILED, 1 skipped"
    assert any("NVIDIA H200, SM 9.0" in line for line in lines)
    verified = Outcome("demo", "trt-fp16")
    gpu_check.check_target(verified, "demo", tmp_path / "engine", Commands(verify=Done(9, report, "", 1.0)))
    assert "1/2" in gpu_check.page([verified], MACHINE)


Invoked = Callable[..., Result]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Invoked:
    def call(hardware: Hardware, targets: Sequence[Target], run: gpu_check.Runner, *arguments: str) -> Result:
        monkeypatch.setattr(gpu_check, "probe", lambda: hardware)
        monkeypatch.setattr(gpu_check, "gpu_targets", lambda names: list(targets))
        monkeypatch.setattr(gpu_check.signal, "signal", lambda number, handler: None)
        monkeypatch.setattr(gpu_check, "run_command", run)
        places = ["--results", str(tmp_path / "results"), "--work-dir", str(tmp_path / "out")]
        return CliRunner().invoke(app, ["gpu-check", *places, *arguments])

    return call


def test_exit_codes(invoke: Invoked) -> None:
    good, gone = named("trt-fp16"), named("trt-int4", available=False)
    done = invoke(MACHINE, [good, gone], Commands())
    assert done.exit_code == 0 and "2 passed, 2 skipped" in done.stdout
    assert invoke(MACHINE, [good], Commands(bench=Done(5, "", "error: x\n", 1.0))).exit_code == 1
    assert invoke(MACHINE, [gone], Commands()).exit_code == 1
    done = invoke(replace(MACHINE, gpus=(), notes=("driver hangs",)), [good], Commands())
    assert done.exit_code == 2 and "driver hangs" in done.stdout


def test_an_unknown_target_is_one_error_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu-check", "--target", "abacus"])
    monkeypatch.setattr(gpu_check, "probe", lambda: MACHINE)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == TargetError.exit_code
    said = capsys.readouterr()
    assert said.err == "error: no GPU target abacus\n  remedy: see: qwen3vl targets\n" and said.out == ""


def test_nothing_is_left_in_the_work_folder(invoke: Invoked, tmp_path: Path) -> None:
    invoke(MACHINE, [named("trt-fp16")], Commands(), "--model", "qwen3-vl-2b")
    assert list((tmp_path / "out").iterdir()) == []
    assert len(list((tmp_path / "results").iterdir())) == 3


def test_without_a_gpu_for_real(tmp_path: Path) -> None:
    # No nvidia-smi on this path, so also on a machine with a GPU there is none.
    command = [sys.executable, "-m", "benchmarks", "gpu-check", "--model", "qwen3-vl-2b"]
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "no NVIDIA GPU on this machine" in done.stdout
    targets = ", ".join(target.name for target in gpu_check.gpu_targets())
    assert f"  demo: {targets}\n  demo-moe: {targets}\n  qwen3-vl-2b: {targets}\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_passes_the_model_only_if_it_is_given() -> None:
    def dry(*arguments: str) -> str:
        command = ["make", "--dry-run", "gpu-check", *arguments]
        # Under `make test` a make of ours would be the inner one, and say which folder it leaves.
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=outside).stdout

    assert dry().splitlines()[-1].strip().endswith("-m benchmarks gpu-check")
    assert dry("MODEL=./a b").splitlines()[-1].endswith("-m benchmarks gpu-check --model './a b'")


def test_a_command_runs_for_real_and_is_killed_with_its_children_in_time(tmp_path: Path) -> None:
    done = gpu_check.run_command([sys.executable, "-c", "import sys; print(1); sys.exit('said')"], 60)
    assert (done.exit_code, done.stdout, done.stderr) == (1, "1\n", "said\n")
    pid = tmp_path / "pid"
    sleeper = f"sleep 300 & echo $! > {pid}.new; mv {pid}.new {pid}; wait"
    done = gpu_check.run_command(["sh", "-c", sleeper], 3)
    assert done.exit_code is None
    child = int(pid.read_text())
    for _ in range(6000):  # the kernel takes a moment to bury it
        if not is_alive(child):
            break
        time.sleep(0.05)
    assert not is_alive(child)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


DETAILED = {
    "Layers": [
        {
            "Name": "norm",
            "LayerType": "kgen",
            "Outputs": [{"Name": "a", "Dimensions": [1], "Format/Datatype": "Row major linear FP32"}],
        },
        {"Name": "product", "LayerType": "gemm", "Outputs": [{"Name": "b", "Format/Datatype": "Half"}]},
        {"Name": "add", "LayerType": "kgen", "Outputs": [{"Name": "c", "Format/Datatype": "Half"}]},
    ],
    "Bindings": ["x"],
}


def test_layers_of_a_plan() -> None:
    assert plans.layer_summary(json.dumps(DETAILED)) == {
        "num_layers": 3,
        "layer_types": {"gemm": 1, "kgen": 2},
        "output_types": {"FP32": 1, "Half": 2},
        "layers": ["norm", "product", "add"],
    }
    assert plans.layer_summary('{"Layers": ["norm", "product"]}') == {
        "num_layers": 2,
        "layer_types": {},
        "output_types": {},
        "layers": ["norm", "product"],
    }


class FakeLibrary(types.SimpleNamespace):
    """As much of TensorRT as the inspection uses; `opens` says whether a plan is opened."""

    def __init__(self, opens: bool) -> None:
        inspector = types.SimpleNamespace(get_engine_information=lambda form: json.dumps(DETAILED) * (form == "json"))
        engine = types.SimpleNamespace(num_optimization_profiles=2, create_engine_inspector=lambda: inspector)
        runtime = types.SimpleNamespace(deserialize_cuda_engine=lambda data: engine if opens and data else None)

        class Logger:
            ERROR = 1

            def __init__(self, severity: int) -> None:
                assert severity == self.ERROR

        super().__init__(
            __version__="10.1",
            Logger=Logger,
            Runtime=lambda logger: runtime,
            LayerInformationFormat=types.SimpleNamespace(JSON="json"),
        )


def test_plans_of_an_engine_are_inspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = types.SimpleNamespace(capabilities={"library": "a_library"})
    monkeypatch.setattr(plans.Manifest, "read", lambda folder: manifest)
    (tmp_path / "vision.plan").write_bytes(b"abc")
    monkeypatch.setitem(sys.modules, "a_library", FakeLibrary(opens=True))
    (name, plan), *rest = plans.inspect_plans(tmp_path).items()
    assert rest == [] and name == "vision"
    assert (plan["plan_bytes"], plan["num_profiles"], plan["num_layers"]) == (3, 2, 3)
    monkeypatch.setitem(sys.modules, "a_library", FakeLibrary(opens=False))
    with pytest.raises(TargetError, match=r"vision.plan: a_library 10.1 does not open it"):
        plans.inspect_plans(tmp_path)


@pytest.mark.slow
def test_the_commands_for_real_on_a_target_of_the_cpu(tmp_path: Path) -> None:
    target = get("ort-cpu-int8")
    (outcome,), (result,), _ = check(tmp_path, gpu_check.run_command, target)
    assert (outcome.result, outcome.why) == (PASSED, "")
    assert list(outcome.steps) == [BUILD, VERIFY, BENCH]
    assert result["values"][VERIFY]["num_checks"] > 10 and result["values"][VERIFY]["failed"] == []
    assert result["values"][BENCH]["target"] == target.name
    assert "passed" in gpu_check.page([outcome], MACHINE)


def test_a_target_that_needs_calibration_gets_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.quantize.calibration_data import read_prompts

    monkeypatch.setattr(gpu_check, "needs_prompts", lambda target: target.name == "trt-fp8")
    commands, counted = Commands(), []

    def run(command: Sequence[str], timeout_s: float) -> Done:
        if "--calibration" in command:
            counted.append(len(read_prompts(Path(command[command.index("--calibration") + 1]))))
        return commands(command, timeout_s)

    outcomes, _, _ = check(tmp_path, run, named("trt-fp8"), named("trt-fp16"))
    assert [each.result for each in outcomes] == [PASSED, PASSED]
    assert len(counted) == 1 and counted[0] >= 2

"""Build, verify, inspect and time every GPU target on a machine with a GPU; keep the results; print one page.

Each step is one of the public commands in a process of its own, so a crash, a hang or a lack of memory ends that step,
and the next target goes on. Nothing of the GPU is configured. Exit code 0 if all passed, 1 if one failed or none could
be tried, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, Python looks beside it
    sys.path.insert(0, str(ROOT))

import configs  # noqa: E402
from benchmarks import synthetic  # noqa: E402
from engines.choose import estimate, limit_bytes  # noqa: E402
from engines.disk import replace_text  # noqa: E402
from engines.hardware import Hardware, probe  # noqa: E402
from engines.quantize.calibration import needs_prompts  # noqa: E402
from engines.registry import all_targets  # noqa: E402
from engines.target import GPU  # noqa: E402
from runtime.errors import CheckpointError, Qwen3VLError, TargetError  # noqa: E402
from runtime.manifest import Manifest  # noqa: E402

if TYPE_CHECKING:
    from engines.target import Target

RESULTS = ROOT / "benchmarks" / "results"
SHIPPED = ("demo", "demo-moe")
# Of the shipped engines seconds are used. A 2B checkpoint takes minutes to build, and verify reads it in float32.
LIMIT_S = 1800.0
PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"
BUILD, VERIFY, INSPECT, BENCH = "build", "verify", "inspect", "bench"
_ERROR_LINES = 12
_COMMANDS = "qwen3vl_export.cli"


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        exit_code: Negative: the signal that killed it; None: it ran out of time and was killed.
        stdout: What it printed.
        stderr: The same, of its messages.
        seconds: From start to end.
    """

    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float


Runner = Callable[[Sequence[str], float], Done]


@dataclass
class Outcome:
    """What became of one target with one model.

    Attributes:
        model, target: Their names.
        result: `passed`, `FAILED` or `skipped`.
        why: Of a failure or a skip; empty otherwise.
        steps: For each step that ran: exit code, seconds, and the end of its messages where it failed.
        values: What the steps said, by step.
    """

    model: str
    target: str
    result: str = PASSED
    why: str = ""
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def run_command(command: Sequence[str], timeout_s: float) -> Done:
    """Run a command in a process group of its own; at the end of its time, or of ours, the group is killed."""
    start = time.monotonic()
    with (
        tempfile.TemporaryFile("w+", errors="replace") as out,
        tempfile.TemporaryFile("w+", errors="replace") as err,
    ):
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, start_new_session=True)
        exit_code: int | None = None
        try:
            exit_code = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if exit_code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        err.seek(0)
        return Done(exit_code, out.read(), err.read(), time.monotonic() - start)


def check_target(
    model: str,
    source: str,
    target: str,
    folder: Path,
    run: Runner,
    limit_s: float = LIMIT_S,
    calibration: Path | None = None,
) -> Outcome:
    """Take one target through all steps.

    Without an engine nothing follows; an engine that is not in parity is still inspected and timed.

    Args:
        model: Name of the model in reports.
        source: The checkpoint, as the commands take it.
        target: Name of the target.
        folder: Where the engine goes.
        run: Runs a command for so many seconds at most.
        limit_s: For all steps together.
        calibration: Prompts for a target that needs them.
    """
    outcome = Outcome(model, target)
    deadline = time.monotonic() + limit_s
    for name, command in _steps(source, target, folder, calibration):
        done = run(command, max(0.0, deadline - time.monotonic()))
        failure = _failure(name, done, limit_s)
        values = None if done.exit_code is None else _last_json(done.stdout)
        if not failure and values is None:
            failure = f"{name}: printed no JSON"
        outcome.steps[name] = {"exit_code": done.exit_code, "seconds": round(done.seconds, 1)}
        if values is not None:
            outcome.values[name] = _kept(name, values)
        if failure:
            outcome.result = FAILED
            outcome.why = outcome.why or failure
            tail = "\n".join(done.stderr.strip().splitlines()[-_ERROR_LINES:])
            outcome.steps[name]["error"] = _without_paths(tail, folder, source)
            if name == BUILD or done.exit_code is None:
                break
    return outcome


def _steps(source: str, target: str, folder: Path, calibration: Path | None) -> Iterator[tuple[str, list[str]]]:
    """Yield name and command of each step; those behind the build follow from what it wrote."""
    python = [sys.executable, "-m"]
    build = [f"{_COMMANDS}.export", source, "--target", target, "--output", str(folder), "--json"]
    yield BUILD, [*python, *build, *(["--calibration", str(calibration)] if calibration is not None else [])]
    yield VERIFY, [*python, f"{_COMMANDS}.run", "verify", str(folder), "--checkpoint", source, "--json"]
    if any(folder.glob("*.plan")):
        yield INSPECT, [sys.executable, str(Path(__file__).resolve()), "--inspect-plans", str(folder)]
    yield BENCH, [*python, f"{_COMMANDS}.run", "bench", str(folder), "--json"]


def _failure(name: str, done: Done, limit_s: float) -> str:
    if done.exit_code is None:
        return f"{name}: not done when the target's {limit_s:.0f} s were over"
    if done.exit_code < 0:
        try:
            reason = signal.Signals(-done.exit_code).name
        except ValueError:
            reason = str(-done.exit_code)
        return f"{name}: killed by signal {reason}"
    if done.exit_code > 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        return f"{name}: {said[-1].removeprefix('error:').strip() if said else f'exit code {done.exit_code}'}"
    return ""


def _last_json(stdout: str) -> Any:
    """Return the JSON value on the last line that holds one, or None."""
    for line in reversed(stdout.splitlines()):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue
    return None


def _kept(name: str, values: Any) -> Any:
    """Return what a result file keeps of a step: of the build no path, of the parity report no row that passed."""
    if not isinstance(values, dict):
        return values
    if name == BUILD:
        return {key: value for key, value in values.items() if key != "output"}
    if name == VERIFY:
        checks = values.get("checks", [])
        kept = {key: value for key, value in values.items() if key != "checks"}
        return {**kept, "num_checks": len(checks), "failed": [each for each in checks if not each["passed"]]}
    return values


def _without_paths(text: str, folder: Path, source: str) -> str:
    for path, name in ((str(folder), "ENGINE"), (source if os.sep in source else "", "CHECKPOINT"), (str(ROOT), ".")):
        if path:
            text = text.replace(path, name)
    return text


def inspect_plans(engine: Path) -> dict[str, Any]:
    """Open the plans of an engine folder and return what the library's inspector says of each.

    Raises:
        TargetError: The library does not open a plan.
    """
    library = str(Manifest.read(engine).capabilities["library"])
    trt = importlib.import_module(library)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    plans: dict[str, Any] = {}
    for path in sorted(engine.glob("*.plan")):
        opened = runtime.deserialize_cuda_engine(path.read_bytes())
        if opened is None:
            raise TargetError(f"{path.name}: {library} {trt.__version__} does not open it on this machine")
        text = opened.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        plans[path.stem] = {
            "plan_bytes": path.stat().st_size,
            "num_profiles": opened.num_optimization_profiles,
            **layer_summary(text),
        }
    return plans


def layer_summary(text: str) -> dict[str, Any]:
    """Summarise the inspector's JSON: names of the layers, their kinds, and the types of what they give.

    A plan that was built without detailed profiling verbosity holds names alone: kinds and types are then empty.
    """
    layers = json.loads(text)["Layers"]
    detailed = [each for each in layers if isinstance(each, dict)]
    types = Counter(
        str(output.get("Format/Datatype", "unknown")).split()[-1]
        for each in detailed
        for output in each.get("Outputs", [])
    )
    return {
        "num_layers": len(layers),
        "layer_types": dict(sorted(Counter(str(each.get("LayerType")) for each in detailed).items())),
        "output_types": dict(sorted(types.items())),
        "layers": [each if isinstance(each, str) else each.get("Name", "") for each in layers],
    }


def write_result(outcome: Outcome, hardware: Hardware, folder: Path, date: str) -> Path:
    """Write `<model>_<gpu>_<target>_<date>.json`, whole or not at all, and return its path."""
    assert hardware.gpu is not None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(outcome.model)}_{slug(hardware.gpu.name)}_{outcome.target}_{date}.json"
    values = {**asdict(outcome), "gpu": hardware.gpu.name, "date": date, "machine": hardware.to_dict()}
    replace_text(path, json.dumps(values, indent=1) + "\n")
    return path


def slug(name: str) -> str:
    """Return a name in lower case, with one dash for all that is neither letter, digit nor dot."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def report(outcomes: Sequence[Outcome], hardware: Hardware) -> str:
    """Return one page: the machine, one line for each target, the reasons."""
    rows = [("MODEL", "TARGET", "RESULT", "BUILD s", "CHECKS", "LAYERS", "TTFT ms", "TOKENS/s")]
    for each in outcomes:
        rows.append((each.model, each.target, each.result, *_cells(each)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{name}: {value}" for name, value in hardware.lines()] + [""]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    reasons = [f"{each.model} {each.target}: {each.why}" for each in outcomes if each.why]
    count = Counter(each.result for each in outcomes)
    summary = ", ".join(f"{count[result]} {result}" for result in (PASSED, FAILED, SKIPPED) if count[result])
    return "\n".join([*lines, *(["", *reasons] if reasons else []), "", summary or "nothing was tried"])


def _cells(outcome: Outcome) -> tuple[str, str, str, str, str]:
    values: Mapping[str, Any] = outcome.values
    build = outcome.steps.get(BUILD)
    verify, plans, bench = values.get(VERIFY), values.get(INSPECT), values.get(BENCH)
    return (
        f"{build['seconds']:.0f}" if build else "-",
        f"{verify['num_checks'] - len(verify['failed'])}/{verify['num_checks']}" if verify else "-",
        "+".join(str(plan["num_layers"]) for plan in plans.values()) if plans else "-",
        f"{1e3 * bench['ttft_p50_s']:.0f}" if bench else "-",
        f"{bench['tokens_per_s']:.1f}" if bench else "-",
    )


def gpu_targets(names: Sequence[str] = ()) -> list[Target]:
    """Return the targets that run on a GPU, or those of them that are asked for."""
    return [target for target in all_targets() if target.device == GPU and (not names or target.name in names)]


def skip_reason(target: Target, source: str, hardware: Hardware) -> str:
    """Return why a target is not tried here, empty if it is."""
    from qwen3vl_export.cli.targets import model_shape

    available = target.availability()
    if not (available.can_build and available.can_run):
        return available.reason
    if source not in SHIPPED and not Path(source).is_dir() and not _is_shape(source):
        return ""  # a Hub id: its shape is known once it is downloaded
    needed, limit = sum(estimate(target, model_shape(source)).values()), limit_bytes(hardware, GPU)
    if needed > limit:
        return f"takes about {needed / 1e9:.1f} GB, the GPU has {limit / 1e9:.1f} GB free"
    return ""


def model_name(source: str) -> str:
    """Return a model's name in reports: the last part of a folder or of a Hub id."""
    return Path(source.partition("@")[0]).name or source


def check(
    sources: Sequence[str],
    targets: Sequence[Target],
    hardware: Hardware,
    *,
    run: Runner,
    results: Path,
    work: Path,
    limit_s: float = LIMIT_S,
) -> list[Outcome]:
    """Check every target with every model; a result is written as soon as it is there."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    outcomes = []
    for source in sources:
        checkpoint = source
        for target in targets:
            outcome = Outcome(model_name(source), target.name)
            outcomes.append(outcome)
            try:
                outcome.why = skip_reason(target, source, hardware)
                if outcome.why:
                    outcome.result = SKIPPED
                    continue
                if checkpoint == source and _is_shape(source):
                    checkpoint = _synthetic(source, work, run, limit_s)
            except Qwen3VLError as error:
                outcome.result, outcome.why = FAILED, error.message
                continue
            print(f"{outcome.model} {target.name}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=work) as folder:
                outcomes[-1] = check_target(
                    outcome.model,
                    checkpoint,
                    target.name,
                    Path(folder) / "engine",
                    run,
                    limit_s,
                    synthetic.write_calibration(work / "calibration") if needs_prompts(target) else None,
                )
            write_result(outcomes[-1], hardware, results, date)
    return outcomes


def _is_shape(source: str) -> bool:
    return source in configs.names("models") and not Path(source).is_dir()


def _synthetic(shape: str, work: Path, run: Runner, limit_s: float) -> str:
    """Write a checkpoint of random weights and return its folder.

    Raises:
        CheckpointError: The command failed.
    """
    folder = work / f"{shape}-synthetic"
    command = [sys.executable, "-m", "benchmarks", "synthetic", str(folder), "--model", shape]
    failure = _failure("synthetic checkpoint", run(command, limit_s), limit_s)
    if failure:
        raise CheckpointError(failure)
    return str(folder)


def without_gpu(hardware: Hardware, sources: Sequence[str], targets: Sequence[Target]) -> str:
    """Return what is said on a machine without a GPU."""
    lines = ["no NVIDIA GPU on this machine, so nothing was checked", *hardware.notes]
    lines += ["", f"on a machine with one: {BUILD}, {VERIFY}, {INSPECT} (of plans) and {BENCH} of"]
    lines += [f"  {model_name(source)}: {', '.join(target.name for target in targets)}" for source in sources]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, *, run: Runner = run_command) -> int:
    """Run the script; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help="checkpoint beside those that are shipped: folder, Hub id, or size for random weights",
    )
    parser.add_argument("--target", action="append", default=[], help="only this target; repeat for several")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "out", help="room for engines, emptied afterwards")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds for one target")
    parser.add_argument("--inspect-plans", type=Path, metavar="ENGINE", help="print what the plans of an engine hold")
    given = parser.parse_args(arguments)
    try:
        if given.inspect_plans is not None:
            print(json.dumps(inspect_plans(given.inspect_plans)))
            return 0
        return _check_all(given, run)
    except Qwen3VLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _check_all(given: argparse.Namespace, run: Runner) -> int:
    hardware, targets = probe(), gpu_targets(given.target)
    unknown = sorted(set(given.target) - {target.name for target in targets})
    if unknown:
        raise TargetError(f"no GPU target {', '.join(unknown)}", remedy="see: qwen3vl targets")
    sources = list(dict.fromkeys([*SHIPPED, *given.model]))
    if hardware.gpu is None:
        print(without_gpu(hardware, sources, targets))
        return 2
    # Ended from outside, it must not leave a command behind that works on the GPU.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    given.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=given.work_dir) as work:
        outcomes = check(
            sources, targets, hardware, run=run, results=given.results, work=Path(work), limit_s=given.limit_s
        )
    print(report(outcomes, hardware))
    tried = [each for each in outcomes if each.result != SKIPPED]
    return 0 if tried and all(each.result == PASSED for each in tried) else 1


if __name__ == "__main__":
    sys.exit(main())

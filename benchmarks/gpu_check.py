"""`python -m benchmarks gpu-check`: build, verify, inspect and time every GPU target on a machine with a GPU.

Each step is one of the public commands in a process of its own, so a crash, a hang or a lack of memory ends that step,
and the next target goes on. Nothing of the GPU is configured. Exit code 0 if all passed, 1 if one failed or none could
be tried, 2 without a GPU, 6 for a target that is not known.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import configs
from benchmarks import options, synthetic
from benchmarks.build import SHIPPED
from benchmarks.result_files import RESULTS
from engines.choose import estimate, limit_bytes
from engines.disk import replace_text
from engines.hardware import Hardware, probe
from engines.quantize.calibration import needs_prompts
from engines.registry import all_targets
from engines.target import GPU
from runtime.errors import CheckpointError, Qwen3VLError, TargetError
from runtime.manifest import MANIFEST_NAME, Manifest
from runtime.shown import columns

if TYPE_CHECKING:
    from engines.target import Target

ROOT = Path(__file__).resolve().parent.parent
# Shipped checkpoints take seconds of it. A 2B checkpoint takes minutes to build, and verify reads it in float32.
LIMIT_S = 1800.0
PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"
BUILD, VERIFY, INSPECT, BENCH, SPEED = "build", "verify", "inspect", "bench", "speed"
_TIMED_SESSION = "ort_cuda"
_ERROR_LINES = 12
_COMMANDS = "qwen3vl_export.cli"


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        exit_code: Negative: the signal that killed it; None: it ran out of time and was killed.
        stdout: The text that it printed.
        stderr: Its messages.
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
        model, target: Names of both.
        result: `passed`, `FAILED` or `skipped`.
        why: The reason of a failure or a skip; empty otherwise.
        steps: For each step that ran: exit code, seconds, and the end of its messages where it failed.
        values: What the steps said, by step.
    """

    model: str
    target: str
    result: str = PASSED
    why: str = ""
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def gpu_check(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Check this too: a folder, a Hub id, or a shape for random weights; may be repeated."),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="Check only this target; may be repeated.")] = None,
    results: options.Results = RESULTS,
    work_dir: Annotated[Path, typer.Option(help="Folder for engines, which are removed afterwards.")] = ROOT / "out",
    limit_s: Annotated[float, typer.Option(help="Most seconds for one target.")] = LIMIT_S,
) -> None:
    """Build, verify, inspect and time every GPU target that fits this machine; keep the results; print one page."""
    hardware, targets = probe(), gpu_targets(target or ())
    unknown = sorted(set(target or ()) - {each.name for each in targets})
    if unknown:
        raise TargetError(f"no GPU target {', '.join(unknown)}", remedy="see: qwen3vl targets")
    sources = list(dict.fromkeys([*SHIPPED, *(model or ())]))
    if hardware.gpu is None:
        typer.echo(without_gpu(hardware, sources, targets))
        raise typer.Exit(2)
    # When this process is ended from outside, it must leave no command running on the GPU.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=work_dir) as work:
        outcomes = check(sources, targets, hardware, run=run_command, results=results, work=Path(work), limit_s=limit_s)
    typer.echo(page(outcomes, hardware))
    tried = [each for each in outcomes if each.result != SKIPPED]
    if not tried or any(each.result == FAILED for each in tried):
        raise typer.Exit(1)


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
            calibration = synthetic.write_calibration(work / "calibration") if needs_prompts(target) else None
            with tempfile.TemporaryDirectory(dir=work) as name:
                check_target(outcome, checkpoint, Path(name) / "engine", run, limit_s, calibration)
            write_result(outcome, hardware, results, date)
    return outcomes


def check_target(
    outcome: Outcome,
    source: str,
    folder: Path,
    run: Runner,
    limit_s: float = LIMIT_S,
    calibration: Path | None = None,
) -> None:
    """Take one target through all steps.

    Without an engine nothing follows; an engine that is not in parity is still inspected and timed.

    Args:
        outcome: Names model and target; gets what the steps said.
        source: The checkpoint, as the commands take it.
        folder: Where the engine goes.
        run: Runs a command for so many seconds at most.
        limit_s: For all steps together.
        calibration: Prompts for a target that needs them.
    """
    deadline = time.monotonic() + limit_s
    for name, command in _steps(source, outcome.target, folder, calibration):
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


def _steps(source: str, target: str, folder: Path, calibration: Path | None) -> Iterator[tuple[str, list[str]]]:
    """Yield name and command of each step; those after the build follow from what it wrote."""
    python = [sys.executable, "-m"]
    build = [f"{_COMMANDS}.export", source, "--target", target, "--output", str(folder), "--json"]
    yield BUILD, [*python, *build, *(["--calibration", str(calibration)] if calibration is not None else [])]
    yield VERIFY, [*python, f"{_COMMANDS}.run", "verify", str(folder), "--checkpoint", source, "--json"]
    if any(folder.glob("*.plan")):
        yield INSPECT, [*python, "benchmarks.plans", str(folder)]
    yield BENCH, [*python, f"{_COMMANDS}.run", "bench", str(folder), "--json"]
    if (folder / MANIFEST_NAME).is_file() and Manifest.read(folder).session == _TIMED_SESSION:
        # The section of a GPU pack: steps of all batches, prompts, images, device memory.
        yield SPEED, [*python, "benchmarks.gpu.speed", str(folder), "--values", str(folder.with_name("speed.json"))]


def _failure(name: str, done: Done, limit_s: float) -> str:
    if done.exit_code is None:
        return f"{name}: not done when the target's {limit_s:.0f} s were over"
    if done.exit_code < 0:
        known = {each.value: each.name for each in signal.Signals}
        return f"{name}: killed by signal {known.get(-done.exit_code, -done.exit_code)}"
    if done.exit_code > 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        return f"{name}: {said[-1].removeprefix('error:').strip() if said else f'exit code {done.exit_code}'}"
    return ""


def _last_json(stdout: str) -> dict[str, Any] | None:
    """Return the JSON object on the last line that holds one, or None."""
    for line in reversed(stdout.splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(line)
            if isinstance(value, dict):
                return value
    return None


def _kept(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return what a result file keeps of a step: of the build no path, of the parity report no row that passed."""
    if name == VERIFY:
        checks = values.get("checks", [])
        values = {**values, "num_checks": len(checks), "failed": [each for each in checks if not each["passed"]]}
    left_out = {BUILD: "output", VERIFY: "checks"}.get(name)
    return {key: value for key, value in values.items() if key != left_out}


def _without_paths(text: str, folder: Path, source: str) -> str:
    for path, name in ((str(folder), "ENGINE"), (source if os.sep in source else "", "CHECKPOINT"), (str(ROOT), ".")):
        if path:
            text = text.replace(path, name)
    return text


def write_result(outcome: Outcome, hardware: Hardware, folder: Path, date: str) -> None:
    """Write `<model>_<gpu>_<target>_<date>.json`, whole or not at all."""
    assert hardware.gpu is not None
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{slug(outcome.model)}_{slug(hardware.gpu.name)}_{outcome.target}_{date}.json"
    values = {**asdict(outcome), "gpu": hardware.gpu.name, "date": date, "machine": hardware.to_dict()}
    replace_text(folder / name, json.dumps(values, indent=1) + "\n")


def slug(name: str) -> str:
    """Return a name in lower case, with one dash for all that is neither letter, digit nor dot."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def page(outcomes: Sequence[Outcome], hardware: Hardware) -> str:
    """Return one page: the machine, one line for each target, the reasons."""
    rows = [("MODEL", "TARGET", "RESULT", "BUILD s", "CHECKS", "LAYERS", "TTFT ms", "TOKENS/s")]
    for each in outcomes:
        rows.append((each.model, each.target, each.result, *_cells(each)))
    lines = [*(f"{name}: {value}" for name, value in hardware.lines()), "", *columns(rows)]
    reasons = [f"{each.model} {each.target}: {each.why}" for each in outcomes if each.why]
    count = Counter(each.result for each in outcomes)
    summary = ", ".join(f"{count[result]} {result}" for result in (PASSED, FAILED, SKIPPED) if count[result])
    return "\n".join([*lines, *(["", *reasons] if reasons else []), "", summary or "nothing was tried"])


def _cells(outcome: Outcome) -> tuple[str, str, str, str, str]:
    build = outcome.steps.get(BUILD)
    verify, plans, bench = (outcome.values.get(step) for step in (VERIFY, INSPECT, BENCH))
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

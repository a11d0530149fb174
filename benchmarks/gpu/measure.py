"""`python -m benchmarks.gpu.measure WORK`: run the sections within a time limit, and write one JSON file.

Each section is a process of its own, which a crash, a hang or a lack of memory ends without the others. No two that
open an engine run at once. The most important come first; what no time is left for is reported as skipped, with what
it had measured. The file is written again after each section, so that it holds that even if this process is killed.

The file, schema 1: `gpu` (name, SM, driver, memory), `environment`, `pack`, and `sections`, by name: `state`
(passed, failed, skipped), `why`, `seconds`, and `values`, which the module of the section describes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
LAYOUT = "layout.json"
_MANIFEST = "engine.json"
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
_TAIL_LINES = 15
# A section that has less than this left would only be killed.
_LEAST_S = 3.0
_PREPARING, _GPU = "preparing", "gpu"


@dataclass(frozen=True)
class Section:
    """One process.

    Attributes:
        name: Its name in the result.
        arguments: Module and arguments, after `python -m`; the file for its values is added.
        limit_s: After which it is killed.
        after: Sections that must have passed.
        group: Neighbours of one group run side by side: what is not timed, such as the filling of weights.
        lane: Those of a group that have one lane run one after the other: what opens an engine, since an engine looks
            how much of the GPU's memory is taken.
        is_extra: It takes long and answers one question, so it runs only where it is asked for.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    after: tuple[str, ...] = ()
    group: str = ""
    lane: str = ""
    is_extra: bool = False


def sections(work: Path) -> list[Section]:
    """Return what can be measured of an unpacked pack, the most important first."""
    references = str(work / "references")
    graphs = [work / "graphs" / name for name in description(work).get("graphs", [])]
    prepared = [
        *(_section("fill", folder, "fill", limit_s=90, group=_PREPARING) for folder in graphs),
        *(
            _section("parity", folder, "parity", references, limit_s=60, group=_PREPARING, lane=_GPU)
            for folder in _folders(work / "engines")
        ),
    ]
    timed: dict[str, list[Section]] = {kind: [] for kind in ("speed", "step", "torch", "speed-without-plan")}
    later: list[Section] = []
    for folder in graphs:
        filled = (f"fill {folder.name}",)
        has_plan, has_experts = (folder / "decode_plan.json").is_file(), _has_experts(folder)
        twice = ("--weights-twice",) if has_experts else ()
        timed["speed"].append(_section("speed", folder, "speed", limit_s=60, after=filled))
        if has_plan and has_experts:
            timed["speed"].append(_section("speed-weights-twice", folder, "speed", *twice, limit_s=60, after=filled))
        if has_plan:
            timed["step"].append(_section("step", folder, "plan_step", limit_s=45, after=filled))
            later.append(_section("agreement", folder, "agreement", *twice, limit_s=60, after=filled))
        if has_plan and not has_experts:  # experts decode in ONNX Runtime in `speed` too
            timed["speed-without-plan"].append(
                _section("speed-without-plan", folder, "speed", "--no-plan", limit_s=45, after=filled)
            )
        if _is_plain(folder):
            timed["torch"].append(_section("torch", folder, "torch_step", limit_s=45, after=filled))
        later.append(_section("first-token", folder, "first_token", limit_s=45, after=filled))
        later.append(_section("kernels", folder, "kernel_times", limit_s=45, after=filled))
    extra = [
        _section("options", folder, "options", limit_s=600, after=(f"fill {folder.name}",), is_extra=True)
        for folder in graphs
    ]
    ordered = [*(each for kind in timed.values() for each in kind), *later, *extra]
    return [Section("machine", ("benchmarks.gpu.machine",), 40), *prepared, *ordered]


def measure(
    chosen: Sequence[Section],
    seconds: float,
    *,
    run: Callable[[Section, float], dict[str, Any]] | None = None,
    on_result: Callable[[dict[str, Any]], None] = lambda results: None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Run the sections until the time is over; return their results by name.

    Args:
        chosen: In this order.
        seconds: For all of them.
        run: Runs one for so many seconds at most; a process of its own by default.
        on_result: Told all results after each section.
        clock: Gives seconds.
    """
    run = run or run_section
    deadline = clock() + seconds
    results: dict[str, Any] = {}
    names = [each.name for each in chosen]
    lock = threading.Lock()

    def run_lane(lane: Sequence[Section]) -> None:
        for section in lane:
            left = deadline - clock()
            why = _obstacle(section, names, results, left, seconds)
            skipped = {"state": SKIPPED, "why": why, "seconds": 0.0}
            found = skipped if why else run(section, min(section.limit_s, left))
            with lock:
                results[section.name] = found
                on_result({name: results[name] for name in names if name in results})

    for _, group in itertools.groupby(enumerate(chosen), lambda pair: pair[1].group or pair[0]):
        lanes: dict[str, list[Section]] = {}
        for _, section in group:
            lanes.setdefault(section.lane or section.name, []).append(section)
        with ThreadPoolExecutor(len(lanes)) as pool:
            list(pool.map(run_lane, lanes.values()))
    return {name: results[name] for name in names}


def _obstacle(section: Section, names: Sequence[str], results: dict[str, Any], left: float, seconds: float) -> str:
    """Return why a section is not run, empty if it is."""
    # A section that was not asked for has perhaps run earlier: the section that needs it will say.
    needed = [name for name in section.after if name in names]
    missing = [name for name in needed if results.get(name, {}).get("state") != PASSED]
    if missing:
        return f"{', '.join(missing)} did not pass"
    return f"the {seconds:.0f} s were over" if left < _LEAST_S else ""


def run_section(section: Section, limit_s: float) -> dict[str, Any]:
    """Run a section in a process group of its own, and kill the group at the end of its time."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        output, log = Path(name) / "values.json", Path(name) / "log"
        with log.open("wb") as file:
            command = [sys.executable, "-m", *section.arguments, "--values", str(output)]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code: int | None = process.wait(timeout=limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        values = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    result = {"state": PASSED, "why": "", "seconds": round(time.monotonic() - start, 1), "values": values}
    if code is None and limit_s < section.limit_s:
        result |= {"state": SKIPPED, "why": f"the time was over after {limit_s:.0f} s of it"}
    elif code is None:
        result |= {"state": FAILED, "why": f"not done after {limit_s:.0f} s"}
    elif code < 0:
        result |= {"state": FAILED, "why": f"killed by {signal.Signals(-code).name}"}
    elif code or values.get("problems"):
        result |= {"state": FAILED, "why": "; ".join(values.get("problems", [])) or _last_message(said, code)}
    if result["state"] == FAILED:
        result["log"] = said[-_TAIL_LINES:]
    why = f" ({result['why']})" if result["why"] else ""
    print(f"{section.name}: {result['state']} in {result['seconds']:.1f} s{why}", flush=True)
    return result


def _last_message(lines: Sequence[str], code: int) -> str:
    """Return the last line that is not indented: below an error's own line stands its remedy."""
    return next((line for line in reversed(lines) if line and not line.startswith(" ")), f"exit code {code}")


def main() -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    known = sections(args.work)
    names = tuple(each.strip() for each in args.only.split(",") if each.strip())
    unknown = [name for name in names if not any(each.name.startswith(name) for each in known)]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: no section begins so; there are {', '.join(_kinds(known))}")
    chosen = choose(known, names)
    if args.dry_run:
        extra = [each for each in known if each not in chosen and each.is_extra]
        return dry_run(chosen, extra)
    result = header(args.work)

    def keep(results: dict[str, Any]) -> None:
        result["sections"] = results
        partial = args.json.with_name(args.json.name + ".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(args.json)

    results = measure(chosen, args.seconds, on_result=keep)
    states = [each["state"] for each in results.values()]
    print(", ".join(f"{states.count(state)} {state}" for state in (PASSED, FAILED, SKIPPED)) + f": {args.json}")
    return 1 if FAILED in states or PASSED not in states else 0


def choose(known: Sequence[Section], names: tuple[str, ...]) -> list[Section]:
    """Return those whose names begin with one of the given, and what fills their weights if that has not been done.

    Args:
        known: All.
        names: None: all but those that run only where they are asked for.
    """
    if not names:
        return [each for each in known if not each.is_extra]
    asked = [each for each in known if each.name.startswith(names)]
    needed = {name for each in asked for name in each.after}
    missing = {
        each.name for each in known if each.name in needed and not (Path(each.arguments[1]) / _MANIFEST).is_file()
    }
    return [each for each in known if each in asked or each.name in missing]


def dry_run(chosen: Sequence[Section], extra: Sequence[Section]) -> int:
    """Import what the sections need and list them; a section that cannot be imported is a failure."""
    import importlib

    for module in sorted({each.arguments[0] for each in (*chosen, *extra)}):
        importlib.import_module(module)
    import onnxruntime

    print(f"onnxruntime {onnxruntime.__version__}: {', '.join(onnxruntime.get_available_providers())}")
    for each in chosen:
        print(f"would run {each.name} (at most {each.limit_s:.0f} s)")
    if extra:
        print(f"only with --only: {', '.join(each.name for each in extra)}")
    return 0


def header(work: Path) -> dict[str, Any]:
    """Return the result without its sections."""
    from benchmarks.measure import environment

    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "pack": description(work),
        "environment": environment(),
        "sections": {},
    }


def description(work: Path) -> dict[str, Any]:
    """Return what the pack is: title, versions, names of its graphs in the order in which they are measured."""
    path = work / "description.json"
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values


def _section(
    kind: str,
    folder: Path,
    module: str,
    *arguments: str,
    limit_s: float,
    **options: Any,
) -> Section:
    command = f"benchmarks.gpu.{module}", str(folder), *arguments
    return Section(f"{kind} {folder.name}", command, limit_s, **options)


def _is_plain(folder: Path) -> bool:
    """Return whether PyTorch can run a decoder as it is stored: dense, in 16 bits."""
    is_half = all(each["dtype"] in ("float16", "bfloat16") for each in _decoder_weights(folder))
    return is_half and not _has_experts(folder)


def _has_experts(folder: Path) -> bool:
    return any(".experts." in each["name"] for each in _decoder_weights(folder))


def _decoder_weights(folder: Path) -> list[dict[str, Any]]:
    layout = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))
    tensors: list[dict[str, Any]] = layout["decoder.onnx.data"]["tensors"]
    return tensors


def _kinds(known: Sequence[Section]) -> list[str]:
    """Return the first words of the names of sections, each once."""
    return list(dict.fromkeys(each.name.partition(" ")[0] for each in known))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir())


if __name__ == "__main__":
    sys.exit(main())

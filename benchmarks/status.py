"""The tables of README.md: what was measured of which model and target, and the state of each target."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configs
from benchmarks import export, run
from benchmarks.build import SHIPPED
from benchmarks.compare.sides import REFERENCE
from benchmarks.compare.tables import tokens_per_s
from benchmarks.compare.workloads import DECODE, PREFILL, Point
from benchmarks.result_files import Results, markdown, of_kind
from engines.registry import all_targets
from engines.target import GPU
from qwen3vl_export.demo.tasks import TASKS

_NOT_SHOWN = "tiny"  # how the names of the tests' shapes begin
Accuracies = Mapping[str, Mapping[str, Mapping[str, float]]]
_PASSED = "passed"  # as benchmarks/gpu_check.py and benchmarks/gpu/measure.py write it
_SKIPPED = "skipped"
_SPEEDS = {"speed": "", "speed-weights-twice": ", `weights_twice`"}


@dataclass(frozen=True)
class OnGpu:
    """What became of a target's engine on a GPU.

    Attributes:
        target, model: Names of both.
        gpu: Name of the GPU.
        passed: It did what it was to do.
        text: What was measured, or why it failed.
    """

    target: str
    model: str
    gpu: str
    passed: bool
    text: str

    @property
    def shown(self) -> str:
        """One line of the table."""
        return f"{self.model}: {self.text}" if self.passed else f"{self.model} FAILED: {self.text}"


def tables(results: Results, folder: Path, docs: Path) -> str:
    """Return both tables, of result files of `folder` and accuracies of `docs`."""
    accuracies = read_accuracies(docs)
    devices = {target.name: target.device for target in all_targets()}
    ran = [*checked(read_checks(folder)), *packed(of_kind(results, "gpu"), list(devices))]
    states = target_states(devices, results, accuracies, ran)
    return f"{works_table(results, accuracies)}\n{states}"


def works_table(results: Results, accuracies: Accuracies) -> str:
    """Return model shapes against targets; a cell says what was measured.

    Args:
        results: What `report.load` returns.
        accuracies: What `read_accuracies` returns.
    """
    exports = of_kind(results, "export")
    runs = of_kind(results, "run")
    compared = of_kind(results, "compare")
    measured = [*exports, *runs]
    answered = {target for each in accuracies.values() for target in each}
    timed = {(result["model"], result["target"]) for result in runs}
    targets = sorted({result["target"] for result in measured} | answered - {""})
    models = {result["model"] for result in measured} | set(configs.names("models"))
    rows = [("model", *(f"`{target}`" for target in targets))]
    for checkpoint, shares in accuracies.items():
        cells = [_accuracy(shares.get(target), shares.get("")) for target in targets]
        rows.append((f"{checkpoint} checkpoint", *cells))
    for model in sorted((name for name in models if not name.startswith(_NOT_SHOWN)), key=_natural):
        cells = []
        for target in targets:
            own = [r for r in measured if (r["model"], r["target"]) == (model, target)]
            here = [_shown(r) for r in own]
            # A phase that was measured on its own is not taken from the comparison too.
            is_exported = any(r.get("no_weights") is False for r in own)
            if (model, target) not in timed:
                sides = [r["sides"] for r in compared if r["model"] == model]
                here += [line for each in sides for line in _compared(each, target, has_export=not is_exported)]
            cells.append("<br>".join(here) or "not measured")
        rows.append((f"`{model}`", *cells))
    return markdown(rows)


def target_states(
    devices: Mapping[str, str],
    results: Results,
    accuracies: Accuracies,
    ran: Sequence[OnGpu],
) -> str:
    """Return one row for each target: whether it was run, built, or neither, and what shows it.

    Args:
        devices: `cpu` or `gpu` by target.
        results: What `report.load` returns: an engine that was timed has run; of `build` are plans that were compiled.
        accuracies: Shares of right answers by checkpoint and target: an engine that was asked has run.
        ran: What engines did on GPUs.
    """
    timed = {str(result["target"]) for result in of_kind(results, "run")}
    compared = [result["sides"] for result in of_kind(results, "compare")]
    timed |= {side.get("target", name) for sides in compared for name, side in sides.items()}
    answered = {target for each in accuracies.values() for target in each}
    rows = [("target", "status", "shown by")]
    for target, device in sorted(devices.items()):
        mine = [each for each in ran if each.target == target]
        built = [each for each in of_kind(results, "build") if each["target"] == target]
        passed = [each for each in mine if each.passed]
        state, shown = ("**needs a GPU to run**" if device == GPU else "not run"), ""
        failed = [each for each in mine if not each.passed]
        if passed:
            state, shown = f"run on {_gpus(passed)}", "<br>".join(each.shown for each in [*passed, *failed])
        elif target in timed | answered:
            state, shown = "run here", "the table above"
        elif failed:
            state, shown = f"**fails on {_gpus(failed)}**", "<br>".join(each.shown for each in failed)
        elif built:
            state = "built here, needs a GPU to run"
            shown = "<br>".join(
                f"{each['model']}: {sum(each['plan_bytes'].values()) / 1e6:,.1f} MB of plans" for each in built
            )
        rows.append((f"`{target}`", state, shown))
    return markdown(rows) + (
        "\n`run`: engines of this target have answered, on the machine of the result files or on the GPU that is named;"
        "\n`FAILED`: what did not do there all that it was to do."
        "\n`built here`: its plans were compiled on a machine without a GPU, and have not been executed."
        "\n`make gpu-check` runs the rest on a machine with a GPU; one without a package index takes `make gpu-pack`.\n"
    )


def read_checks(folder: Path) -> list[dict[str, Any]]:
    """Return the results of `make gpu-check`, of each model, GPU and target the latest."""
    latest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*_*_*_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        key = result["model"], result["gpu"], result["target"]
        if key not in latest or latest[key]["date"] <= result["date"]:
            latest[key] = result
    return list(latest.values())


def checked(checks: Sequence[Mapping[str, Any]]) -> list[OnGpu]:
    """Return what results of `make gpu-check` say, each of one model and target on one GPU."""
    found = []
    for each in checks:
        passed, text = each["result"] == _PASSED, str(each["why"])
        if passed:
            bench = each["values"]["bench"]
            speed = f"TTFT {1e3 * bench['ttft_p50_s']:.0f} ms, {bench['tokens_per_s']:.1f} tokens/s"
            text = f"{speed} ({each['gpu']}, {each['date']})"
        found.append(OnGpu(each["target"], each["model"], each["gpu"], passed, text))
    return found


def packed(packs: Sequence[Mapping[str, Any]], targets: Sequence[str]) -> list[OnGpu]:
    """Return what sections of GPU packs say, the latest of each engine on each GPU.

    Counted are answers of shipped checkpoints (`parity`) and steps of large shapes (`speed`); what was skipped, or ran
    on a GPU that is not known, says nothing.
    """
    latest: dict[tuple[str, str], OnGpu] = {}
    for pack in sorted(packs, key=lambda each: str(each["date"])):
        gpu = pack["sections"].get("machine", {}).get("values", {}).get("gpu", {}).get("name")
        for name, section in pack["sections"].items():
            kind, _, engine = name.partition(" ")
            target = next((each for each in targets if engine.endswith(f"-{each}")), None)
            if gpu is None or target is None or section["state"] == _SKIPPED or kind not in ("parity", *_SPEEDS):
                continue
            passed, model = section["state"] == _PASSED, engine.removesuffix(f"-{target}")
            text = f"{_measured(kind, section['values'])} ({gpu}, {pack['date']})" if passed else str(section["why"])
            latest[gpu, name] = OnGpu(target, model, gpu, passed, text)
    return list(latest.values())


def _measured(kind: str, values: Mapping[str, Any]) -> str:
    if kind == "parity":
        return f"{values['num_same']} of {values['num_questions']} answers as on the CPU"
    step, kernels = values["decode"]["1"]["median_ms"], values["decode_kernels"]
    whose = "own kernels" if kernels == "own" else "ONNX Runtime's kernels"
    return f"a decode step of one sequence {step:.2f} ms, {whose}, random weights{_SPEEDS[kind]}"


def _gpus(ran: Sequence[OnGpu]) -> str:
    return ", ".join(sorted({each.gpu for each in ran}))


def _compared(sides: Mapping[str, Any], target: str, *, has_export: bool) -> list[str]:
    """Return speeds of our sides of a target in a comparison, PyTorch fp32 = 1; tokens a second where it was left out.

    Args:
        sides: Results by side.
        target: Name of the target.
        has_export: Begin with the cost of the export.
    """
    points = {"vision": "vision-784-b1", "prefill": "prefill-512-b1", "decode": "decode-512-b1"}
    tokens = (Point(PREFILL, 512), Point(DECODE, 512))
    lines: list[str] = []
    for side in sides.values():
        if side.get("target") != target:
            continue
        if has_export and not lines:
            export = side["export"]
            lines.append(f"export: {export['wall_s']:.0f} s, {export['peak_rss_bytes'] / 1e9:.1f} GB peak")
        speeds = [
            f"{name} {sides[REFERENCE]['points'][point]['median_s'] / side['points'][point]['median_s']:.2f} ×"
            for name, point in points.items()
            if REFERENCE in sides and point in side["points"] and point in sides[REFERENCE]["points"]
        ]
        if REFERENCE not in sides:
            speeds = [f"{p.phase} {tokens_per_s(p, side):.1f} tokens/s" for p in tokens if p.name in side["points"]]
        if speeds:
            pages = ", huge pages" if side["options"]["huge_pages"] else ""
            lines.append(f"speed (`compare`{pages}): {', '.join(speeds)}")
    return lines


def read_accuracies(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return the shares of right answers on the held-out canvases by checkpoint and target.

    The empty name is that of the reference: PyTorch if it was asked, else the float32 engine.
    """
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in SHIPPED}
    for name, shares in found.items():
        stem = f"{name.replace('-', '_')}_accuracy"
        for path in sorted(folder.glob(f"{stem}*.json")):
            shares[path.stem.removeprefix(stem).removeprefix("_")] = json.loads(path.read_text(encoding="utf-8"))["all"]
    for path in sorted((folder / "accuracy").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        shares = found.setdefault(result["checkpoint"], {})
        for target, right in (("", "expected_right"), (result["target"], "right")):
            shares.setdefault(target, {row["task"]: row[right] / row["questions"] for row in result["rows"]})
    return found


def _accuracy(shares: Mapping[str, float] | None, reference: Mapping[str, float] | None) -> str:
    if shares is None:
        return "not measured"
    parts = []
    for task in TASKS:
        beside = f" ({100 * reference[task]:.1f})" if reference else ""
        parts.append(f"{task} {100 * shares[task]:.1f} %{beside}")
    return "<br>".join(parts)


def _shown(result: Mapping[str, Any]) -> str:
    if "engine" in result:
        return "speed (`run`): " + ", ".join(f"{phase} {run.speed(result, phase):.2f} ×" for phase in run.PHASES)
    wall = f"{export.median(result, 'wall_s'):.0f} s"
    if result["no_weights"]:
        return f"graphs: {wall}"
    return f"export: {wall}, {export.peak_bytes(result) / 1e9:.1f} GB peak"


def _natural(name: str) -> list[str | int]:
    """Return a sort key that takes numbers as numbers: 2b before 30b."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

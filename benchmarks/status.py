"""Write what was measured into README.md and docs/benchmarks.md, from the result files alone.

A new result file, of a new target too, shows up without a change here. Each generated block stands between two
comments, `<!-- NAME: written by python -m benchmarks report -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import configs
from benchmarks import goals, lowered, mixture, plot, report, routes
from benchmarks.compare import chart
from benchmarks.compare.sides import REFERENCE
from benchmarks.compare.tables import tokens_per_s
from benchmarks.compare.workloads import DECODE, PREFILL, Point
from benchmarks.goals import Results
from engines.registry import all_targets
from engines.target import GPU

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("demo", "demo-moe")
TASKS = ("read", "count", "where", "json")
_NOT_SHOWN = "tiny"  # how the names of the tests' shapes begin
Accuracies = Mapping[str, Mapping[str, Mapping[str, float]]]
_PASSED = "passed"  # as scripts/gpu_check.py writes it


def works_table(results: Results, accuracies: Accuracies) -> str:
    """Return model shapes against targets; a cell says what was shown.

    Args:
        results: What `report.load` returns.
        accuracies: What `read_accuracies` returns.
    """
    exports = [result for name, result in results.items() if report.kind(name) == "export"]
    runs = [result for name, result in results.items() if report.kind(name) == "run"]
    compared = [result for name, result in results.items() if report.kind(name) == "compare"]
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
            # Of what has a measurement of its own, the comparison's is left out.
            is_exported = any(r.get("no_weights") is False for r in own)
            if (model, target) not in timed:
                sides = [r["sides"] for r in compared if r["model"] == model]
                here += [line for each in sides for line in _compared(each, target, has_export=not is_exported)]
            cells.append("<br>".join(here) or "not measured")
        rows.append((f"`{model}`", *cells))
    return report.table(rows)


def target_states(
    devices: Mapping[str, str],
    results: Results,
    accuracies: Accuracies,
    checks: Sequence[Mapping[str, Any]],
    builds: Sequence[Mapping[str, Any]],
) -> str:
    """Return one row for each target: whether it was run, built, or neither, and what shows it.

    Args:
        devices: `cpu` or `gpu` by target.
        results: What `report.load` returns: an engine that was timed has run.
        accuracies: Shares of right answers by checkpoint and target: an engine that was asked has run.
        checks: Results of `make gpu-check`, each of one model and target on one GPU.
        builds: Results with `plan_bytes`: plans that were compiled, not executed.
    """
    timed = {str(r["target"]) for name, r in results.items() if report.kind(name) == "run"}
    compared = [r["sides"] for name, r in results.items() if report.kind(name) == "compare"]
    timed |= {side.get("target", name) for sides in compared for name, side in sides.items()}
    answered = {target for each in accuracies.values() for target in each}
    rows = [("target", "status", "shown by")]
    for target, device in sorted(devices.items()):
        checked = [each for each in checks if each["target"] == target]
        built = [each for each in builds if each["target"] == target]
        passed = [each for each in checked if each["result"] == _PASSED]
        state, shown = ("**needs a GPU to run**" if device == GPU else "not run"), ""
        failed = [f"{each['model']} FAILED: {each['why']}" for each in checked if each["result"] != _PASSED]
        if passed:
            state, shown = f"run on {_gpus(passed)}", "<br>".join([*map(_timed, passed), *failed])
        elif target in timed | answered:
            state, shown = "run here", "the table above"
        elif checked:
            state, shown = f"**fails on {_gpus(checked)}**", "<br>".join(failed)
        elif built:
            state = "built here, needs a GPU to run"
            shown = "<br>".join(f"{each['model']}: {_plan_bytes(each) / 1e6:,.1f} MB of plans" for each in built)
        rows.append((f"`{target}`", state, shown))
    return report.table(rows) + (
        "\n`run`: engines of it answered, on the machine of the result files or on the GPU that is named. `built here`:"
        "\nits plans were compiled for real on a machine without a GPU, and not executed. `make gpu-check` on a machine"
        "\nwith a GPU runs the rest.\n"
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


def read_builds(folder: Path) -> list[dict[str, Any]]:
    """Return the results of builds that compiled plans."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("build-*.json")))
    return [result for result in found if "plan_bytes" in result]


def _gpus(checks: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(sorted({each["gpu"] for each in checks}))


def _timed(check: Mapping[str, Any]) -> str:
    bench = check["values"]["bench"]
    speed = f"TTFT {1e3 * bench['ttft_p50_s']:.0f} ms, {bench['tokens_per_s']:.1f} tokens/s"
    return f"{check['model']}: {speed} ({check['gpu']}, {check['date']})"


def _plan_bytes(build: Mapping[str, Any]) -> int:
    """Return the bytes of all plans; a result holds their sum, or the bytes of each by name."""
    plans = build["plan_bytes"]
    return sum(plans.values()) if isinstance(plans, Mapping) else plans


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


def generated(root: Path = ROOT) -> dict[Path, str]:
    """Return the contents that all files with generated parts should have."""
    folder = root / "benchmarks" / "results"
    results = report.load(folder)
    files = {folder / f"{name}.md": report.render(name, result) for name, result in results.items()}
    files[folder / "speed.svg"] = plot.speeds([r for name, r in results.items() if report.kind(name) == "run"])
    files |= {folder / f"{name}.svg": chart.draw(r) for name, r in results.items() if report.kind(name) == "compare"}
    accuracies = read_accuracies(root / "docs")
    devices = {target.name: target.device for target in all_targets()}
    states = target_states(devices, results, accuracies, read_checks(folder), read_builds(folder))
    blocks = [
        ("README.md", "what works", f"{works_table(results, accuracies)}\n{states}"),
        ("docs/benchmarks.md", "figures", goals.table(results)),
        ("docs/mixture_of_experts.md", "speed", mixture.tables(results)),
    ]
    if "lowered" in results:
        blocks.append(("docs/accuracy.md", "lowered graphs", lowered.table_of(results["lowered"])))
    if "quantizers" in results:
        blocks.append(("docs/quantization.md", "quantizers", report.quantizers_table(results["quantizers"])))
    if "routes" in results:
        blocks.append(("docs/mixture_of_experts.md", "routes", routes.table_of(results["routes"])))
    for place, name, body in blocks:
        path = root / place
        files[path] = replace_block(files.get(path) or path.read_text(encoding="utf-8"), name, body)
    return files


def replace_block(text: str, name: str, body: str) -> str:
    """Return `text` with `body` between the two comments of a block.

    Raises:
        ValueError: The comments do not occur exactly once.
    """
    start, end = f"<!-- {name}: written by python -m benchmarks report -->", f"<!-- end of {name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"expected each once: {start} and {end}")
    before, rest = text.split(start)
    return f"{before}{start}\n\n{body}\n{end}{rest.split(end)[1]}"


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
        return "speed (`run`): " + ", ".join(f"{phase} {report.speed(result, phase):.2f} ×" for phase in report.PHASES)
    wall = f"{report.export_median(result, 'wall_s'):.0f} s"
    if result["no_weights"]:
        return f"graphs: {wall}"
    return f"export: {wall}, {report.export_peak_bytes(result) / 1e9:.1f} GB peak"


def _natural(name: str) -> list[str | int]:
    """Return a sort key that takes numbers as numbers: 2b before 30b."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

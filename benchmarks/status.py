"""Write what was measured into README.md and docs/benchmarks.md, from the result files alone.

A new result file, of a new target too, shows up without a change here. Each generated block stands between two
comments, `<!-- NAME: written by python -m benchmarks report -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configs
from benchmarks import lowered, plot, report
from benchmarks.compare import chart
from benchmarks.compare.sides import REFERENCE
from benchmarks.compare.tables import bytes_per_s
from benchmarks.compare.workloads import DECODE, Point
from engines.choose import GPU, device_of
from engines.registry import all_targets

ROOT = Path(__file__).resolve().parent.parent
DEMO = "demo checkpoint"
TASKS = ("read", "count", "where", "json")
_ACCURACY = "demo_accuracy"
_NOT_SHOWN = "tiny"  # how the names of the tests' shapes begin
_PASSED = "passed"  # as scripts/gpu_check.py writes it

Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Goal:
    """A figure that was asked for.

    Attributes:
        what: What is measured.
        limit: The figure asked, in `unit`.
        unit: The unit, with its space.
        inputs: Names of the results that `value` takes.
        value: The figure reached.
        is_minimum: More is better.
        on_huge_pages: The same figure of the same engine on huge pages; it is shown, and not judged.
    """

    what: str
    limit: float
    unit: str
    inputs: tuple[str, ...]
    value: Callable[..., float]
    is_minimum: bool = False
    on_huge_pages: Callable[..., float] | None = None

    def row(self, results: Results) -> tuple[str, str, str, str]:
        """Return the cells what, asked, reached, verdict."""
        asked = f"{'≥' if self.is_minimum else '≤'} {self.limit:g}{self.unit}"
        value, other = (self._of(results, function) for function in (self.value, self.on_huge_pages))
        reached = "not measured" if value is None else self._text(value)
        if other is not None:
            reached += f"; huge pages {self._text(other)}"
        if value is None:
            return self.what, asked, reached, ""
        is_reached = value >= self.limit if self.is_minimum else value <= self.limit
        return self.what, asked, reached, "yes" if is_reached else "**no**"

    def _of(self, results: Results, function: Callable[..., float] | None) -> float | None:
        try:
            return None if function is None else function(*(results[name] for name in self.inputs))
        except KeyError:  # a result or a side that is not there
            return None

    def _text(self, value: float) -> str:
        is_near = abs(value - self.limit) < 0.02 * self.limit  # where two decimals could hide the verdict
        return f"{value:.{4 if is_near else 3}g}{self.unit}"


_FP32 = "ort-cpu-fp32"
_GRAPHS_2B, _GRAPHS_32B = (f"export-qwen3-vl-{size}-{_FP32}-no-weights" for size in ("2b", "32b"))
_EXPORT_2B, _RUN_2B = (f"{what}-qwen3-vl-2b-{_FP32}" for what in ("export", "run"))
_IMPORT = "from qwen3_vl import Qwen3VLModel"  # more than the lazy `import qwen3_vl`

GOALS = (
    Goal("2B, graphs without weights: wall time", 25, " s", (_GRAPHS_2B,), lambda r: report.export_median(r, "wall_s")),
    Goal(
        "32B, graphs without weights: wall time beyond that of 2B",
        3,
        " s",
        (_GRAPHS_2B, _GRAPHS_32B),
        lambda small, large: report.export_median(large, "wall_s") - report.export_median(small, "wall_s"),
    ),
    Goal("2B, graphs without weights: peak RSS", 2, " GB", (_GRAPHS_2B,), lambda r: report.export_peak_bytes(r) / 1e9),
    Goal("2B, export in fp32: CPU time", 75, " s", (_EXPORT_2B,), lambda r: report.export_median(r, "cpu_s")),
    Goal("2B, export in fp32: peak RSS", 2, " GB", (_EXPORT_2B,), lambda r: report.export_peak_bytes(r) / 1e9),
    Goal("2B, engine in fp32: prefill", 1, " × PyTorch", (_RUN_2B,), lambda r: report.speed(r, "prefill"), True),
    Goal("2B, engine in fp32: decode", 1, " × PyTorch", (_RUN_2B,), lambda r: report.speed(r, "decode"), True),
    Goal("Import of `Qwen3VLModel`", 0.3, " s", ("import",), lambda r: report.added_s(r, _IMPORT)),
    Goal(
        "Import of `Qwen3VLModel`: torch, transformers, ONNX libraries",
        0,
        " loaded",
        ("import",),
        lambda r: len(r["imports"][_IMPORT]["heavy_modules"]),
    ),
)

_COMPARE, _SPECULATION, _OVERHEAD = "compare-qwen3-vl-2b", "speculation-2b-int4", "overhead-2b-int4"
_INT4, _INT4P8 = "ort-cpu-int4", "ort-cpu-int4p8"
_BLOCK_32, _BLOCK_128 = ("genai-int4-b32",), ("genai-int4-b128", "genai-int4-b128-pruned")
_OPENVINO = ("openvino-int4",)

OfComparison = Callable[[Mapping[str, Any]], float]


def _goal(
    what: str,
    limit: float,
    unit: str,
    target: str,
    value: Callable[..., float],
    *more: Any,
    is_minimum: bool = False,
    depends_on_pages: bool = True,
) -> Goal:
    """Return a goal of the comparison; `value` takes the result, the name of one of our sides, and `more`."""

    def of(side: str) -> OfComparison:
        return lambda result: value(result, side, *more)

    on_huge_pages = of(f"{target}-huge-pages") if depends_on_pages else None
    return Goal(f"2B, `{target}`: {what}", limit, unit, (_COMPARE,), of(target), is_minimum, on_huge_pages)


def _times_as_fast(result: Mapping[str, Any], side: str, peers: tuple[str, ...], point: str) -> float:
    """Return how many times as fast as the fastest of some peers one of our sides is."""
    return min(_median(result, peer, point) for peer in peers) / _median(result, side, point)


def _time_over(result: Mapping[str, Any], side: str, peers: tuple[str, ...], point: str) -> float:
    return 1 / _times_as_fast(result, side, peers, point)


def _median(result: Mapping[str, Any], side: str, point: str) -> float:
    return float(result["sides"][side]["points"][point]["median_s"])


def _divergence_ratio(result: Mapping[str, Any], side: str, peer: str) -> float:
    ours, theirs = (result["sides"][name]["divergence"]["mean_kl"] for name in (side, peer))
    return float(ours / theirs)


def _memory_share(result: Mapping[str, Any], side: str, point: Point) -> float:
    ceiling = float(result["ceilings"]["memory_bytes_per_s"])
    return 100 * bytes_per_s(point, result["sides"][side]) / ceiling


def _first_token(result: Mapping[str, Any], side: str) -> float:
    """Return our time from an image to the first token over that of the fastest peer that sees the same image.

    Raises:
        KeyError: No such peer was measured.
    """
    peers = [each for each in result["sides"].values() if not each["is_ours"] and each["has_vision"]]
    # The image has 3072 patches: a side that is done before its own vision tower could be has shrunk it.
    same = [each for each in peers if each["image"]["median_s"] > each["points"]["vision-3072-b1"]["median_s"]]
    if not same:
        raise KeyError("no peer sees the same image")
    ours = float(result["sides"][side]["image"]["median_s"])
    return ours / min(float(each["image"]["median_s"]) for each in same)


def _load(result: Mapping[str, Any], side: str) -> float:
    return float(result["sides"][side]["load_s"])


def _rss_without_cache(result: Mapping[str, Any], side: str) -> float:
    values = result["sides"][side]
    return float(values["peak_rss_bytes"] - values["cache_bytes"]) / 1e9


def _export(result: Mapping[str, Any], side: str, value: str, unit: float) -> float:
    return float(result["sides"][side]["export"][value]) / unit


def _nothing_accepted(result: Mapping[str, Any]) -> float:
    """Return the least speed of prompt lookup on a text of which no draft was right."""
    races = [race["lookup"] for race in result["natural"].values()]
    speeds = [float(race["speed"]) for race in races if not race["accepted"]]
    if not speeds:
        raise KeyError("something is accepted in every text")
    return min(speeds)


QUANTISED_GOALS = (
    *(
        _goal(
            f"{what} against onnxruntime-genai {build}",
            least,
            " ×",
            target,
            _times_as_fast,
            peers,
            point,
            is_minimum=True,
        )
        for target in (_INT4, _INT4P8)
        for build, peers, what, point, least in (
            ("block 128", _BLOCK_128, "decode behind 512 tokens", "decode-512-b1", 1.1),
            ("block 128", _BLOCK_128, "prefill of 512 tokens", "prefill-512-b1", 1.25),
            ("block 32", _BLOCK_32, "decode behind 512 tokens", "decode-512-b1", 1.3),
            ("block 32", _BLOCK_32, "prefill of 512 tokens", "prefill-512-b1", 1.8),
        )
    ),
    *(
        _goal(
            f"decode behind {size} tokens, share of the memory ceiling",
            80,
            " %",
            _INT4,
            _memory_share,
            Point(DECODE, size),
            is_minimum=True,
        )
        for size in (0, 512)
    ),
    _goal(
        "mean KL to float32, over that of onnxruntime-genai block 32",
        1,
        " ×",
        _INT4,
        _divergence_ratio,
        *_BLOCK_32,
        depends_on_pages=False,
    ),
    _goal("vision, 3072 patches, over OpenVINO", 1.2, " ×", _INT4, _time_over, _OPENVINO, "vision-3072-b1"),
    *(
        goal
        for target in (_INT4, _INT4P8)
        for goal in (
            _goal("image to first token, over the fastest peer on the same image", 1, " ×", target, _first_token),
            _goal("ready, files in the page cache", 3, " s", target, _load),
            _goal("peak RSS but the KV cache", 1.8, " GB", target, _rss_without_cache),
            _goal("wall time of the export", 60, " s", target, _export, "wall_s", 1, depends_on_pages=False),
            _goal("peak RSS of the export", 2, " GB", target, _export, "peak_rss_bytes", 1e9, depends_on_pages=False),
        )
    ),
    Goal(
        "2B, `ort-cpu-int4`: host, share of a decode step behind 512 tokens",
        1,
        " %",
        (_OVERHEAD,),
        lambda r: 100 * r["outside"]["median_s"] / r["step"]["median_s"],
    ),
    Goal(
        "2B, `ort-cpu-int4`: prompt lookup, every draft wrong, 256 tokens",
        0.97,
        " × plain",
        (_SPECULATION,),
        lambda r: r["forced"]["0%"]["speed"],
        True,
    ),
    Goal(
        "2B, `ort-cpu-int4`: prompt lookup, a text of which nothing is accepted",
        0.97,
        " × plain",
        (_SPECULATION,),
        _nothing_accepted,
        True,
    ),
)


def goals_table(results: Results) -> str:
    """Return figure asked against figure reached."""
    return report.table(
        [("figure", "asked", "reached", "met"), *(goal.row(results) for goal in (*GOALS, *QUANTISED_GOALS))]
    )


def works_table(results: Results, accuracies: Mapping[str, Mapping[str, float]]) -> str:
    """Return model shapes against targets; a cell says what was shown.

    Args:
        results: What `report.load` returns.
        accuracies: Shares of right answers by target; those of PyTorch under the empty name.
    """
    exports = [result for name, result in results.items() if report.kind(name) == "export"]
    runs = [result for name, result in results.items() if report.kind(name) == "run"]
    compared = [result for name, result in results.items() if report.kind(name) == "compare"]
    measured = [*exports, *runs]
    targets = sorted({result["target"] for result in measured} | set(accuracies) - {""})
    models = {result["model"] for result in measured} | set(configs.names("models"))
    rows = [("model", *(f"`{target}`" for target in targets))]
    rows.append((DEMO, *(_accuracy(accuracies.get(target), accuracies.get("")) for target in targets)))
    for model in sorted((name for name in models if not name.startswith(_NOT_SHOWN)), key=_natural):
        cells = []
        for target in targets:
            here = [_shown(r) for r in measured if (r["model"], r["target"]) == (model, target)]
            # A target that has a measurement of its own needs no line of the comparison.
            here = here or [line for r in compared if r["model"] == model for line in _compared(r["sides"], target)]
            cells.append("<br>".join(here) or "not measured")
        rows.append((f"`{model}`", *cells))
    return report.table(rows)


def target_states(
    devices: Mapping[str, str],
    results: Results,
    accuracies: Mapping[str, Mapping[str, float]],
    checks: Sequence[Mapping[str, Any]],
    builds: Sequence[Mapping[str, Any]],
) -> str:
    """Return one row for each target: whether it was run, built, or neither, and what shows it.

    Args:
        devices: `cpu` or `gpu` by target.
        results: What `report.load` returns: an engine that was timed has run.
        accuracies: Shares of right answers by target: an engine that was asked has run.
        checks: Results of `make gpu-check`, each of one model and target on one GPU.
        builds: Results with `plan_bytes`: plans that were compiled, not executed.
    """
    timed = {str(r["target"]) for name, r in results.items() if report.kind(name) == "run"}
    compared = [r["sides"] for name, r in results.items() if report.kind(name) == "compare"]
    timed |= {side.get("target", name) for sides in compared for name, side in sides.items()}
    rows = [("target", "status", "shown by")]
    for target, device in sorted(devices.items()):
        checked = [each for each in checks if each["target"] == target]
        built = [each for each in builds if each["target"] == target]
        passed = [each for each in checked if each["result"] == _PASSED]
        state, shown = ("**needs a GPU to run**" if device == GPU else "not run"), ""
        if passed:
            state, shown = f"run on {_gpus(passed)}", "<br>".join(_timed(each) for each in passed)
        elif target in timed | set(accuracies):
            state, shown = "run here", "the table above"
        elif checked:
            state = f"**fails on {_gpus(checked)}**"
            shown = "<br>".join(f"{each['model']}: {each['why']}" for each in checked)
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


def _compared(sides: Mapping[str, Any], target: str) -> list[str]:
    """Return export and speeds of our sides of a target in a comparison, PyTorch fp32 = 1."""
    points = {"vision": "vision-784-b1", "prefill": "prefill-512-b1", "decode": "decode-512-b1"}
    lines: list[str] = []
    for side in sides.values():
        if side.get("target") != target:
            continue
        if not lines:
            export = side["export"]
            lines.append(f"export: {export['wall_s']:.0f} s, {export['peak_rss_bytes'] / 1e9:.1f} GB peak")
        speeds = [
            f"{name} {sides[REFERENCE]['points'][point]['median_s'] / side['points'][point]['median_s']:.2f} ×"
            for name, point in points.items()
            if REFERENCE in sides and point in side["points"] and point in sides[REFERENCE]["points"]
        ]
        if speeds:
            pages = ", huge pages" if side["options"]["huge_pages"] else ""
            lines.append(f"speed (`compare`{pages}): {', '.join(speeds)}")
    return lines


def read_accuracies(folder: Path) -> dict[str, dict[str, float]]:
    """Return the shares of right answers on the held-out canvases by target; those of PyTorch under the empty name."""
    alone = {
        path.stem.removeprefix(_ACCURACY).removeprefix("_"): json.loads(path.read_text(encoding="utf-8"))["all"]
        for path in sorted(folder.glob(f"{_ACCURACY}*.json"))
    }
    paired = {}
    for path in sorted((folder / "accuracy").glob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        paired[path.stem] = {row["task"]: row["right"] / row["questions"] for row in rows}
    return alone | paired


def generated(root: Path = ROOT) -> dict[Path, str]:
    """Return the contents that all files with generated parts should have."""
    folder = root / "benchmarks" / "results"
    results = report.load(folder)
    files = {folder / f"{name}.md": report.render(name, result) for name, result in results.items()}
    files[folder / "speed.svg"] = plot.speeds([r for name, r in results.items() if report.kind(name) == "run"])
    files |= {folder / f"{name}.svg": chart.draw(r) for name, r in results.items() if report.kind(name) == "compare"}
    accuracies = read_accuracies(root / "docs")
    devices = {target.name: device_of(target) for target in all_targets()}
    states = target_states(devices, results, accuracies, read_checks(folder), read_builds(folder))
    blocks = {
        root / "README.md": ("what works", f"{works_table(results, accuracies)}\n{states}"),
        root / "docs" / "benchmarks.md": ("figures", goals_table(results)),
    }
    if "lowered" in results:
        blocks[root / "docs" / "accuracy.md"] = "lowered graphs", lowered.table_of(results["lowered"])
    if "quantizers" in results:
        blocks[root / "docs" / "quantization.md"] = "quantizers", report.quantizers_table(results["quantizers"])
    for path, (name, body) in blocks.items():
        files[path] = replace_block(path.read_text(encoding="utf-8"), name, body)
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

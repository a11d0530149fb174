"""Write results as JSON, and their tables; a table is made from the JSON alone, so it can be made again.

The kind of a result is the first part of its name: `export-MODEL-TARGET`, `build-MODEL-TARGET`,
`run-MODEL-TARGET`, `import`, `compare-MODEL`, `lowered`, `routes`, `quantizers`,
`speculation-NAME`, `race-NAME`, `overhead-NAME`, `experts-MODEL-BITS-bits`, `against-COMMIT`, `kernels`, `kills`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import kernels, lowered, routes
from engines.disk import replace_text

RESULTS = Path(__file__).with_name("results")
PHASES = ("vision", "prefill", "decode")


def write(name: str, result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write `name.json` and `name.md` and return the path of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / f"{name}.json", json.dumps(result, indent=2) + "\n")
    path = folder / f"{name}.md"
    replace_text(path, render(name, result))
    return path


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return all results of a folder, by name; other JSON files may lie beside them."""
    paths = [path for path in sorted(folder.glob("*.json")) if kind(path.stem) in _TABLES]
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def kind(name: str) -> str:
    """Return what a result of this name measures: a key of `_TABLES`, if it is one of ours."""
    return name.partition("-")[0]


def render(name: str, result: Mapping[str, Any]) -> str:
    """Return the text of `name.md`."""
    return f"# {name}\n\n{_TABLES[kind(name)](result)}\n{_environment_line(result['environment'])}\n"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n"


def export_median(result: Mapping[str, Any], value: str) -> float:
    """Return the median of a value over the runs of an export."""
    return statistics.median(run[value] for run in result["runs"])


def export_peak_bytes(result: Mapping[str, Any]) -> int:
    """Return the largest peak memory of the runs of an export."""
    return max(run["peak_rss_bytes"] for run in result["runs"])


def speed(result: Mapping[str, Any], phase: str) -> float:
    """Return how many times as fast as PyTorch the engine was in a phase, median against median."""
    return result["torch"][phase]["median_s"] / result["engine"][phase]["median_s"]


def added_s(result: Mapping[str, Any], statement: str) -> float:
    """Return the seconds that an import adds to a bare interpreter, median minus median."""
    return result["imports"][statement]["median_s"] - result["bare"]["median_s"]


def export_table(result: Mapping[str, Any]) -> str:
    """Return the median run of an export."""
    wall = export_median(result, "wall_s")
    cells = {
        "model": result["model"],
        "weights": "no" if result["no_weights"] else "yes",
        "wall, s": f"{wall:.1f}",
        "CPU, s": f"{export_median(result, 'cpu_s'):.1f}",
        "peak RSS, GB": f"{export_peak_bytes(result) / 1e9:.2f}",
        "output, MB": f"{export_median(result, 'output_bytes') / 1e6:.1f}",
    }
    if "checkpoint_bytes" in result and not result["no_weights"]:  # earlier results do not have it
        size = result["checkpoint_bytes"]
        cells |= {"checkpoint, GB": f"{size / 1e9:.2f}", "GB/s": f"{size / wall / 1e9:.3f}"}
    walls = ", ".join(f"{run['wall_s']:.1f}" for run in result["runs"])
    return (
        table([list(cells), list(cells.values())])
        + f"\nMedian of {len(result['runs'])} runs (wall, s: {walls}); of the peaks the largest.{holes_note(result)}\n"
    )


def has_holes(result: Mapping[str, Any]) -> bool:
    """Tell whether the weights that a measurement used came from a sparse checkpoint."""
    is_used = not result.get("no_weights", False)
    return is_used and "disk_bytes" in result and 2 * result["disk_bytes"] < result["checkpoint_bytes"]


def holes_note(result: Mapping[str, Any]) -> str:
    """Return a sentence about the holes of a measurement's checkpoint, behind a space; empty if it has none."""
    if not has_holes(result):
        return ""
    return f" Of the checkpoint's bytes {written(result)} were written; the rest are holes of sparse files (zeros)."


def written(result: Mapping[str, Any]) -> str:
    """Return the share of a sparse checkpoint's bytes that are not holes."""
    return f"{100 * result['disk_bytes'] / result['checkpoint_bytes']:.0f} %"


def build_table(result: Mapping[str, Any]) -> str:
    """Return what one build of plans took, and how its bytes compare with the weights of the lowered graphs."""
    rows = [("graph", "weights, MB", "plan, MB", "plan / weights")]
    for graph, weights in result["weight_bytes"].items():
        plan = result["plan_bytes"][f"{graph}.plan"]
        rows.append((graph, f"{weights / 1e6:.1f}", f"{plan / 1e6:.1f}", f"{plan / weights:.2f}"))
    options = result["options"]
    return (
        f"{result['model']}, {result['target']}: {result['wall_s']:.0f} s, {result['cpu_s']:.0f} s of CPU, "
        f"{result['peak_rss_bytes'] / 1e9:.1f} GB at the peak, tracing included. {options['library']} "
        f"{options['library_version']}, no GPU, for SM {', '.join(options['compute_capabilities'])}; "
        f"{options['capacity']} positions, batch {options['max_batch']}, chunks of {options['prefill_chunk']}."
        f"\n\n{table(rows)}"
    )


def inference_table(result: Mapping[str, Any]) -> str:
    """Return one row for each phase, engine against PyTorch."""
    engine, torch = result["engine"], result["torch"]
    rows = [(result["model"], "engine, s", "PyTorch fp32, s", "PyTorch / engine")]
    for phase in PHASES:
        ours, theirs = engine[phase]["median_s"], torch[phase]["median_s"]
        rows.append((phase, f"{ours:.4f}", f"{theirs:.4f}", f"{speed(result, phase):.2f}"))
    loads = engine["load_s"], torch["load_s"]
    rows.append(("load", f"{loads[0]:.1f}", f"{loads[1]:.1f}", f"{loads[1] / loads[0]:.2f}"))
    rss = engine["peak_rss_bytes"] / 1e9, torch["peak_rss_bytes"] / 1e9
    rows.append(("peak RSS, GB", f"{rss[0]:.2f}", f"{rss[1]:.2f}", f"{rss[1] / rss[0]:.2f}"))
    return (
        f"{engine['prompt_tokens']} prompt tokens, {engine['visual_tokens']} of them visual; "
        f"{result['workload']['threads']} threads; median of {result['workload']['repeats']} repeats "
        f"({result['workload']['decode_steps']} decode steps).\n\n{table(rows)}"
    )


def import_table(result: Mapping[str, Any]) -> str:
    """Return one row for each import, less the time of a bare interpreter."""
    rows = [("statement", "added, s", "heavy libraries loaded")]
    for statement, values in result["imports"].items():
        loaded = ", ".join(values["heavy_modules"]) or "none"
        rows.append((f"`{statement}`", f"{added_s(result, statement):.3f}", loaded))
    return (
        f"Fresh interpreters, median of {len(result['bare']['all_s'])}, "
        f"less {result['bare']['median_s']:.3f} s of a bare one.\n\n{table(rows)}"
    )


def quantizers_table(result: Mapping[str, Any]) -> str:
    """Return one row for each way to round, one column for each block size."""
    blocks = list(next(iter(result["methods"].values())))
    rows = [("decoder", *(f"block {block}" for block in blocks))]
    rows += [(method, *(f"{kl[block]:.5f}" for block in blocks)) for method, kl in result["methods"].items()]
    return (
        f"Mean KL to float32 in nats, over all positions of the four prompts of {result['canvases']} held-out canvases "
        f"of the demo;\n{result['bits']} bits, decoder only; calibrated on {result['calibration']} training canvases, "
        f"one prompt each.\n\n{table(rows)}"
    )


def comparison(result: Mapping[str, Any]) -> str:
    """Return the tables of a comparison with peers."""
    from benchmarks.compare import tables  # which takes `table` from this file

    return tables.render(result)


def speculation(result: Mapping[str, Any]) -> str:
    """Return the tables of prompt lookup."""
    from benchmarks.speculation import table as body

    return body(result)


def race(result: Mapping[str, Any]) -> str:
    """Return the table of a race of engines."""
    from benchmarks.race import table as body

    return body(result)


def overhead(result: Mapping[str, Any]) -> str:
    """Return what of a decode step is spent outside the graph."""
    rows = [("", "median, ms", "share of a step, %")]
    step = result["step"]["median_s"]
    for name, part in (("step", "step"), ("graph", "inside"), ("host", "outside")):
        median = result[part]["median_s"]
        rows.append((name, f"{1e3 * median:.3f}", f"{100 * median / step:.2f}"))
    return (
        f"{result['target']}, {result['threads']} threads, {len(result['step']['all_s'])} steps behind "
        f"{result['num_cached']} positions. A step is a turn of the loop: `Session.decode` and the greedy choice; "
        f"graph is `run_with_iobinding` in it, host the rest of each step.\n\n{table(rows)}"
    )


def against(result: Mapping[str, Any]) -> str:
    """Return the table of two checkouts."""
    from benchmarks.against import table_of

    return table_of(result)


def experts(result: Mapping[str, Any]) -> str:
    """Return the table of the forms of a mixture of experts."""
    from benchmarks.experts import table as body

    return body(result)


def _environment_line(environment: Mapping[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in environment["libraries"].items())
    cpu = environment["cpu"]
    if environment.get("instruction_sets"):  # earlier results do not have them
        cpu += f" ({' '.join(environment['instruction_sets'])})"
    return (
        f"{cpu}, {environment['cores']} cores, {environment['memory_bytes'] / 2**30:.0f} GiB, "
        f"{environment['system']}, Python {environment['python']}, {libraries}; "
        f"load average before the run {environment['load_average_1min']:.1f}."
    )


def kills(result: Mapping[str, Any]) -> str:
    """Return one row for each way to put an engine into its place."""
    columns = {
        "exports": "exports",
        "killed": "killed",
        "older engine": "old",
        "new engine": "new",
        "none until the next run": "missing",
        "broken": "broken",
        "something left": "left",
        "left after the next run began": "left_after_next_run",
    }
    rows = [("put into place by", *columns)]
    rows += [(way, *(str(row[key]) for key in columns.values())) for way, row in result["ways"].items()]
    seconds = max(row["typical_s"] for row in result["ways"].values())
    return (
        f"{table(rows)}\nThe demo for {result['target']}, killed (SIGKILL) at random moments of the {seconds:.1f} s "
        "from the end of tracing to the end, a third of them while the engine is put into its place; seed "
        f"{result['seed']}. CPU flags: {', '.join(result['cpu_flags'])}.\n"
    )


_TABLES = {
    "against": against,
    "export": export_table,
    "build": build_table,
    "run": inference_table,
    "import": import_table,
    "compare": comparison,
    "lowered": lowered.table_of,
    "routes": routes.table_of,
    "quantizers": quantizers_table,
    "speculation": speculation,
    "race": race,
    "overhead": overhead,
    "experts": experts,
    "kernels": kernels.table_of,
    "kills": kills,
}

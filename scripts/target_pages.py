"""A page of the site for each target: what it is, how it is built, what it needs, its formats, state and figures."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import report, status
from benchmarks.result_files import RESULTS, markdown
from engines.quantize.formats import FLOAT, WeightFormats
from engines.registry import all_targets
from engines.target import GPU, Target

ROOT = Path(__file__).resolve().parent.parent


def target_pages() -> dict[str, str]:
    """Return the pages, by their places on the site."""
    results = report.load()
    works, states = rows(status.tables(results, RESULTS, ROOT / "docs"))
    return {
        f"targets/{target.name}.md": page(
            target, states[f"`{target.name}`"], column(works, f"`{target.name}`"), results
        )
        for target in all_targets()
    }


def rows(tables: str) -> list[dict[str, list[str]]]:
    """Return the rows of each Markdown table of a text, by their first cell."""
    found: list[dict[str, list[str]]] = []
    for table in re.findall(r"(?:^\|.*\|\n)+", tables, re.M):
        cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
        found.append({row[0]: row[1:] for row in [cells[0], *cells[2:]]})
    return found


def column(table: dict[str, list[str]], name: str) -> dict[str, str]:
    """Return a column by the first cells of its rows, without those where nothing was measured."""
    (head, *_), names = table, next(iter(table.values()))
    if name not in names:
        return {}
    cells = {row: values[names.index(name)] for row, values in table.items() if row != head}
    return {row: cell for row, cell in cells.items() if cell != "not measured"}


def page(target: Target, state: list[str], figures: dict[str, str], results: report.Results) -> str:
    """Return the text of a target's page.

    Args:
        target: The target.
        state: Its status, and what shows it.
        figures: What was measured, by model.
        results: All results, whose pages are linked if their names hold the target's.
    """
    # What the CPU's table shows is shown here under Figures.
    shown = "Figures, below" if state[1] == "the table above" else state[1] or "–"
    named = sorted(name for name in results if re.search(rf"-{target.name}(-|$)", name))
    parts = [
        f"# {target.name}",
        f"{target.description}.",
        markdown([("", ""), *needs(target), ("state", state[0]), ("shown by", shown)]),
        "## Build and run",
        build(target),
        "## Weights",
        weights(target),
        "## Figures",
        markdown([("model", "measured"), *figures.items()]) if figures else "",
        "\n".join(f"- [{name}](../results/{name}.md)" for name in named),
        "" if figures or named else "None were measured but what the state says.",
        "[benchmarks](../benchmarks.md) says how they are measured, [targets](../targets.md) how a target is chosen.",
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def needs(target: Target) -> list[tuple[str, str]]:
    """Return rows of what an engine needs."""
    device = "the processor"
    if target.device == GPU:
        gpus = f" of SM {', '.join(target.compute_capabilities)}" if target.compute_capabilities else ""
        least = f" of SM {target.min_compute_capability} or later" if target.min_compute_capability else ""
        device = f"an NVIDIA GPU{gpus or least}"
    where = "on the GPU that runs it" if target.builds_on_its_gpu else "on any machine, with or without a GPU"
    # By hand: an engine of the CPU is built on the machine's processor, whose kernels it names.
    where = "on any machine" if target.device != GPU else where
    kinds = [target.kernels, *(other.kernels for other in target.other_kernels)]
    return [
        ("runs on", device),
        ("is built", where),
        ("extra", f"`{target.extra}`, and `export` to build"),
        ("KV cache", target.cache_dtype),
        *([("kernels", " or ".join(f"`--kernels {kind}`" for kind in sorted(kinds)))] if any(kinds) else []),
        ("`--target auto`", f"only by name: {target.by_name_only}" if target.by_name_only else "may choose it"),
    ]


def build(target: Target) -> str:
    """Return the commands that build and ask an engine."""
    calibration = " --calibration FOLDER" if "--calibration" in target.by_name_only else ""
    fixed = " --max-context 4096" if target.compile is not None else ""
    return (
        "```sh\n"
        f"pip install 'qwen3vl-export[export,{target.extra}]'\n"
        f"qwen3vl-export MODEL --target {target.name}{calibration}{fixed} --output ENGINE\n"
        'qwen3vl run ENGINE "What is this?" --image PICTURE\n'
        "```"
    )


def weights(target: Target) -> str:
    """Return which weights have which format, by keys of the checkpoint; the first row that fits counts."""
    own = [(other.kernels, other.formats) for other in target.other_kernels]
    kinds: list[tuple[str, WeightFormats]] = [(target.kernels, target.formats), *own]
    tables = []
    for kernels, formats in kinds:
        # A format of float32 is one of no other: such weights have the target's own type.
        named = [(keys, target.float_dtype if each.kind == FLOAT else str(each)) for keys, each in formats.rules]
        rules = [(" ".join(f"`{key}`" for key in keys), shown) for keys, shown in named]
        if all(keys != "`*`" for keys, _ in rules):
            rules.append(("all others" if rules else "all", target.float_dtype))
        title = f"With `--kernels {kernels}`:\n\n" if kernels else ""
        tables.append(title + markdown([("weights", "format"), *rules]))
    return "\n".join(tables)

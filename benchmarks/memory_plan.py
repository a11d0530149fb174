"""`python -m benchmarks memory-plan ENGINE…`: plans of memory, against processes that fill what was planned."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import options
from benchmarks.measure import child_result, environment
from benchmarks.result_files import RESULTS, markdown, write
from runtime.errors import UsageError
from runtime.manifest import Manifest
from runtime.memory_plan import Planner, Work

NAME = "memory-plan"
GOAL = 0.05
"""Largest error that a plan may have, of the total."""
_CASE = re.compile(
    r"(?P<context>\d+)(x(?P<sequences>\d+))?(\+(?P<images>\d+)@(?P<width>\d+)x(?P<height>\d+))?", re.ASCII
)


@dataclass(frozen=True)
class Case:
    """What a process does: as many prompts at once as there are sequences, each with its images fills the context."""

    context: int
    sequences: int = 1
    images: int = 0
    width: int = 1
    height: int = 1

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read CONTEXT[xSEQUENCES][+IMAGES@WIDTHxHEIGHT].

        Raises:
            UsageError: It is none.
        """
        found = _CASE.fullmatch(text)
        if found is None:
            raise UsageError(f"--case {text}: expected such as 1024, 2048x4 or 2048x2+1@512x512")
        return cls(**{name: int(value) for name, value in found.groupdict().items() if value is not None})


def memory_plan(
    engines: list[Path],
    case: Annotated[list[str], typer.Option(help="CONTEXT[xSEQUENCES][+IMAGES@WIDTHxHEIGHT]; may be repeated.")],
    threads: int = 2,
    results: options.Results = RESULTS,
) -> None:
    """Fill engines in processes of their own, and compare their memory with the plan; add the rows to the table."""
    machine = environment()
    rows = []
    for engine in engines:
        for each in map(Case.parse, case):
            rows.append(_measured(engine, each, threads))
            typer.echo(_line(rows[-1]))
    path = results / f"{NAME}.json"
    earlier = _earlier(path)
    keys = {_key(row) for row in rows}
    rows = sorted([*(row for row in earlier if _key(row) not in keys), *rows], key=_key)
    result = {"rows": rows, "environment": machine}
    write(NAME, result, table(result), results)


def table(result: Mapping[str, Any]) -> str:
    """Return one row for each process."""
    rows = [("engine", "threads", "context", "sequences", "images", "planned", "resident", "error", "without mapped")]
    worst = 0.0
    for each in result["rows"]:
        total, anonymous = (_error(each, kind) for kind in ("resident", "anonymous"))
        worst = max(worst, abs(total))
        images = f"{each['images']} × {each['width']}x{each['height']}" if each["images"] else ""
        figures = (f"{each[name] / 1e6:,.1f} MB" for name in ("planned_resident_bytes", "resident_bytes"))
        cells = (each["engine"], str(each["threads"]), str(each["context"]), str(each["sequences"]), images)
        rows.append((*cells, *figures, f"{100 * total:+.1f} %", f"{100 * anonymous:+.1f} %"))
    within = sum(abs(_error(each, "resident")) <= GOAL for each in result["rows"])
    return (
        "Each process opens an engine, and asks as many questions at once as it has sequences; each fills the context. "
        "The plan is made of the manifest alone. Errors are those of the plan: of the largest resident memory "
        f"(VmHWM), and of the largest anonymous memory. {within} of {len(result['rows'])} plans are within "
        f"{100 * GOAL:.0f} % of the resident memory; the largest error is {100 * worst:.1f} %.\n\n{markdown(rows)}"
    )


def _measured(engine: Path, case: Case, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory_plan_worker", str(engine)]
    command += [str(value) for value in (case.context, case.sequences, case.images)]
    with tempfile.TemporaryDirectory() as folder:
        found, _ = child_result([*command, f"{case.width}x{case.height}", str(threads)], Path(folder) / "found.json")
    manifest = Manifest.read(engine)
    work = Work(case.context, case.sequences, images=tuple(found["patches"]), is_text_only=not case.images)
    plan = Planner.of(manifest, threads).plan(work)
    return {
        "engine": engine.name,
        "target": manifest.target,
        "threads": threads,
        **asdict(case),
        "patches": found["patches"],
        "planned_resident_bytes": plan.total_bytes,
        "planned_anonymous_bytes": plan.anonymous_bytes,
        "resident_bytes": found["resident_bytes"],
        "anonymous_bytes": found["anonymous_bytes"],
        "parts": dict(plan.parts),
    }


def _error(row: Mapping[str, Any], kind: str) -> float:
    return float(row[f"planned_{kind}_bytes"] / row[f"{kind}_bytes"]) - 1


def _line(row: Mapping[str, Any]) -> str:
    return f"{row['engine']} {row['context']} x {row['sequences']}: " + ", ".join(
        f"{kind} {row[f'{kind}_bytes'] / 1e6:.1f} MB, planned {100 * _error(row, kind):+.1f} %"
        for kind in ("resident", "anonymous")
    )


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("engine", "threads", "context", "sequences", "images", "width", "height"))


def _earlier(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path.is_file() else []

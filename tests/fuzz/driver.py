"""Runs of many inputs: progress, findings made smaller and saved, a table."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzz.family import SHARES, Family, Recipe, load
from fuzz.outcome import REFUSED, TAKEN, USUAL, Bounds, Outcome
from fuzz.worker import Worker

_SAVED_OF_A_CAUSE = 3
_MAX_TRIES = 12


@dataclass
class Tally:
    """What became of the inputs of one family."""

    kinds: Counter[str] = field(default_factory=Counter)
    causes: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], Finding] = field(default_factory=dict)
    max_cpu_s: float = 0.0
    max_grown_bytes: int = 0

    @property
    def num_findings(self) -> int:
        """Inputs that are to be mended."""
        return sum(self.causes.values())


@dataclass(frozen=True)
class Finding:
    """An input that went wrong, as small as it got, and what became of it."""

    family: str
    number: int
    recipe: Recipe
    outcome: Outcome
    file: Path | None = None


def shares(total: int, families: Mapping[str, int]) -> dict[str, int]:
    """Divide so many inputs among families; each gets one at least."""
    whole = sum(families.values())
    return {name: max(1, round(total * share / whole)) for name, share in families.items()}


def fuzz(
    names: Mapping[str, int],
    engine: Path,
    seed: int,
    folder: Path | None,
    report: Callable[[str], None] = lambda _: None,
    family_of: Callable[[str], Family] = load,
    max_findings: int | None = None,
    bounds: Bounds = USUAL,
) -> dict[str, Tally]:
    """Run so many inputs of each family; the same seed gives the same inputs.

    Args:
        names: Inputs by family.
        engine: Of the demo.
        seed: Of all inputs.
        folder: Takes the findings; None saves none, and makes none smaller.
        report: Takes lines that say how far it is.
        family_of: Finds a family.
        max_findings: Of a family, after which its other inputs are left out.
        bounds: Beyond which an input is slow or hangs.
    """
    tallies = {name: Tally() for name in names}
    for name, count in names.items():
        with Worker(family_of(name), engine, bounds) as worker:
            _fuzz_family(name, family_of(name), count, worker, seed, folder, report, tallies[name], max_findings)
    return tallies


def _fuzz_family(
    name: str,
    family: Family,
    count: int,
    worker: Worker,
    seed: int,
    folder: Path | None,
    report: Callable[[str], None],
    tally: Tally,
    max_findings: int | None,
) -> None:
    told = time.monotonic()
    for number in range(count):
        if max_findings is not None and tally.num_findings >= max_findings:
            break
        recipe = recipe_of(name, family, seed, number)
        outcome = worker.run(recipe)
        tally.kinds[outcome.kind] += 1
        tally.max_cpu_s = max(tally.max_cpu_s, outcome.cpu_s)
        tally.max_grown_bytes = max(tally.max_grown_bytes, outcome.grown_bytes)
        if outcome.is_finding:
            tally.causes[outcome.key] += 1
            if folder is not None and tally.causes[outcome.key] <= _SAVED_OF_A_CAUSE:
                recipe, outcome = smaller(recipe, outcome, worker.run)
            finding = Finding(name, number, recipe, outcome)
            if folder is not None and tally.causes[outcome.key] <= _SAVED_OF_A_CAUSE:
                finding = save(finding, folder)
            tally.examples.setdefault(outcome.key, finding)
        if time.monotonic() - told > 10:
            told = time.monotonic()
            report(f"{name}: {number + 1} of {count}, {tally.num_findings} findings")
    report(f"{name}: {tally.kinds.total()} of {count}, {tally.num_findings} findings")


def recipe_of(name: str, family: Family, seed: int, number: int) -> Recipe:
    """Return an input by its number; it has the form that a saved one has."""
    made = family.make(Random(f"{name} {seed} {number}"))
    recipe: Recipe = json.loads(json.dumps(made))
    return recipe


def smaller(recipe: Recipe, outcome: Outcome, run: Callable[[Recipe], Outcome]) -> tuple[Recipe, Outcome]:
    """Leave out what an input needs not to go wrong in the same way: edits and options, one at a time."""
    for candidate in itertools.islice(_without_one(recipe), _MAX_TRIES):
        found = run(candidate)
        if found.key == outcome.key:
            return smaller(candidate, found, run)
    return recipe, outcome


def _without_one(recipe: Recipe) -> Iterator[Recipe]:
    for key in ("edits", "options"):
        items = recipe.get(key, [])
        for index in range(len(items)):
            if len(items) > 1 or key == "options":
                yield {**recipe, key: items[:index] + items[index + 1 :]}


def save(finding: Finding, folder: Path) -> Finding:
    """Write a finding to a file that `replay` runs again."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = finding.outcome.kind.replace(" ", "-")
    path = folder / f"{finding.family}-{kind}-{finding.number}.json"
    values = {"family": finding.family, "recipe": finding.recipe, "outcome": finding.outcome.to_dict()}
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return Finding(finding.family, finding.number, finding.recipe, finding.outcome, path)


def replay(path: Path, engine: Path) -> Outcome:
    """Run a saved finding again."""
    values = json.loads(path.read_text(encoding="utf-8"))
    with Worker(load(values["family"]), engine) as worker:
        return worker.run(values["recipe"])


def table(tallies: Mapping[str, Tally]) -> str:
    """Return a row for each family, and a line for each cause of findings."""
    head = ("family", "inputs", "taken", "refused", "findings", "most CPU s", "most MB")
    rows = [head]
    for name, tally in tallies.items():
        counts = (tally.kinds.total(), tally.kinds[TAKEN], tally.kinds[REFUSED], tally.num_findings)
        rows.append((name, *map(str, counts), f"{tally.max_cpu_s:.1f}", f"{tally.max_grown_bytes / 1e6:.0f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name, tally in tallies.items():
        for key, count in tally.causes.most_common():
            kind, place = key
            example = tally.examples[key]
            lines.append(f"{name}: {count} x {kind} {place}".rstrip())
            lines.append(f"    {example.outcome.text[:300]!r}")
            lines.append(f"    {example.file or f'input {example.number}'}")
    return "\n".join(lines)


def chosen(names: list[str]) -> dict[str, int]:
    """Return the shares of the families of these names; all without any."""
    for name in names:
        load(name)
    return {name: share for name, share in SHARES.items() if not names or name in names}

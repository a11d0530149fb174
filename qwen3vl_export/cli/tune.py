"""`qwen3vl tune`: measure which settings are faster for an engine on this machine, and keep them."""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from qwen3vl_export.cli.options import AsJson, Opening, grouped
from qwen3vl_export.cli.output import print_json, print_text
from qwen3vl_export.cli.progress import counting
from runtime.errors import UsageError
from runtime.shown import columns


@grouped
def tune(
    engine: Annotated[
        Path | None, typer.Argument(metavar="[ENGINE]", help="Engine folder that qwen3vl-export wrote.")
    ] = None,
    *,
    budget: Annotated[int | None, typer.Option(metavar="SECONDS", help="Take about so long. [default: 180]")] = None,
    allow_approximate: Annotated[
        bool, typer.Option("--allow-approximate", help="Try settings that change what is computed, within tolerance.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Keep what was found on a busy machine as well.")] = False,
    shows_list: Annotated[bool, typer.Option("--list", help="List the tunings that are kept.")] = False,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", metavar="NAME", help="Remove a kept tuning; may be repeated."),
    ] = None,
    opening: Annotated[Opening, ("max_context", "max_memory")],
    as_json: AsJson = False,
) -> None:
    """Measure which settings make an engine faster on this machine, and keep them: it is opened with them from then on.

    Tried are, where an engine has a use for them: huge pages, threads, the chunks that prompts are read in, how many
    images share a call, how much prompt lookup drafts; on a GPU also graphs, decode kernels and attention kernels. A
    setting is taken if something is faster beyond the noise, nothing is slower, and the answer is that of the defaults:
    to the bit, or within rounding. All that was taken then meets the defaults in whole requests; if it is not faster
    there, the defaults stay. On a busy machine nothing is kept.

    --no-tuned, of every command that opens an engine, opens it with the defaults. docs/tuning.md says more.

    --json prints one object: engine, target, machine, versions, noise, settings (what is worth keeping), verdict,
    changes (of whole requests), tried, stored (the file; null if nothing was kept), reason, notes, spent_s. With --list
    folder and tunings (each: file, name, target, tuned in seconds since 1970, settings, noise, problem); with --remove
    folder and removed.

    \b
    Examples:
      qwen3vl tune demo-engine
      qwen3vl tune ENGINE --budget 60 --json
      qwen3vl tune --list
    """
    asked = [engine is not None, shows_list, bool(remove)]
    if sum(asked) != 1:
        raise UsageError("give ENGINE, --list or --remove, and one of them", remedy="qwen3vl tune ENGINE")
    if engine is not None:
        _tune(engine, budget, opening, allow_approximate=allow_approximate, force=force, as_json=as_json)
    elif budget is not None or allow_approximate or force:
        raise UsageError("--budget, --allow-approximate and --force are of measuring", remedy="leave them out")
    elif shows_list:
        _list(as_json=as_json)
    else:
        _remove(remove or [], as_json=as_json)


def _tune(
    engine: Path, budget: int | None, opening: Opening, *, allow_approximate: bool, force: bool, as_json: bool
) -> None:
    from qwen3vl_export.tune.tuner import DEFAULT_BUDGET_S, tune
    from runtime.urls import check_local

    check_local(engine, "engine")
    budget_s = DEFAULT_BUDGET_S if budget is None else budget
    started = time.perf_counter()
    with counting("tuning") as show:
        report = tune(
            engine,
            budget_s,
            allow_approximate=allow_approximate,
            force=force,
            opening=opening.arguments(),
            on_step=lambda text: show(min(budget_s, round(time.perf_counter() - started)), budget_s, text),
        )
    if as_json:
        print_json(report.to_dict())
    else:
        print_text(report.render())


def _list(*, as_json: bool) -> None:
    from qwen3vl_export.tune.store import entries, folder_of_user
    from runtime.tuning import Tuning

    folder = folder_of_user()
    found = entries(folder)
    if as_json:
        print_json({"folder": str(folder), "tunings": [entry.to_dict() for entry in found]})
        return
    rows = [("NAME", "ENGINE", "TARGET", "TUNED", "SETTINGS")]
    for entry in found:
        if not entry.values:
            rows.append((entry.file, "", "", "", f"not used: {entry.problem}"))
            continue
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.values["tuned"]))
        said = str(Tuning.of(entry.values["settings"])) or "the defaults"
        unused = f" (not used: {entry.problem})" if entry.problem else ""
        rows.append((entry.file, entry.values["name"], str(entry.values.get("target")), when, f"{said}{unused}"))
    print_text("\n".join([*(columns(rows) if found else []), f"{folder}: {len(found)} tunings"]))


def _remove(names: list[str], *, as_json: bool) -> None:
    from qwen3vl_export.tune.store import folder_of_user, remove

    folder = folder_of_user()
    for name in names:
        remove(folder, name)
    if as_json:
        print_json({"folder": str(folder), "removed": names})
    else:
        print_text(f"{len(names)} tunings removed")

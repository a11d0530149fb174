"""Find targets by the names of the files in `engines/targets`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from engines.target import Target
from runtime.errors import TargetError


def families() -> list[str]:
    """List the target files, sorted; none is imported."""
    import engines.targets

    return sorted(module.name for module in pkgutil.iter_modules(engines.targets.__path__))


def load_family(family: str) -> tuple[Target, ...]:
    """Import one target file and return its targets, one for each precision."""
    targets: tuple[Target, ...] = importlib.import_module(f"engines.targets.{family}").TARGETS
    prefix = family.replace("_", "-") + "-"
    assert all(isinstance(target, Target) and target.name.startswith(prefix) for target in targets), (
        f"engines/targets/{family}.py: no Target, or its name lacks {prefix}"
    )
    assert len({target.name for target in targets}) == len(targets), (
        f"engines/targets/{family}.py: a name appears twice"
    )
    return targets


def all_targets() -> list[Target]:
    """Return every target, sorted by name."""
    return sorted((target for family in families() for target in load_family(family)), key=lambda target: target.name)


def get(name: str) -> Target:
    """Return the target of that name; only its own file is imported.

    Raises:
        TargetError: No file or no precision of that name; the message lists the known ones.
    """
    for family in families():
        if name.startswith(family.replace("_", "-") + "-"):
            for target in load_family(family):
                if target.name == name:
                    return target
    known = [target.name for target in all_targets()]
    close = difflib.get_close_matches(name, known, n=1)
    raise TargetError(
        f"unknown target {name!r}; known: {', '.join(known)}",
        remedy=f"did you mean {close[0]}?" if close else "choose a known one (see: qwen3vl targets), or auto",
    )

"""Check that the packages beside this one are those that Python would import under their names.

They have names that other programs use too. One of another program would end in an AttributeError somewhere else.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

_OWN = ("runtime", "engines", "configs", "qwen3vl_export")


def check_names() -> None:
    """Raise if another module has the name of a package of ours, loaded already or earlier on `sys.path`.

    Raises:
        ImportError: It says which file has the name.
    """
    ours = Path(__file__).resolve().parents[1]
    for name in _OWN:
        taken = [place for place in _places(name) if Path(place).resolve() != (ours / name).resolve()]
        if taken:
            raise ImportError(
                f"the name {name!r} is taken by {taken[0]}, but qwen3_vl needs its own package of that name, "
                f"{ours / name}\n  remedy: rename that module, or start Python in another folder, or put {ours} before "
                "its folder in sys.path, and import qwen3_vl before it",
                name=name,
                path=taken[0],
            )


def _places(name: str) -> Iterable[str]:
    """Yield the folder of the package, or the file of the module, that a name stands for; nothing if for none."""
    module = sys.modules.get(name)
    try:
        spec = importlib.util.find_spec(name) if module is None else module.__spec__
    except ValueError:  # a module made by hand, without a spec
        spec = None
    if spec is not None:
        yield from list(spec.submodule_search_locations or []) or [spec.origin or f"a module without a file ({name})"]
    elif module is not None:
        yield getattr(module, "__file__", None) or f"a module without a file ({name})"

"""Names that a module offers from elsewhere, imported when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy(
    module: str, names: list[str], sources: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a module (PEP 562).

    Args:
        module: Name of the module.
        names: The `__all__` of the module.
        sources: Which modules they come from: `{"runtime.model": ["Qwen3VLModel"]}`; a name may be a module there.

    The first raises AttributeError for other names, and ImportError where the library of an extra is missing.
    """
    source_of = {name: source for source, held in sources.items() for name in held}

    def find(name: str) -> Any:
        if name not in source_of:
            raise AttributeError(f"module {module!r} has no attribute {name!r}; it has {', '.join(names)}")
        try:
            # As `from source import name` does, for modules in a package too.
            return getattr(__import__(source_of[name], fromlist=[name]), name)
        except ModuleNotFoundError as error:
            from runtime.installation import EXTRAS, how_to_install

            package = (error.name or "").partition(".")[0]
            if package not in EXTRAS:
                raise
            remedy = how_to_install(EXTRAS[package])
            raise ImportError(
                f"{name} needs the Python package {package!r}, which is not installed\n  remedy: {remedy}", name=package
            ) from error

    return find, lambda: names

"""What this machine is, which target suits it, and which engines run which parts of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from engines.choose import Candidate, Choice, choose_target, consider
    from engines.hardware import Gpu, Hardware, probe
    from engines.split import Share, Split, find_split
    from runtime.route import Route, possible_routes
    from runtime.routed_session import RoutedCache, RoutedEngine, RoutedSession

__all__ = [
    "Candidate",
    "Choice",
    "Gpu",
    "Hardware",
    "Route",
    "RoutedCache",
    "RoutedEngine",
    "RoutedSession",
    "Share",
    "Split",
    "choose_target",
    "consider",
    "find_split",
    "possible_routes",
    "probe",
]

_SOURCES = {
    "engines.choose": ["Candidate", "Choice", "choose_target", "consider"],
    "engines.hardware": ["Gpu", "Hardware", "probe"],
    "engines.split": ["Share", "Split", "find_split"],
    "runtime.route": ["Route", "possible_routes"],
    "runtime.routed_session": ["RoutedCache", "RoutedEngine", "RoutedSession"],
}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)

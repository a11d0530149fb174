"""What this machine is, which target suits it, which engine runs what, and which settings are faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from engines.choose import Candidate, Choice, choose_target, consider
    from engines.hardware import Gpu, Hardware, probe
    from engines.split import Share, Split, find_split
    from qwen3vl_export.tune.tuner import tune
    from runtime.route import Route, possible_routes
    from runtime.routed_session import RoutedCache, RoutedEngine, RoutedSession
    from runtime.tuning import Tuning

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
    "Tuning",
    "choose_target",
    "consider",
    "find_split",
    "possible_routes",
    "probe",
    "tune",
]

_SOURCES = {
    "engines.choose": ["Candidate", "Choice", "choose_target", "consider"],
    "engines.hardware": ["Gpu", "Hardware", "probe"],
    "engines.split": ["Share", "Split", "find_split"],
    "runtime.route": ["Route", "possible_routes"],
    "runtime.routed_session": ["RoutedCache", "RoutedEngine", "RoutedSession"],
    "qwen3vl_export.tune.tuner": ["tune"],
    "runtime.tuning": ["Tuning"],
}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)

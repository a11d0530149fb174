"""What this machine is, which target suits it, and which settings are faster on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from engines.choose import Candidate, Choice, choose_target, consider
    from engines.hardware import Gpu, Hardware, probe
    from qwen3vl_export.tune.tuner import tune
    from runtime.tuning import Tuning

__all__ = ["Candidate", "Choice", "Gpu", "Hardware", "Tuning", "choose_target", "consider", "probe", "tune"]

_SOURCES = {
    "engines.choose": ["Candidate", "Choice", "choose_target", "consider"],
    "engines.hardware": ["Gpu", "Hardware", "probe"],
    "qwen3vl_export.tune.tuner": ["tune"],
    "runtime.tuning": ["Tuning"],
}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)

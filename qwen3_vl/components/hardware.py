"""What this machine is, and which target suits it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3_vl.lazy import lazy

if TYPE_CHECKING:
    from engines.choose import Candidate, Choice, choose_target, consider
    from engines.hardware import Gpu, Hardware, probe

__all__ = ["Candidate", "Choice", "Gpu", "Hardware", "choose_target", "consider", "probe"]

_SOURCES = {
    "engines.choose": ["Candidate", "Choice", "choose_target", "consider"],
    "engines.hardware": ["Gpu", "Hardware", "probe"],
}

__getattr__, __dir__ = lazy(__name__, __all__, _SOURCES)

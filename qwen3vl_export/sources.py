"""What the name of a model may be: a folder, an id of the Hugging Face Hub, or a checkpoint that is shipped."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

DEMO, DEMO_MOE, DEMO_LONG = "demo", "demo-moe", "demo-long"
SHIPPED = {DEMO: "checkpoint", DEMO_MOE: "checkpoint_moe", DEMO_LONG: "checkpoint_long"}
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def shipped_folder(name: str) -> Path:
    """Return the folder of a checkpoint that travels with this package."""
    return Path(str(resources.files("qwen3vl_export") / "demo" / SHIPPED[name]))


def local_path(source: str) -> Path | None:
    """Return the path that a source may be, or None for text that is no path."""
    try:
        return Path(source).expanduser()
    except RuntimeError:  # an unknown user's home
        return None

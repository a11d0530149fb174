"""How this package was installed, so that a remedy names a command that adds to that installation."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from runtime.errors import EngineError

DISTRIBUTION = "qwen3vl-export"

EXTRAS = {
    "av": "video",
    "fastapi": "serve",
    "huggingface_hub": "export",
    "llguidance": "structured",
    "matplotlib": "plot",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxruntime": "cpu",
    "onnxscript": "export",
    "pillow_heif": "heif",
    "polygraphy": "polygraphy",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "safetensors": "export",
    "sklearn": "test",
    "torch": "export",
    "torchvision": "verify",
    "transformers": "verify",
    "triton": "decode-plan",
    "uvicorn": "serve",
}
"""Extra of pyproject.toml that installs a module."""


@contextmanager
def from_extra(extra: str) -> Iterator[None]:
    """Import the library of a session, which an extra installs.

    Raises:
        EngineError: It is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise EngineError(
            f"this engine needs the Python package {error.name}, which is not installed", remedy=how_to_install(extra)
        ) from error


def how_to_install(*extras: str) -> str:
    """Return a remedy: the extras by name, and for instance the command that adds them here.

    An editable checkout, a folder, a wheel, a Git address and the package index are told apart by what the installer
    wrote (PEP 610); pipx and `uv tool` by the file that they keep in the environment; an environment without pip is
    given uv's command.
    """
    names = ", ".join(f"`{extra}`" for extra in extras)
    return (
        f"install the extra{'s' if len(extras) > 1 else ''} {names} of {DISTRIBUTION}, for instance: "
        f"{shlex.join(install_command(extras))}"
    )


def install_command(extras: tuple[str, ...]) -> list[str]:
    """Return the words of a command that adds extras to this installation."""
    options, requirement = _source(extras)
    environment = Path(sys.prefix)
    if (environment / "uv-receipt.toml").is_file():
        return ["uv", "tool", "install", "--force", *options, requirement]
    if (environment / "pipx_metadata.json").is_file():
        return ["pipx", "install", "--force", *[word.replace("-e", "--editable") for word in options], requirement]
    if importlib.util.find_spec("pip") is None:
        return ["uv", "pip", "install", "--python", sys.executable or "python", *options, requirement]
    return [sys.executable or "python", "-m", "pip", "install", *options, requirement]


def _source(extras: tuple[str, ...]) -> tuple[list[str], str]:
    """Return options of the installer, and what it is to install."""
    wanted = f"[{','.join(extras)}]"
    try:
        record = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        # Not installed: the folder of the source is on sys.path.
        return ["-e"], f"{Path(__file__).resolve().parents[1]}{wanted}"
    if record is None:
        return [], f"{DISTRIBUTION}{wanted}"
    direct: dict[str, Any] = json.loads(record)
    parts = urlsplit(direct["url"])
    if "vcs_info" in direct:
        vcs = direct["vcs_info"]
        revision = vcs.get("requested_revision") or vcs["commit_id"]
        return [], f"{DISTRIBUTION}{wanted} @ {vcs['vcs']}+{direct['url']}@{revision}"
    if parts.scheme == "file":
        is_editable = direct.get("dir_info", {}).get("editable", False)
        return ["-e"] if is_editable else [], f"{url2pathname(parts.path)}{wanted}"
    return [], f"{DISTRIBUTION}{wanted} @ {direct['url']}"

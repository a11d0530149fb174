"""A remedy that installs an extra fits the way in which the package was installed."""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT
from runtime.errors import EngineError
from runtime.installation import from_extra, how_to_install, install_command

pytestmark = pytest.mark.portable

PIP = [sys.executable, "-m", "pip", "install"]


class Distribution:
    """What the installer wrote beside the package."""

    def __init__(self, direct_url: dict[str, Any] | None) -> None:
        self._text = None if direct_url is None else json.dumps(direct_url)

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self._text


def install(monkeypatch: pytest.MonkeyPatch, direct_url: dict[str, Any] | None) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution(direct_url))


VCS = {"vcs": "git", "commit_id": "abc"}


@pytest.mark.parametrize(
    ("direct_url", "words"),
    [
        (None, ["qwen3vl-export[cpu,plot]"]),
        ({"url": "file:///a/b%20c", "dir_info": {"editable": True}}, ["-e", "/a/b c[cpu,plot]"]),
        ({"url": "file:///a", "dir_info": {}}, ["/a[cpu,plot]"]),
        ({"url": "file:///a/x.whl", "archive_info": {}}, ["/a/x.whl[cpu,plot]"]),
        ({"url": "https://h/x.whl", "archive_info": {}}, ["qwen3vl-export[cpu,plot] @ https://h/x.whl"]),
        ({"url": "https://h/r", "vcs_info": VCS}, ["qwen3vl-export[cpu,plot] @ git+https://h/r@abc"]),
        (
            {"url": "https://h/r", "vcs_info": VCS | {"requested_revision": "v1"}},
            ["qwen3vl-export[cpu,plot] @ git+https://h/r@v1"],
        ),
    ],
)
@pytest.mark.parametrize(
    ("file", "command"),
    [
        (None, PIP),
        ("uv-receipt.toml", ["uv", "tool", "install", "--force"]),
        ("pipx_metadata.json", ["pipx", "install", "--force"]),
    ],
)
def test_the_command_fits_the_installation(
    direct_url: dict[str, Any] | None,
    words: list[str],
    file: str | None,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, direct_url)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    if file is not None:
        (tmp_path / file).touch()
    if "pipx" in command:
        words = ["--editable" if word == "-e" else word for word in words]
    assert install_command(("cpu", "plot")) == [*command, *words]


def test_an_environment_without_pip_gets_the_command_of_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    install(monkeypatch, None)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else found(name))
    assert install_command(("cpu",)) == ["uv", "pip", "install", "--python", sys.executable, "qwen3vl-export[cpu]"]


def test_a_source_folder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert install_command(("export",)) == [*PIP, "-e", f"{ROOT}[export]"]


def test_the_remedy_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    monkeypatch.setattr(sys, "executable", "/a b/python")
    assert how_to_install("cpu") == (
        "install the extra `cpu` of qwen3vl-export, for instance: '/a b/python' -m pip install 'qwen3vl-export[cpu]'"
    )
    assert how_to_install("export", "cuda").startswith("install the extras `export`, `cuda` of qwen3vl-export, for ")


@pytest.mark.parametrize("package", ["runtime", "engines", "qwen3vl_export", "qwen3_vl"])
def test_no_message_has_a_command_of_its_own(package: str) -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / package).rglob("*.py")}
    assert [str(path) for path, text in texts.items() if re.search(r"pip3? install", text)] == []


def test_a_library_that_is_missing_names_the_extra_that_installs_it() -> None:
    said = "needs the Python package no_such_library, which is not installed"
    with pytest.raises(EngineError, match=said) as caught, from_extra("cuda"):
        import no_such_library  # noqa: F401
    assert caught.value.remedy == how_to_install("cuda")

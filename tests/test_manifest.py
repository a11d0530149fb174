"""The manifest of an engine: what is noticed, and what stays inside the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import EngineError
from runtime.manifest import MANIFEST_NAME, Manifest


@pytest.fixture
def engine(demo_engine: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "engine"
    folder.mkdir()
    for path in demo_engine.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / MANIFEST_NAME).unlink()
    shutil.copy(demo_engine / MANIFEST_NAME, folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / MANIFEST_NAME).read_text())
    change(values)
    (folder / MANIFEST_NAME).write_text(json.dumps(values))


@pytest.mark.portable
def test_what_is_written_is_read(engine: Path) -> None:
    manifest = Manifest.read(engine)
    (engine / MANIFEST_NAME).unlink()
    manifest.write(engine)
    assert Manifest.read(engine) == manifest
    Manifest.read(engine).check(engine, full=True)


@pytest.mark.portable
def test_order_and_spacing_do_not_matter(engine: Path) -> None:
    before = Manifest.read(engine)
    values = json.loads((engine / MANIFEST_NAME).read_text())
    (engine / MANIFEST_NAME).write_text(json.dumps(dict(reversed(values.items())), indent=4))
    assert Manifest.read(engine) == before


@pytest.mark.portable
@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["capabilities"].clear(),
        lambda values: values["capabilities"].update(cache_dtype="float16"),
        lambda values: values["files"].clear(),
        lambda values: values["model"]["text"].update(num_layers=3),
        lambda values: values.update(source=None),
        lambda values: values.pop("sha256"),
    ],
)
def test_an_altered_manifest_is_refused(change: Callable[[dict[str, Any]], None], engine: Path) -> None:
    edit(engine, change)
    with pytest.raises(EngineError, match="altered since it was written"):
        Manifest.read(engine)


@pytest.mark.portable
@pytest.mark.parametrize("name", ["../decoder.onnx", "/etc/hostname", "..", "a/b"])
def test_a_name_outside_of_the_folder_is_not_looked_at(name: str, engine: Path) -> None:
    manifest = Manifest.read(engine)
    files = dict(manifest.files)
    files[name] = files.pop("decoder.onnx")
    with pytest.raises(EngineError, match="is no name of a file in the engine's folder"):
        Manifest(**{**vars(manifest), "files": files}).check(engine)

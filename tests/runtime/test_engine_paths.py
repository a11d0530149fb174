"""Engines whose files are links, and folders with unusual names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import EngineError
from runtime.model import Qwen3VLModel

ASK = [{"role": "user", "content": "Read the digits."}]


@pytest.fixture
def engine(demo_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_engine, tmp_path / "engine"))


def answer(folder: Path | str) -> list[int]:
    return Qwen3VLModel.from_engine(folder).generate(ASK, max_new_tokens=3).token_ids


def move(engine: Path, is_moved: Callable[[Path], bool], *, into: Path | None = None) -> None:
    """Move files to another folder and leave links, with names of a content store."""
    disk = engine.parent / "disk" if into is None else into
    disk.mkdir()
    for path in sorted(engine.iterdir()):
        if path.is_file() and is_moved(path):
            blob = disk / f"{path.stat().st_ino:064}"
            shutil.move(path, blob)
            path.symlink_to(blob)


def is_weights(path: Path) -> bool:
    return path.suffix == ".data"


def test_weights_alone_behind_links_are_named_with_a_remedy_that_works(engine: Path, tmp_path: Path) -> None:
    expected = answer(engine)
    move(engine, is_weights)
    with pytest.raises(EngineError, match=r"vision.onnx.data is a symlink to .*, away from vision.onnx") as caught:
        answer(engine)
    assert "build the engine again" not in str(caught.value)
    assert f"cp -rL {engine} NEW" in str(caught.value)
    shutil.copytree(engine, tmp_path / "copied")  # follows links, as cp -rL
    assert answer(tmp_path / "copied") == expected


@pytest.mark.parametrize("kind", ["folder", "all files", "inside"])
def test_links_that_are_opened(engine: Path, tmp_path: Path, kind: str) -> None:
    expected = answer(engine)
    opened = engine
    if kind == "folder":
        opened = tmp_path / "link"
        opened.symlink_to(engine)
    elif kind == "all files":
        move(engine, lambda path: True)
    else:
        move(engine, is_weights, into=engine / "weights")
    assert answer(opened) == expected


@pytest.mark.skipif(os.name != "posix", reason="names are UTF-16 elsewhere")
def test_a_folder_whose_name_is_not_utf8_is_named_with_a_remedy_that_works(engine: Path, tmp_path: Path) -> None:
    expected = answer(engine)
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9t\xe9\x1b[2J")
    engine.rename(odd)
    with pytest.raises(EngineError, match=r"the folder's name is not UTF-8.*\n.*ln -s FOLDER engine") as caught:
        answer(odd)
    assert caught.value.message.isprintable() and r"\udce9t\udce9\x1b[2J" in caught.value.message
    (tmp_path / "link").symlink_to(odd)
    assert answer(tmp_path / "link") == expected
    assert np.isfinite(expected).all() and expected

"""Folders that this user may not search: an error of ours with its remedy, whichever door they come through."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engines.quantize.calibration_data import read_prompts
from helpers.command_line import call
from helpers.permissions import as_plain_user
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.cli import export, run
from qwen3vl_export.cli.targets import model_shape
from qwen3vl_export.parity.lowered import is_lowered
from runtime.errors import CheckpointError, EngineError, Qwen3VLError, UsageError
from runtime.files import is_folder, leads_somewhere
from runtime.manifest import Manifest
from runtime.model import Qwen3VLModel


@contextmanager
def closed(folder: Path, mode: int = 0) -> Iterator[None]:
    """Let nobody look into a folder, not even root."""
    folder.chmod(mode)
    try:
        with as_plain_user():
            yield
    finally:
        folder.chmod(0o700)


DOORS: dict[str, tuple[Callable[[Path], Any], type[Qwen3VLError]]] = {
    "Manifest.read": (Manifest.read, EngineError),
    "from_engine": (Qwen3VLModel.from_engine, EngineError),
    "is_lowered": (is_lowered, EngineError),
    "Checkpoint.open": (lambda folder: Checkpoint.open(str(folder)), CheckpointError),
    "model_shape": (lambda folder: model_shape(str(folder)), CheckpointError),
    "read_prompts": (read_prompts, UsageError),
}


@pytest.mark.portable
@pytest.mark.parametrize("name", list(DOORS))
def test_a_folder_below_one_that_may_not_be_searched(name: str, tmp_path: Path) -> None:
    enter, kind = DOORS[name]
    folder = tmp_path / "closed" / "model"
    folder.mkdir(parents=True)
    with closed(folder.parent), pytest.raises(kind) as caught:
        enter(folder)
    assert f"{folder}" in caught.value.message and "Permission denied" in caught.value.message
    assert "chmod u+x" in str(caught.value.remedy)


@pytest.mark.portable
@pytest.mark.parametrize("mode", [0, 0o400, 0o100], ids=["nothing", "listing", "searching"])
@pytest.mark.parametrize("name", list(DOORS))
def test_a_folder_that_is_closed_itself(name: str, mode: int, tmp_path: Path) -> None:
    """Whoever may list it sees names and reads no file; whoever may search it opens files whose names are known."""
    enter, kind = DOORS[name]
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("engine.json", "config.json", "prompts.txt"):
        (folder / file).write_text("{}")
    if name == "is_lowered" and mode == 0o100:
        with closed(folder, mode):
            assert not is_lowered(folder)
        return
    with closed(folder, mode), pytest.raises(kind) as caught:
        enter(folder)
    assert str(folder) in caught.value.message and caught.value.remedy


@pytest.mark.parametrize(
    ("app", "arguments", "code"),
    [
        (run.app, ["run", "FOLDER", "Hello"], EngineError.exit_code),
        (run.app, ["inspect", "FOLDER"], EngineError.exit_code),
        (run.app, ["verify", "FOLDER", "--checkpoint", "demo", "--reference", "own"], EngineError.exit_code),
        (run.app, ["verify", "FOLDER", "--checkpoint", "demo", "--tasks"], EngineError.exit_code),
        (run.app, ["verify", "--ranges", "--checkpoint", "FOLDER"], CheckpointError.exit_code),
        (run.app, ["chat", "FOLDER"], EngineError.exit_code),
        (run.app, ["bench", "FOLDER"], EngineError.exit_code),
        (run.app, ["targets", "--model", "FOLDER"], CheckpointError.exit_code),
        (export.app, ["FOLDER"], CheckpointError.exit_code),
        (export.app, ["demo", "--target", "ort-cpu-int4", "--calibration", "FOLDER"], UsageError.exit_code),
        (export.app, ["demo", "--target", "ort-cpu-fp32", "--output", "FOLDER"], UsageError.exit_code),
        (export.app, ["demo", "--bundle", "FOLDER"], UsageError.exit_code),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_say_so(app: Any, arguments: list[str], code: int, tmp_path: Path) -> None:
    folder = tmp_path / "closed" / "model"
    folder.mkdir(parents=True)
    with closed(folder.parent):
        found, out, err = call(app, *(str(folder) if each == "FOLDER" else each for each in arguments))
    assert (found, out) == (code, ""), err
    assert f"error: {folder}: " in err and "Permission denied" in err and "\n  remedy: " in err


@pytest.mark.parametrize("options", [["--reference", "own"], ["--tasks", "--limit", "1"]])
def test_a_checkpoint_to_compare_with(options: list[str], demo_engine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "closed" / "model"
    folder.mkdir(parents=True)
    with closed(folder.parent):
        code, _, err = call(run.app, "verify", str(demo_engine), "--checkpoint", str(folder), "--quiet", *options)
    assert code == CheckpointError.exit_code and f"error: {folder}" in err and "chmod u+x" in err


def test_an_image_that_may_not_be_looked_at(demo_engine: Path, tmp_path: Path) -> None:
    image = tmp_path / "closed" / "a.png"
    image.parent.mkdir()
    image.touch()
    with closed(image.parent):
        code, _, err = call(run.app, "run", str(demo_engine), "Count.", "--image", str(image))
    assert code in (UsageError.exit_code, 7) and f"{image}" in err and "Permission denied" in err


def test_a_checkpoint_beside_a_closed_folder_is_found(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (tmp_path / "closed").mkdir()
    with closed(tmp_path / "closed"), pytest.raises(CheckpointError, match="lies one folder deeper, in model"):
        Checkpoint.open(str(tmp_path))


@pytest.mark.portable
def test_what_leads_nowhere_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to(".")
    for name in ("absent", "file/below", "loop", "x" * 300, "nul\0", "\ud800"):
        assert not is_folder(tmp_path / name) and not leads_somewhere(tmp_path / name)
    assert is_folder(tmp_path / "link") and not is_folder(tmp_path / "file") and leads_somewhere(tmp_path / "file")


@pytest.mark.portable
def test_another_failure_of_the_system_is_no_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> os.stat_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("runtime.files.os.stat", fail)
    with pytest.raises(UsageError, match="cannot be looked at: Input/output error") as caught:
        is_folder("/some/folder", error=UsageError)
    monkeypatch.undo()
    assert caught.value.remedy == "check the disk that it lies on"

"""The output folder: what may be replaced, and what survives an interrupt at any point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engines.output import check_output, output_folder
from runtime.errors import UsageError


def engine(folder: Path, mark: str) -> Path:
    folder.mkdir()
    for name in ("engine.json", "decoder.onnx"):
        (folder / name).write_text(mark)
    return folder


def replace(output: Path) -> None:
    with output_folder(output, 0) as folder:
        (folder / "engine.json").write_text("new")


@pytest.mark.portable
def test_an_engine_is_replaced_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    output = engine(tmp_path / "out", "old")
    replace(output)
    assert [path.name for path in output.iterdir()] == ["engine.json"]
    assert (output / "engine.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.portable
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_in_the_exchange_leaves_one_whole_engine(
    call: int, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = engine(tmp_path / "out", "old")
    original, calls = Path.rename, 0

    def rename(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == call and moment == "before":
            raise KeyboardInterrupt
        renamed = original(self, target)
        if calls == call and moment == "after":
            raise KeyboardInterrupt
        return renamed

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        replace(output)
    assert (output / "engine.json").read_text() == ("new" if (call, moment) == (2, "after") else "old")
    assert list(tmp_path.iterdir()) == [output]


def tokenizer_folder(path: Path) -> None:
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (path / name).write_text("mine")


def engine_and_notes(path: Path) -> None:
    engine(path, "old")
    (path / "notes.txt").write_text("mine")


@pytest.mark.portable
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tokenizer_folder, "neither an engine nor empty"),
        (engine_and_notes, "neither an engine nor empty"),
        (lambda path: path.write_text("mine"), "neither an engine nor empty"),
        (lambda path: path.symlink_to("nowhere"), "a link to nothing"),
    ],
)
def test_what_is_not_ours_stays(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "out")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=message):
        replace(tmp_path / "out")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.portable
def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be made"):
        check_output(tmp_path / ("x" * 300))


@pytest.mark.portable
@pytest.mark.parametrize(
    "names", [["engine.json"], ["lowered.json"], ["bundle.json"], ["decoder.onnx", "vision.onnx"], []]
)
def test_what_the_exporter_writes_may_be_replaced(names: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).touch()
    check_output(tmp_path / "out")

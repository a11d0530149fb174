"""Files that are whole or absent, and what is said when they cannot be written."""

from __future__ import annotations

import errno
import os
import resource
import stat
from pathlib import Path

import pytest

from engines.disk import check_disk_space, check_file, check_file_size, replace_text, replaced_file
from runtime.errors import CapacityError, UsageError

pytestmark = pytest.mark.portable


def test_a_file_is_replaced_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.md"
    for text in ("old", "é\n"):
        replace_text(path, text)
        assert path.read_bytes() == text.encode()
    assert [each.name for each in path.parent.iterdir()] == ["table.md"]


def test_an_error_or_an_interrupt_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    path.write_text("old")
    for error in (KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(error), replaced_file(path) as partial:
            assert partial.suffix == ".svg" and partial.parent == tmp_path
            partial.write_text("half")
            raise error
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("plot.svg", "old")]


def test_permissions_are_those_of_the_older_file_or_of_any_new_one(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    (tmp_path / "old").chmod(0o640)
    mask = os.umask(0o027)
    try:
        for name in ("old", "new"):
            replace_text(tmp_path / name, "text")
    finally:
        os.umask(mask)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("old", "new")] == [0o640, 0o640]


def test_a_link_is_followed_and_a_pipe_is_written_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    replace_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    with replaced_file(tmp_path / "pipe") as partial:
        assert partial == tmp_path / "pipe"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, CapacityError), (errno.EACCES, UsageError)])
def test_a_folder_that_cannot_be_written(
    code: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(error, match=f"{tmp_path}/plot.svg: ") as raised:
        check_file(tmp_path / "plot.svg")
    assert raised.value.remedy


def test_a_check_of_a_file_leaves_nothing_and_refuses_a_folder(tmp_path: Path) -> None:
    check_file(tmp_path / "plot.svg")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="it is a folder, but a file has to be written"):
        check_file(tmp_path)


def test_room_and_limits_are_compared_with_what_is_needed(tmp_path: Path) -> None:
    check_disk_space(tmp_path, 1)
    with pytest.raises(CapacityError, match=r"1000000000000\.00 GB are needed"):
        check_disk_space(tmp_path, 10**21)
    check_file_size(tmp_path, 10**21)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        check_file_size(tmp_path, 4096)
        with pytest.raises(CapacityError, match="RLIMIT_FSIZE"):
            check_file_size(tmp_path, 4097)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

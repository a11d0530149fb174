"""The output folder: what may be replaced, and what survives an interrupt at any point."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.exchange import exchange
from engines.output import check_output, output_folder
from helpers import ROOT
from runtime.errors import CapacityError, UsageError


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
@pytest.mark.parametrize("has_exchange", [True, False])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_in_the_exchange_waits_until_the_new_engine_is_whole(
    number: int, moment: str, has_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = engine(tmp_path / "out", "old")
    original = exchange

    def interrupted(first: Path, second: Path) -> bool:
        if moment == "before":
            signal.raise_signal(number)
        is_done = has_exchange and original(first, second)
        if moment == "after":
            signal.raise_signal(number)
        return is_done

    monkeypatch.setattr("engines.output.exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(output)
    assert (output / "engine.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [output]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.portable
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_while_writing_leaves_the_older_engine_and_nothing_else(number: int, tmp_path: Path) -> None:
    output = engine(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), output_folder(output, 0) as folder:
        (folder / "engine.json").write_text("new")
        signal.raise_signal(number)
    assert (output / "engine.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.portable
def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with output_folder(tmp_path / "out", 0) as folder:
            (folder / "engine.json").write_text("new")
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "out" / "engine.json").read_text() == "new"


def died_in(step: Callable[[], None]) -> int:
    """Run a step in a process of its own; return the signal that ended it, or 0."""
    process = multiprocessing.get_context("fork").Process(target=step)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return max(0, -process.exitcode)


@pytest.mark.portable
@pytest.mark.parametrize("call", [1, 2])
def test_two_renames_that_a_kill_parts_are_mended_by_the_next_run(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = engine(tmp_path / "out", "old")
    monkeypatch.setattr("engines.output.exchange", lambda *_: False)
    original, calls = os.rename, 0

    def rename(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        original(source, target)

    def killed() -> None:
        os.rename = rename
        replace(output)

    assert died_in(killed) == signal.SIGKILL
    assert output.exists() == (call == 1)
    check_output(output)  # the next run, before it does anything
    assert (output / "engine.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]
    replace(output)
    assert (output / "engine.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [output]


def kill_while_writing(output: Path) -> None:
    with output_folder(output, 0) as folder:
        (folder / "decoder.onnx.data").write_bytes(bytes(1000))
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.portable
def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    for name in ("a", "b"):  # another output of the same folder
        assert died_in(lambda name=name: kill_while_writing(tmp_path / name)) == signal.SIGKILL
    (dead,) = tmp_path.iterdir()  # the second run removed what the first had left
    with output_folder(tmp_path / "living", 0) as folder:
        (folder / "engine.json").write_text("new")
        assert not dead.exists()
        check_output(tmp_path / "other")
        replace(tmp_path / "other")
        assert (folder / "engine.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["living", "other"]


@pytest.mark.portable
@pytest.mark.parametrize(("age_s", "stays"), [(0, True), (100_000, False)])
def test_a_leftover_of_another_boot_or_host_stays_for_a_day(age_s: int, stays: bool, tmp_path: Path) -> None:
    died_in(lambda: kill_while_writing(tmp_path / "out"))
    (left,) = tmp_path.iterdir()
    (left / "lock").write_text(json.dumps({"boot": "another", "output": "out"}))
    for path in left.rglob("*"):
        os.utime(path, (time.time() - age_s,) * 2)
    replace(tmp_path / "out")
    assert left.exists() == stays


@pytest.mark.portable
@pytest.mark.parametrize("name", [".qwen3vl-notes", ".qwen3vl-ABCDEFGH", "qwen3vl-abcdefgh", ".qwen3vl-abcdefgh9"])
def test_names_that_are_not_those_of_our_folders_stay(name: str, tmp_path: Path) -> None:
    engine(tmp_path / name, "mine")
    replace(tmp_path / "out")
    assert (tmp_path / name / "engine.json").read_text() == "mine"


@pytest.mark.portable
def test_a_link_in_the_place_of_a_leftover_is_not_followed(tmp_path: Path) -> None:
    precious = engine(tmp_path / "precious", "mine")
    (tmp_path / ".qwen3vl-abcdefgh").symlink_to(precious)
    replace(tmp_path / "out")
    assert sorted(os.listdir(precious)) == ["decoder.onnx", "engine.json"]


@pytest.mark.portable
@pytest.mark.parametrize("record", ["", "[]", "{", '{"output": "../precious"}', '{"output": 5}', '{"output": "/"}'])
def test_a_leftover_with_a_strange_record_harms_nothing(record: str, tmp_path: Path) -> None:
    precious = engine(tmp_path / "precious", "mine")
    folder = tmp_path / "in" / ".qwen3vl-abcdefgh"
    (folder / "old000").mkdir(parents=True)
    (folder / "lock").write_text(record)
    replace(tmp_path / "in" / "out")
    assert (precious / "engine.json").read_text() == "mine"
    assert (tmp_path / "in" / "out" / "engine.json").read_text() == "new"


@pytest.mark.portable
def test_the_working_directory_is_filled_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = engine(tmp_path / "out", "old")
    (output / "decode_plan_sm90.bin").write_text("old")
    inode = output.stat().st_ino
    monkeypatch.chdir(output)
    with output_folder(Path(), 0) as folder:
        assert folder.parent.parent == output
        (folder / "engine.json").write_text("new")
        (folder / "vision.onnx").write_text("new")
    assert {path.name: path.read_text() for path in Path().iterdir()} == {"engine.json": "new", "vision.onnx": "new"}
    assert output.stat().st_ino == inode


@pytest.mark.portable
def test_a_link_is_followed(tmp_path: Path) -> None:
    real = engine(tmp_path / "real", "old")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "link").symlink_to(real)
    replace(tmp_path / "other" / "link")
    assert (tmp_path / "other" / "link").is_symlink()
    assert (real / "engine.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["engine.json", "link", "other", "real"]


@pytest.mark.portable
def test_notes_that_came_while_writing_stay(tmp_path: Path) -> None:
    output = engine(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="neither an engine nor empty"), output_folder(output, 0) as folder:
        (folder / "engine.json").write_text("new")
        (output / "notes.txt").write_text("mine")
    assert (output / "notes.txt").read_text() == "mine"
    assert (output / "engine.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.portable
@pytest.mark.parametrize("has_exchange", [True, False])
@pytest.mark.parametrize("exists", [True, False])
def test_of_two_at_once_both_end_and_one_whole_engine_stays(
    exists: bool, has_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_exchange:
        monkeypatch.setattr("engines.output.exchange", lambda *_: False)
    context = multiprocessing.get_context("fork")
    for turn in range(10):
        parent = tmp_path / str(turn)
        parent.mkdir()
        if exists:
            engine(parent / "out", "old")
        barrier = context.Barrier(2)

        def write(mark: str, output: Path = parent / "out", barrier: Any = barrier) -> None:
            with output_folder(output, 0) as folder:
                for name in ("engine.json", "decoder.onnx"):
                    (folder / name).write_text(mark)
                barrier.wait(300)

        both = [context.Process(target=write, args=(mark,)) for mark in "ab"]
        for each in both:
            each.start()
        for each in both:
            each.join(60)
        assert [each.exitcode for each in both] == [0, 0]
        contents = {(parent / "out" / name).read_text() for name in ("engine.json", "decoder.onnx")}
        assert contents in ({"a"}, {"b"})
        assert [path.name for path in parent.iterdir()] == ["out"]


@pytest.mark.portable
def test_files_larger_than_the_process_may_write_are_refused_before_any_work(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        with pytest.raises(CapacityError, match=r"may write files of at most 1\.0 MB") as raised:
            check_output(tmp_path / "new" / "out", 9 << 20)
        with pytest.raises(CapacityError, match="became larger"), output_folder(tmp_path / "out", 0) as folder:
            (folder / "decoder.onnx.data").write_bytes(bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "ulimit -f unlimited" in str(raised.value.remedy)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.portable
@pytest.mark.parametrize("name", ["out", "new/out", "link"])
def test_too_little_room_is_told_of_the_output_and_not_of_our_folder_beside_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    output = tmp_path / name
    with pytest.raises(CapacityError, match=r": 1000000000000\.07 GB are needed, ") as raised:
        check_output(output, 10**21)
    assert raised.value.message.startswith(f"{output}: ") and "qwen3vl-" not in raised.value.message
    with pytest.raises(CapacityError, match=f"^{output}: "), output_folder(output, 10**21):
        pytest.fail("the block runs")


@pytest.mark.portable
@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (errno.ENOSPC, CapacityError, "the disk is full"),
        (errno.EDQUOT, CapacityError, "the disk quota is used up"),
        (errno.EROFS, UsageError, "read-only"),
        (errno.EACCES, UsageError, "not writable for this user"),
    ],
)
def test_a_folder_that_cannot_be_written_is_found_before_any_work(
    code: int, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(error, match=message) as raised:
        check_output(tmp_path / "new" / "out")
    assert raised.value.remedy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.portable
def test_errors_of_what_is_written_are_ours_and_those_of_what_is_read_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="No such file or directory"), output_folder(tmp_path / "out", 0) as folder:
        folder.rmdir()  # by whoever tidies up
        (folder / "engine.json").write_text("new")
    with pytest.raises(FileNotFoundError), output_folder(tmp_path / "out", 0):
        (tmp_path / "checkpoint").read_text()

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UsageError, match="Input/output error"):
        replace(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.portable
def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.portable
@pytest.mark.parametrize("name", ["a\0b", "\ud800", "file/out", "file/a/out", "x" * 300])
def test_a_place_that_cannot_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be made|not a file name|or a folder above it, is a file") as raised:
        check_output(tmp_path / name)
    assert raised.value.remedy


MOUNTED = """
import os, sys
from pathlib import Path
from engines.output import output_folder
from runtime.errors import Qwen3VLError
try:
    with output_folder(Path(sys.argv[1]), int(sys.argv[2])) as folder:
        (folder / "engine.json").write_text("new")
        (folder / "decoder.onnx.data").write_bytes(bytes(int(sys.argv[3])))
except Qwen3VLError as error:
    print(type(error).__name__, str(error).replace(sys.argv[1], "OUT"))
print(*sorted(os.listdir(sys.argv[1])), (Path(sys.argv[1]) / "engine.json").read_text())
"""
TMPFS = 'mount -t tmpfs -o size=80m tmpfs "$0" && echo old > "$0"/engine.json'
BOUND = 'echo old > "$0"/engine.json; mount --bind "$0" "$0"'


@pytest.mark.portable
@pytest.mark.parametrize(
    ("mount", "num_bytes", "written", "expected"),
    [
        (TMPFS, 0, 10, ["decoder.onnx.data engine.json new"]),
        (BOUND, 0, 10, ["decoder.onnx.data engine.json new"]),
        (f'{TMPFS}; mkdir -m 700 "$0"/lost+found', 0, 10, ["decoder.onnx.data engine.json lost+found new"]),
        (f'{BOUND} && mount -o remount,ro,bind "$0"', 0, 10, ["UsageError OUT: the file system is read-only"]),
        (TMPFS, 60 << 20, 10, ["CapacityError OUT: 0.13 GB are needed, 0.08 GB are free"]),
        (TMPFS, 0, 90 << 20, ["CapacityError OUT: the disk is full"]),
    ],
    ids=["tmpfs", "bound", "lost+found", "read-only", "too small", "becomes full"],
)
def test_a_mount_point_is_filled_where_it_is_or_left_as_it_was(
    mount: str, num_bytes: int, written: int, expected: list[str], tmp_path: Path
) -> None:
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this process may make no mount namespace")
    script = f'{mount} && exec "$@"'
    python = [sys.executable, "-c", MOUNTED, str(tmp_path), str(num_bytes), str(written)]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(tmp_path), *python]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for each in expected:
        assert each in done.stdout
    if "Error" in expected[0]:
        assert done.stdout.endswith("engine.json old\n\n") and "  remedy: " in done.stdout


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
        (lambda path: path.symlink_to("nowhere"), "a broken link"),
    ],
)
def test_what_is_not_ours_stays(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "out")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=message) as raised:
        replace(tmp_path / "out")
    assert str(raised.value).startswith(str(tmp_path / "out")) and str(raised.value).count("remedy") == 1
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.portable
@pytest.mark.parametrize(
    "names",
    [
        *(["engine.json"], ["lowered.json"], ["bundle.json"], ["decoder.onnx", "vision.onnx"], []),
        ["engine.json", "decode_plan.json", "decode_plan_sm90.bin", "decode_plan_sm120.bin"],
    ],
)
def test_what_the_exporter_writes_may_be_replaced(names: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).touch()
    check_output(tmp_path / "out")


@pytest.mark.portable
def test_two_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    first, second = engine(tmp_path / "first", "a"), engine(tmp_path / "second", "b")
    if not exchange(first, second):
        pytest.skip("the file system of the temporary folder has no RENAME_EXCHANGE")
    assert [(path / "engine.json").read_text() for path in (first, second)] == ["b", "a"]
    with pytest.raises(FileNotFoundError):
        exchange(first, tmp_path / "missing")
    assert (first / "engine.json").read_text() == "b"

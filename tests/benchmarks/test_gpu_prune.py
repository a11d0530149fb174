"""Machine code of other GPUs is zeroed, and nothing else of the library changes."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from benchmarks.gpu.prune import MACHINE_CODE, MAGIC, PTX, fat_binaries, prune

BEFORE, AFTER = b"code of the host ", b" and its data"


def entry(kind: int, sm: int, code: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0x101, 64, len(code)).ljust(28, b"\0") + struct.pack("<I", sm)
    return header.ljust(64, b"\1") + code


def fat_binary(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", MAGIC, 1, 16, len(body)) + body


def library(tmp_path: Path, *binaries: bytes) -> Path:
    path = tmp_path / "lib.so"
    path.write_bytes(BEFORE + b"-".join(binaries) + AFTER)
    return path


def test_only_code_of_the_gpu_stays(tmp_path: Path) -> None:
    path = library(tmp_path, fat_binary(entry(MACHINE_CODE, 80, b"a" * 40), entry(MACHINE_CODE, 90, b"b" * 24)))
    before = path.read_bytes()
    found = prune(path, 90)
    assert path.read_bytes() == before.replace(b"a" * 40, bytes(40))
    assert (found.kept_bytes, found.zeroed_bytes, found.num_fat_binaries, found.num_without_code) == (24, 40, 1, 0)
    assert found.bytes_by_sm == {80: 40, 90: 24}


@pytest.mark.parametrize(
    ("sm", "kept"),
    [(80, "a"), (86, "ab"), (89, "ab"), (90, "c"), (100, "d"), (120, "d"), (75, "")],
    ids=["8.0", "8.6", "8.9 runs code of 8.6", "9.0", "10.0 takes PTX", "12.0 takes PTX", "7.5 has nothing"],
)
def test_a_gpu_keeps_what_it_runs(tmp_path: Path, sm: int, kept: str) -> None:
    entries = {"a": (MACHINE_CODE, 80), "b": (MACHINE_CODE, 86), "c": (MACHINE_CODE, 90), "d": (PTX, 90)}
    path = library(tmp_path, fat_binary(*(entry(kind, of, name.encode() * 32) for name, (kind, of) in entries.items())))
    found = prune(path, sm)
    data = path.read_bytes()
    assert "".join(name for name in entries if name.encode() * 32 in data) == kept
    assert found.num_without_code == (not kept)


def test_the_same_bytes_elsewhere_are_no_fat_binary(tmp_path: Path) -> None:
    stray = struct.pack("<IHHQ", MAGIC, 7, 16, 8) + b"constant"
    path = library(tmp_path, stray, fat_binary(entry(MACHINE_CODE, 80, b"a" * 8)))
    assert [[each.sm for each in entries] for entries in fat_binaries(path.read_bytes())] == [[80]]
    prune(path, 90)
    assert stray in path.read_bytes()


def test_an_entry_of_an_unknown_kind_is_not_touched_but_refused(tmp_path: Path) -> None:
    path = library(tmp_path, fat_binary(entry(9, 80, b"a" * 8)))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="kind 9"):
        prune(path, 90)
    assert path.read_bytes() == before

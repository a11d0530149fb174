"""Zero the machine code of other GPUs in a library's fat binaries, so that the library compresses well.

A fat binary (the section `.nv_fatbin`) is a header and entries, each code for one architecture, machine code or PTX
(NVIDIA's fatbinary.h; `cuobjdump --list-elf` lists the same). Sizes and places stay, so the library loads as before:
an entry of another architecture is one that the driver does not look at.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MAGIC = 0xBA55ED50
PTX, MACHINE_CODE = 1, 2
_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of all entries
_ENTRY = struct.Struct("<HHIQ")  # kind, unknown, bytes of this header, bytes of the code
_ARCHITECTURE_AT = 28
_LEAST_ENTRY_BYTES, _MOST_ENTRY_BYTES = 40, 4096


@dataclass(frozen=True)
class Entry:
    """One entry of a fat binary: kind, SM version such as 90, and where its code lies in the file."""

    kind: int
    sm: int
    start: int
    num_bytes: int


@dataclass
class Pruned:
    """What was done to a library.

    Attributes:
        kept_bytes, zeroed_bytes: Of code.
        num_fat_binaries: How many there were.
        num_without_code: How many of them have nothing that the GPU runs.
        bytes_by_sm: Bytes of machine code that the library had, by SM version.
    """

    kept_bytes: int = 0
    zeroed_bytes: int = 0
    num_fat_binaries: int = 0
    num_without_code: int = 0
    bytes_by_sm: Counter[int] = field(default_factory=Counter)


def fat_binaries(data: bytes | bytearray | mmap.mmap) -> Iterator[list[Entry]]:
    """Yield the entries of each fat binary of a library."""
    magic = struct.pack("<I", MAGIC)
    position = data.find(magic)
    while position >= 0:
        entries, end = _entries(data, position)
        if entries:
            yield entries
        position = data.find(magic, end)


def runs_on(entries: list[Entry], sm: int) -> list[Entry]:
    """Return those entries that a GPU takes: machine code of its generation up to its version, else PTX up to it."""
    code = [each for each in entries if each.kind == MACHINE_CODE and each.sm // 10 == sm // 10 and each.sm <= sm]
    return code or [each for each in entries if each.kind == PTX and each.sm <= sm]


def prune(path: Path, sm: int) -> Pruned:
    """Zero in place all code of a library that a GPU of version `sm`, such as 90, does not run."""
    result = Pruned()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        for entries in fat_binaries(data):
            kept = runs_on(entries, sm)
            result.num_fat_binaries += 1
            result.num_without_code += not kept
            for entry in entries:
                if entry.kind == MACHINE_CODE:
                    result.bytes_by_sm[entry.sm] += entry.num_bytes
                if entry in kept:
                    result.kept_bytes += entry.num_bytes
                else:
                    data[entry.start : entry.start + entry.num_bytes] = bytes(entry.num_bytes)
                    result.zeroed_bytes += entry.num_bytes
    return result


def _entries(data: bytes | bytearray | mmap.mmap, position: int) -> tuple[list[Entry], int]:
    """Return the entries of the fat binary at `position`, none if there is none, and where to look on."""
    after = position + 4
    if position + _HEADER.size > len(data):
        return [], after
    _, version, header_bytes, num_bytes = _HEADER.unpack_from(data, position)
    end = position + header_bytes + num_bytes
    if version != 1 or header_bytes != _HEADER.size or end > len(data):
        return [], after  # the same four bytes in another place
    entries, at = [], position + header_bytes
    while at + _ENTRY.size + _ARCHITECTURE_AT <= end:
        kind, _, entry_bytes, code_bytes = _ENTRY.unpack_from(data, at)
        is_known = kind in (PTX, MACHINE_CODE) and _LEAST_ENTRY_BYTES <= entry_bytes <= _MOST_ENTRY_BYTES
        if not is_known or at + entry_bytes + code_bytes > end:
            raise ValueError(f"byte {at}: an entry of kind {kind} with a header of {entry_bytes} bytes is not known")
        (sm,) = struct.unpack_from("<I", data, at + _ARCHITECTURE_AT)
        entries.append(Entry(kind, sm, at + entry_bytes, code_bytes))
        at += entry_bytes + code_bytes
    return entries, end

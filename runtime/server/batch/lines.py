"""The file of requests: read line by line, each with an id that is made of what it holds."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from runtime.errors import Qwen3VLError, UsageError
from runtime.files import NotRegularError, open_regular
from runtime.server.bodies import parse_json
from runtime.server.errors import ApiError
from runtime.shown import shown

ID = "batch_req_"
_ID_DIGITS = 32
_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20

Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class Line:
    """One request of a batch.

    Attributes:
        number: Of the line, from 1.
        line_id: `batch_req_` and a digest of the line; one without custom_id counts its number in, so that no two lines
            of a file have one id.
        custom_id: The caller's name for it; None if it has none.
        values: What the line holds; None if it is no request.
        problem: Why it is none; empty otherwise.
    """

    number: int
    line_id: str
    custom_id: str | None
    values: dict[str, Any] | None
    problem: str

    @property
    def key(self) -> int:
        """Number by which its result is known: of its custom_id, or of the line if it has none."""
        return key_of(self.custom_id, self.line_id)


@dataclass(frozen=True)
class Contents:
    """What lines a file has, in 24 bytes for each.

    Attributes:
        numbers: Of the lines.
        keys: `Line.key` of each.
        ids: The first 64 bits of the digest of each.
    """

    numbers: Keys
    keys: Keys
    ids: Keys

    def __len__(self) -> int:
        return len(self.numbers)


def key_of(custom_id: str | None, line_id: str) -> int:
    """Return 64 bits that tell requests apart: of the custom_id, or else of the line."""
    name = f"id {custom_id}" if custom_id is not None else f"line {line_id}"
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def number_of(line_id: str) -> int:
    """Return the first 64 bits of the digest in an id.

    Raises:
        ValueError: It is no id of a line.
    """
    digits = line_id.removeprefix(ID)
    if len(digits) != _ID_DIGITS or len(line_id) != len(ID) + _ID_DIGITS:
        raise ValueError(line_id)
    return int(digits, 16) >> (_ID_DIGITS * 4 - 64)


def read_lines(path: Path, max_bytes: int) -> Iterator[Line]:
    """Yield the requests of a file; empty lines are none. A line that is no request is yielded with its problem.

    Args:
        path: The file.
        max_bytes: Longest line that is read; of a longer one, only the digest is computed.

    Raises:
        UsageError: The file is missing, no regular file, or cannot be read.
    """
    try:
        with open(open_regular(path), "rb") as file:
            number = 0
            while True:
                number += 1
                raw, digest = _read_line(file, max_bytes)
                if number == 1:
                    raw = raw.removeprefix(_BOM)
                if not raw:
                    return
                raw = raw.strip()
                if raw:
                    yield _parse(raw, number, max_bytes, digest)
    except NotRegularError as error:
        raise UsageError(
            f"{path}: expected a file, found {error.strerror}",
            remedy="write the requests into a file: it is read twice",
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, Qwen3VLError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path}: cannot be read: {reason}", remedy="check the path, and its permissions") from error


def scan(path: Path, max_bytes: int) -> Contents:
    """Read a file of requests once, before any of them is answered.

    Raises:
        UsageError: It cannot be read, has no request, or has a custom_id twice.
    """
    numbers, keys, ids = array("Q"), array("Q"), array("Q")
    for line in read_lines(path, max_bytes):
        numbers.append(line.number)
        keys.append(line.key)
        ids.append(number_of(line.line_id))
    if not numbers:
        raise UsageError(
            f"{path}: it has no line",
            remedy='write a request on each: {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", '
            '"body": {…}}',
        )
    contents = Contents(*(np.frombuffer(each, np.uint64) for each in (numbers, keys, ids)))
    _check_twice(path, max_bytes, contents)
    return contents


def _check_twice(path: Path, max_bytes: int, contents: Contents) -> None:
    order = np.argsort(contents.keys, kind="stable")
    same = np.flatnonzero(contents.keys[order][1:] == contents.keys[order][:-1])
    # 64 bits may be the same by chance: what is refused is compared.
    pairs = [(int(contents.numbers[order[i]]), int(contents.numbers[order[i + 1]])) for i in same[:1000]]
    wanted = {number for pair in pairs for number in pair}
    if not wanted:
        return
    found = {line.number: line.custom_id for line in read_lines(path, max_bytes) if line.number in wanted}
    for first, second in sorted(pairs):
        if found[first] == found[second]:
            raise UsageError(
                f"{path}: lines {first} and {second} have the same custom_id, {shown(found[first])}",
                remedy="give each request a custom_id of its own: results are found by it",
            )


def _read_line(file: BinaryIO, max_bytes: int) -> tuple[bytes, str]:
    """Return a line, and for one that is too long a part of it and the digest of the whole."""
    raw = file.readline(max_bytes + 2)  # its end, which may be two characters, counts nothing
    if len(raw.rstrip(b"\r\n")) <= max_bytes:
        return raw, ""
    digest, block = hashlib.sha256(raw), raw
    while block and not block.endswith(b"\n"):
        block = file.readline(_BLOCK_BYTES)
        digest.update(block)
    return raw, digest.hexdigest()


def _parse(raw: bytes, number: int, max_bytes: int, digest: str) -> Line:
    if digest:
        problem = f"it has more than {max_bytes} bytes. Remedy: send smaller images, or raise --max-body"
        return Line(number, _id(f"{number} {digest}".encode()), None, None, problem)
    values, custom_id, problem = None, None, ""
    try:
        values = parse_json(raw)
    except ApiError as error:
        problem = error.message.replace("the body is", "it is")
    if not problem and not isinstance(values, dict):
        problem = f"it is {type(values).__name__} and no object. Remedy: write a request in OpenAI's batch format"
    if isinstance(values, dict):
        custom_id = values.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            problem = f"custom_id is {shown(custom_id)}. Remedy: give each request a text of its own as custom_id"
            custom_id = None
    name = raw if custom_id is not None else b"%d %s" % (number, raw)
    return Line(number, _id(name), custom_id, None if problem else values, problem)


def _id(name: bytes) -> str:
    return ID + hashlib.sha256(name).hexdigest()[:_ID_DIGITS]

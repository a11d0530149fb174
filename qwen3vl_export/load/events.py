"""Server-sent events: the values that a stream of bytes holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

MAX_EVENT_BYTES = 16 << 20
"""Longest event that is kept in memory; one of a chat is some hundred bytes."""


class MalformedEventError(ValueError):
    """A stream is not made of events."""


def read_events(pieces: Iterable[bytes]) -> Iterator[bytes]:
    r"""Yield the data of each event as soon as all of it has come.

    Lines end with \n or \r\n. Comments and the fields event, id and retry are passed over, as the data of an event
    that is cut off by the end of the stream is (https://html.spec.whatwg.org/multipage/server-sent-events.html).

    Args:
        pieces: The stream, cut anywhere.

    Raises:
        MalformedEventError: A line is no field, or an event is longer than `MAX_EVENT_BYTES`.
    """
    data: list[bytes] = []
    num_bytes = 0
    for line in _lines(pieces):
        if not line:
            if data:
                yield b"\n".join(data)
            data, num_bytes = [], 0
            continue
        name, colon, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
            num_bytes += len(value)
            if num_bytes > MAX_EVENT_BYTES:
                raise MalformedEventError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        elif not colon or name not in (b"", b"event", b"id", b"retry"):
            raise MalformedEventError("a line is no field of an event")


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")
        if len(rest) > MAX_EVENT_BYTES:
            raise MalformedEventError(f"a line is longer than {MAX_EVENT_BYTES} bytes")

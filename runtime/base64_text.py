"""Base64 as programs write it: in lines, in either alphabet, with or without padding, after a `data:` prefix."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote_to_bytes

from runtime.shown import shown

_BLANK = re.compile(r"[ \t\r\n\f\v]+")
_FOREIGN = re.compile(r"[^A-Za-z0-9+/]")
_TO_STANDARD = str.maketrans("-_", "+/")


def decode_base64(text: str | bytes | bytearray) -> bytes:
    """Decode base64 text (RFC 4648, both alphabets).

    Blanks and line breaks are passed over, also those of MIME and of `base64` of coreutils; padding may be missing; a
    `data:…;base64,` prefix is taken off, and what follows one may be percent-encoded. Nothing else is passed over: text
    with foreign characters is not an image that arrived whole.

    Args:
        text: The text, or its ASCII bytes.

    Raises:
        ValueError: It is not base64; the message says where.
    """
    if not isinstance(text, str):
        text = bytes(text).decode("latin-1")
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or "base64" not in [word.strip().lower() for word in header.split(";")[1:]]:
            raise ValueError(f"its prefix {shown(header, 60)} does not end in ';base64,'")
        if "%" in text:  # a URL's way to write + / and =
            text = unquote_to_bytes(text).decode("latin-1")
    body = _BLANK.sub("", text)
    digits = body.rstrip("=").translate(_TO_STANDARD)
    if not digits:
        raise ValueError("it is empty")
    foreign = _FOREIGN.search(digits)
    if foreign is not None:
        raise ValueError(f"found {shown(foreign[0])} after {foreign.start()} of its characters")
    if len(body) - len(digits) > 2 or len(digits) % 4 == 1:
        raise ValueError(f"{len(digits)} characters and {len(body) - len(digits)} of padding: it is cut short")
    return base64.b64decode(digits + "=" * (-len(digits) % 4))

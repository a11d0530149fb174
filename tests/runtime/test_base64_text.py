"""Base64 as programs write it, and what is said of text that is none."""

from __future__ import annotations

import base64
import random
from urllib.parse import quote

import pytest

from runtime.base64_text import decode_base64

pytestmark = pytest.mark.portable

DATA = bytes(range(256))
TEXT = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.encode(),
        bytearray(TEXT.encode()),
        base64.encodebytes(DATA).decode(),
        base64.encodebytes(DATA).decode().replace("\n", "\r\n"),
        " ".join(TEXT),
        f"\t{TEXT}\n\n",
        base64.urlsafe_b64encode(DATA).decode(),
        TEXT.rstrip("="),
        base64.urlsafe_b64encode(DATA).decode().rstrip("="),
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/png;charset=utf-8;BASE64,\n{base64.encodebytes(DATA).decode()}",
        f"data:;base64,{TEXT}",
        f"data:application/octet-stream;base64,{TEXT}",
        f"data:image/png;base64,{quote(TEXT, safe='')}",
    ],
)
def test_every_form_is_the_same_bytes(text: str | bytes) -> None:
    assert decode_base64(text) == DATA


def test_every_length_with_and_without_padding() -> None:
    draw = random.Random(0)
    for length in range(1, 40):
        data = draw.randbytes(length)
        for text in (base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()):
            assert decode_base64(text) == decode_base64(text.rstrip("=")) == data


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("==", "it is empty"),
        ("data:image/png;base64,", "it is empty"),
        ("ab*d", r"found '\*' after 2 of its characters"),
        ("ab=d", "found '=' after 2"),
        ("abcdé", "found 'é' after 4"),
        ("abcd\ud800", r"found '\\ud800' after 4"),
        ("ab\x00d", r"found '\\x00' after 2"),
        ("abcde", "5 characters and 0 of padding: it is cut short"),
        ("abcd====", "4 characters and 4 of padding"),
        ("data:image/png,abcd", "prefix 'data:image/png' does not end in ';base64,'"),
        ("data:image/png;base64", "prefix .* does not end"),
        ("https://host/a.png", "found ':' after 5"),
    ],
)
def test_other_text_is_refused_with_the_place(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode_base64(text)

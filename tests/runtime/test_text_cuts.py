"""Texts cut in pieces against the same texts as a whole, with every tokenizer whose pattern is known."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import tokenizers

from demo_training.tokenizer import build_tokenizer
from helpers.tokenizer_fixture import build_tokenizer_json
from runtime.errors import CapacityError
from runtime.text_cuts import DIGITS, GPT2_PATTERN, LETTERS, MARKS, QWEN_PATTERN, places_to_cut
from runtime.tokenizer import MAX_WORD_BYTES, Tokenizer

pytestmark = pytest.mark.portable


def settings_of(name: str) -> dict[str, Any]:
    if name == "demo":
        return json.loads(build_tokenizer().to_str())
    settings = json.loads(build_tokenizer_json())
    if name == "gpt2":
        settings["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": GPT2_PATTERN}
    if name == "gpt2 of the library":
        settings["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
        settings["pre_tokenizer"]["use_regex"] = True
    if name == "qwen without NFC":
        settings["normalizer"] = None
    return settings


NAMES = ["demo", "qwen", "qwen without NFC", "gpt2", "gpt2 of the library"]


@cache
def opened(name: str) -> tuple[tokenizers.Tokenizer, re.Pattern[str]]:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(settings_of(name)))
    cuts = places_to_cut(settings_of(name), list(tokenizer.get_added_tokens_decoder().values()))
    assert cuts is not None
    return tokenizer, cuts


def ids_of(tokenizer: tokenizers.Tokenizer, *parts: str) -> list[int]:
    """Return the token ids of texts, each encoded for itself."""
    return [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False).ids]


def words(tokenizer: tokenizers.Tokenizer, *parts: str) -> list[str]:
    """Return the words of texts, as the library makes them of each, NFC first."""
    normal = [part if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(part) for part in parts]
    return [word for part in normal for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(part)]


def num_places(name: str, text: str) -> int:
    """Compare the two parts with the whole at every place where a text may be cut, and return how many there are."""
    tokenizer, cuts = opened(name)
    ids, whole = ids_of(tokenizer, text), words(tokenizer, text)
    places = [match.start() for match in cuts.finditer(text) if 0 < match.start() < len(text)]
    for place in places:
        parts = (text[:place], text[place:])
        assert ids_of(tokenizer, *parts) == ids, (text, place)
        if "<" not in text:  # no added token
            assert words(tokenizer, *parts) == whole, (text, place)
    return len(places)


BITS = [
    *("a", "b", "'s", "'", "'S", "ſ", "K", "é", "e", "\u0301", "\u0338", "=", "<", "\u0323", "1", "2", "٣", "½"),
    *(" ", "  ", "\t", "\n", "\r", "\r\n", "\n\n", "\u00a0", "\u3000", "\u2000", "\u2028", "\x85", "\x1c", "\x0b"),
    *("\u180e", "\u200b", "\ufeff", "п", "ривет", ",", ".", "-", "[", "]", "{", "}", '"', ":", "か", "\u3099", "は"),
    *("。", "、", "字", "가", "\u11a8", "\u1100", "\u1161", "한", "न", "\u093c", "\u0958", "\u0938\u094d\u0924", "ا"),
    *("\u064b", "ก", "\u0e33", "\u0e47", "ა", "😀", "👍🏽", "\u200d", "\ufe0f", "_", "|", "<|im_start|>", "<think>"),
    *("<|", "|>", "im_start", "\u0f0b", "\u0344", "\u0374", "\u037e", "\u1fef", "\u2126", "𝒜", "\U0001e900"),
    *("²", "Ⅷ", "\u09c7", "\u09be", "\u0b47", "\u0b3e", "٠", "\ufb1d"),
]


@pytest.mark.parametrize("name", NAMES)
def test_no_cut_changes_the_tokens_of_a_random_text(name: str) -> None:
    draw, found = random.Random(5), 0
    for _ in range(400):
        some = draw.choice((BITS, draw.sample(BITS, 5)))
        found += num_places(name, "".join(draw.choices(some, k=draw.randrange(2, 14))))
        found += num_places(
            name, "".join(draw.choice((draw.choice(BITS), chr(draw.randrange(0xD800)))) for _ in "x" * 9)
        )
    assert found > 500


def members(ranges: str) -> list[str]:
    everything = "".join(chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000)
    return re.findall(f"[{ranges}]", everything)


@pytest.mark.parametrize("name", ["qwen", "gpt2"])
@pytest.mark.parametrize(("kind", "categories"), [(LETTERS, "L"), (DIGITS, "N"), (MARKS, "PS")])
def test_each_character_is_of_its_kind_and_nfc_leaves_it(name: str, kind: str, categories: str) -> None:
    found = members(kind)
    assert len(found) >= 40
    for c in found:
        assert unicodedata.category(c)[0] in categories, hex(ord(c))
        assert unicodedata.ucd_3_2_0.category(c)[0] in categories or c >= "\U0001f300"
        assert unicodedata.normalize("NFC", c) == c and unicodedata.combining(c) == 0
    # The library's Unicode agrees: the words of the parts are those of the whole, at all places at once.
    tokenizer, cuts = opened(name)
    found = [c for c in found if ord(c) < 0x3400 or ord(c) % 17 == 0 or c in "\u4db5\u9fa5\ud7a3"]
    for i in range(0, len(found), 200):
        text = "\n".join(f"a {c},b {c}1 b{c} .{c}. {c}{c}x" for c in found[i : i + 200])
        places = [0, *(match.start() for match in cuts.finditer(text)), len(text)]
        parts = [text[a:b] for a, b in pairwise(places)]
        assert words(tokenizer, *parts) == words(tokenizer, text)
        assert len(parts) > len(found[i : i + 200])


LONG = {
    "Russian": "привет, мир\n",
    "Russian in one line": "привет, мир ",
    "Korean": "안녕하세요 세계\n",
    "kana": "これはぺんです。",
    "Hindi": "नमस्ते दुनिया\n",
    "Thai": "สวัสดีชาวโลก ",
    "Chinese": "今天，天气",
    "a list": "- [ ] \n",
    "JSON in lines": '{"a": 1},\n',
    "JSON in one line": '{"a":"b","c":[1,2]},',
    "indented brackets": "}\n  }\n  ",
    "emoji and words": "да🙂",
    "emoji and blanks": "🙂 ",
    "a table": "| | |\n",
    "digits": "12",
    "letters of the Osage": "\U000104d8\U000104d9 ",
    "lines of Windows": "слово\r\n",
    "tabs": "—\t",
}


@pytest.mark.parametrize("language", LONG)
def test_a_long_text_of_words_and_lines_is_taken(language: str) -> None:
    text = LONG[language] * (MAX_WORD_BYTES // len(LONG[language].encode()) + 1)
    tokenizer = Tokenizer(build_tokenizer_json())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    part = text[: len(text) // 4]
    assert tokenizer.encode(part) == ids_of(opened("qwen")[0], part)


@pytest.mark.parametrize("text", ["слово, слово\n", '{"a":1},', "a\n b\n "])
def test_gpt2s_words_are_cut_too(text: str) -> None:
    long = text * ((MAX_WORD_BYTES + 100_000) // len(text.encode()))
    contents = json.dumps(settings_of("gpt2"))
    expected = ids_of(tokenizers.Tokenizer.from_str(contents), long)
    assert Tokenizer(contents.encode()).encode(long) == expected


@pytest.mark.parametrize("word", ["x", "字", "🙂", "!", " ", "\n"])
def test_a_word_of_nearly_the_limit_is_taken_wherever_it_begins(word: str) -> None:
    tokenizer = Tokenizer(build_tokenizer_json())
    long = word * (MAX_WORD_BYTES // len(word.encode()) - 5)  # of blanks, the word after them is in the same part
    for before in ("", "слово " * 10_900):
        text = f"{before}a{long}b" + "c d\n" * 20_000
        assert tokenizer.decode(tokenizer.encode(text)) == text
        with pytest.raises(CapacityError, match="has more than 500000 bytes without a place to cut it"):
            tokenizer.encode(f"{before}{long}{word * 20}")


def added(content: str, **of_token: Any) -> dict[str, Any]:
    entry = {"id": 9999, "content": content, "special": False, "normalized": False}
    return entry | {"lstrip": False, "rstrip": False, "single_word": False} | of_token


@pytest.mark.parametrize(
    "content", ["a,b", "x\ny", "55", "a b", "<r_1|>", "é=\u0338b", "a\u2260b", "\n", "x\n", "字。字", "\r\n\n"]
)
@pytest.mark.parametrize("normalized", [False, True])
def test_no_cut_lies_in_an_added_token(content: str, normalized: bool) -> None:
    settings = settings_of("qwen")
    settings["added_tokens"].append(added(content, normalized=normalized))
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(settings))
    cuts = places_to_cut(settings, list(tokenizer.get_added_tokens_decoder().values()))
    assert cuts is not None
    raw = unicodedata.normalize("NFD", content)
    text = (
        f"p, q\n  1 22{content} {content}x{raw}a {content}{content}\n-{raw} 字。か {content[:-1]} {content[1:]}\n\n z "
    )
    ids = ids_of(tokenizer, text)
    assert 9999 in ids or tokenizer.token_to_id(content) in ids
    places = [match.start() for match in cuts.finditer(text)]
    assert len(places) >= 3
    for place in places:
        parts = (text[:place], text[place:])
        assert ids_of(tokenizer, *parts) == ids, place


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}},
        {"model": {"type": "BPE", "dropout": 0.1}},
        {"model": []},
    ],
)
def test_nothing_is_known_of_other_ways_to_make_words(change: dict[str, Any]) -> None:
    assert places_to_cut(settings_of("qwen") | change, []) is None
    assert settings_of("qwen")["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": QWEN_PATTERN}

"""The tokenizer against transformers', and streamed text against the whole."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tokenizer_fixture import PLAIN_ADDED_TOKENS, SPECIAL_TOKENS, build_tokenizer_files, build_tokenizer_json
from runtime.errors import CapacityError, EngineError, UsageError
from runtime.stop_text import AnswerText
from runtime.tokenizer import MAX_WORD_BYTES, Tokenizer

TOKENIZER = Tokenizer(build_tokenizer_json())
REFERENCE = tokenizers.Tokenizer.from_buffer(build_tokenizer_json())
TEXTS = [
    "",
    "What is in the picture?",
    "  two  spaces,\n\n newlines\tand tabs \n",
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi<|im_end|>\n",
    "<think>\nhm\n</think>\n\nfour",
    "Grüße, 日本語, 🙂👍🏽, e\u0301 (composed by NFC), \u0000, \ufffd",
    "<|image_pad|<|image_pad|>|>",
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(build_tokenizer_files(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.judge
@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_transformers(reference: Any, text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == reference.encode(text)
    for skip in (True, False):
        assert TOKENIZER.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)


@pytest.mark.portable
def test_special_tokens_are_skipped_and_other_added_tokens_are_kept() -> None:
    ids = TOKENIZER.encode("<|im_start|>a<think>b</think><|im_end|>")
    assert TOKENIZER.decode(ids) == "a<think>b</think>"
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == "<|im_start|>a<think>b</think><|im_end|>"
    assert TOKENIZER.special_ids == {TOKENIZER.token_id(token) for token in SPECIAL_TOKENS}
    assert TOKENIZER.special_ids.isdisjoint(TOKENIZER.token_id(token) for token in PLAIN_ADDED_TOKENS)
    assert TOKENIZER.num_tokens == max(TOKENIZER.token_id(token) for token in PLAIN_ADDED_TOKENS) + 1


def stream(ids: list[int]) -> list[str]:
    text = AnswerText(TOKENIZER, [], [])
    return ["".join(run.text for run in runs) for runs in (*map(text.push, ids), text.flush())]


# Any ids, also 20 beyond the last token: models pad their vocabulary. Most such sequences are no valid UTF-8.
@pytest.mark.portable
@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, TOKENIZER.num_tokens + 20), max_size=40))
def test_the_pieces_make_the_whole_for_any_ids(ids: list[int]) -> None:
    assert "".join(stream(ids)) == TOKENIZER.decode(ids)


# Bytes alone: every token of the byte alphabet, lead and continuation bytes in any order.
BYTE_IDS = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.num_tokens) if len(TOKENIZER.token_bytes(i)) == 1}


@pytest.mark.portable
@settings(max_examples=300)
@given(data=st.lists(st.sampled_from([0x41, 0x80, 0xBF, 0xC0, 0xC3, 0xE0, 0xE3, 0xED, 0xF0, 0xF4, 0xF5, 0xFF])))
def test_the_pieces_make_the_whole_for_broken_utf8(data: list[int]) -> None:
    ids = [BYTE_IDS[bytes([byte])] for byte in data]
    assert "".join(stream(ids)) == TOKENIZER.decode(ids)


@pytest.mark.portable
@settings(max_examples=200)
@given(text=st.text(max_size=20))
def test_valid_text_comes_as_whole_characters_and_as_soon_as_it_can(text: str) -> None:
    ids = TOKENIZER.encode(text)
    pieces = stream(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)
    content = b""
    for i, token_id in enumerate(ids):
        content += TOKENIZER.token_bytes(token_id)
        # errors="ignore" drops the unfinished character at the end and nothing else of valid text
        assert "".join(pieces[: i + 1]) == content.decode(errors="ignore")


@pytest.mark.portable
def test_an_emoji_waits_for_its_last_byte() -> None:
    assert BYTE_IDS.keys() == {bytes([byte]) for byte in range(256)}
    ids = [BYTE_IDS[bytes([byte])] for byte in "🙂".encode()]
    assert stream(ids) == ["", "", "", "🙂", ""]
    assert stream(ids[:3]) == ["", "", "", "\ufffd"]


def edited(edit: Callable[[dict[str, Any]], None]) -> bytes:
    content = json.loads(build_tokenizer_json())
    edit(content)
    return json.dumps(content).encode()


@pytest.mark.portable
def test_truncation_and_padding_in_the_file_have_no_effect() -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer = Tokenizer(edited(lambda content: content.update(truncation=truncation)))
    assert tokenizer.encode("What is in the picture?") == TOKENIZER.encode("What is in the picture?")


@pytest.mark.portable
def test_an_added_token_outside_the_byte_alphabet_is_taken_literally() -> None:
    token = "<a b é>"

    def add(content: dict[str, Any]) -> None:
        content["added_tokens"].append({**content["added_tokens"][-1], "id": TOKENIZER.num_tokens, "content": token})

    tokenizer = Tokenizer(edited(add))
    ids = tokenizer.encode(f"x{token}y")
    assert TOKENIZER.num_tokens in ids
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == f"x{token}y"
    assert tokenizer.decode(ids) == f"x{token}y"


@pytest.mark.portable
def test_files_that_are_no_byte_level_tokenizer_are_refused() -> None:
    with pytest.raises(EngineError, match=r"tokenizer\.json: not readable as JSON"):
        Tokenizer(build_tokenizer_json()[:-100])
    with pytest.raises(EngineError, match="decoder Metaspace, expected ByteLevel"):
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        Tokenizer(edited(lambda content: content.update(decoder=metaspace)))
    with pytest.raises(EngineError, match=r"elsewhere/a\.json cannot be read as a tokenizer"):
        Tokenizer(b"{}", name="elsewhere/a.json")


@pytest.mark.portable
def test_an_unknown_token_is_an_error() -> None:
    with pytest.raises(EngineError, match="no token '<|nothing|>'".replace("|", r"\|")):
        TOKENIZER.token_id("<|nothing|>")


@pytest.mark.portable
def test_a_lone_surrogate_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"lone surrogate.*character 3"):
        TOKENIZER.encode("abc\ud800")


PIECES = [
    *("Hello, world. ", "It's 12345 o'clock;we'll see!\n", "\r\n\n  tabs\t\x0b \n", "日本語、今天。天気は？ ", "   "),
    *("e\u0301\u0338=\u0338 ", "<|im_start|>user\n", "<think>\na b</think>", "🙂👍🏽 ", "a.b,c;d:e!f?g(h)i ", "ﬁ K ſ "),
    *("\u3000\u2028x ", "!!!???\n\n"),
]


@pytest.mark.portable
@pytest.mark.parametrize("seed", range(12))
def test_a_long_text_has_the_ids_of_the_whole(seed: int) -> None:
    draw = random.Random(seed)
    some = draw.sample(PIECES, draw.randrange(2, len(PIECES)))
    text = "".join(draw.choices(some, k=100_000 // max(map(len, some))))
    text *= 80_000 // len(text) + 1
    assert len(text) > 80_000
    assert TOKENIZER.encode(text) == REFERENCE.encode(text, add_special_tokens=False).ids


@pytest.mark.portable
@pytest.mark.parametrize("text", ["a b " * 60_000, "天、地" * 40_000, "12" * 100_000, "x\n" * 100_000])
def test_every_kind_of_place_to_cut_is_used(text: str) -> None:
    # One piece of more than MAX_WORD_BYTES is refused, so one that passes was cut.
    long = text * (MAX_WORD_BYTES // len(text.encode()) + 1)
    ids = TOKENIZER.encode(long)
    assert len(long.encode()) > MAX_WORD_BYTES and TOKENIZER.decode(ids) == long


@pytest.mark.portable
@pytest.mark.parametrize(
    "text", [" " * 3_000_000 + "x", "a" * 3_000_000, "!" * 600_000, "🙂" * 200_000, "か" * 200_000]
)
def test_a_word_that_is_too_long_is_refused_before_it_is_encoded(text: str) -> None:
    with pytest.raises(CapacityError, match=f"has more than {MAX_WORD_BYTES} bytes without a place to cut it"):
        TOKENIZER.encode(text)
    assert TOKENIZER.encode("digits") == REFERENCE.encode("digits").ids


@pytest.mark.portable
def test_a_text_of_too_many_tokens_is_given_up() -> None:
    text = "word " * 1_000_000
    with pytest.raises(CapacityError, match=r"5000000 characters, and the first 655\d\d are \d+ tokens already.* 1000"):
        TOKENIZER.encode(text, max_tokens=1000)
    short = text[:50_000]
    assert len(TOKENIZER.encode(short, max_tokens=10)) > 10  # whoever asked counts them
    assert TOKENIZER.encode(text[:200_000], max_tokens=10**9) == TOKENIZER.encode(text[:200_000])


def with_added(**token: Any) -> Callable[[dict[str, Any]], object]:
    entry = {"id": 9999, "content": "<x>", "special": False, "normalized": False}
    entry |= {"lstrip": False, "rstrip": False, "single_word": False} | token
    return lambda content: content["added_tokens"].append(entry)


@pytest.mark.portable
@pytest.mark.parametrize(
    "change",
    [
        with_added(lstrip=True),
        with_added(rstrip=True),
        with_added(single_word=True),
        lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        lambda content: content["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    ],
)
def test_a_tokenizer_whose_words_are_not_known_is_given_the_whole_text(
    change: Callable[[dict[str, Any]], object],
) -> None:
    tokenizer = Tokenizer(edited(change))
    reference = tokenizers.Tokenizer.from_buffer(edited(change))
    text = "<x> a,b 5555 x\ny 55 " * 5000
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
    with pytest.raises(CapacityError, match="its rules allow no place to cut a text"):
        tokenizer.encode(text * 6)


@pytest.mark.portable
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(x+x+)+y"}),
            r"regex '\(x\+x\+\)\+y', which is not one",
        ),
        (
            lambda content: content.update(
                decoder={
                    "type": "Sequence",
                    "decoders": [{"type": "Replace", "pattern": {"Regex": "(a|a)*b"}, "content": ""}],
                }
            ),
            "regex",
        ),
        (
            lambda content: content.update(
                normalizer={"type": "Replace", "pattern": {"Regex": "(a|a)*b"}, "content": ""}
            ),
            "normalizer",
        ),
        (lambda content: content.update(normalizer={"type": "NFKC"}), "normalizer .*NFKC.*, expected NFC or none"),
        (lambda content: content.update(normalizer=[]), "normalizer"),
        (lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": ["x"]}), "regex"),
    ],
)
def test_work_of_unknown_length_is_refused(change: Callable[[dict[str, Any]], object], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        Tokenizer(edited(change))


@pytest.mark.slow
@pytest.mark.portable
def test_a_panic_of_the_library_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.tokenizer.MAX_WORD_BYTES", 1 << 30)
    with pytest.raises(UsageError, match="the tokenizer fails on the text from character 0 on"):
        TOKENIZER.encode(" " * 12_000_000 + "x")
    assert TOKENIZER.encode("digits") == REFERENCE.encode("digits").ids

"""Tokens that a fine-tune added, in any file that transformers reads: encoded as its tokenizer does, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import judge
from helpers.damage import edit_json
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.demo import CHECKPOINT
from runtime.errors import CheckpointError
from runtime.tokenizer import Tokenizer

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
ADDED, SPECIAL_MAP = "added_tokens.json", "special_tokens_map.json"
FIRST_FREE = 399  # the demo's vocabulary has 385 tokens, and 14 are added

TEXTS = (
    "<loc>Read",
    "a <loc> b<b> it is <a> xyloc",
    "<|im_start|>user\n  <|vision_start|><|image_pad|><|vision_end|>Read the  digits.<|im_end|>\n",
    " it  it\n\n'S don't Ünï e\u0301 123 <LOC>",
    "<|im_end|><|endoftext|><|video_pad|> q  <loc>  q",
)
Change = Callable[[Path], None]


def write(name: str, content: Any) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps(content)) and None


def settings(**changes: Any) -> Change:
    return lambda folder: edit_json(folder / SETTINGS, lambda values: values.update(changes))


def without(*keys: str) -> Change:
    return lambda folder: edit_json(folder / SETTINGS, lambda values: [values.pop(key) for key in keys])


def also(key: str, *tokens: Any) -> Change:
    return lambda folder: edit_json(folder / SETTINGS, lambda values: values.setdefault(key, []).extend(tokens))


def decoder(changes: dict[str, Any] | None = None, *, every: dict[str, Any] | None = None) -> Change:
    """Write `added_tokens_decoder` with the tokens of tokenizer.json, as transformers 4 does, and change it."""

    def change(folder: Path) -> None:
        own = json.loads((folder / TOKENIZER).read_text())["added_tokens"]
        tokens = {str(token.pop("id")): token | (every or {}) for token in own} | (changes or {})
        settings(added_tokens_decoder={key: value for key, value in tokens.items() if value is not None})(folder)

    return change


def in_tokenizer(token_id: int, content: str = "<loc>", **flags: bool) -> Change:
    token = {"id": token_id, "content": content, **token_flags(**flags)}
    return lambda folder: edit_json(folder / TOKENIZER, lambda values: values["added_tokens"].append(token))


def token_flags(**flags: bool) -> dict[str, bool]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return plain | flags


def as_vocabulary(*names: str) -> Change:
    """Write vocab.json and merges.txt instead of tokenizer.json, the added tokens as added_tokens.json."""

    def change(folder: Path) -> None:
        values = json.loads((folder / TOKENIZER).read_text())
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in values["model"]["merges"]]
        added = {token["content"]: token["id"] for token in values["added_tokens"]}
        contents = {
            "vocab.json": json.dumps(values["model"]["vocab"]),
            "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
            ADDED: json.dumps(added | {"<loc>": FIRST_FREE}),
        }
        for name in names:
            (folder / name).write_text(contents[name])
        (folder / TOKENIZER).unlink()

    return change


def steps(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


AS_FILE = settings(tokenizer_class="PreTrainedTokenizerFast")
MARKED = {"__type": "AddedToken", "content": "<loc>", "lstrip": True, "rstrip": True, "normalized": False}

# What both encode alike.
READ: dict[str, Change] = {
    "nothing": steps(),
    "added_tokens.json": write(ADDED, {"<loc>": FIRST_FREE}),
    "added_tokens.json in another order": write(ADDED, {"<b>": FIRST_FREE + 1, "<a>": FIRST_FREE}),
    "added_tokens.json of a token of the vocabulary": lambda folder: write(
        ADDED, {"it": json.loads((folder / TOKENIZER).read_text())["model"]["vocab"]["it"]}
    )(folder),
    "additional": also("additional_special_tokens", "<loc>"),
    "additional with flags": also("additional_special_tokens", MARKED),
    "extra": settings(extra_special_tokens=["<loc>", "<b>"]),
    "extra by name beside additional": steps(
        settings(extra_special_tokens={"x_token": "<loc>"}), also("additional_special_tokens", "<b>")
    ),
    "extra twice, with and without flags": settings(unk_token="<loc>", extra_special_tokens=[MARKED]),
    "extra of added_tokens.json with flags": steps(
        settings(extra_special_tokens=[MARKED]), write(ADDED, {"<loc>": FIRST_FREE})
    ),
    "extra in the vocabulary": settings(extra_special_tokens=["it"]),
    "extra beside additional": settings(extra_special_tokens=["<loc>"], additional_special_tokens=["<b>"]),
    "of the model": settings(model_specific_special_tokens={"loc_token": "<loc>", "other": "<b>"}),
    "of the model, beside extra by name": settings(
        extra_special_tokens={"loc_token": "<loc>"}, model_specific_special_tokens={"b_token": "<b>"}
    ),
    "of the model, beside extra": settings(
        extra_special_tokens=["<loc>"], model_specific_special_tokens={"b_token": "<b>"}
    ),
    "extra by name": settings(extra_special_tokens={"loc_token": "<loc>", "other": "<b>"}),
    "named": settings(eos_token="<loc>", pad_token="<b>"),
    "named with flags": settings(eos_token=MARKED),
    "named by the model": settings(image_token="<|image_pad|>", loc_token="<loc>"),
    "no named ones": without("eos_token", "pad_token"),
    "decoder": decoder(),
    "decoder with a token": decoder({"399": {"content": "<loc>", **token_flags(lstrip=True, normalized=True)}}),
    "decoder with a word": decoder({"399": {"content": "loc", **token_flags(rstrip=True, single_word=True)}}),
    "decoder with other flags": decoder(every={"lstrip": True, "rstrip": True}),
    "decoder with other flags of what is not special": steps(
        decoder(every={"lstrip": True}), settings(additional_special_tokens=[])
    ),
    "decoder beside added_tokens.json": steps(decoder(), write(ADDED, {"<loc>": FIRST_FREE})),
    "special map": write(
        SPECIAL_MAP, {"eos_token": {"content": "<loc>", "lstrip": True}, "additional_special_tokens": ["<b>"]}
    ),
    "special map alone": steps(
        without("additional_special_tokens"),
        write(SPECIAL_MAP, {"eos_token": "<loc>", "additional_special_tokens": ["<b>", "<|im_start|>"]}),
    ),
    "special map with extra": write(
        SPECIAL_MAP, {"extra_special_tokens": ["<b>", {"content": "<loc>", "lstrip": True}]}
    ),
    "special map with named extra": steps(
        without("additional_special_tokens"), write(SPECIAL_MAP, {"extra_special_tokens": {"b_token": "<b>"}})
    ),
    "special map and added_tokens.json": steps(
        write(SPECIAL_MAP, {"eos_token": "<loc>"}), write(ADDED, {"<loc>": FIRST_FREE, "<b>": FIRST_FREE + 1})
    ),
    "tokenizer.json": in_tokenizer(FIRST_FREE, lstrip=True, normalized=True),
    "as the file says": steps(AS_FILE, also("additional_special_tokens", "<loc>")),
    "as the file says, with a decoder": steps(
        AS_FILE, decoder({"399": {"content": "<loc>", **token_flags(rstrip=True)}})
    ),
    "as the file says, more than the decoder": steps(AS_FILE, decoder(), in_tokenizer(FIRST_FREE, special=True)),
    "as the file says, other flags": steps(AS_FILE, decoder(every={"lstrip": True, "rstrip": True})),
    "as the file says, added_tokens.json": steps(AS_FILE, write(ADDED, {"<b>": FIRST_FREE + 1, "<a>": FIRST_FREE})),
    "class of another name": steps(
        settings(tokenizer_class="Qwen2TokenizerFast"), also("additional_special_tokens", "<b>")
    ),
    "no class": steps(without("tokenizer_class"), also("additional_special_tokens", "<b>")),
    "vocabulary": as_vocabulary("vocab.json", "merges.txt", ADDED),
    "vocabulary with a decoder": steps(decoder(), as_vocabulary("vocab.json", "merges.txt")),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo's small files, with room for more tokens in the embedding."""
    for path in CHECKPOINT.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config["text_config"].update(vocab_size=512))
    return tmp_path


def exported(folder: Path) -> Tokenizer:
    return Tokenizer(Checkpoint.open(str(folder)).assets()[TOKENIZER])


@pytest.mark.judge
@pytest.mark.parametrize("name", READ)
def test_ids_are_those_of_transformers(folder: Path, name: str) -> None:
    from transformers import AutoTokenizer

    judge.skip_unless(judge.release() >= (5, 24), "which files count was read from 5.24")
    READ[name](folder)
    found, expected = exported(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = expected(text, add_special_tokens=False)["input_ids"]
        assert found.encode(text) == ids, text
        assert found.decode(ids) == expected.decode(ids, skip_special_tokens=True)
    special = {token_id for token_id, token in expected.added_tokens_decoder.items() if token.special}
    assert found.special_ids == special


@pytest.mark.portable
def test_a_folder_whose_other_files_add_nothing_keeps_its_file(folder: Path) -> None:
    content = (folder / TOKENIZER).read_bytes()
    for change in (steps(), decoder()):
        change(folder)
        assert Checkpoint.open(str(folder)).assets()[TOKENIZER] == content


@pytest.mark.portable
def test_an_added_token_is_one_id(folder: Path) -> None:
    write(ADDED, {"<loc>": FIRST_FREE})(folder)
    assert exported(folder).encode("<loc>Read")[0] == FIRST_FREE
    assert exported(folder).encode("a<loc>")[1:] == [FIRST_FREE]


@pytest.mark.portable
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (write(ADDED, {"<b>": 405}), rf"{ADDED}: '<b>' has the id 405, .* number it 399: .*\n.*without gaps"),
        (write(ADDED, {"<|im_end|>": 399}), rf"{ADDED}: '<\|im_end\|>' has the id 399, .* number it 387"),
        (write(ADDED, {"<a>": 399, "<b>": 399}), rf"{ADDED}: '<a>' is an added token here"),
        (write(ADDED, {"<a>": "399"}), rf"{ADDED}: '<a>' has the id '399', expected a number"),
        (write(ADDED, {"<a>": -1}), rf"{ADDED}: '<a>' has the id -1"),
        (decoder({"405": {"content": "<b>"}}), rf"{SETTINGS}: '<b>' has the id 405, .* number it 399"),
        (decoder({"400": {"content": "<|im_end|>"}, "387": None}), "has the id 388, .* number it 387"),
        (decoder({"385": None}), "has the id 386, .* number it 385"),
        (decoder({"x": {"content": "<b>"}}), rf"{SETTINGS}: added_tokens_decoder: 'x' is no id"),
        (decoder({"399": "<b>"}), "expected tokens with a content"),
        (decoder({"399": {"content": "<b>", "lstrip": 1}}), "expected true or false as flags"),
        (
            steps(decoder(), in_tokenizer(FIRST_FREE)),
            rf"{TOKENIZER}: '<loc>' is an added token here.*\n.*added_tokens_decoder in {SETTINGS}",
        ),
        (in_tokenizer(402), rf"{TOKENIZER}: '<loc>' has the id 402, .* number it 399"),
        (settings(eos_token={"content": "<b>"}), rf"{SETTINGS}: eos_token: expected a token"),
        (settings(extra_special_tokens="<b>"), r"extra_special_tokens is '<b>', expected a list"),
        (settings(extra_special_tokens=[1]), r"extra_special_tokens: expected a token, found 1"),
        (settings(split_special_tokens=True), "split_special_tokens is true"),
        (settings(tokenizer_class="GPT2Tokenizer"), "tokenizer_class is 'GPT2Tokenizer', expected Qwen2Tokenizer"),
        (settings(add_prefix_space=True), "pre_tokenizer differs from what transformers 5 has in its code"),
        (
            lambda folder: edit_json(folder / TOKENIZER, lambda values: values.update(normalizer=None)),
            "normalizer differs from what transformers 5 has.*\n.*PreTrainedTokenizerFast",
        ),
        (as_vocabulary(), rf"{TOKENIZER}: missing\n"),
        (as_vocabulary("vocab.json"), rf"{TOKENIZER}: missing, and so is merges.txt, which together with vocab.json"),
        (as_vocabulary("merges.txt"), rf"{TOKENIZER}: missing, and so is vocab.json, which together with merges.txt"),
        (
            steps(as_vocabulary("vocab.json", "merges.txt"), AS_FILE),
            rf"{TOKENIZER}: missing; vocab.json and merges.txt do instead only where the tokenizer_class is Qwen2",
        ),
        (
            steps(as_vocabulary("vocab.json", "merges.txt"), lambda folder: (folder / "vocab.json").write_text("[")),
            "vocab.json and merges.txt cannot be read as a tokenizer",
        ),
        (
            steps(
                lambda folder: edit_json(folder / "config.json", lambda c: c["text_config"].update(vocab_size=399)),
                write(ADDED, {"<loc>": FIRST_FREE}),
            ),
            "400 tokens with ids up to 399, config.json a vocab_size of 399, the rows of the embedding",
        ),
    ],
)
def test_what_cannot_be_made_right_is_refused(folder: Path, change: Change, words: str) -> None:
    change(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(str(folder)).assets()
    assert caught.value.remedy

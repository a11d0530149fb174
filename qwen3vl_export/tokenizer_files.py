"""One `tokenizer.json` from all files in which a checkpoint may name tokens, encoding as transformers' tokenizer does.

A fine-tune's new tokens are in `tokenizer.json`, or beside it: `added_tokens.json`, `special_tokens_map.json`, and in
`tokenizer_config.json` as `added_tokens_decoder`, `extra_special_tokens`, `additional_special_tokens` or a named token
such as `eos_token`. Which of them count, and in which order tokens without an id get one, follows transformers 5.24
(`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__` and `Qwen2Tokenizer.__init__`). The
tokenizers library does the adding there and here, so that ids and flags come about in the same way.

Releases differ: 4.57 takes normaliser, splitting and added tokens from `tokenizer.json`; for `Qwen2Tokenizer`, 5.24 has
the first two in its code, and of the third takes what `added_tokens_decoder` says where there is one. A folder that
they read differently is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3vl_export.added_tokens import SAVE_AGAIN, AddedTokenEntry, special_entry
from qwen3vl_export.formats import COMPLETE
from runtime.errors import CheckpointError
from runtime.files import MAX_TOKENIZER_BYTES, read_small_file
from runtime.panics import is_panic
from runtime.shown import one_line, shown
from runtime.tokenizer import QWEN_PATTERN

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

NAME = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
_ADDED, _SPECIAL_MAP = "added_tokens.json", "special_tokens_map.json"
_VOCABULARY, _MERGES = "vocab.json", "merges.txt"

_QWEN2, _AS_IN_FILE = "Qwen2Tokenizer", ("TokenizersBackend", "PreTrainedTokenizerFast")
# `PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES`; tokens without an id are numbered in this order.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_QWEN2_DEFAULTS = {name: "<|endoftext|>" for name in ("unk_token", "eos_token", "pad_token")}

# What `Qwen2Tokenizer.__init__` has in its code, as the tokenizers library writes it.
_MODEL_SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "type": ("BPE", None),
    "dropout": (None,),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (False, None),
    "byte_fallback": (False, None),
    "ignore_merges": (False, None),
}
TAKE_ALL = "take all files from one complete Qwen3-VL checkpoint, or repair this one"


def read_tokenizer(folder: Path, read_json: Callable[[str], dict[str, Any]]) -> bytes:
    """Return a checkpoint's `tokenizer.json`, with the tokens that other files add.

    It is the file itself where they add nothing.

    Args:
        folder: The checkpoint.
        read_json: Reads a JSON object from a file of it.

    Raises:
        CheckpointError: A file is missing or not what transformers reads, or two of them contradict each other.
    """
    from tokenizers import Tokenizer

    files = _Files(folder, read_json)
    is_qwen2 = files.tokenizer_class() == _QWEN2
    if not files.has(NAME):
        tokenizer, additions = _from_vocabulary(files, is_qwen2), _additions(files, None, is_qwen2)
    else:
        content = files.json(NAME)
        if is_qwen2:
            _check_settings(folder, content, files.settings)
        additions = _additions(files, content, is_qwen2)
        own = [AddedTokenEntry.read(token, f"{folder / NAME}: added_tokens") for token in _list_of(content, folder)]
        if _is_numbered_as_stated(content, own) and additions.changes_nothing(own, is_qwen2):
            return read_small_file(folder / NAME, max_bytes=MAX_TOKENIZER_BYTES, error=CheckpointError)
        with _refusing(f"{folder / NAME}: the file cannot be read as a tokenizer"):
            tokenizer = Tokenizer.from_str(json.dumps({**content, "added_tokens": []} if is_qwen2 else content))
    _add(tokenizer, additions, is_qwen2, folder)
    _check_stated(tokenizer, additions, folder)
    return (tokenizer.to_str(pretty=False) + "\n").encode()


@dataclass
class _Additions:
    """What transformers adds to the vocabulary: `tokens` in this order, then `specials` again with default flags."""

    tokens: list[AddedTokenEntry] = field(default_factory=list)
    specials: list[str] = field(default_factory=list)
    stated: list[tuple[AddedTokenEntry, str]] = field(default_factory=list)

    def changes_nothing(self, own: list[AddedTokenEntry], is_qwen2: bool) -> bool:
        """Return whether a tokenizer.json with the added tokens `own` is what would come of adding."""
        plain = {token.content: AddedTokenEntry(**token.flags()) for token in own}
        added = {token.content: AddedTokenEntry(**token.flags()) for token in self.tokens}
        if not all(plain.get(content) == token for content, token in added.items()):
            return False
        # In the order of the file: a token without an id that was left out elsewhere is numbered after all others.
        if is_qwen2 and (list(added) != list(plain) or not all(map(plain.__contains__, self.specials))):
            return False
        if is_qwen2 and not all(plain[content] == special_entry(content) for content in self.specials):
            return False
        ids = {token.content: token.id for token in own}
        return all(token.id is None or ids.get(token.content) == token.id for token, _ in self.stated)


def _is_numbered_as_stated(content: Mapping[str, Any], own: list[AddedTokenEntry]) -> bool:
    """Return whether the library gives the file's added tokens the ids that the file states: it numbers them itself."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocabulary, Mapping):
        return False
    new = [token.id for token in own if token.content not in vocabulary]
    return new == list(range(len(vocabulary), len(vocabulary) + len(new))) and all(
        token.id == vocabulary.get(token.content, token.id) for token in own
    )


class _Files:
    """The small files of one folder that concern tokens."""

    def __init__(self, folder: Path, read_json: Callable[[str], dict[str, Any]]) -> None:
        self.folder = folder
        self.json = read_json
        self.settings = read_json(SETTINGS)
        if self.settings.get("split_special_tokens"):
            raise CheckpointError(
                f"{folder / SETTINGS}: split_special_tokens is true, expected false: chats need their special tokens",
                remedy="remove the key",
            )

    def has(self, name: str) -> bool:
        """Return whether the name is there, whatever it leads to: what is no file is refused when it is read."""
        return os.path.lexists(self.folder / name)

    def tokenizer_class(self) -> str:
        """Return which class of transformers reads the folder; without a name, that of the model's family."""
        name = self.settings.get("tokenizer_class") or self.json("config.json").get("tokenizer_class") or _QWEN2
        plain = name.removesuffix("Fast") if isinstance(name, str) and name not in _AS_IN_FILE else name
        if plain not in (_QWEN2, *_AS_IN_FILE):
            raise CheckpointError(
                f"{self.folder / SETTINGS}: tokenizer_class is {shown(name)}, expected {_QWEN2} as every Qwen3-VL has, "
                f"or {_AS_IN_FILE[1]}",
                remedy="take the tokenizer's files from the original checkpoint",
            )
        return _QWEN2 if plain == _QWEN2 else _AS_IN_FILE[0]


def _additions(files: _Files, content: Mapping[str, Any] | None, is_qwen2: bool) -> _Additions:
    """Collect the tokens in transformers' order.

    Args:
        files: The folder.
        content: Its tokenizer.json, if there is one.
        is_qwen2: Which class reads it: tokens of its own file are in the other's vocabulary before anything is added.
    """
    folder, settings = files.folder, dict(files.settings)
    where = folder / SETTINGS
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    named_by_model = {
        key: settings.pop(key)
        for key in list(settings)
        if key.endswith("_token") and key not in _NAMED and isinstance(settings[key], str)
    }
    if isinstance(settings.get("extra_special_tokens"), Mapping):
        named_by_model |= settings.pop("extra_special_tokens")
    elif isinstance(settings.get("model_specific_special_tokens"), Mapping):
        named_by_model |= settings.pop("model_specific_special_tokens")
    additions, decoder = _Additions(), dict[int, AddedTokenEntry]()
    own = [] if content is None else _list_of(content, folder)
    if "added_tokens_decoder" in settings:
        for key, value in _object(settings.pop("added_tokens_decoder"), f"{where}: added_tokens_decoder").items():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise CheckpointError(f"{where}: added_tokens_decoder: {shown(key)} is no id", remedy=SAVE_AGAIN)
            decoder[int(key)] = AddedTokenEntry.read(value, f"{where}: added_tokens_decoder", token_id=int(key))
        additions.stated += [(token, f"{SETTINGS}'s added_tokens_decoder") for token in decoder.values()]
        additions.stated += [(AddedTokenEntry.read(token, f"{folder / NAME}: added_tokens"), NAME) for token in own]
    else:
        if files.has(_SPECIAL_MAP):
            named_by_model |= _merge_special_map(files, settings)
        if files.has(_ADDED):
            extra = settings.get("extra_special_tokens")
            specials = {_content(settings.get(key)) for key in _NAMED}
            specials |= {_content(value) for value in (extra if isinstance(extra, list) else ())}
            for text, token_id in files.json(_ADDED).items():
                if type(token_id) is not int or token_id < 0 or not text:
                    raise CheckpointError(
                        f"{folder / _ADDED}: {shown(text)} has the id {shown(token_id)}, expected a number",
                        remedy=SAVE_AGAIN,
                    )
                is_special = text in specials
                token = AddedTokenEntry(text, id=token_id, normalized=not is_special, special=is_special)
                decoder[token_id] = token
                additions.stated.append((token, _ADDED))
        for value in own:
            token = AddedTokenEntry.read(value, f"{folder / NAME}: added_tokens")
            decoder[token.id if token.id is not None else -1] = token
            additions.stated.append((token, NAME))
    additions.tokens = [token for _, token in sorted(decoder.items())]
    if "additional_special_tokens" in settings and "extra_special_tokens" not in settings:
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    _add_named(additions, settings, named_by_model, where, is_qwen2, own)
    return additions


def _merge_special_map(files: _Files, settings: dict[str, Any]) -> dict[str, Any]:
    """Lay special_tokens_map.json over the settings; return the tokens that it names beyond the usual."""
    where = f"{files.folder / _SPECIAL_MAP}"

    def special(value: Any, key: str) -> Any:
        is_token = isinstance(value, Mapping)
        return AddedTokenEntry.read({**value, "special": True}, f"{where}: {key}") if is_token else value

    for key, value in files.json(_SPECIAL_MAP).items():
        if key != "extra_special_tokens":
            settings[key] = special(value, key)
        elif isinstance(value, list):
            present = settings.get(key) or []
            present = list(present) if isinstance(present, list) else [present]
            settings[key] = [*present, *(special(each, key) for each in value)]
        else:
            settings[key] = value
    named = settings.pop("extra_special_tokens") if isinstance(settings.get("extra_special_tokens"), Mapping) else {}
    return dict(named)


def _add_named(
    additions: _Additions,
    settings: Mapping[str, Any],
    named_by_model: Mapping[str, Any],
    where: Path,
    is_qwen2: bool,
    own: list[Any],
) -> None:
    """Append the special tokens that no file has given an id, and list all special tokens."""
    known = {token.content: token for token in additions.tokens}
    named: list[AddedTokenEntry | None] = []
    for key in _NAMED:
        value = settings.get(key) if key in settings or not is_qwen2 else _QWEN2_DEFAULTS.get(key)
        token = _token(value, f"{where}: {key}")
        named.append(token if token is None else known.get(token.content, token))
    automatic = {
        key: value
        for key, value in settings.items()
        if key.endswith("_token")
        and key not in _NAMED
        and (isinstance(value, AddedTokenEntry) or (isinstance(value, Mapping) and "__type" in value))
    }
    named += [_token(value, f"{where}: {key}") for key, value in {**automatic, **named_by_model}.items()]
    extra = settings.get("extra_special_tokens")
    if extra is not None and not isinstance(extra, list):
        raise CheckpointError(
            f"{where}: extra_special_tokens is {shown(extra)}, expected a list of tokens, or an object of named ones",
            remedy=SAVE_AGAIN,
        )
    extras = [_token(value, f"{where}: extra_special_tokens") for value in extra or []]
    # The vocabulary of the file itself is not searched: a token that is there already keeps its id when it is added.
    present = {*known, *([] if is_qwen2 else (token["content"] for token in own))}
    # Twice if it is named twice: the flags of the last count.
    additions.tokens += [token for token in (*named, *extras) if token is not None and token.content not in present]
    of_names = {token.content for token in named if token is not None}
    additions.tokens = [token.as_special() if token.content in of_names else token for token in additions.tokens]
    additions.specials = list(dict.fromkeys(token.content for token in (*named, *extras) if token is not None))


def _token(value: Any, where: str) -> AddedTokenEntry | None:
    if value is None:
        return None
    if isinstance(value, str) and value:
        return special_entry(value)
    if isinstance(value, AddedTokenEntry):
        return value
    if isinstance(value, Mapping) and value.get("__type") == "AddedToken":
        return AddedTokenEntry.read(value, where)
    raise CheckpointError(f"{where}: expected a token, found {shown(value)}", remedy=SAVE_AGAIN)


def _content(value: Any) -> str | None:
    """Return the text of a token; None for an object with `__type`, which transformers looks at later."""
    return value.content if isinstance(value, AddedTokenEntry) else value if isinstance(value, str) else None


def _check_settings(folder: Path, content: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise if tokenizer.json splits text otherwise than the code of `Qwen2Tokenizer`, which 5.24 follows.

    Raises:
        CheckpointError: With the setting that differs.
    """
    model = _object(content.get("model"), f"{folder / NAME}: the file cannot be read as a tokenizer: its model")
    differing = [f"model.{key}" for key, values in _MODEL_SETTINGS.items() if model.get(key) not in values]
    if content.get("normalizer") != {"type": "NFC"}:
        differing.append("normalizer")
    if _without_offsets(content.get("pre_tokenizer")) != _qwen2_splitting(bool(settings.get("add_prefix_space"))):
        differing.append("pre_tokenizer")
    if differing:
        raise CheckpointError(
            f"{folder / NAME}: {', '.join(differing)} differs from what transformers 5 has in its code for {_QWEN2}: "
            "there it encodes differently from what the file says",
            remedy=f"if the file is right, set tokenizer_class to {_AS_IN_FILE[1]} in {SETTINGS}; otherwise take it "
            "from the original checkpoint",
        )


def _qwen2_splitting(add_prefix_space: bool) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, to_bytes]}


def _without_offsets(value: Any) -> Any:
    """Leave `trim_offsets` out, which changes no id."""
    if isinstance(value, dict):
        return {key: _without_offsets(each) for key, each in value.items() if key != "trim_offsets"}
    return [_without_offsets(each) for each in value] if isinstance(value, list) else value


def _from_vocabulary(files: _Files, is_qwen2: bool) -> Tokenizer:
    """Build the tokenizer from vocab.json and merges.txt, as `Qwen2Tokenizer` does where there is no tokenizer.json.

    Raises:
        CheckpointError: They are missing or damaged too.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    folder = files.folder
    missing = [name for name in (_VOCABULARY, _MERGES) if not files.has(name)]
    if len(missing) == 1:
        present = _MERGES if missing == [_VOCABULARY] else _VOCABULARY
        raise CheckpointError(
            f"{folder / NAME}: missing, and so is {missing[0]}, which together with {present} would replace it",
            remedy=COMPLETE,
        )
    if missing:
        raise CheckpointError(f"{folder / NAME}: missing", remedy=COMPLETE)
    if not is_qwen2:
        raise CheckpointError(
            f"{folder / NAME}: missing; {_VOCABULARY} and {_MERGES} do instead only where the tokenizer_class is "
            f"{_QWEN2}",
            remedy=f"{COMPLETE}, or set tokenizer_class to {_QWEN2} in {SETTINGS} if that wrote the two files",
        )
    for name in (_VOCABULARY, _MERGES):  # the library would wait for a pipe
        read_small_file(folder / name, max_bytes=MAX_TOKENIZER_BYTES, error=CheckpointError, remedy=COMPLETE)
    with _refusing(f"{folder}: {_VOCABULARY} and {_MERGES} cannot be read as a tokenizer"):
        model = models.BPE.from_file(str(folder / _VOCABULARY), str(folder / _MERGES))
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=bool(files.settings.get("add_prefix_space")), use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add(tokenizer: Tokenizer, additions: _Additions, is_qwen2: bool, folder: Path) -> None:
    from tokenizers import AddedToken

    def added(tokens: Iterator[AddedTokenEntry]) -> list[AddedToken]:
        return [AddedToken(**token.flags()) for token in tokens]

    with _refusing(f"{folder}: its added tokens cannot be added"):
        tokenizer.add_tokens(added(iter(additions.tokens)))
        if is_qwen2:
            tokenizer.add_tokens(added(map(special_entry, additions.specials)))


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Say of an error of the tokenizers library what it is about; it raises plain Exception, and panics.

    Raises:
        CheckpointError: Always where the library fails, also for text that is no UTF-8.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise CheckpointError(
            f"{what}: {one_line(str(error), 160)}",
            remedy=TAKE_ALL,
        ) from error


def _check_stated(tokenizer: Tokenizer, additions: _Additions, folder: Path) -> None:
    """Raise if a token did not get the id that a file states: the embedding was trained with that one."""
    for token, name in additions.stated:
        found = tokenizer.token_to_id(token.content)
        if found is None:
            raise CheckpointError(
                f"{folder / name}: {shown(token.content)} is an added token here, and in no file that transformers 5 "
                "takes added tokens from: there it is split",
                remedy=f"add it to added_tokens_decoder in {SETTINGS}; or {SAVE_AGAIN}",
            )
        if token.id is not None and found != token.id:
            raise CheckpointError(
                f"{folder / name.partition(chr(39))[0]}: {shown(token.content)} has the id {token.id}, transformers "
                f"and the tokenizers library number it {found}: another file says so, or ids before it are unused",
                remedy=f"give the added tokens ids without gaps after the vocabulary, the same in all files; or "
                f"{SAVE_AGAIN}",
            )


def _list_of(content: Mapping[str, Any], folder: Path) -> list[Any]:
    tokens = content.get("added_tokens") or []
    if not isinstance(tokens, list):
        raise CheckpointError(f"{folder / NAME}: added_tokens is {shown(tokens)}, expected a list", remedy=SAVE_AGAIN)
    return tokens


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where} is {shown(value)}, expected an object", remedy=SAVE_AGAIN)
    return value

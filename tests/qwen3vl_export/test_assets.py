"""The small files of a checkpoint: where they are taken from, and that what no runtime opens is not exported."""

from __future__ import annotations

import json
import re
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
from runtime.image_config import ImageProcessorConfig

GENERATION = "generation_config.json"
PREPROCESSOR = "preprocessor_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo's files without its weights."""
    for path in CHECKPOINT.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    return tmp_path


def asset(folder: Path, name: str) -> Any:
    return json.loads(Checkpoint.open(str(folder)).assets()[name])


@pytest.mark.judge
def test_end_token_without_generation_config_is_that_of_transformers(folder: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    (folder / GENERATION).unlink()
    expected = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))
    found = asset(folder, GENERATION)
    assert expected.eos_token_id is not None
    names = ("eos_token_id", "bos_token_id", "pad_token_id")
    assert found == {name: getattr(expected, name) for name in names}


@pytest.mark.portable
def test_only_ids_that_are_not_set_are_filled(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c["text_config"].update(eos_token_id=1, pad_token_id=2))
    edit_json(folder / "config.json", lambda c: c.update(pad_token_id=3))
    edit_json(folder / GENERATION, lambda g: g.pop("pad_token_id"))
    found = asset(folder, GENERATION)
    assert (found["eos_token_id"], found["pad_token_id"], found["max_new_tokens"]) == ([387, 385], 3, 64)


@pytest.mark.portable
def test_a_folder_without_any_end_token_is_refused(folder: Path) -> None:
    (folder / GENERATION).write_text('{"eos_token_id": null}')
    edit_json(folder / "config.json", lambda c: c["text_config"].pop("eos_token_id"))
    with pytest.raises(CheckpointError, match="no answer would end"):
        asset(folder, GENERATION)


@pytest.mark.judge
def test_processor_as_transformers_saves_it(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    saved = tmp_path_factory.mktemp("saved")
    judge.processor(folder).save_pretrained(saved)
    # One file from 5 on, one for each part before.
    assert (saved / PREPROCESSOR).exists() == (judge.release() < (5, 0))
    for name in ("config.json", GENERATION):
        shutil.copy(folder / name, saved)
    expected = ImageProcessorConfig.from_dict(json.loads((folder / PREPROCESSOR).read_text()))
    assert ImageProcessorConfig.from_dict(asset(saved, PREPROCESSOR)) == expected


@pytest.mark.portable
def test_the_newer_form_of_the_processors_settings_wins(folder: Path) -> None:
    """As in transformers, where both files hold them."""
    settings = json.loads((folder / PREPROCESSOR).read_text())
    expected = ImageProcessorConfig.from_dict(settings)
    newer = {"processor_class": settings.pop("processor_class"), "image_processor": settings}
    (folder / "processor_config.json").write_text(json.dumps(newer))
    edit_json(folder / PREPROCESSOR, lambda p: p.update(image_mean=[0, 0, 0]))
    assert ImageProcessorConfig.from_dict(asset(folder, PREPROCESSOR)) == expected
    (folder / PREPROCESSOR).unlink()
    assert ImageProcessorConfig.from_dict(asset(folder, PREPROCESSOR)) == expected
    edit_json(folder / "processor_config.json", lambda p: p["image_processor"].update(image_mean=[0, 0, 0]))
    assert ImageProcessorConfig.from_dict(asset(folder, PREPROCESSOR)) != expected


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def values(name: str, **changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / name, lambda content: content.update(changes))


def other_ids(folder: Path) -> None:
    """Exchange the ids of two tokens."""

    def swap(tokenizer: Any) -> None:
        first, second = (t for t in tokenizer["added_tokens"] if t["content"] in ("<|image_pad|>", "<|video_pad|>"))
        first["content"], second["content"] = second["content"], first["content"]

    edit_json(folder / "tokenizer.json", swap)


@pytest.mark.portable
@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (text("tokenizer.json", "{}"), "tokenizer.json", "cannot be read as a tokenizer"),
        (text("tokenizer_config.json", "{"), "tokenizer_config.json", "not readable as JSON"),
        (other_ids, "tokenizer.json", r"<\|image_pad\|> has the id 398, config.json says image_token_id = 397"),
        (
            lambda folder: edit_json(folder / "config.json", lambda c: c["text_config"].update(vocab_size=398)),
            "tokenizer.json",
            "has 399 tokens with ids up to 398, config.json a vocab_size of 398",
        ),
        (text("chat_template.jinja", "{% if %}"), "chat_template.jinja", "not valid jinja2"),
        (text("chat_template.jinja", b"\xff"), "chat_template.jinja", "can.t decode byte"),
        (text(PREPROCESSOR, "{"), PREPROCESSOR, "not readable as JSON"),
        (lambda folder: (folder / PREPROCESSOR).unlink(), PREPROCESSOR, "missing"),
        (values(PREPROCESSOR, image_std=[0, 1, 1]), PREPROCESSOR, "image_std"),
        (values(PREPROCESSOR, merge_size=4), PREPROCESSOR, "merge_size is 4, .* vision_config.spatial_merge_size = 2"),
        (values(PREPROCESSOR, patch_size=14), PREPROCESSOR, "patch_size is 14, .* vision_config.patch_size = 16"),
        (values(PREPROCESSOR, temporal_patch_size=1), PREPROCESSOR, "temporal_patch_size is 1"),
        (text(GENERATION, "[]"), GENERATION, "expected a JSON object"),
        (values(GENERATION, num_beams=4), GENERATION, "asks for what this runtime does not do: num_beams=4"),
        (values(GENERATION, do_sample=True, top_p=-1), GENERATION, "top_p must be in"),
        (values(GENERATION, eos_token_id=[-1]), GENERATION, "eos_token_id holds no id that a token can have"),
        (values(GENERATION, eos_token_id=[500, 399]), GENERATION, "399 is not below config.json's vocab_size, 399"),
    ],
)
def test_files_that_no_runtime_opens_are_refused(
    folder: Path, damage: Callable[[Path], object], name: str, words: str
) -> None:
    Checkpoint.open(str(folder)).assets()
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(str(folder)).assets()
    assert caught.value.message.startswith(f"{folder / name}: ")
    assert caught.value.remedy is not None
    assert "export" not in caught.value.remedy


@pytest.mark.portable
@pytest.mark.parametrize(
    ("damage", "remedy"),
    [
        (values(GENERATION, num_beams=2), "^remove the key from the file, or use transformers for this kind of"),
        (
            values(PREPROCESSOR, size={"shortest_edge": 0, "longest_edge": 0}),
            "^take min_pixels from the original check",
        ),
        (values(PREPROCESSOR, do_pad=True), "^set do_pad to false"),
        (text("chat_template.jinja", b"\xff"), "^write the template in UTF-8$"),
        (text("chat_template.jinja", "{% if %}"), "^take all files from one complete Qwen3-VL checkpoint"),
        (other_ids, "^take all files from one complete Qwen3-VL checkpoint"),
        (text(PREPROCESSOR, "{"), "^the file is damaged: download it again$"),
    ],
)
def test_advice_is_kept_unless_it_speaks_of_engines(
    folder: Path, damage: Callable[[Path], object], remedy: str
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(str(folder)).assets()
    assert re.search(remedy, str(caught.value.remedy)), caught.value

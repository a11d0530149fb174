"""What is given in the place of a checkpoint is named, with what to do, before anything is traced."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.command_line import call
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.cli.export import app as export_app
from qwen3vl_export.demo import CHECKPOINT
from runtime.errors import CheckpointError

SINGLE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose weights are a link."""
    made = tmp_path / "checkpoint"
    made.mkdir()
    for path in CHECKPOINT.iterdir():
        (made / path.name).symlink_to(path)
    return made


def instead(*names: str) -> Callable[[Path], object]:
    """Other files in the place of the weights."""

    def change(folder: Path) -> None:
        (folder / SINGLE).unlink()
        for name in names:
            (folder / name).write_bytes(b"x")

    return change


def alone(*names: str) -> Callable[[Path], object]:
    """These files, and nothing else."""

    def change(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name in names:
            (folder / name).write_text("{}")

    return change


def one_too_high(folder: Path) -> None:
    names = os.listdir(folder)
    (folder / "v1").mkdir()
    for name in names:
        (folder / name).rename(folder / "v1" / name)


def two_checkpoints(folder: Path) -> None:
    one_too_high(folder)
    shutil.copytree(folder / "v1", folder / "v2", symlinks=True)


def adapter(folder: Path) -> None:
    alone()(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-VL-2B-Instruct"}))
    (folder / "adapter_model.safetensors").write_bytes(b"x")


def engine(folder: Path) -> None:
    alone("config.json")(folder)
    (folder / "engine.json").write_text(json.dumps({"source": {"name": "somebody/model"}}))


SAVE_AGAIN = "save_pretrained"
FOLDERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "pytorch": (instead("pytorch_model.bin"), r"PyTorch weights \(pickle\) \(pytorch_model.bin\)", SAVE_AGAIN),
    "pytorch shards": (
        instead("pytorch_model.bin.index.json", *(f"pytorch_model-0000{i}-of-00005.bin" for i in range(1, 6))),
        r"pytorch_model-00001-of-00005.bin, .*, …\)",
        SAVE_AGAIN,
    ),
    "consolidated": (instead("consolidated.00.pth"), r"PyTorch weights .*consolidated.00.pth", SAVE_AGAIN),
    "flax": (instead("flax_model.msgpack"), "Flax weights", SAVE_AGAIN),
    "tensorflow": (instead("tf_model.h5"), "TensorFlow weights", SAVE_AGAIN),
    "gguf beside the config": (instead("model-Q4_K_M.gguf"), "GGUF weights", "Hugging Face folder that the GGUF"),
    "gguf alone": (alone("a-Q4_K_M.gguf", "mmproj-a.gguf"), "GGUF weights", "Hugging Face folder that the GGUF"),
    "onnx": (instead("model.onnx"), "an ONNX model", "that it was made from"),
    "archive": (alone("checkpoint.tar.gz"), "an archive", "unpack it"),
    "trainer's state alone": (
        instead("optimizer.pt", "rng_state.pth", "training_args.bin"),
        f"{SINGLE} and .* missing",
        "complete",
    ),
    "no index": (
        instead("model-00001-of-00002.safetensors"),
        "there is model-00001-of-00002",
        "model.safetensors.index",
    ),
    "another name": (instead("weights.safetensors"), "there is weights.safetensors", f"called {SINGLE}"),
    "adapter": (
        adapter,
        r"LoRA or other PEFT adapter .* of 'Qwen/Qwen3-VL-2B-Instruct', and no whole",
        "merge_and_unload",
    ),
    "adapter beside weights": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        "adapter .* beside a whole model",
        "merge_and",
    ),
    "pipeline": (alone("model_index.json"), "a diffusers pipeline", "text_encoder"),
    "engine": (engine, "an engine, or lowered graphs", "qwen3vl run.* 'somebody/model'"),
    "lowered": (alone("config.json", "lowered.json"), "an engine, or lowered graphs", "qwen3vl run"),
    "one folder too high": (
        one_too_high,
        "config.json is missing; .* one folder deeper, in v1",
        "give .*checkpoint/v1",
    ),
    "several checkpoints": (two_checkpoints, "2 folders in it have one: v1, v2", "give one of them"),
    "empty": (alone(), "config.json: missing", "complete Hugging Face folder"),
}


@pytest.mark.portable
@pytest.mark.parametrize("name", FOLDERS)
def test_folders(folder: Path, name: str) -> None:
    change, words, remedy = FOLDERS[name]
    Checkpoint.open(str(folder)).entries  # noqa: B018  (is a checkpoint before)
    change(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(str(folder)).entries  # noqa: B018  (what is read before tracing)
    assert caught.value.remedy is not None
    assert re.search(remedy, caught.value.remedy)
    assert len(str(caught.value)) < 600


@pytest.mark.portable
@pytest.mark.parametrize(
    ("name", "content", "words", "remedy"),
    [
        ("m.gguf", b"GGUF\3\0\0\0", "GGUF weights", "Hugging Face folder that the GGUF"),
        ("M", b"GGUF\3\0\0\0", "GGUF weights", "Hugging Face folder that the GGUF"),
        ("model.safetensors", b"x", "one of a checkpoint's files", "give its folder, .*pytest"),
        ("config.json", b"{}", "one of a checkpoint's files", "give its folder"),
        ("pytorch_model.bin", b"PK\3\4", "PyTorch weights", SAVE_AGAIN),
        ("weights", b"PK\3\4", "an archive, or PyTorch weights", "unpack it"),
        ("model.zip", b"PK\3\4", "an archive", "unpack it"),
        ("model.tar.zst", b"", "an archive", "unpack it"),
        ("decoder.onnx", b"", "an ONNX model", "that it was made from"),
        ("notes", b"", "of no kind that is known", "config.json and the safetensors"),
    ],
)
def test_files(tmp_path: Path, name: str, content: bytes, words: str, remedy: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"a file \({words}.*\), expected the folder.*\n.*{remedy}"):
        Checkpoint.open(str(tmp_path / name))


@pytest.mark.portable
@pytest.mark.parametrize("name", ["\0", "a" * 5000, "~nobody-of-this-name/x", "\ud800", "a b/c d", "\x1b[2J"])
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder") as caught:
        Checkpoint.open(name)
    assert caught.value.message.isprintable() and len(str(caught.value)) < 500


def test_commands_name_it_before_they_trace(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(*_: object) -> None:
        raise AssertionError("traced before the checkpoint was looked at")

    monkeypatch.setattr("qwen3vl_export.tracing.pieces.trace_pieces", trace)
    instead("pytorch_model.bin")(folder)
    code, out, err = call(export_app, str(folder), "--output", str(tmp_path / "engine"))
    assert (code, out) == (CheckpointError.exit_code, "")
    assert "PyTorch weights (pickle) (pytorch_model.bin), expected safetensors" in err
    assert not (tmp_path / "engine").exists()

"""The manifest of an engine: what is noticed, and what stays inside the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.damage import resign
from runtime.errors import EngineError
from runtime.manifest import MANIFEST_NAME, Manifest
from runtime.model import Qwen3VLModel


@pytest.fixture
def engine(demo_engine: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "engine"
    folder.mkdir()
    for path in demo_engine.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / MANIFEST_NAME).unlink()
    shutil.copy(demo_engine / MANIFEST_NAME, folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / MANIFEST_NAME).read_text())
    change(values)
    (folder / MANIFEST_NAME).write_text(json.dumps(values))


@pytest.mark.portable
def test_what_is_written_is_read(engine: Path) -> None:
    manifest = Manifest.read(engine)
    (engine / MANIFEST_NAME).unlink()
    manifest.write(engine)
    assert Manifest.read(engine) == manifest
    Manifest.read(engine).check(engine, full=True)


@pytest.mark.portable
def test_order_and_spacing_do_not_matter(engine: Path) -> None:
    before = Manifest.read(engine)
    values = json.loads((engine / MANIFEST_NAME).read_text())
    (engine / MANIFEST_NAME).write_text(json.dumps(dict(reversed(values.items())), indent=4))
    assert Manifest.read(engine) == before


@pytest.mark.portable
@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["capabilities"].clear(),
        lambda values: values["capabilities"].update(cache_dtype="float16"),
        lambda values: values["files"].clear(),
        lambda values: values["model"]["text"].update(num_layers=3),
        lambda values: values.update(source=None),
        lambda values: values.pop("sha256"),
    ],
)
def test_an_altered_manifest_is_refused(change: Callable[[dict[str, Any]], None], engine: Path) -> None:
    edit(engine, change)
    with pytest.raises(EngineError, match="it was altered after it was written"):
        Manifest.read(engine)


@pytest.mark.portable
@pytest.mark.parametrize("name", ["../decoder.onnx", "/etc/hostname", "..", "a/b"])
def test_a_name_outside_of_the_folder_is_not_looked_at(name: str, engine: Path) -> None:
    manifest = Manifest.read(engine)
    files = dict(manifest.files)
    files[name] = files.pop("decoder.onnx")
    with pytest.raises(EngineError, match="is not the name of a file in the engine's folder"):
        Manifest(**{**vars(manifest), "files": files}).check(engine)


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return change


@pytest.mark.portable
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("format_version", value=True), "format version True, expected 2"),
        (put("format_version", value=2.0), r"format version 2\.0, expected 2"),
        (put("session", value="__init__"), "unknown kind of session '__init__'; known: ort_cpu, ort_cuda, tensorrt"),
        (put("session", value="ort_cpu.x"), "unknown kind of session"),
        (put("session", value=""), "unknown kind of session"),
        (put("session", value="\0"), "unknown kind of session"),
        (put("session", value=5), "an object of strings"),
        (put("versions", value=None), "versions is None, expected an object of strings"),
        (put("source", value=None), "source is None, expected an object"),
        (put("files", value=[]), "an entry is missing or unknown"),
        (
            put("files", "config.json", "num_bytes", value="9"),
            r"files\.config\.json\.num_bytes is '9', expected",
        ),
        (put("files", "config.json", "num_bytes", value=2**70), "num_bytes is 1180591620717411303424, expected"),
        (put("files", "config.json", "sha256", value="x"), "sha256 is 'x', expected 64 hexadecimal digits"),
        (put("files", "config.json", "is_weights", value="no"), "is_weights is 'no', expected true or false"),
        (put("files", "\0", value={"num_bytes": 1, "sha256": "0" * 64}), "is not the name of a file"),
        (put("files", "\ud800", value={"num_bytes": 1, "sha256": "0" * 64}), "is not the name of a file"),
        (lambda values: values["files"].pop("decoder.onnx"), r"decoder\.onnx: not listed in engine\.json"),
        (lambda values: values["files"].pop("tokenizer.json"), r"tokenizer\.json: not listed in engine\.json"),
        (put("capabilities", value=None), "capabilities is None, expected an object"),
        (lambda values: values["capabilities"].pop("cache_dtype"), "cache_dtype is None, expected one of float32"),
        (put("capabilities", "cache_dtype", value="object"), "cache_dtype is 'object', expected one of float32"),
        (put("capabilities", "cache_dtype", value=[]), r"cache_dtype is \[\], expected one of"),
        (put("capabilities", "cache_bits", value=3), "cache_bits is 3, expected one of 4, 8, 16, 32"),
        (put("capabilities", "cache_scales", value="/etc/passwd"), "'/etc/passwd' is not the name of a file"),
        (put("capabilities", "cache_scales", value="../x"), "'../x' is not the name of a file"),
        (put("capabilities", "cache_scales", value="x.npy"), "not listed in engine.json"),
        (put("capabilities", "capacity", value="x"), "capacity is 'x', expected an integer of 1"),
        (put("capabilities", "capacity", value=-1), "capacity is -1, expected an integer of 1"),
        (put("capabilities", "prefill_chunk", value=0), "prefill_chunk is 0, expected an integer of 1"),
        (put("capabilities", "prefill_chunk", value=True), "prefill_chunk is True, expected an integer of 1"),
        (put("capabilities", "prefill_min_tokens", value=1), r"prefill\.onnx: not listed"),
        (
            put("capabilities", "cache_dtype", value="bfloat16"),
            r"cache is of tensor\(float\), engine\.json says bfloat16",
        ),
        (put("capabilities", "top_k", value=8), r"promises the largest logits \(top_k\), which a session 'ort_cpu'"),
        (put("capabilities", "device", value="tpu"), "device is 'tpu', expected one of cpu, gpu"),
        (put("capabilities", "kernels", value=5), "kernels is 5, expected a list of strings"),
        (put("capabilities", "kernels", value=[["x"]]), "kernels is .* expected a list of strings"),
        (put("capabilities", "profiles", value={"decoder": [1]}), r"profiles\.decoder\[0\] is 1, expected"),
        (put("model", "text", "max_positions", value=10**30), "max_positions is 10+, expected an integer of 1"),
        (put("model", "text", "num_layers", value=0), "num_layers is 0, expected an integer of 1 to 1024"),
        (put("model", "text", "num_layers", value=10**9), "num_layers is 1000000000, expected an integer"),
        (
            put("model", "text", "num_layers", value=5),
            "lacks the inputs past_key_values.4.key",
        ),
        (put("model", "text", "num_layers", value=3), "has the unknown inputs past_key_values.3.key"),
        (put("model", "text", "hidden_size", value="a"), "hidden_size is 'a', expected an integer of 1"),
        (put("model", "text", "rms_norm_eps", value=float("nan")), "rms_norm_eps is nan, expected a number above 0"),
        (put("model", "text", "mrope_section", value=[1, 2]), r"mrope_section is \[1, 2\], expected three integers"),
        (put("model", "text", "tie_word_embeddings", value=1), "tie_word_embeddings is 1, expected true or false"),
        (put("model", "vision", "patch_size", value=0), "patch_size is 0, expected an integer of 1 to 64"),
        (
            put("model", "vision", "patch_size", value=32),
            r"preprocessor_config.json: patch_size is 16, the model has vision_config.patch_size = 32",
        ),
        (put("model", "vision", "num_heads", value=10**6), "num_heads is 1000000, expected at most hidden_size"),
        (put("model", "vision", "in_channels", value=64), "images of 64 channels, expected 3"),
        (put("model", "image_token_id", value=-1), "image_token_id is -1, expected an integer of 0"),
        (put("x", value=1), "an entry is missing or unknown"),
    ],
)
def test_an_entry_that_no_build_writes_is_named(
    change: Callable[[dict[str, Any]], object], words: str, engine: Path
) -> None:
    resign(engine, change)
    with pytest.raises(EngineError, match=words) as caught:
        Qwen3VLModel.from_engine(engine)
    assert caught.value.remedy and len(caught.value.message) < 500


@pytest.mark.portable
def test_a_manifest_that_is_no_json_object_or_too_large(engine: Path) -> None:
    for contents, words in (
        (b"[]", "expected a JSON object, got list"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"\xff", "not readable as JSON"),
        (b"{" + b" " * (9 << 20) + b"}", "larger than 8388608 bytes"),
    ):
        (engine / MANIFEST_NAME).write_bytes(contents)
        with pytest.raises(EngineError, match=rf"engine\.json: {words}"):
            Manifest.read(engine)

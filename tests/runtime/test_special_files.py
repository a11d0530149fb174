"""Special files in the place of small ones, and JSON that would fill the memory: readers neither wait nor grow."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.damage import altered, resign
from qwen3vl_export.checkpoint import Checkpoint
from runtime.errors import CheckpointError, EngineError, Qwen3VLError, UsageError
from runtime.files import (
    MAX_INDEX_BYTES,
    MAX_JSON_OBJECT_BYTES,
    MAX_SMALL_FILE_BYTES,
    MAX_TOKENIZER_BYTES,
    open_regular,
    parse_json_object,
    read_json_object,
    read_small_file,
)
from runtime.model import Qwen3VLModel


def bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is at most 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (os.mkfifo, "expected a file, found a named pipe"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "expected a file, found a device"),
    "folder": (lambda path: path.mkdir(), "expected a file, found a folder"),
    "socket": (bind, "expected a file, found a socket"),
    "loop": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
    "memory": (lambda path: path.symlink_to("/proc/self/mem"), "cannot be read: Input/output error"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "missing"),
}


@pytest.mark.portable
@pytest.mark.parametrize("kind", list(SPECIAL))
def test_a_special_file_is_no_small_file(kind: str, tmp_path: Path) -> None:
    make, words = SPECIAL[kind]
    make(tmp_path / "config.json")
    with pytest.raises(UsageError, match=words):
        read_small_file(tmp_path / "config.json", error=UsageError)


@pytest.mark.portable
@pytest.mark.parametrize("name", ["nul\0", "\ud800", "a" * 300])
def test_a_name_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be read"):
        read_small_file(tmp_path / name)


@pytest.mark.portable
def test_the_size_is_limited_whatever_the_file_says_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"x" * 100)
    assert read_small_file(path, max_bytes=100) == b"x" * 100
    with pytest.raises(EngineError, match=r"a\.json: larger than 99 bytes"):
        read_small_file(path, max_bytes=99)
    with pytest.raises(EngineError, match="larger than 5 bytes"):
        read_small_file("/proc/self/status", max_bytes=5)  # says that it is empty
    os.truncate(path, 1 << 40)  # sparse
    with pytest.raises(EngineError, match=f"larger than {MAX_SMALL_FILE_BYTES} bytes"):
        read_small_file(path)
    assert MAX_SMALL_FILE_BYTES < MAX_INDEX_BYTES < MAX_TOKENIZER_BYTES


@pytest.mark.portable
def test_a_regular_file_is_opened_without_waiting_and_closed_at_exec(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    descriptor = open_regular(tmp_path / "link")
    try:
        assert os.read(descriptor, 9) == b"abc" and not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):
        open_regular("/dev/zero")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.portable
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "not readable as JSON"),
        (b'{"a":' * 100_000, "not readable as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        (b"\xff", "not readable as JSON"),
        (b"", "not readable as JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b'{"a": [' + b"[]," * 1_500_000 + b"[]]}", "would take about 3.. MiB of memory; expected at most 192"),
        (b'{"a": [' + b'"bc",' * 2_000_000 + b'""]}', "would take about 3.. MiB of memory"),
        (b'{"a": [' + b"1.5," * 5_000_000 + b"0]}", "would take about 2.. MiB of memory"),
        # One letter beyond the basic plane makes four bytes of each character.
        (b'{"a": "' + "😀".encode() + b"x" * 51_000_000 + b'"}', "would take about 194 MiB of memory"),
    ],
)
def test_json_that_is_no_object_or_too_many(text: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"here: .*{words}"):
        parse_json_object(text, "here", error=CheckpointError)


@pytest.mark.portable
def test_the_estimate_has_room_for_the_largest_files_that_models_have(tmp_path: Path) -> None:
    assert MAX_JSON_OBJECT_BYTES == 192 << 20
    # An index of 80,000 names, and a tokenizer of 152,000 tokens and as many merges.
    index = {f"model.language_model.layers.{i % 94}.mlp.experts.{i}.down_proj.weight": "a" for i in range(80_000)}
    words = {f"Ġw{i}": i for i in range(152_000)}
    merges = [[f"Ġw{i}", f"x{i}"] for i in range(152_000)]

    for values in ({"weight_map": index}, {"model": {"vocab": words, "merges": merges}}):
        (tmp_path / "a.json").write_text(json.dumps(values, indent=2, ensure_ascii=False))
        assert read_json_object(tmp_path / "a.json", max_bytes=MAX_TOKENIZER_BYTES) == values


COST = """
import json, sys, time
from pathlib import Path
from runtime.errors import Qwen3VLError
from runtime.files import MAX_TOKENIZER_BYTES, read_small_file
from runtime.tokenizer import Tokenizer
from qwen3vl_export.safetensors_reader import read_header

def high_water():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

def read_tokenizer(path):
    return Tokenizer(read_small_file(path, max_bytes=MAX_TOKENIZER_BYTES))

path, piece, costs = Path(sys.argv[1]), sys.argv[2], []
for read, num_bytes, head in ((read_header, 20_000_000, True), (read_tokenizer, 20_000_000, False)) * 2:
    if costs[2:]:
        num_bytes = 15_000_000
    body = ('{"a": [' + piece * (num_bytes // len(piece.encode())) + '0]}').encode()
    path.write_bytes((len(body).to_bytes(8, "little") if head else b"") + body)
    del body
    Path("/proc/self/clear_refs").write_text("5")
    before, start = high_water(), time.process_time()
    try:
        read(path)
        raise SystemExit("was taken")
    except Qwen3VLError:
        pass
    costs.append((time.process_time() - start, high_water() - before - num_bytes))
print(json.dumps(costs))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel keeps no high-water mark to reset")
@pytest.mark.parametrize("piece", ["1.5,", "[],", '"\U0001f642",', "1,"])
def test_no_short_text_of_json_takes_long_or_much_before_it_is_refused(piece: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COST, str(tmp_path / "a"), piece], capture_output=True, text=True, check=True
    )
    costs = json.loads(done.stdout)
    assert len(costs) == 4
    for seconds, num_bytes in costs:
        assert seconds < 20 and num_bytes < 300e6


def replaced(path: Path, make: Callable[[Path], None]) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    make(path)


def read_all(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.config
    assert checkpoint.entries
    checkpoint.assets()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "memory"])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "processor_config.json",
        "generation_config.json",
        "model.safetensors",
    ],
)
def test_the_exporter_reads_no_special_file(tiny_checkpoint: Path, tmp_path: Path, name: str, kind: str) -> None:
    folder = altered(tiny_checkpoint, tmp_path / "checkpoint")
    replaced(folder / name, SPECIAL[kind][0])
    with pytest.raises(CheckpointError) as caught:
        read_all(folder)
    assert name in caught.value.message and caught.value.message.count(str(folder)) == 1
    assert caught.value.remedy


@pytest.mark.parametrize("kind", list(SPECIAL))
@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json", "special_tokens_map.json"])
def test_files_of_tokens_that_lead_nowhere_are_not_absent(
    tiny_checkpoint: Path, tmp_path: Path, name: str, kind: str
) -> None:
    """A link to nothing, for one: what it was to add would be dropped in silence."""
    folder = altered(tiny_checkpoint, tmp_path / "checkpoint")
    make, words = SPECIAL[kind]
    replaced(folder / name, make)
    with pytest.raises(CheckpointError, match=re.escape(f"{folder / name}: {words}")) as caught:
        Checkpoint.open(str(folder)).assets()
    assert caught.value.remedy


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling"])
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_files_of_a_vocabulary_are_files(tiny_checkpoint: Path, tmp_path: Path, name: str, kind: str) -> None:
    folder = altered(tiny_checkpoint, tmp_path / "checkpoint")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    make, words = SPECIAL[kind]
    replaced(folder / name, make)
    with pytest.raises(CheckpointError, match=re.escape(f"{folder / name}: {words}")):
        Checkpoint.open(str(folder)).assets()


@pytest.mark.portable
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "dangling", "loop"])
def test_what_is_no_folder_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    SPECIAL[kind][0](tmp_path / "model")
    with pytest.raises(CheckpointError, match=f"{tmp_path}/model: a ") as caught:
        Checkpoint.open(str(tmp_path / "model"))
    assert caught.value.remedy and ("broken link" in caught.value.message) == (kind in ("dangling", "loop"))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "memory", "loop"])
@pytest.mark.parametrize("name", ["engine.json", "tokenizer.json", "decoder.onnx", "decoder.onnx.data"])
def test_the_runtime_reads_no_special_file(tiny_engine: Path, tmp_path: Path, name: str, kind: str) -> None:
    folder = shutil.copytree(tiny_engine, tmp_path / "engine")
    replaced(folder / name, SPECIAL[kind][0])
    with pytest.raises(EngineError, match=name):
        Qwen3VLModel.from_engine(folder)


def test_scales_of_a_cache_are_a_file_of_the_folder(tiny_engine: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_engine, tmp_path / "engine")
    os.mkfifo(folder / "pipe")
    for scales, words in (
        ("/etc/passwd", "is not the name of a file"),
        ("../engine.json", "is not the name of a file"),
        ("pipe", "not listed in engine.json"),
        ("config.json", "no array"),
    ):
        resign(folder, lambda values, scales=scales: values["capabilities"].update(cache_scales=scales))
        with pytest.raises(EngineError, match=words):
            Qwen3VLModel.from_engine(folder)
        shutil.copy(tiny_engine / "engine.json", folder)


def test_errors_are_of_the_tree_for_any_reader(tmp_path: Path) -> None:
    for error in (EngineError, CheckpointError, UsageError):
        with pytest.raises(Qwen3VLError) as caught:
            read_small_file(tmp_path / "absent", error=error, remedy="write it")
        assert type(caught.value) is error and caught.value.remedy == "write it"

"""The files of a checkpoint: the layout safetensors requires, which files win, and a download that fails."""

from __future__ import annotations

import errno
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import judge
from helpers.damage import altered, rewrite
from qwen3vl_export import safetensors_reader
from qwen3vl_export.checkpoint import EMBEDDING_KEY, HEAD_KEY, Checkpoint
from qwen3vl_export.safetensors_reader import read_header
from runtime.errors import CapacityError, CheckpointError


def safetensors_file(path: Path, offsets: list[Any], num_bytes: int, shape: Any = (2,)) -> Path:
    """Write a file of one F32 tensor for each pair of offsets."""
    header = {str(i): {"dtype": "F32", "shape": shape, "data_offsets": pair} for i, pair in enumerate(offsets)}
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(num_bytes))
    return path


@pytest.mark.portable
@pytest.mark.parametrize(
    ("offsets", "num_bytes", "words"),
    [
        ([[-8, 0], [0, 8]], 8, "expected a whole number of 0 to .*, found -8"),
        ([[0, 8.0]], 8, "expected a whole number of 0 to .*, found 8.0"),
        ([[0, 8], [4, 12]], 12, "1 begins at byte .*, what lies before it ends at byte"),
        ([[0, 8], [0, 8]], 8, "1 begins at byte"),
        ([[0, 8], [12, 20]], 20, "1 begins at byte"),
        ([[4, 12]], 12, "0 begins at byte"),
        ([[0, 8]], 9, "the tensors end at byte .*, the file has"),
        ([[0, 8], [8, 16]], 15, "1 ends at byte .*, the file has"),
    ],
)
def test_offsets_that_safetensors_refuses(tmp_path: Path, offsets: list[Any], num_bytes: int, words: str) -> None:
    path = safetensors_file(tmp_path / "model.safetensors", offsets, num_bytes)
    with pytest.raises(Exception, match="while deserializing header"):
        load_file(path)
    with pytest.raises(CheckpointError, match=words):
        read_header(path)


@pytest.mark.portable
def test_a_negative_shape_is_refused(tmp_path: Path) -> None:
    path = safetensors_file(tmp_path / "model.safetensors", [[0, 8]], 8, shape=(-1, -2))
    with pytest.raises(CheckpointError, match=r"expected a whole number of 0 to .*, found -1"):
        read_header(path)


@pytest.mark.portable
def test_tensors_in_any_order_and_empty_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"b": np.ones(3, np.float32), "a": np.ones((2, 2), np.float16), "none": np.ones((0, 4), np.int8)}, path)
    shapes = {key: entry.shape for key, entry in read_header(path).tensors.items()}
    assert shapes == {"a": (2, 2), "b": (3,), "none": (0, 4)}


@pytest.mark.judge
def test_a_single_file_wins_over_an_index(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As in transformers, whose answer is looked at here too."""
    folder = altered(tiny_checkpoint, tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    other = {key: values + 1 for key, values in tensors.items()}
    save_file(other, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(other, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    key = "model.language_model.norm.weight"
    reference = judge.load(folder).model.language_model.norm.weight
    np.testing.assert_array_equal(reference.detach().float().numpy(), tensors[key])
    assert list(Checkpoint.open(str(folder)).headers) == ["model.safetensors"]


@pytest.mark.portable
@pytest.mark.parametrize("changed", [False, True])
def test_copy_of_the_tied_head_in_another_dtype(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    """Blocks of half the length, several of them, hold the same elements."""
    monkeypatch.setattr(safetensors_reader, "BLOCK_BYTES", 4096)
    folder = altered(tiny_checkpoint, tmp_path / "checkpoint")

    def store(tensors: dict[str, np.ndarray]) -> None:
        tensors[EMBEDDING_KEY] = tensors[EMBEDDING_KEY].astype(np.float16)
        tensors[HEAD_KEY] = tensors[EMBEDDING_KEY].astype(np.float32)
        tensors[HEAD_KEY][-1, -1] += changed

    rewrite(folder, store)
    checkpoint = Checkpoint.open(str(folder))
    used = set(checkpoint.entries) - {HEAD_KEY}
    if changed:
        with pytest.raises(CheckpointError, match=f"{HEAD_KEY} differs from {EMBEDDING_KEY}"):
            checkpoint.check_keys(used)
    else:
        checkpoint.check_keys(used)


@pytest.mark.portable
@pytest.mark.parametrize("is_chained", [False, True])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EFBIG, "a file became larger than this process may write"),
    ],
)
def test_a_full_disk_while_downloading(
    monkeypatch: pytest.MonkeyPatch, is_chained: bool, code: int, words: str
) -> None:
    def download(*_: object, **__: object) -> str:
        full = OSError(code, os.strerror(code))
        if is_chained:
            raise RuntimeError("download failed") from full
        raise full

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CapacityError, match=f"^someone/model@main: the Hub's cache: {words}") as caught:
        Checkpoint.open("someone/model@main")
    assert str(caught.value.remedy).endswith("choose another place for the Hub's cache, with HF_HOME")


@pytest.mark.portable
def test_a_download_that_fails_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise ConnectionError("unreachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"neither a folder here nor on the Hub \(ConnectionError: unreachable\)"):
        Checkpoint.open("someone/model")


NORM = "model.language_model.norm.weight"


@pytest.mark.judge
def test_float64_is_cast_as_transformers_casts(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_reader, "BLOCK_BYTES", 4096)
    folder = altered(tiny_checkpoint, tmp_path / "checkpoint")
    random = np.random.default_rng(0)
    wide: dict[str, np.ndarray] = {}

    def widen(tensors: dict[str, np.ndarray]) -> None:
        for key in (NORM, EMBEDDING_KEY):  # one block, and several
            wide[key] = tensors[key] * (1 + random.uniform(-1e-8, 1e-8, tensors[key].shape))
            wide[key].flat[:3] = (1 + 2**-24, 1 + 3 * 2**-24, 2**-140)  # halves, and a subnormal number
        tensors.update(wide)

    rewrite(folder, widen)
    expected, checkpoint = judge.load(folder).state_dict(), Checkpoint.open(str(folder))
    for key, values in wide.items():
        found = checkpoint.tensor(key, values.shape).numpy()
        assert checkpoint.entries[key].dtype == "F64"
        np.testing.assert_array_equal(found, expected[key].numpy())
        assert found.flat[0] == 1 and found.flat[1] == np.float32(1 + 2**-22) and found.flat[2] > 0


@pytest.mark.portable
def test_float64_beyond_float32_is_infinite_and_so_refused_later(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = altered(tiny_checkpoint, tmp_path / "checkpoint")
    rewrite(folder, lambda tensors: tensors.update({NORM: np.full(48, 1e300)}))
    assert np.isinf(Checkpoint.open(str(folder)).tensor(NORM, [48]).numpy()).all()


@pytest.mark.portable
@pytest.mark.parametrize(
    ("dtype", "bits", "remedy"),
    [
        ("F8_E4M3", 8, "lacks the quantization_config"),
        ("F8_E5M2", 8, "lacks the quantization_config"),
        ("F4", 4, "lacks the quantization_config"),
        ("I8", 8, "bitsandbytes saves such ones"),
        ("U8", 8, "bitsandbytes saves such ones"),
        ("I32", 32, "cast them to BF16"),
        ("I64", 64, "cast them to BF16"),
        ("BOOL", 8, "cast them to BF16"),
        ("C64", 64, "cast them to BF16"),
        ("F1000", 32, "cast them to BF16"),
        ("\x1b[2J", 32, "cast them to BF16"),
    ],
)
def test_other_dtypes_are_refused_for_what_they_are(tmp_path: Path, dtype: str, bits: int, remedy: str) -> None:
    num_bytes = 48 * bits // 8
    raw = json.dumps({NORM: {"dtype": dtype, "shape": [48], "data_offsets": [0, num_bytes]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(num_bytes))
    entry = read_header(path).tensors[NORM]
    with pytest.raises(
        CheckpointError, match=rf"{NORM} is .*, expected one of F32, F16, BF16, F64\n.*{remedy}"
    ) as error:
        entry.tensor(NORM)
    assert error.value.message.isprintable()


PLAIN = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.portable
@pytest.mark.parametrize(
    "header",
    [
        *({"a": PLAIN | {"dtype": dtype}} for dtype in (["F32"], {}, None, 1)),
        *(
            {"a": PLAIN | {"shape": shape}}
            for shape in ("12", {}, [2**63], [0, 2**64], [2**32, 2**32], [1] * 20, [True])
        ),
        *({"a": PLAIN | {"data_offsets": offsets}} for offsets in ("04", {"0": 0}, [0], [0, 2**64], [4, 0], [0, 4, 8])),
        *({"a": value} for value in (None, [], "x", 1, {})),
        *(b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"\xff", b"[]", b"null"),
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 5000 + b"]}}",
        {"\ud800\x1b[2J" * 500: PLAIN | {"shape": [2]}},
    ],
    ids=lambda header: f"{str(header)[:40]}",
)
def test_any_header_ends_in_a_short_error_of_ours(tmp_path: Path, header: Any) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert caught.value.message.isprintable() and len(str(caught.value)) < 600


@pytest.mark.portable
@pytest.mark.parametrize(("num_tensors", "words"), [(1_400_000, "expected at most 20971520"), (300_000, "memory")])
def test_a_header_of_more_tensors_than_any_model_takes_no_time_and_no_memory(
    tmp_path: Path, num_tensors: int, words: str
) -> None:
    entry = '"%d":{"dtype":"X","shape":[],"data_offsets":[0,0]}'
    raw = ("{" + ",".join(entry % i for i in range(num_tensors)) + "}").encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(CheckpointError, match=words):
        read_header(path)
    assert time.thread_time() - started < 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 300e6 + len(raw)


@pytest.mark.portable
@pytest.mark.parametrize("name", ["a" * 300, "\0", "x\ud800", "..", "", ".", "folder", "pipe", "device", "memory"])
def test_any_name_of_a_shard_ends_in_a_short_error_of_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "memory").symlink_to("/proc/self/mem")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(str(tmp_path)).headers  # noqa: B018
    assert caught.value.message.isprintable() and len(str(caught.value)) < 600


@pytest.mark.portable
def test_shards_behind_links_into_the_cache_of_the_hub(tiny_checkpoint: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "disk" / "blobs", tmp_path / "cache" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(tiny_checkpoint.iterdir()):
        (blobs / f"{i:064}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blobs / f"{i:064}")
    linked, plain = (Checkpoint.open(str(folder)) for folder in (snapshot, tiny_checkpoint))
    assert linked.assets() == plain.assets()
    assert linked.describe()["weight_files"] == plain.describe()["weight_files"]
    np.testing.assert_array_equal(linked.tensor(NORM, [48]).numpy(), plain.tensor(NORM, [48]).numpy())

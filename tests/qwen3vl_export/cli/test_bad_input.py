"""Bad input through the commands: one clear error and its remedy, the exit code of its class, no damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from engines.external_data import write_model
from engines.initializers import add_initializer
from engines.quantize.tensors import BlockwiseWeight
from engines.weights import StreamedTensor
from helpers.command_line import call
from helpers.damage import altered, png_of_size, rewrite
from qwen3vl_export.checkpoint import EMBEDDING_KEY, HEAD_KEY, Checkpoint
from qwen3vl_export.cli.export import app as export_app
from qwen3vl_export.cli.run import app as run_app
from runtime.errors import (
    BundleError,
    CapacityError,
    CheckpointError,
    EngineError,
    ImageError,
    Qwen3VLError,
    TargetError,
    UsageError,
)
from runtime.manifest import FileRecord

NORM = "model.language_model.norm.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pieces(tiny_checkpoint: Path) -> Any:
    from qwen3vl_export.tracing.pieces import trace_pieces

    return trace_pieces(Checkpoint.open(str(tiny_checkpoint)).config)


@pytest.fixture
def traced_once(pieces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace the tiny shape once: every checkpoint here has it, and assembling leaves the pieces as they are."""
    monkeypatch.setattr("qwen3vl_export.tracing.pieces.trace_pieces", lambda config: pieces)


def assert_clear(err: str, words: str) -> None:
    """Check that there is one error of one line, with one remedy, and that it says what it should."""
    lines = err[err.index("error: ") :].splitlines()
    assert err.count("error: ") == 1
    assert "Traceback" not in err and "internal error" not in err
    assert words in lines[0]
    assert len(lines) == 2 and lines[1].startswith("  remedy: ")
    assert "max_" not in err  # options are spelled as the command line does


def shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def retensor(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, change)


def other_architecture(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "qwen2_5_vl"}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "model.safetensors and model.safetensors.index.json are",
        ),
        (lambda folder: cut(folder / "model.safetensors"), "the file has"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"{}"), "do not hold a header"),
        (shard, "model-00001-of-00002.safetensors: missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not readable as JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing"),
        (other_architecture, "model_type is 'qwen2_5_vl', which is Qwen2.5-VL, expected"),
        (retensor(lambda t: t.pop("model.visual.blocks.1.norm1.bias")), "norm1.bias is missing"),
        (retensor(lambda t: t.update({"model.extra.weight": np.zeros(3, np.float32)})), "model.extra.weight"),
        (retensor(lambda t: t.update({NORM: np.ones(7, np.float32)})), "norm.weight has shape [7]"),
        (retensor(lambda t: t.update({NORM: np.ones(48, np.int64)})), "norm.weight is I64"),
        (retensor(lambda t: t.update({HEAD_KEY: t[EMBEDDING_KEY] + 1})), f"differs from {EMBEDDING_KEY}"),
    ],
)
@pytest.mark.usefixtures("traced_once")
def test_bad_checkpoints(tiny_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    checkpoint = altered(tiny_checkpoint, tmp_path / "checkpoint")
    damage(checkpoint)
    output = older_engine(tmp_path)
    for option in ("--weights", "--no-weights"):
        code, out, err = call(export_app, str(checkpoint), "--output", str(output), option)
        assert (code, out) == (CheckpointError.exit_code, "")
        assert_clear(err, words)
        assert_untouched(tmp_path)


def older_engine(folder: Path) -> Path:
    (folder / "engine").mkdir()
    (folder / "engine" / "engine.json").write_text("before")
    return folder / "engine"


def assert_untouched(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} <= {"engine", "checkpoint"}
    assert [path.name for path in (folder / "engine").iterdir()] == ["engine.json"]
    assert (folder / "engine" / "engine.json").read_text() == "before"


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        (["demo", "--target", "ort-cpu-fp33"], TargetError, "unknown target 'ort-cpu-fp33'; known: ort-cpu-fp32"),
        (["no-such-folder"], CheckpointError, "no-such-folder: no such folder"),
        (["demo", "--bundle", "elsewhere"], UsageError, "--bundle and --output exclude each other"),
    ],
)
def test_bad_arguments(args: list[str], error: type[Qwen3VLError], words: str, tmp_path: Path) -> None:
    code, out, err = call(export_app, *args, "--output", str(older_engine(tmp_path)))
    assert (code, out) == (error.exit_code, "")
    assert_clear(err, words)
    assert_untouched(tmp_path)


@pytest.mark.usefixtures("traced_once")
def test_a_folder_of_something_else_is_not_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    code, out, err = call(export_app, str(tiny_checkpoint), "--output", str(tmp_path / "thesis"))
    assert (code, out) == (UsageError.exit_code, "")
    assert_clear(err, "not overwritten")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


@pytest.mark.usefixtures("traced_once")
def test_disk_space_is_checked_first(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_model(*_: object, **__: object) -> dict[str, FileRecord]:
        raise AssertionError("written before the space was checked")

    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr("engines.build.write_model", write_model)
    code, out, err = call(export_app, str(tiny_checkpoint), "--output", str(older_engine(tmp_path)))
    assert (code, out) == (CapacityError.exit_code, "")
    assert_clear(err, "0.00 GB are free")
    assert_untouched(tmp_path)


def test_an_equal_copy_of_the_tied_head_is_accepted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = altered(tiny_checkpoint, tmp_path / "checkpoint")
    rewrite(checkpoint, lambda t: t.update({HEAD_KEY: t[EMBEDDING_KEY].copy()}))
    code, out, err = call(
        export_app, str(checkpoint), "--output", str(tmp_path / "engine"), "--no-compile", "--no-weights", "--json"
    )
    assert (code, "error" in err) == (0, False)
    assert json.loads(out)["is_engine"] is False
    code, out, err = call(run_app, "run", str(tmp_path / "engine"), "Read.")
    assert (code, out) == (EngineError.exit_code, "")
    assert_clear(err, "engine.json is missing, so this is not an engine folder")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors and model.safetensors.index.json"),
        (lambda folder: cut(folder / "model.safetensors"), "the file has"),
        (shard, "model-00001-of-00002.safetensors: missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json: the file cannot be read as a"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json: missing"),
        (
            retensor(lambda t: t.pop(NORM)),
            f"1 weights are missing or of another shape than config.json implies: {NORM}",
        ),
        (retensor(lambda t: t.update({NORM: np.ones(7, np.float32)})), "1 weights are missing or of another shape"),
    ],
)
def test_verify_against_bad_checkpoints(
    tiny_engine: Path, tiny_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    checkpoint = altered(tiny_checkpoint, tmp_path / "checkpoint")
    damage(checkpoint)
    code, out, err = call(run_app, "verify", str(tiny_engine), "--checkpoint", str(checkpoint))
    assert (code, out) == (CheckpointError.exit_code, "")
    assert_clear(err, words)


def flip_a_byte(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def newer_version(folder: Path) -> None:
    manifest = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps(manifest | {"format_version": 99}))


@pytest.mark.parametrize(
    ("damage", "args", "words"),
    [
        (lambda folder: shutil.rmtree(folder), [], "no such engine folder"),
        (lambda folder: (folder / "engine.json").unlink(), [], "engine.json is missing"),
        (lambda folder: (folder / "engine.json").write_text("{"), [], "not readable as JSON"),
        (newer_version, [], "format version 99, expected 2"),
        (lambda folder: (folder / "tokenizer.json").unlink(), [], "tokenizer.json: missing"),
        (lambda folder: flip_a_byte(folder / "decoder.onnx"), [], "decoder.onnx: its SHA-256 is not the one"),
        (lambda folder: flip_a_byte(folder / "chat_template.jinja"), [], "chat_template.jinja: its SHA-256"),
        (lambda folder: cut(folder / "decoder.onnx.data"), [], "decoder.onnx.data: "),
        (lambda folder: flip_a_byte(folder / "vision.onnx.data"), ["--check"], "vision.onnx.data: its SHA-256"),
    ],
)
def test_bad_engines(
    demo_engine: Path, tmp_path: Path, damage: Callable[[Path], None], args: list[str], words: str
) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(demo_engine, engine)
    damage(engine)
    for command in (["run", str(engine), "Read."], ["inspect", str(engine)]):
        code, out, err = call(run_app, *command, *args)
        assert code == EngineError.exit_code
        assert out == "" or command[0] == "inspect"
        assert_clear(err, words)


def image_file(folder: Path, name: str) -> str:
    """Write the image of that name, if it is one that this function knows, and return its path."""
    path = folder / name
    if name == "broken.png":
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path)
        cut(path)
    elif name == "text.png":
        path.write_text("no image")
    elif name == "bomb.png":
        path.write_bytes(png_of_size(60_000, 60_000))
    elif name == "empty.png":
        path.write_bytes(png_of_size(0, 5))
    elif name == "ribbon.png":
        Image.new("RGB", (402, 2)).save(path)
    elif "://" in name:
        return name
    return str(path)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("missing.png", ImageError, "no such file"),
        ("text.png", ImageError, "not an image"),
        ("broken.png", ImageError, "damaged or cut short"),
        ("bomb.png", CapacityError, "expected at most 50000000 pixels"),
        ("empty.png", ImageError, "damaged"),
        ("ribbon.png", ImageError, "a ratio of at most 200, found 201.0"),
        ("http://host/cat.png", UsageError, "nothing is fetched"),
        ("https://host/cat.png", UsageError, "nothing is fetched"),
    ],
)
def test_bad_images(demo_engine: Path, tmp_path: Path, name: str, error: type[Qwen3VLError], words: str) -> None:
    code, out, err = call(run_app, "run", str(demo_engine), "Read.", "--image", image_file(tmp_path, name))
    assert (code, out) == (error.exit_code, "")
    assert_clear(err, words)


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        (["Read. " * 50, "--max-context", "40"], CapacityError, "--max-context is 40"),
        (["Read.", "--max-context", "0"], UsageError, "--max-context = 0"),
        (["Read.", "--max-memory", "0.001"], CapacityError, "the limit is 0.00 GB"),
        (["Read.", "--max-memory", "0"], UsageError, "--max-memory = 0"),
        (["Read.", "--temperature", "0.5"], UsageError, "no effect"),
    ],
)
def test_bad_requests(demo_engine: Path, args: list[str], error: type[Qwen3VLError], words: str) -> None:
    code, out, err = call(run_app, "run", str(demo_engine), *args)
    assert (code, out) == (error.exit_code, "")
    assert_clear(err, words)


def test_typed_image_tokens_are_text(demo_engine: Path, tmp_path: Path) -> None:
    typed = "<|vision_start|><|image_pad|><|vision_end|> Read <|image_pad|>."
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for images in ([], ["--image", str(tmp_path / "a.png")]):
        code, out, err = call(run_app, "run", str(demo_engine), typed, *images, "--max-new-tokens", "2", "--json")
        assert (code, err) == (0, "")
        stats = json.loads(out)["stats"]
        assert (stats["visual_tokens"], stats["new_tokens"]) == (4 if images else 0, 2)


def test_a_norm_that_is_no_number_stops_a_quantised_export_too(tmp_path: Path) -> None:
    # Kernels that round activations to 8 bits would turn it into a plausible answer.
    source = shutil.copytree(Checkpoint.open("demo").folder, tmp_path / "checkpoint")
    key = "model.language_model.layers.2.input_layernorm.weight"
    rewrite(source, lambda tensors: tensors[key].__setitem__(5, np.nan))
    output = tmp_path / "engine"
    code, _, err = call(export_app, str(source), "--target", "ort-cpu-int4", "--output", str(output))
    assert code == BundleError.exit_code
    assert f"{key}: nan at element 5" in err and "get it again" in err
    assert not output.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_streamed_weight_that_is_no_number_is_named(value: float, tmp_path: Path) -> None:
    class Weight(StreamedTensor):
        def blocks(self) -> Iterator[np.ndarray]:
            yield np.full(6, 3e38, np.float32)  # large, but a number
            yield np.float32([0, 1, value, 3, 4, 5])

    weight = Weight("layer.bias", (12,), ir.DataType.FLOAT)
    model = ir.Model(ir.Graph([], [], nodes=[], name="g", opset_imports={"": 24}), ir_version=11)
    add_initializer(model, weight)
    with pytest.raises(BundleError, match=r"layer\.bias: -?(nan|inf) at element 8; 1 weights"):
        write_model(model, tmp_path / "model.onnx", with_weights=True)


def test_a_weight_beyond_what_can_be_squared_is_not_quantised_to_rubbish() -> None:
    rows = np.ones((2, 32), np.float32)
    rows[1, 7] = 3e38

    class Weight(StreamedTensor):
        def blocks(self) -> Iterator[np.ndarray]:
            yield rows.reshape(-1)

    weight = BlockwiseWeight(Weight("layer.weight", rows.shape, ir.DataType.FLOAT), 4, 32)
    with pytest.raises(
        BundleError, match=r"layer\.weight: 3.*e\+38 at row 1, column 7: no number that can be quantised"
    ):
        list(weight.packed.blocks())


def test_nothing_of_a_checkpoint_is_refused_after_tracing_began(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is torch loaded for it: what is refused is so in a moment, and without a line of progress."""
    monkeypatch.setattr("qwen3vl_export.export.make_bundle", lambda *_: pytest.fail("traced"))
    damages: list[Callable[[Path], object]] = [
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        lambda folder: cut(folder / "model.safetensors"),
        shard,
        retensor(lambda t: t.pop(NORM)),
        retensor(lambda t: t.update({"model.extra.weight": np.zeros(3, np.float32)})),
        retensor(lambda t: t.update({NORM: np.ones(7, np.float32)})),
        retensor(lambda t: t.update({NORM: np.ones(48, np.int64)})),
        retensor(lambda t: t.update({HEAD_KEY: t[EMBEDDING_KEY] + 1})),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "chat_template.jinja").write_text("{% if %}"),
    ]
    for number, damage in enumerate(damages):
        checkpoint = altered(tiny_checkpoint, tmp_path / f"checkpoint{number}")
        damage(checkpoint)
        output = str(tmp_path / "out")
        code, out, err = call(export_app, str(checkpoint), "--target", "ort-cpu-fp32", "--output", output)
        assert (code, out) == (CheckpointError.exit_code, ""), err
        assert err.startswith(f"error: {checkpoint}") and err.count("\n") == 2
    assert not (tmp_path / "out").exists()


def test_a_weight_file_that_a_link_promises_is_called_by_its_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = altered(tiny_checkpoint, tmp_path / "checkpoint")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"/model\.safetensors: a broken link") as caught:
        Checkpoint.open(str(checkpoint)).entries  # noqa: B018
    assert str(caught.value.remedy).startswith("download model.safetensors again")
    (checkpoint / "model.safetensors").unlink()
    shard(altered(tiny_checkpoint, tmp_path / "sharded"))
    with pytest.raises(CheckpointError, match=r"/model-00001-of-00002\.safetensors: missing") as caught:
        Checkpoint.open(str(tmp_path / "sharded")).entries  # noqa: B018
    assert str(caught.value.remedy).startswith("download model-00001-of-00002.safetensors again")

"""Break the engine or the runtime, never the reference, and require `qwen3vl verify` to fail where the fault is.

The first check that fails must be the one nearest to the fault: whatever is compared before it is not touched by it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

import configs
import runtime.generation
import runtime.image_processor
import runtime.input_kinds.video
import runtime.preparation
import runtime.video.processor
import runtime.vision_inputs
from helpers.engines import build
from helpers.moe_checkpoints import write_experts
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.cli.errors import run_app
from qwen3vl_export.cli.run import app
from qwen3vl_export.export import make_bundle
from runtime.contract import DecoderInputs
from runtime.errors import CheckpointError, ParityError
from runtime.manifest import FileRecord, Manifest, sha256_of
from runtime.model import Qwen3VLModel
from runtime.scheduling.sequence import Sequence
from runtime.sessions.ort_cpu import OrtCpuSession
from runtime.video.frame_readers import FramesReader
from runtime.video.processor import ProcessedVideo

STEPS = 4


def run_verify(engine: Path, checkpoint: Path) -> tuple[Any, dict[str, Any]]:
    """Run the command and return its exit code and its JSON."""
    arguments = ["verify", str(engine), "--checkpoint", str(checkpoint), "--max-new-tokens", str(STEPS), "--json"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
        run_app(app, arguments)
    return end.value.code, json.loads(output.getvalue())


@dataclass
class Subject:
    """What a sabotage works on: an engine, room for an altered copy of it, and a patch of the runtime."""

    engine: Path
    copy: Path
    patch: pytest.MonkeyPatch

    def edit_graph(self, name: str, change: Callable[[onnx.GraphProto], int]) -> None:
        """Go on with a copy of the engine, one graph of which is altered; `change` returns how many places it met."""
        shutil.copytree(self.engine, self.copy)
        model = onnx.load(self.copy / name, load_external_data=False)
        assert change(model.graph) > 0
        onnx.save(model, self.copy / name)
        manifest = Manifest.read(self.copy)
        record = FileRecord((self.copy / name).stat().st_size, sha256_of(self.copy / name))
        dataclasses.replace(manifest, files={**manifest.files, name: record}).write(self.copy)
        self.engine = self.copy

    def patch_calls(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Alter the inputs of every call of the decoder, of prompts and of steps."""

        def changed(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(session: OrtCpuSession, inputs: DecoderInputs, cache: Any, slot: int = 0) -> Any:
                arrays = inputs.arrays()
                change(arrays)
                return original(session, DecoderInputs(**arrays), cache, slot)

            return call

        for name in ("prefill", "decode"):
            self.patch.setattr(OrtCpuSession, name, changed(getattr(OrtCpuSession, name)))


def bypass(node: onnx.NodeProto, value: str) -> None:
    """Make a node hand one of its inputs on."""
    assert value in node.input
    node.op_type, node.domain = "Identity", ""
    node.input[:] = [value]
    del node.attribute[:]


def deepstack_off(subject: Subject) -> None:
    def change(graph: onnx.GraphProto) -> int:
        adds = [node for node in graph.node if node.output[0].startswith("deepstack.") and node.op_type == "Where"]
        for node in adds:
            bypass(node, node.input[2])
        return len(adds)

    subject.edit_graph("decoder.onnx", change)


def deepstack_swapped(subject: Subject) -> None:
    def change(graph: onnx.GraphProto) -> int:
        (node,) = (node for node in graph.node if list(node.output) == ["visual_embeds"])
        node.input[1:] = node.input[:0:-1]
        return len(node.input) - 1

    subject.edit_graph("vision.onnx", change)


def chunk_deepstack_from_zero(subject: Subject) -> None:
    """Each chunk takes the DeepStack rows from the first on, as if no chunk before it had taken any."""

    def change(inputs: dict[str, Any]) -> None:
        rows, embeds = inputs["visual_rows"], inputs["visual_embeds"].copy()
        if (rows >= 0).any():
            first = rows[rows >= 0].min()
            embeds[1:] = np.roll(embeds[1:], first, axis=1)
        inputs["visual_embeds"] = embeds

    subject.patch_calls(change)


def chunk_rows_from_zero(subject: Subject) -> None:
    """Each chunk takes the visual rows of all levels from the first on."""

    def change(inputs: dict[str, Any]) -> None:
        rows = inputs["visual_rows"]
        if (rows >= 0).any():
            inputs["visual_rows"] = np.where(rows >= 0, rows - rows[rows >= 0].min(), -1)

    subject.patch_calls(change)


def align_corners_off(subject: Subject) -> None:
    def half_pixel(h: int, w: int, side: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
        from runtime.vision_inputs import patch_coordinates

        taps, weights = [], []
        for coordinate, size in zip(patch_coordinates(h, w, merge), (h, w), strict=True):
            source = np.clip((coordinate + 0.5) * side / size - 0.5, 0, side - 1)
            low = np.floor(source).astype(np.int64)
            taps.append(np.stack([low, np.minimum(low + 1, side - 1)], 1))
            weights.append(np.stack([1 - (source - low), source - low], 1).astype(np.float32))
        indices = taps[0][:, :, None] * side + taps[1][:, None, :]
        return indices.reshape(-1, 4), (weights[0][:, :, None] * weights[1][:, None, :]).reshape(-1, 4)

    subject.patch.setattr(runtime.vision_inputs, "position_interpolation", half_pixel)


def mrope_sections_swapped(subject: Subject) -> None:
    """Frequencies of the height turn with the width, and the other way round."""

    def change(graph: onnx.GraphProto) -> int:
        (axes,) = (tensor for tensor in graph.initializer if tensor.name == "axis_of_frequency")
        values = np.array([0, 2, 1])[numpy_helper.to_array(axes)]
        axes.CopyFrom(numpy_helper.from_array(values, axes.name))
        return int((values > 0).sum())

    subject.edit_graph("decoder.onnx", change)


def decode_delta_zero(subject: Subject) -> None:
    """Generated tokens are numbered by their index, as if an image took one position for each of its tokens."""
    original = runtime.generation.decode_steps

    def decode_steps(session: Any, cache: Any, logits: Any, num_cached: int, delta: int, *rest: Any) -> Any:
        return original(session, cache, logits, num_cached, 0, *rest)

    subject.patch.setattr(runtime.generation, "decode_steps", decode_steps)


def answer_delta_zero(subject: Subject) -> None:
    """The same in `generate` alone, whose sequences take the delta from the prompt by themselves."""
    start = Sequence.start

    def start_at_zero(sequence: Sequence, *args: Any) -> None:
        start(sequence, *args)
        sequence.delta = 0

    subject.patch.setattr(Sequence, "start", start_at_zero)


def q_norm_dropped(subject: Subject) -> None:
    def change(graph: onnx.GraphProto) -> int:
        norms = [node for node in graph.node if node.op_type == "SimplifiedLayerNormalization"]
        norms = [node for node in norms if node.input[1].endswith(".self_attn.q_norm.weight")]
        for node in norms:
            bypass(node, node.input[0])
        return len(norms)

    subject.edit_graph("decoder.onnx", change)


def head_dim_from_hidden(subject: Subject) -> None:
    """The scale of the scores is that of hidden / heads; the shapes, which this cannot reach, stay right."""
    text = configs.load("models/tiny")["text_config"]

    def change(graph: onnx.GraphProto) -> int:
        scales = [a for node in graph.node if node.op_type == "GroupQueryAttention" for a in node.attribute]
        scales = [attribute for attribute in scales if attribute.name == "scale"]
        for attribute in scales:
            assert attribute.f == pytest.approx(text["head_dim"] ** -0.5)
            attribute.f = (text["hidden_size"] / text["num_attention_heads"]) ** -0.5
        return len(scales)

    subject.edit_graph("decoder.onnx", change)


def cache_off_by_one(subject: Subject) -> None:
    def change(inputs: dict[str, Any]) -> None:
        inputs["past_lengths"] = inputs["past_lengths"] - (inputs["past_lengths"] > 0)

    subject.patch_calls(change)


def images_swapped(subject: Subject) -> None:
    original = Qwen3VLModel.encode_images
    subject.patch.setattr(Qwen3VLModel, "encode_images", lambda model, images: original(model, images[::-1]))


def resize_bilinear(subject: Subject) -> None:
    def bilinear(image: np.ndarray, height: int, width: int, kernel: object) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))

    subject.patch.setattr(runtime.image_processor, "resize", bilinear)


def timestamps_of_the_next_patch(subject: Subject) -> None:
    def shifted(*arguments: Any, **keywords: Any) -> ProcessedVideo:
        video = process_video(*arguments, **keywords)
        return dataclasses.replace(video, timestamps=(*video.timestamps[1:], video.timestamps[-1] + 1))

    process_video = runtime.video.processor.process_video
    subject.patch.setattr(runtime.input_kinds.video, "process_video", shifted)


def frames_of_the_wrong_parity(subject: Subject) -> None:
    """Temporal patches begin at every odd frame; their times stay right."""
    frames = FramesReader.frames

    def odd(reader: FramesReader, indices: np.ndarray) -> Any:
        return frames(reader, np.minimum(indices + 1, reader.num_frames - 1))

    subject.patch.setattr(FramesReader, "frames", odd)


def temporal_patches_swapped(subject: Subject) -> None:
    """The segments are placed from the last to the first; every other input stays right."""
    original = Qwen3VLModel.encode_images

    def swapped(model: Qwen3VLModel, images: Any) -> Any:
        is_video = len({image.grid_thw for image in images}) == 1 and len(images) > 1
        return original(model, images[::-1] if is_video else images)

    subject.patch.setattr(Qwen3VLModel, "encode_images", swapped)


def grid_of_another_video(subject: Subject) -> None:
    """Positions of the last video are those of one as wide as it is high, and the other way round."""
    original = runtime.preparation.mrope_positions

    def positions(num_tokens: int, spans: Any) -> Any:
        if len(spans) > 4:  # of two videos
            last = spans[-1].merged_grid_thw
            assert last[1] != last[2]
            turned = (last[0], last[2], last[1])
            spans = [
                dataclasses.replace(span, merged_grid_thw=turned) if span.merged_grid_thw == last else span
                for span in spans
            ]
        return original(num_tokens, spans)

    subject.patch.setattr(runtime.preparation, "mrope_positions", positions)


# What breaks, and the case, the check and the layer that notice first.
BREAKS: list[tuple[Callable[[Subject], None], tuple[str, str, int | None]]] = [
    (deepstack_off, ("one image", "keys", 1)),
    (deepstack_swapped, ("one image", "visual_embeds level 1", None)),
    (chunk_deepstack_from_zero, ("small chunks", "keys", 1)),
    (chunk_rows_from_zero, ("small chunks", "keys", 0)),
    (align_corners_off, ("one image", "visual_embeds level 1", None)),
    (mrope_sections_swapped, ("one image", "keys", 0)),
    (decode_delta_zero, ("one image", "greedy logits", None)),
    (answer_delta_zero, ("one image", "answer agrees", None)),
    (q_norm_dropped, ("text", "keys", 1)),
    (head_dim_from_hidden, ("text", "keys", 1)),
    (cache_off_by_one, ("text", "greedy logits", None)),
    (images_swapped, ("three images", "visual_embeds level 1", None)),
    (resize_bilinear, ("one image", "pixels, grey levels", None)),
    (timestamps_of_the_next_patch, ("video", "token ids differ from processor", None)),
    (frames_of_the_wrong_parity, ("video", "pixels, grey levels", None)),
    (temporal_patches_swapped, ("video", "visual_embeds level 1", None)),
    (grid_of_another_video, ("videos and image", "keys", 0)),
]


@pytest.fixture(scope="module", params=["dense", pytest.param("experts", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An engine and its checkpoint."""
    if request.param == "dense":
        return request.getfixturevalue("tiny_engine"), request.getfixturevalue("tiny_checkpoint")
    folder = tmp_path_factory.mktemp("tiny-moe")
    # A model whose answer to the picture of the first case depends on where its tokens stand.
    checkpoint = write_experts(folder / "checkpoint", seed=3)
    return build(make_bundle(Checkpoint.open(str(checkpoint))), "ort-cpu-fp32", folder / "engine"), checkpoint


@pytest.fixture(scope="module")
def unbroken(model: tuple[Path, Path]) -> tuple[Any, dict[str, Any]]:
    return run_verify(*model)


@pytest.mark.parametrize(("sabotage", "noticed_by"), BREAKS, ids=lambda value: getattr(value, "__name__", ""))
def test_verify_notices(
    sabotage: Callable[[Subject], None],
    noticed_by: tuple[str, str, int | None],
    unbroken: tuple[Any, dict[str, Any]],
    model: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, report = unbroken
    assert (code, report["passed"]) == (0, True), report
    engine, checkpoint = model
    subject = Subject(engine, tmp_path / "engine", monkeypatch)
    sabotage(subject)
    code, report = run_verify(subject.engine, checkpoint)
    assert (code, report["passed"]) == (ParityError.exit_code, False)
    first = next(check for check in report["checks"] if not check["passed"])
    print({key: first[key] for key in ("case", "name", "layer", "value", "limit")})  # pytest -rP shows the margin
    assert (first["case"], first["name"], first["layer"]) == noticed_by
    # Well past the limit: a fault that just passes it would be noticed by luck.
    assert first["is_minimum"] or first["value"] > 5 * first["limit"]


def test_head_dim_from_hidden_is_no_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The loud variant: an exporter that took the shapes, too, from hidden / heads would not find its weights."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    for form in ("rope_parameters", "rope_scaling"):
        text[form]["mrope_section"] = [2, 2, 2]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight has shape \[128, 48\]"):
        make_bundle(Checkpoint.open(str(folder)))

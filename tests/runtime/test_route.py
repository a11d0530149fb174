"""Which engines may work together, what they are together, and what is said of them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.bundle import Bundle
from helpers.engines import build, requantized
from qwen3vl_export.export import ExportRequest, export
from runtime import memory
from runtime.errors import CapacityError, EngineError, UsageError
from runtime.manifest import FileRecord, Manifest
from runtime.memory import CACHE, OF_OTHERS, STAGING, WEIGHTS, cache_bytes
from runtime.memory_plan import Facts, Planner, Work
from runtime.model import Qwen3VLModel
from runtime.route import Route, possible_routes
from runtime.scheduling.plan import held_bytes
from runtime.session import DECODE, PREFILL, VISION

Copy = Callable[..., Path]


@pytest.fixture
def copy(demo_engine: Path, tmp_path: Path) -> Copy:
    """Copy the demo engine, with entries of its manifest changed."""

    def copied(name: str = "copy", of: Path = demo_engine, **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(of, folder)
        manifest = Manifest.read(folder)
        dataclasses.replace(manifest, **{key: change(getattr(manifest, key)) for key, change in changes.items()}).write(
            folder
        )
        return folder

    return copied


@pytest.fixture(scope="module")
def int4_engine(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(demo_bundle, "ort-cpu-int4", tmp_path_factory.mktemp("route") / "int4")


# What export writes


def test_engines_of_one_checkpoint_say_so(demo_engine: Path, int4_engine: Path) -> None:
    digests = {Manifest.read(folder).source["weights_sha256"] for folder in (demo_engine, int4_engine)}
    assert len(digests) == 1
    assert Route.read(demo_engine, prefill_engine=int4_engine).engines[1].folder == int4_engine


@pytest.mark.slow
def test_exports_of_a_checkpoint_and_of_a_fine_tuned_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_checkpoint, tuned)
    tensors = load_file(tuned / "model.safetensors")
    key = "model.language_model.layers.0.mlp.down_proj.weight"
    save_file({**tensors, key: tensors[key] * np.float32(1.01)}, tuned / "model.safetensors", metadata={"format": "pt"})
    engines = [
        export(ExportRequest(str(source), target="ort-cpu-fp32", output=tmp_path / f"engine-{i}")).output
        for i, source in enumerate((tiny_checkpoint, tuned))
    ]
    with pytest.raises(UsageError, match="not engines of one checkpoint: the weights differ"):
        Route.read(engines[0], vision_engine=engines[1])


# What is refused


def test_another_checkpoint_is_refused_with_both_names(demo_engine: Path, copy: Copy) -> None:
    other = copy(source=lambda source: {**source, "name": "other", "weights_sha256": "0" * 64})
    for option in ("vision_engine", "prefill_engine"):
        with pytest.raises(UsageError) as caught:
            Qwen3VLModel.from_engine(demo_engine, **{option: other})
        assert f"{demo_engine} (of demo) and {other} (of other)" in caught.value.message
        assert caught.value.message.endswith("not engines of one checkpoint: the weights differ")
        assert "--target" in caught.value.remedy


@pytest.mark.parametrize("missing", ["ours", "theirs"])
def test_an_engine_that_does_not_say_what_its_weights_are_is_refused(missing: str, copy: Copy) -> None:
    def without(source: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in source.items() if name != "weights_sha256"}

    folders = {name: copy(name, source=without if name == missing else dict) for name in ("ours", "theirs")}
    with pytest.raises(UsageError, match="built by a version that did not write a digest of the weights"):
        Route.read(folders["ours"], prefill_engine=folders["theirs"])


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "preprocessor_config.json"])
def test_another_way_to_make_prompts_is_refused(name: str, demo_engine: Path, copy: Copy) -> None:
    other = copy()
    path = other / name
    path.write_bytes(path.read_bytes() + b"\n")
    manifest = Manifest.read(other)
    dataclasses.replace(manifest, files={**manifest.files, name: FileRecord.of(path)}).write(other)
    with pytest.raises(UsageError, match=rf"not engines of one checkpoint: {name} differ"):
        Route.read(demo_engine, vision_engine=other)


def test_all_ways_between_two_engines(demo_engine: Path, int4_engine: Path, copy: Copy) -> None:
    vision, prefill = {"vision_engine": int4_engine}, {"prefill_engine": int4_engine}
    assert possible_routes(demo_engine, int4_engine) == [vision, prefill, vision | prefill]
    other = copy(source=lambda source: {**source, "weights_sha256": "0" * 64})
    with pytest.raises(UsageError, match="not engines of one checkpoint"):
        possible_routes(demo_engine, other)


def test_an_engine_with_two_names_is_opened_once(demo_engine: Path, int4_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(int4_engine)
    engines = Route.read(demo_engine, vision_engine=int4_engine, prefill_engine=tmp_path / "link").engines
    assert [(each.folder, each.parts) for each in engines[1:]] == [(int4_engine, {VISION, PREFILL})]


def test_another_shape_is_refused(demo_engine: Path, copy: Copy) -> None:
    other = copy(model=lambda model: dataclasses.replace(model, text=dataclasses.replace(model.text, rope_theta=1.0)))
    with pytest.raises(UsageError, match="their models have different shapes"):
        Route.read(demo_engine, vision_engine=other)


def test_the_engine_itself_is_refused(demo_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(demo_engine)
    for same in (demo_engine, str(demo_engine), tmp_path / "link"):
        with pytest.raises(UsageError, match="is the engine that decodes, so it changes nothing"):
            Route.read(demo_engine, prefill_engine=same)


def test_what_is_no_engine_is_refused(demo_engine: Path, copy: Copy, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such engine folder"):
        Route.read(demo_engine, vision_engine=tmp_path / "nothing")
    with pytest.raises(UsageError, match="nothing is fetched"):
        Route.read(demo_engine, vision_engine="https://host/engine")
    with pytest.raises(UsageError, match="prefill_engine: expected a path, got int"):
        Route.read(demo_engine, prefill_engine=7)
    altered = copy()
    (altered / "decoder.onnx").write_bytes((altered / "decoder.onnx").read_bytes()[:-1])
    with pytest.raises(EngineError, match=r"decoder\.onnx: \d+ bytes, expected"):
        Qwen3VLModel.from_engine(demo_engine, prefill_engine=altered)


def test_weight_files_of_all_engines_are_hashed_on_request(demo_engine: Path, copy: Copy) -> None:
    altered = copy()
    path = altered / "vision.onnx.data"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    Route.read(demo_engine, vision_engine=altered)
    with pytest.raises(EngineError, match="its SHA-256 is not the one"):
        Qwen3VLModel.from_engine(demo_engine, vision_engine=altered, check=True)


def test_plans_run_all_or_nothing(demo_engine: Path, copy: Copy) -> None:
    plans = copy(session=lambda _: "tensorrt")
    with pytest.raises(UsageError, match="whose sessions run all parts of an engine or none"):
        Route.read(demo_engine, vision_engine=plans)


def test_codes_move_between_caches_of_the_same_scales_alone(
    demo_engine: Path, copy: Copy, tmp_path: Path, calibration: list[Any]
) -> None:
    codes = requantized(demo_engine, tmp_path / "int8", 8, calibration)
    with pytest.raises(UsageError, match="the one holds int8, the other float32"):
        Route.read(demo_engine, prefill_engine=codes)
    with pytest.raises(UsageError, match="the one holds float32, the other int8"):
        Route.read(codes, prefill_engine=demo_engine)
    Route.read(demo_engine, vision_engine=codes)  # no row moves
    assert possible_routes(demo_engine, codes) == [{"vision_engine": codes}]
    assert len(Route.read(codes, prefill_engine=copy("same", of=codes)).engines) == 2
    scales = Manifest.read(codes).capabilities["cache_scales"]
    other = copy("other", of=codes)
    values = np.load(other / scales)
    values[0, 0, 0, 0] *= 2
    np.save(other / scales, values)
    manifest = Manifest.read(other)
    dataclasses.replace(manifest, files={**manifest.files, scales: FileRecord.of(other / scales)}).write(other)
    with pytest.raises(UsageError, match="their codes have different scales") as caught:
        Route.read(codes, prefill_engine=other)
    assert str(codes) in caught.value.message and str(other) in caught.value.message


@pytest.fixture(scope="module")
def calibration() -> list[Any]:
    from demo_training.prompts import training_prompts

    return training_prompts(2)


# What they are together


def test_an_engine_alone_is_what_it_is(demo_engine: Path) -> None:
    route = Route.read(demo_engine)
    assert route.manifest == Manifest.read(demo_engine)
    with Qwen3VLModel.from_engine(demo_engine) as model:
        assert "route" not in model.statistics() and "engine=" not in repr(model)


def stored(model: Qwen3VLModel) -> int:
    """Return the bytes of weights that a plan begins with."""
    return sum(Facts.of(model.manifest).weight_bytes.values())


def test_weights_and_staging_are_planned(demo_engine: Path, int4_engine: Path) -> None:
    def files(folder: Path, *graphs: str) -> int:
        records = Manifest.read(folder).files
        return sum(records[f"{graph}.onnx.data"].num_bytes for graph in graphs)

    with Qwen3VLModel.from_engine(
        int4_engine, vision_engine=demo_engine, prefill_engine=demo_engine, max_context=512, max_sequences=2
    ) as model:
        parts = held_bytes(model.manifest, model.limits)
        capabilities = Manifest.read(demo_engine).capabilities
        staging = cache_bytes(model.config, capabilities, 512)
        assert parts[STAGING] == staging == parts[CACHE] // model.limits.num_slots
        assert (
            stored(model) == files(demo_engine, "vision", "decoder") + files(int4_engine, "decoder") <= parts[WEIGHTS]
        )
    with Qwen3VLModel.from_engine(int4_engine, vision_engine=demo_engine) as model:
        parts = held_bytes(model.manifest, model.limits)
        assert parts[STAGING] == 0
        assert stored(model) == files(demo_engine, "vision") + files(int4_engine, "decoder") <= parts[WEIGHTS]
    one = {"max_sequences": 1, "kept_sequences": 0, "vision_cache_bytes": 0, "max_context": 512}
    with Qwen3VLModel.from_engine(int4_engine, prefill_engine=demo_engine, **one) as model:
        least = sum(held_bytes(model.manifest, model.limits).values())
    with Qwen3VLModel.from_engine(int4_engine, prefill_engine=demo_engine, max_memory=least, **one):
        pass
    with pytest.raises(CapacityError, match=r"staging 0\.00 GB"):
        Qwen3VLModel.from_engine(int4_engine, prefill_engine=demo_engine, max_memory=least - staging, **one)


def test_each_part_is_planned_as_the_engine_computes_that_runs_it(demo_engine: Path, int4_engine: Path) -> None:
    work = Work(512, images=(1024,))

    def planned(manifest: Manifest) -> Mapping[str, int]:
        return Planner.of(manifest, 1).plan(work).parts

    floats, codes = (planned(Manifest.read(engine)) for engine in (demo_engine, int4_engine))
    routed = planned(Route.read(int4_engine, vision_engine=demo_engine, prefill_engine=demo_engine).manifest)
    assert (routed[memory.VISION], routed[memory.PREFILL]) == (floats[memory.VISION], floats[memory.PREFILL])
    assert floats[memory.VISION] != codes[memory.VISION] and floats[memory.PREFILL] != codes[memory.PREFILL]
    own = Facts.of(Manifest.read(int4_engine))
    alone = Planner(dataclasses.replace(own, weight_bytes={"decoder": own.weight_bytes["decoder"]}))
    assert routed[WEIGHTS] == floats[WEIGHTS] + alone.plan(work).parts[WEIGHTS]
    seen = planned(Route.read(int4_engine, vision_engine=demo_engine).manifest)
    assert (seen[memory.VISION], seen[CACHE]) == (floats[memory.VISION], codes[CACHE])


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_what_runs_on_another_device_takes_no_workspace_of_this_one(device: str, demo_engine: Path) -> None:
    manifest = Manifest.read(demo_engine)
    here = dataclasses.replace(manifest, capabilities={**manifest.capabilities, "device": device})
    other = {"device": "gpu" if device == "cpu" else "cpu", "precision": "fp32"}
    for part, name in ((VISION, memory.VISION), (PREFILL, memory.PREFILL)):
        there = dataclasses.replace(here, capabilities={**here.capabilities, OF_OTHERS: {part: other}})
        for sequences in (1, 2):
            work = Work(1024, sequences, images=(1024,))
            alone, routed = (Planner.of(each, 1).plan(work).parts for each in (here, there))
            assert routed[name] < 0.8 * alone[name]
            assert routed[CACHE] == alone[CACHE]


def test_only_graphs_that_run_are_opened(demo_engine: Path, copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    opened: list[str] = []
    original = onnxruntime.InferenceSession

    def opening(path: str, *arguments: Any, **keywords: Any) -> Any:
        opened.append("/".join(Path(path).parts[-2:]))
        return original(path, *arguments, **keywords)

    other = copy()
    monkeypatch.setattr(onnxruntime, "InferenceSession", opening)
    with Qwen3VLModel.from_engine(demo_engine, prefill_engine=other):
        assert opened == ["engine/vision.onnx", "engine/decoder.onnx", "copy/decoder.onnx"]
    opened.clear()
    with Qwen3VLModel.from_engine(demo_engine, prefill_engine=other, vision_engine=other):
        assert opened == ["engine/decoder.onnx", "copy/vision.onnx", "copy/decoder.onnx"]
    opened.clear()
    with Qwen3VLModel.from_engine(demo_engine, vision_engine=other):
        assert opened == ["engine/decoder.onnx", "copy/vision.onnx"]


def test_the_route_is_told(demo_engine: Path, int4_engine: Path, copy: Copy) -> None:
    other = copy()
    with Qwen3VLModel.from_engine(int4_engine, vision_engine=demo_engine, prefill_engine=other, threads=1) as model:
        assert f"vision_engine={str(demo_engine)!r}, prefill_engine={str(other)!r}" in repr(model)
        assert "prefill_engine" in model._repr_html_() and str(other) in model._repr_html_()
        assert model.statistics()["route"] == {
            DECODE: {"engine": str(int4_engine), "target": "ort-cpu-int4"},
            PREFILL: {"engine": str(other), "target": "ort-cpu-fp32"},
            VISION: {"engine": str(demo_engine), "target": "ort-cpu-fp32"},
        }

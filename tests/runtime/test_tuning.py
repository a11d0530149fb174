"""What an opening takes of a stored tuning: the settings of this engine on this machine, and never an error."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.serving import WrappedSession, alone, asked
from runtime import tuning_store
from runtime.contract import VisionInputs, VisualEmbeds
from runtime.engine_options import EngineOptions
from runtime.errors import UsageError
from runtime.manifest import FileRecord, Manifest
from runtime.model import Qwen3VLModel
from runtime.scheduling.plan import held_bytes
from runtime.session import SessionOptions
from runtime.tuning import Tuning, tuned_limits
from runtime.tuning_store import FORMAT_VERSION, Key, stored_values, this_machine

FOUND = {"threads": 2, "prefill_chunk": 16, "vision_patches": 16, "draft_cost": 0.05}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of tunings of a user who has none yet."""
    monkeypatch.setattr("runtime.tuning_store.user_cache_folder", lambda: tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    folder = tmp_path / "qwen3vl" / "tuning"
    folder.mkdir(parents=True)
    return folder


def keep(cache: Path, manifest: Manifest, settings: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a tuning as `qwen3vl tune` does, with changes."""
    key = Key.of(manifest)
    values = {"format_version": FORMAT_VERSION, "name": "demo", "tuned": 1, **key.to_dict()}
    path = cache / key.file_name
    path.write_text(json.dumps({**values, "settings": FOUND if settings is None else settings, **changes}))
    return path


def notes(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_opening_takes_what_is_stored_and_says_so(
    cache: Path, demo_engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep(cache, Manifest.read(demo_engine))
    model = Qwen3VLModel.from_engine(demo_engine)
    assert notes(caplog) == [
        "note: opened as tuned on this machine: threads 2, prefill_chunk 16, vision_patches 16, draft_cost 0.05 "
        "(--no-tuned for the defaults)"
    ]
    assert model.threads == 2
    limits = model.limits
    assert (limits.prefill_chunk, limits.last_chunk, limits.vision_patches, limits.draft_cost) == (16, 16, 16, 0.05)
    assert model.statistics()["tuning"] == FOUND
    assert "tuning='threads 2, prefill_chunk 16" in repr(model)
    untuned = Qwen3VLModel.from_engine(demo_engine, tuned=False)
    assert untuned.statistics()["tuning"] == {} and "tuning" not in repr(untuned) and len(notes(caplog)) == 1
    assert untuned.limits.prefill_chunk == 512
    # The same answer, in chunks of another length.
    messages = asked("Read the digits.", 0)
    tuned, plain = (each.generate(messages, max_new_tokens=8) for each in (model, untuned))
    assert tuned.token_ids == plain.token_ids
    chunks = [each.statistics()["prefill_chunks"] for each in (model, untuned)]
    assert chunks == [-(-plain.stats.prompt_tokens // 16), 1] and chunks[0] > 1


def test_who_has_none_gets_the_defaults(cache: Path, demo_engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = Manifest.read(demo_engine)
    assert stored_values(manifest) is None
    assert EngineOptions.checked(manifest) == EngineOptions.checked(manifest, tuned=False)
    assert EngineOptions.checked(manifest).session == SessionOptions()
    cache.rmdir()
    assert EngineOptions.checked(manifest).tuning == Tuning()
    assert notes(caplog) == []


def test_what_is_given_goes_before(cache: Path, demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.read(demo_engine)
    keep(cache, manifest, {"threads": 2, "huge_pages": True})
    assert EngineOptions.checked(manifest).session == SessionOptions(2, huge_pages=True)
    given = EngineOptions.checked(manifest, threads=1, huge_pages=False)
    assert given.session == SessionOptions(1, huge_pages=False) and given.tuning == Tuning()
    assert EngineOptions.checked(manifest, tuned=Tuning(threads=2), threads=1).session.threads == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    asked_for = EngineOptions.checked(manifest)
    assert asked_for.session == SessionOptions(None, huge_pages=True) and asked_for.tuning == Tuning(huge_pages=True)


def with_other_weights(manifest: Manifest) -> Manifest:
    name, record = next((name, each) for name, each in manifest.files.items() if each.is_weights)
    return dataclasses.replace(manifest, files={**manifest.files, name: FileRecord(record.num_bytes, "0" * 64, True)})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": "0" * 64}, "it is of another engine"),
        ({"machine": {"cpu": "Abacus", "cores": 1}}, "it was measured with another cores and cpu and cpu_features"),
        ({"versions": {"onnxruntime": "0.1"}}, "it was measured with another onnxruntime and qwen3vl-export"),
        ({"format_version": 0}, "format version 0, expected 1"),
        ({"format_version": True}, "format version True, expected 1"),
        ({"tuned": 10**30}, "tuned is no time in seconds"),
        ({"tuned": -1}, "tuned is no time in seconds"),
        ({"settings": []}, "settings is missing, or of another kind"),
        ({"settings": {"speed": 11}}, "unknown setting 'speed'"),
        ({"settings": {"threads": "two"}}, "threads = 'two'"),
        ({"settings": {"threads": 10**6}}, "threads = 1000000"),
        ({"settings": {"prefill_chunk": 1}}, "prefill_chunk = 1, expected 16 to 4096"),
        ({"settings": {"huge_pages": 1}}, "huge_pages must be True or False"),
        ({"settings": {"draft_cost": float("nan")}}, "draft_cost"),
        ({"settings": {"cuda_graphs": False}}, "an engine of ort-cpu-fp32 has no use for it"),
    ],
)
def test_what_does_not_fit_is_ignored_with_a_note(
    changes: dict[str, Any], said: str, cache: Path, demo_engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = Manifest.read(demo_engine)
    keep(cache, manifest, **changes)
    assert EngineOptions.checked(manifest).tuning == Tuning()
    (note,) = notes(caplog)
    assert said in note and note.endswith("renew it with: qwen3vl tune ENGINE")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"format_version": 1}', b'"' * 100])
def test_a_damaged_file_is_ignored_with_a_note(
    damage: bytes, cache: Path, demo_engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = Manifest.read(demo_engine)
    keep(cache, manifest).write_bytes(damage)
    assert EngineOptions.checked(manifest).tuning == Tuning()
    assert len(notes(caplog)) == 1 and "renew it with" in notes(caplog)[0]


def test_a_folder_in_place_of_the_file_is_ignored_with_a_note(
    cache: Path, demo_engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = Manifest.read(demo_engine)
    path = keep(cache, manifest)
    path.unlink()
    path.mkdir()
    assert EngineOptions.checked(manifest).tuning == Tuning()
    (said,) = notes(caplog)
    assert "expected a file, found a folder" in said


def test_another_engine_takes_nothing_of_it(cache: Path, demo_engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = Manifest.read(demo_engine)
    path = keep(cache, manifest)
    other = with_other_weights(manifest)
    assert Key.of(other).file_name != path.name
    assert EngineOptions.checked(other).tuning == Tuning() and notes(caplog) == []
    # Under the name that the other one's would have, it is not taken either.
    path.rename(cache / Key.of(other).file_name)
    assert EngineOptions.checked(other).tuning == Tuning()
    assert "it is of another engine" in notes(caplog)[0]
    assert Key.of(dataclasses.replace(manifest, target="other")).engine != Key.of(manifest).engine


def test_of_another_machine_there_is_a_note(
    cache: Path, demo_engine: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.read(demo_engine)
    keep(cache, manifest)
    monkeypatch.setattr(tuning_store, "available_cores", lambda: 7)
    assert EngineOptions.checked(manifest).tuning == Tuning()
    assert notes(caplog) == [
        "note: this engine was tuned on another machine, so that is of no use here; renew it with: qwen3vl tune ENGINE"
    ]


def test_without_a_home_there_is_none(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_store, "user_cache_folder", lambda: None)
    manifest = Manifest.read(demo_engine)
    assert stored_values(manifest) is None and EngineOptions.checked(manifest).tuning == Tuning()


def test_the_gpus_are_part_of_the_machine(tmp_path: Path) -> None:
    folder = tmp_path / "gpus" / "0000:01:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 42\n")
    (tmp_path / "version").write_text("NVRM version: 580.65\nGCC version: 12\n")
    found = this_machine(on_gpu=True, driver=tmp_path)
    assert (found["gpus"], found["gpu_driver"]) == (["NVIDIA H200"], "NVRM version: 580.65")
    assert this_machine(on_gpu=True, driver=tmp_path / "none")["gpus"] == []
    assert "gpus" not in this_machine(on_gpu=False, driver=tmp_path)


@pytest.mark.parametrize("tuned", [1, None, "yes", {}, FOUND])
def test_only_a_truth_value_or_a_tuning_is_taken(tuned: Any, demo_engine: Path) -> None:
    with pytest.raises(UsageError, match="tuned must be True or False"):
        EngineOptions.checked(Manifest.read(demo_engine), tuned=tuned)


@pytest.mark.parametrize(
    "settings", [{"sdpa_kernel": "1"}, {"separate_prefill": False}, {"every_batch": True}, {"decode_plan": False}]
)
def test_settings_that_an_engine_has_no_use_for_are_refused(settings: dict[str, Any], demo_engine: Path) -> None:
    with pytest.raises(UsageError, match="ort-cpu-fp32 has no use for it"):
        Qwen3VLModel.from_engine(demo_engine, tuned=Tuning(**settings))


def test_a_chunk_that_memory_does_not_hold_is_left_out(demo_engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Qwen3VLModel.from_engine(demo_engine, tuned=False)
    tuning = Tuning(prefill_chunk=1024, vision_patches=64)
    held = held_bytes(model.manifest, model.limits)
    beside = held["KV cache"] + held["kept embeddings"]
    tight = tuned_limits(model.limits, tuning, model.manifest, beside)
    assert (tight.prefill_chunk, tight.vision_patches) == (model.limits.prefill_chunk, 64)
    assert notes(caplog) == ["note: memory does not hold chunks of 1024 tokens, so they have 512"]
    roomy = tuned_limits(model.limits, tuning, model.manifest, 1 << 40)
    assert (roomy.prefill_chunk, roomy.last_chunk) == (1024, 1024)
    larger = held_bytes(model.manifest, roomy)["prefill"] - held["prefill"]
    assert tuned_limits(model.limits, tuning, model.manifest, beside + larger) == roomy
    assert tuned_limits(model.limits, tuning, model.manifest, beside + larger - 1).prefill_chunk == 512


class Watching(WrappedSession):
    """Notes how many images a call of the vision tower has."""

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        self.num_segments: list[int] = []

    def vision(self, inputs: VisionInputs) -> VisualEmbeds:
        self.num_segments.append(len(inputs.pixel_values))
        embeds: VisualEmbeds = self.wrapped.vision(inputs)
        return embeds


def test_images_share_a_call_as_far_as_the_setting_says(demo_engine: Path) -> None:
    opened = Qwen3VLModel.from_engine(demo_engine, threads=1)
    pictures = [np.full((128, 128, 3), 40 * number, np.uint8) for number in range(4)]
    calls = {}
    for most in (1, 2, 4):
        watching = Watching(opened.session)
        patches = len(opened.prepare(asked("x", pictures[0])).images[0].patches)
        model = alone(opened, session=watching, vision_patches=most * patches)
        model.generate(asked("Read.", *pictures), max_new_tokens=1)
        calls[most] = watching.num_segments
    assert calls == {1: [1, 1, 1, 1], 2: [2, 2], 4: [4]}


def test_the_cost_decides_how_much_is_drafted(demo_engine: Path) -> None:
    opened = Qwen3VLModel.from_engine(demo_engine, threads=1, tuned=False)

    def drafted(cost: float) -> int:
        options = {"max_new_tokens": 40, "prompt_lookup_num_tokens": 8, "do_sample": False, "eos_token_ids": ()}
        return alone(opened, draft_cost=cost).generate(asked("Read the digits.", 0), **options).stats.drafted_tokens

    assert drafted(0.01) > drafted(5.0)

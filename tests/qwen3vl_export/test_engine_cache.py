"""From a model's name to an engine: what is found, what is built, and when it is built again."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from engines.progress import Progress, Stage
from helpers import ROOT
from helpers.command_line import call
from helpers.damage import edit_json
from qwen3vl_export.cli.run import app
from qwen3vl_export.engine_cache import find_or_build
from qwen3vl_export.engine_store import cache_folder, entries
from qwen3vl_export.export import Exported
from qwen3vl_export.request import ExportRequest
from qwen3vl_export.revisions import look_up
from runtime import native
from runtime.errors import CheckpointError, EngineError, UsageError
from runtime.manifest import Manifest

TARGET = "ort-cpu-fp32"
COMMITS = ("0" * 40, "1" * 40)


class Notes(Progress):
    """Keeps what an export says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def report(self, stage: Stage, text: str) -> None:
        self.texts.append(text)

    def __contains__(self, words: str) -> bool:
        return any(words in text for text in self.texts)


class Exporter:
    """Stands for the exporter: copies an engine, under the target and from the source that is asked for."""

    def __init__(self, engine: Path) -> None:
        self.engine = engine
        self.requests: list[ExportRequest] = []
        self.revision: str | None = None
        self.meanwhile: Any = lambda: None

    def __call__(self, request: ExportRequest, progress: Progress) -> Exported:
        self.requests.append(request)
        self.meanwhile()
        assert request.output is not None
        shutil.copytree(self.engine, request.output)
        source = {"name": request.model, "revision": self.revision, "weight_files": {}}
        manifest = dataclasses.replace(Manifest.read(self.engine), target=request.target, source=source)
        manifest.write(request.output)
        return Exported(request.output, request.target, True, 0, 0.0, 0.0, manifest)


@pytest.fixture
def exporter(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> Exporter:
    found = Exporter(demo_engine)
    monkeypatch.setattr("qwen3vl_export.export.export", found)
    return found


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "My model"))


def test_a_checkpoint_is_built_once_and_opens(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """With the exporter itself; found again in a process that has loaded nothing of it."""
    from runtime.model import Qwen3VLModel

    cache = tmp_path / "cache"
    path = find_or_build(str(tiny_checkpoint), target=TARGET, cache=cache)
    with Qwen3VLModel.from_engine(path, threads=1) as model:
        assert model.manifest.target == TARGET
    code = (
        "import sys\nfrom pathlib import Path\nfrom qwen3vl_export.engine_cache import find_or_build\n"
        f"print(find_or_build({str(tiny_checkpoint)!r}, target={TARGET!r}, cache=Path({str(cache)!r})))\n"
        f"print(find_or_build({str(path)!r}))\n"
        "print(sorted({'torch', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(path), str(path), "[]"]


def test_an_engine_is_taken_as_it_is(demo_engine: Path, tmp_path: Path, exporter: Exporter) -> None:
    assert find_or_build(demo_engine, cache=tmp_path / "none") == demo_engine
    assert exporter.requests == [] and list(tmp_path.iterdir()) == []


def test_what_another_engine_comes_of_is_in_the_name(checkpoint: Path, tmp_path: Path, exporter: Exporter) -> None:
    def built(**options: Any) -> str:
        return find_or_build(str(checkpoint), cache=tmp_path / "cache", **{"target": TARGET, **options}).name

    first = built()
    assert first.startswith(f"My-model-{TARGET}-") and len(first) == len(f"My-model-{TARGET}-") + 12
    assert built() == first and len(exporter.requests) == 1
    # Sizes are no part of an engine that has none.
    assert built(max_context=512, max_batch=2) == first and len(exporter.requests) == 1
    others = {built(target="ort-cpu-int8")}
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for text in ("one", "two"):
        (prompts / "prompts.txt").write_text(text)
        others.add(built(target="ort-cpu-int8", calibration=prompts))
    edit_json(checkpoint / "tokenizer_config.json", lambda values: values.update(x=1))
    others.add(built())
    weights = checkpoint / "model.safetensors"
    os.utime(weights, ns=(1, weights.stat().st_mtime_ns + 1))
    others.add(built())
    (checkpoint / "README.md").write_text("not read")
    others.add(built())
    assert len(others) == 5 and first not in others
    assert len(exporter.requests) == 6


def test_kernels_count_by_what_they_are_and_not_by_who_chose_them(
    checkpoint: Path, tmp_path: Path, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(**options: Any) -> str:
        return find_or_build(str(checkpoint), cache=tmp_path / "cache", target="ort-cpu-int8", **options).name

    monkeypatch.setattr(native, "isas", lambda: ("avx2", "portable"))
    monkeypatch.setattr(native, "failure", lambda: None)
    own, ort = built(), built(kernels="ort")
    assert own != ort and built(kernels="own") == own and len(exporter.requests) == 2
    monkeypatch.setattr(native, "failure", lambda: EngineError("the library is missing", remedy="build it"))
    assert built() == ort and len(exporter.requests) == 2


def test_the_size_of_a_compiled_engine_counts(checkpoint: Path, tmp_path: Path, exporter: Exporter) -> None:
    names = {
        find_or_build(str(checkpoint), target="trt-rtx-fp16", cache=tmp_path / "cache", max_context=size).name
        for size in (512, 1024, None)
    }
    assert len(names) == 3
    assert [request.max_context for request in exporter.requests] == [512, 1024, None]


def test_auto_is_chosen_once(checkpoint: Path, tmp_path: Path, exporter: Exporter) -> None:
    notes = Notes()
    first = find_or_build(str(checkpoint), cache=tmp_path, progress=notes)
    assert f"--target auto: {exporter.requests[0].target}" in notes
    again = Notes()
    assert find_or_build(str(checkpoint), cache=tmp_path, progress=again) == first
    assert "--target auto" not in again and f"engine: {first}" in again and "found in the cache" in again
    for choice in (tmp_path / ".choices").iterdir():
        choice.write_text("{")
    assert find_or_build(str(checkpoint), cache=tmp_path, progress=again) == first
    assert "--target auto" in again and len(exporter.requests) == 1


@pytest.mark.parametrize("damage", ["engine.json", "tokenizer.json", "decoder.onnx.data", "folder"])
def test_a_damaged_engine_is_built_again(damage: str, checkpoint: Path, tmp_path: Path, exporter: Exporter) -> None:
    path = find_or_build(str(checkpoint), target=TARGET, cache=tmp_path)
    if damage == "folder":
        shutil.rmtree(path)
        path.mkdir()
        (path / "other").write_text("")
    else:
        (path / damage).write_bytes((path / damage).read_bytes()[:-2])
    notes = Notes()
    assert find_or_build(str(checkpoint), target=TARGET, cache=tmp_path, progress=notes) == path
    assert "it is built again" in notes and len(exporter.requests) == 2
    Manifest.read(path).check(path, full=True)
    assert not (path / "other").exists()


def test_two_that_ask_at_once_build_once(checkpoint: Path, tmp_path: Path, exporter: Exporter) -> None:
    """A lock belongs to an open file, so two threads exclude each other as two processes do."""
    is_waiting, both = threading.Event(), []

    class Second(Notes):
        def report(self, stage: Stage, text: str) -> None:
            super().report(stage, text)
            if "waiting for it" in text:
                is_waiting.set()

    second = Second()

    def ask(notes: Progress) -> None:
        both.append(find_or_build(str(checkpoint), target=TARGET, cache=tmp_path, progress=notes))

    other = threading.Thread(target=ask, args=(second,))

    def meanwhile() -> None:
        other.start()
        assert is_waiting.wait(60)

    exporter.meanwhile = meanwhile
    ask(Notes())
    other.join()
    assert both[0] == both[1] and len(exporter.requests) == 1
    assert "found in the cache" in second


def test_a_checkpoint_that_changes_meanwhile_is_not_kept(checkpoint: Path, tmp_path: Path, exporter: Exporter) -> None:
    exporter.meanwhile = lambda: edit_json(checkpoint / "config.json", lambda values: values.update(x=1))
    with pytest.raises(CheckpointError, match="changed while it was exported"):
        find_or_build(str(checkpoint), target=TARGET, cache=tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


class Hub:
    """Stands for the Hub: one repository at some commit, or out of reach."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.commit: str | None = COMMITS[0]
        self.checkpoint, self.folder = checkpoint, folder
        self.asked: list[str | None] = []
        self.cache_dir: Path | None = None

    def __call__(self, repo: str, name: str, *, revision: str | None, cache_dir: Path | None) -> str:
        assert (repo, name) == ("owner/model", "config.json")
        self.asked.append(revision)
        self.cache_dir = cache_dir
        if self.commit is None:
            raise ConnectionError("no route to host")
        snapshot = self.folder / "snapshots" / self.commit
        if not snapshot.exists():
            shutil.copytree(self.checkpoint, snapshot)
        return str(snapshot / name)


@pytest.fixture
def hub(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub

    found = Hub(tiny_checkpoint, tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found)
    return found


def test_a_repository_is_known_by_its_commit(hub: Hub, tmp_path: Path, exporter: Exporter) -> None:
    cache = tmp_path / "cache"
    built = []
    for commit in COMMITS:
        hub.commit = exporter.revision = commit
        built.append(find_or_build("owner/model", cache=cache))
        assert find_or_build("owner/model", cache=cache) == built[-1]
    assert built[0] != built[1] and built[0].name.startswith("model-")
    assert [request.model for request in exporter.requests] == ["owner/model"] * 2
    # Downloads go where they are wanted, which is no other engine.
    assert hub.cache_dir is None
    assert find_or_build("owner/model", cache=cache, cache_dir=tmp_path / "hub") == built[-1]
    assert hub.cache_dir == tmp_path / "hub"
    # A commit needs nobody to ask.
    num_asked = len(hub.asked)
    assert find_or_build(f"owner/model@{COMMITS[0]}", cache=cache) == built[0]
    assert len(hub.asked) == num_asked


def test_without_the_hub_the_newest_engine_is_taken(hub: Hub, tmp_path: Path, exporter: Exporter) -> None:
    cache, notes = tmp_path / "cache", Notes()
    built = []
    for number, commit in enumerate(COMMITS):
        hub.commit = exporter.revision = commit
        built.append(find_or_build("owner/model", cache=cache))
        os.utime(built[-1], (100 - number, 100 - number))
    hub.commit = None
    assert find_or_build("owner/model", cache=cache, progress=notes) == built[0]
    assert "the newest engine of owner/model is taken" in notes and "no route to host" in notes
    for model, options in (("owner/model", {"kv_cache": "int8"}), ("owner/model@v1", {})):
        with pytest.raises(CheckpointError, match="no route to host"):
            find_or_build(model, cache=cache, **options)


def test_a_repository_that_moves_meanwhile_is_not_kept(hub: Hub, tmp_path: Path, exporter: Exporter) -> None:
    exporter.revision = COMMITS[1]
    with pytest.raises(CheckpointError, match="changed while it was exported"):
        find_or_build("owner/model", cache=tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_without_the_exporter_the_remedy_is_its_extra(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exporter: Exporter
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "torch" else found(name, *more)
    )
    with pytest.raises(UsageError, match="package torch is needed") as error:
        find_or_build(str(checkpoint), target=TARGET, cache=tmp_path / "cache")
    assert "extra `export`" in str(error.value.remedy) and not (tmp_path / "cache").exists()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="package huggingface_hub is needed"):
        find_or_build("owner/model", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("no such model", "no such folder"),
        ("setup.cfg", "a file"),
        ("empty", "config.json"),
        ("lowered", "lowered graphs"),
    ],
)
def test_what_is_no_model_is_named(model: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.cfg").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "lowered").mkdir()
    (tmp_path / "lowered" / "lowered.json").write_text("{}")
    with pytest.raises(CheckpointError, match=words):
        find_or_build(model, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "qwen3vl" / "engines"
    assert cache_folder(Path("given")) == Path("given")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/qwen3vl/engines")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UsageError, match="no home folder") as error:
        find_or_build("demo")
    assert "--cache DIR" in str(error.value.remedy)


def test_a_cache_that_cannot_be_written_is_named(checkpoint: Path, tmp_path: Path, exporter: Exporter) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file") as error:
        find_or_build(str(checkpoint), target=TARGET, cache=tmp_path / "file" / "cache")
    assert "--cache DIR" in str(error.value.remedy) and exporter.requests == []


def test_the_commands_list_and_remove(checkpoint: Path, tmp_path: Path, exporter: Exporter) -> None:
    cache = tmp_path / "cache"
    options = ("--cache", str(cache))
    assert call(app, "cache", "list", *options) == (0, f"{cache}: 0 engines, 0.0 MB\n", "")
    first = find_or_build(str(checkpoint), target=TARGET, cache=cache)
    second = find_or_build(str(checkpoint), target="ort-cpu-int8", cache=cache)
    (second / "tokenizer.json").write_text("{}")
    _, listed, _ = call(app, "cache", "list", *options)
    assert first.name in listed and f"damaged: {second}" in listed
    found = json.loads(call(app, "cache", "list", "--json", *options)[1])
    assert [each["name"] for each in found["engines"]] == [first.name, second.name]
    assert [each["problem"] is None for each in found["engines"]] == [True, False]
    assert found["engines"][0]["model"] == str(checkpoint) and found["engines"][0]["target"] == TARGET
    assert found["total_bytes"] == sum(each["num_bytes"] for each in found["engines"]) > 0
    removed = json.loads(call(app, "cache", "remove", first.name, "--json", *options)[1])
    assert removed["removed"] == [first.name] and removed["freed_bytes"] == found["engines"][0]["num_bytes"]
    assert not first.exists() and second.exists()
    for wrong in ((first.name,), ("../checkpoint",), (), (second.name, "--all")):
        code, _, error = call(app, "cache", "remove", *wrong, *options)
        assert code == 2 and "remedy" in error
    assert call(app, "cache", "remove", "--all", *options)[0] == 0
    assert entries(cache) == [] and look_up(str(checkpoint)).revision

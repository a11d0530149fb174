"""The `qwen3vl-export` command: its result, and what an interrupted or failed export leaves behind."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.command_line import call
from qwen3vl_export.cli.export import app
from runtime.errors import CapacityError, CheckpointError, EngineError
from runtime.manifest import LOWERED_NAME, MANIFEST_NAME, Manifest
from runtime.model import Qwen3VLModel

# Runs the command with an os.write, through which all weights go, that has a fault.
LAUNCHER = """
import errno, os, signal, sys, time
write, written = os.write, 0

def full(descriptor, data):
    global written
    if descriptor > 2 and (written := written + len(data)) > 3_000_000:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(descriptor, data)

def slow(descriptor, data):
    num_bytes = write(descriptor, data)
    if descriptor > 2:
        time.sleep(0.5)
    return num_bytes

os.write = {"full": full, "slow": slow}[sys.argv.pop(1)]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
from qwen3vl_export.cli.export import main
main()
"""


@pytest.fixture
def older_engine(demo_engine: Path, tmp_path: Path) -> Path:
    shutil.copytree(demo_engine, tmp_path / "engine")
    return tmp_path / "engine"


def start(fault: str, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LAUNCHER, fault, "demo", "--target", "ort-cpu-fp32", "--output", str(output)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_intact(engine: Path, before: dict[str, int]) -> None:
    assert [path.name for path in engine.parent.iterdir()] == [engine.name]
    assert {path.name: path.stat().st_ino for path in engine.iterdir()} == before
    Manifest.read(engine).check(engine, full=True)


@pytest.mark.portable
def test_ctrl_c_leaves_the_older_engine(older_engine: Path) -> None:
    before = {path.name: path.stat().st_ino for path in older_engine.iterdir()}
    process = start("slow", older_engine)
    try:
        # The first weights are on the disk; at 0.5 s a block the rest takes seconds.
        given_up = time.monotonic() + 300
        while not any(path.stat().st_size for path in older_engine.parent.glob(".qwen3vl-*/new/*.data")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < given_up
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert_intact(older_engine, before)


@pytest.mark.portable
def test_a_disk_that_fills_up_leaves_the_older_engine(older_engine: Path) -> None:
    before = {path.name: path.stat().st_ino for path in older_engine.iterdir()}
    process = start("full", older_engine)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (CapacityError.exit_code, "")
    error, remedy = err[err.index("error: ") :].splitlines()
    assert "the disk is full" in error
    assert remedy.startswith("  remedy: free space")
    assert "Traceback" not in err
    assert_intact(older_engine, before)


@pytest.mark.portable
def test_graphs_alone_are_no_engine(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "graphs"
    arguments = [str(tiny_checkpoint), "--target", "ort-cpu-fp32", "--no-compile", "--no-weights", "--json"]
    code, out, err = call(app, *arguments, "--output", str(output))
    result = json.loads(out)
    assert (code, result["output"], result["weight_bytes"], result["is_engine"]) == (0, str(output), 0, False)
    assert err == ""
    names = {path.name for path in output.iterdir()}
    assert {"decoder.onnx", "vision.onnx", "tokenizer.json"} <= names
    assert not names & {MANIFEST_NAME, LOWERED_NAME, "decoder.onnx.data", "vision.onnx.data"}
    documented = call(app, "--help")[1]
    paragraph = documented[documented.index("--json prints") : documented.index("Examples:")]
    assert set(result) <= set(re.findall(r"\w+", paragraph))


def test_lowered_graphs_are_no_engine(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "lowered"
    for _ in range(2):  # the second replaces the first
        arguments = [str(tiny_checkpoint), "--target", "ort-cpu-fp32", "--no-compile", "--json"]
        code, out, _ = call(app, *arguments, "--output", str(output))
        assert (code, json.loads(out)["is_engine"]) == (0, False)
    names = {path.name for path in output.iterdir()}
    assert {"decoder.onnx", "decoder.onnx.data", "vision.onnx", "vision.onnx.data", LOWERED_NAME} <= names
    assert MANIFEST_NAME not in names
    manifest = Manifest.read(output, LOWERED_NAME)
    manifest.check(output, LOWERED_NAME, full=True)
    assert (manifest.target, {*manifest.files} | {LOWERED_NAME}) == ("ort-cpu-fp32", names)
    with pytest.raises(EngineError, match="a folder of lowered graphs") as raised:
        Qwen3VLModel.from_engine(output)
    assert "`qwen3vl verify` reads it" in str(raised.value.remedy)


@pytest.mark.portable
def test_debug_is_told_once_and_is_no_option() -> None:
    code, out, _ = call(app, "--help")
    assert code == 0
    assert out.count("--debug") == 1
    code, _, err = call(app, "no-such-folder", "--debug")
    assert code == CheckpointError.exit_code
    assert "Traceback" in err and err.count("error: no-such-folder: no such folder") == 1


@pytest.mark.portable
def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str], cache_dir: Path | None) -> str:
        asked.append((repo, revision, cache_dir))
        raise LocalEntryNotFoundError("Cannot find the snapshot on the local disk.\n\nPlease check your connection.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    words = ("--output", str(tmp_path / "engine"), "--cache-dir", str(tmp_path / "hub"))
    code, out, err = call(app, "Qwen/Nothing@v1.0", *words)
    assert (code, out, asked) == (CheckpointError.exit_code, "", [("Qwen/Nothing", "v1.0", tmp_path / "hub")])
    error, remedy = err.splitlines()
    assert error.startswith("error: Qwen/Nothing@v1.0: neither a folder here nor on the Hub (LocalEntryNotFoundError: ")
    assert error.endswith("Please check your connection.)")
    assert remedy.startswith("  remedy: check the spelling and the connection")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.portable
def test_auto_says_what_it_considered_and_builds_what_it_chose(tmp_path: Path) -> None:
    output = tmp_path / "engine"
    code, out, err = call(app, "demo", "--max-context", "2048", "--output", str(output))
    assert code == 0, err
    chosen = Manifest.read(output).target
    shown = err.splitlines()
    assert shown[0].startswith(f"--target auto: {chosen}; ")
    assert shown[1:4] == ["tracing demo", "stitching the graphs together", f"lowering the graphs for {chosen}"]
    assert re.fullmatch(rf"writing {re.escape(str(output))}, [\d.]+ MB of weights", shown[4])
    assert len(shown) == 5 and out.startswith(f"{output}  (")


@pytest.mark.portable
@pytest.mark.parametrize("options", [["--target", "ort-cpu-int4"], ["--bundle"]])
def test_files_that_may_not_be_written_are_found_before_tracing(options: list[str], tmp_path: Path) -> None:
    arguments = (
        [*options, str(tmp_path / "out")]
        if options[-1] == "--bundle"
        else [*options, "--output", str(tmp_path / "out")]
    )
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        code, _, err = call(app, "demo", *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (code, "tracing" in err) == (CapacityError.exit_code, False)
    assert "RLIMIT_FSIZE" in err and "ulimit -f unlimited" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.portable
def test_an_output_that_cannot_be_is_found_before_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("downloads"))
    (tmp_path / "file").touch()
    code, _, err = call(app, "Qwen/Nothing", "--output", str(tmp_path / "file"))
    assert code == 2 and "neither an engine nor empty" in err


@pytest.mark.portable
def test_a_mistyped_target_is_found_before_the_model_is_opened(tmp_path: Path) -> None:
    code, _, err = call(app, "no/such-model", "--target", "trt-fp61", "--output", str(tmp_path / "engine"))
    assert code == 6 and "did you mean trt-fp16" in err


@pytest.mark.portable
@pytest.mark.parametrize("option", [["--strip-weights"], ["--max-patches", "1024"], ["--compute-capability", "8.6"]])
def test_auto_does_not_drop_options_of_compiled_engines(option: list[str], tmp_path: Path) -> None:
    code, _, err = call(app, "demo", *option, "--output", str(tmp_path / "engine"))
    assert code == 2 and "is not built for fixed sizes" in err
    assert list(tmp_path.iterdir()) == []

"""A GPU pack in small: written, cut into parts, checked and unpacked by the program that lies beside it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_pack
from benchmarks import gpu_pack_libraries as libraries
from benchmarks.gpu import standalone
from benchmarks.gpu.standalone import DAMAGED, NO_GPU, NO_ROOM, WRONG_PYTHON, PackError
from benchmarks.gpu_pack_parts import MANIFEST, Piece, write_pack
from engines.registry import get
from helpers import ROOT
from runtime.errors import TargetError, UsageError

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
PART_BYTES = 1500
DESCRIPTION = {"title": "a pack", "sm": 90, "python": HERE, "wheels": [], "graphs": [], "work_bytes": 10_000}


def noise(seed: int, size: int = 2000) -> bytes:
    import numpy as np

    return np.random.default_rng(seed).bytes(size)


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A folder with gpu_pack.py, pack.json and parts; the archives cross the borders of parts."""
    source, output = tmp_path / "source", tmp_path / "pack"
    for index, name in enumerate(("site/library.so", "content/engines/e/decoder.onnx", "content/description.json")):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(index) if not name.endswith("json") else json.dumps(DESCRIPTION).encode())
    # What the sections import, without the engines.
    shutil.copytree(ROOT / "benchmarks" / "gpu", source / "project" / "benchmarks" / "gpu")
    shutil.copyfile(ROOT / "benchmarks" / "__init__.py", source / "project" / "benchmarks" / "__init__.py")
    output.mkdir()
    pieces = [Piece("site", source / "site", "site"), Piece("project", source / "project", "project")]
    pieces.append(Piece("content", source / "content", "."))
    written = write_pack(pieces, output, PART_BYTES, DESCRIPTION)
    (output / MANIFEST).write_text(json.dumps(written))
    shutil.copyfile(standalone.__file__, output / "gpu_pack.py")
    return output


def run(pack: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    work = ["--work", str(pack / "gpu-pack-work")] if arguments[0] == "run" else []
    command = [sys.executable, str(pack / "gpu_pack.py"), *arguments, *work]
    return subprocess.run(command, capture_output=True, text=True, cwd=pack)


def manifest(pack: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((pack / MANIFEST).read_text())
    return found


def test_no_part_is_larger_than_asked_and_all_come_back(pack: Path, tmp_path: Path) -> None:
    parts = manifest(pack)["parts"]
    assert [each["num_bytes"] for each in parts[:-1]] == [PART_BYTES] * (len(parts) - 1) and len(parts) > 3
    assert all((pack / each["name"]).stat().st_size == each["num_bytes"] for each in parts)
    standalone.unpack(manifest(pack), [pack], tmp_path / "work")
    for path in sorted((tmp_path / "source" / "content").rglob("*")):
        if path.is_file():
            assert (
                tmp_path / "work" / path.relative_to(tmp_path / "source" / "content")
            ).read_bytes() == path.read_bytes()
    assert (tmp_path / "work" / "site" / "library.so").read_bytes() == noise(0)


def test_the_same_content_gives_the_same_parts(pack: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    source = tmp_path / "source"
    pieces = [Piece("site", source / "site", "site"), Piece("project", source / "project", "project")]
    pieces.append(Piece("content", source / "content", "."))
    (source / "site" / "library.so").touch()
    assert write_pack(pieces, again, PART_BYTES, DESCRIPTION) == manifest(pack)


def test_parts_may_lie_in_several_folders(pack: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (pack / "pack.part02").rename(tmp_path / "other" / "pack.part02")
    assert run(pack, "check").returncode == DAMAGED
    done = run(pack, "check", "--parts", str(tmp_path / "other"))
    assert done.returncode == 0 and "parts are whole: a pack" in done.stdout


def test_what_is_unpacked_is_not_unpacked_again(pack: Path, tmp_path: Path) -> None:
    standalone.unpack(manifest(pack), [pack], tmp_path / "work")
    for part in pack.glob("pack.part*"):
        part.unlink()
    standalone.unpack(manifest(pack), [pack], tmp_path / "work")
    with pytest.raises(PackError, match="missing"):
        standalone.unpack({**manifest(pack), "sm": 80}, [pack], tmp_path / "work")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "pack.part02 is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 1499 bytes instead of 1500"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "pack.part02 is damaged: its SHA-256"),
    ],
    ids=["missing", "cut", "altered"],
)
@pytest.mark.parametrize("command", [("check",), ("run", "--dry-run")], ids=["check", "run"])
def test_a_part_that_is_not_whole_is_named(pack: Path, damage: Any, said: str, command: tuple[str, ...]) -> None:
    damage(pack / "pack.part02")
    done = run(pack, *command)
    assert done.returncode == DAMAGED
    assert said in done.stderr and "copy these parts again" in done.stderr and "Traceback" not in done.stderr
    assert not (pack / "gpu-pack-work" / "unpacked").exists()


@pytest.mark.parametrize(("text", "said"), [(None, "is not in"), ("{", "is damaged"), ('{"format": 9}', "format 9")])
def test_a_pack_without_its_list_says_so(pack: Path, text: str | None, said: str) -> None:
    (pack / MANIFEST).unlink()
    if text is not None:
        (pack / MANIFEST).write_text(text)
    done = run(pack, "check")
    assert done.returncode == DAMAGED and said in done.stderr


def test_another_python_is_refused_before_anything_is_unpacked(pack: Path) -> None:
    (pack / MANIFEST).write_text(json.dumps({**manifest(pack), "python": "3.99"}))
    done = run(pack, "run", "--dry-run")
    assert done.returncode == WRONG_PYTHON
    assert "for Python 3.99" in done.stderr and f"--python {HERE}" in done.stderr
    assert not (pack / "gpu-pack-work").exists()


def test_without_the_right_gpu_nothing_runs(pack: Path) -> None:
    with pytest.raises(PackError, match="no NVIDIA GPU") as caught:
        standalone.check_gpu(manifest(pack), [])
    assert caught.value.exit_code == NO_GPU
    with pytest.raises(PackError, match=r"SM 90 alone, the GPU is SM 80.*--sm 80") as caught:
        standalone.check_gpu(manifest(pack), [80, 90])
    assert caught.value.exit_code == NO_GPU
    standalone.check_gpu(manifest(pack), [90])


def test_too_little_room_is_said_before_anything_is_unpacked(pack: Path) -> None:
    (pack / MANIFEST).write_text(json.dumps({**manifest(pack), "work_bytes": 10**15}))
    done = run(pack, "run", "--dry-run")
    assert done.returncode == NO_ROOM
    assert "1000000.0 are needed" in done.stderr and "--work" in done.stderr
    assert not (pack / "gpu-pack-work").exists()


def test_weights_are_filled_in_memory_where_that_has_the_room(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    memory, packed = tmp_path / "memory", manifest(pack)
    memory.mkdir()
    assert standalone.work_folder(packed, None, memory) == memory / standalone.WORK
    assert standalone.work_folder(packed, "mine", memory) == tmp_path / "mine"
    monkeypatch.setattr(standalone.Path, "read_text", lambda path: "MemAvailable: 19 kB\n")
    assert standalone.work_folder(packed, None, memory) == tmp_path / standalone.WORK
    (memory / standalone.WORK).mkdir()
    (memory / standalone.WORK / "unpacked").touch()  # an earlier run took the room
    assert standalone.work_folder(packed, None, memory) == memory / standalone.WORK


def test_a_name_that_leads_out_of_the_folder_is_not_unpacked(tmp_path: Path) -> None:
    import hashlib
    import io
    import lzma
    import tarfile

    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../outside"))
    data = lzma.compress(plain.getvalue())
    (tmp_path / "pack.part01").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    pack = {
        "title": "",
        "parts": [{"name": "pack.part01", "num_bytes": len(data), "sha256": digest}],
        "archives": [{"name": "a", "folder": "site", "offset": 0, "num_bytes": len(data), "sha256": digest}],
    }
    with pytest.raises((tarfile.TarError, PackError)):
        standalone.unpack(pack, [tmp_path], tmp_path / "work")
    assert not (tmp_path / "work" / "outside").exists()


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return folder / name


def test_a_wheel_is_taken_where_python_lacks_it_or_has_it_too_old(tmp_path: Path) -> None:
    wheels = []
    for name, least in (("no-such-library", "1.0"), ("numpy", "2.0"), ("pytest", "999.1")):
        file = f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
        wheel(tmp_path / "wheels", file, {f"{name}.py": b""})
        wheels.append({"distribution": name, "file": file, "version": "1.0", "least": least})
    standalone.add_wheels({"wheels": wheels}, tmp_path)
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == ["no-such-library.py", "pytest.py"]


def test_our_packages_come_first_and_cuda_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages" / "nvidia" / "cu13" / "lib").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    found = standalone.environment(tmp_path)
    assert found["PYTHONPATH"].split(":") == [str(tmp_path / "project"), str(tmp_path / "site"), "/theirs"]
    assert str(tmp_path / "packages" / "nvidia" / "cu13" / "lib") in found["LD_LIBRARY_PATH"].split(":")


def test_the_program_needs_the_standard_library_alone() -> None:
    command = [sys.executable, "-I", "-S", standalone.__file__, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "Exit codes" in done.stdout


def test_onnxruntime_is_unpacked_without_what_is_not_needed_and_pruned(tmp_path: Path) -> None:
    from test_gpu_prune import entry, fat_binary

    from benchmarks.gpu.prune import MACHINE_CODE

    library = b"host" + fat_binary(entry(MACHINE_CODE, 80, b"a" * 64), entry(MACHINE_CODE, 90, b"b" * 64))
    files = {
        "onnxruntime/__init__.py": b"",
        "onnxruntime/tools/t.py": b"",
        "onnxruntime/capi/libonnxruntime_providers_tensorrt.so": b"x",
        "onnxruntime/capi/libonnxruntime_providers_cuda.so": library,
    }
    path = wheel(tmp_path, "onnxruntime_gpu-1.31.1-cp312-cp312-manylinux_2_28_x86_64.whl", files)
    site = libraries.unpack_onnxruntime(path, "3.12", 90, tmp_path / "work")
    names = sorted(str(each.relative_to(site.folder)) for each in site.folder.rglob("*") if each.is_file())
    assert names == ["onnxruntime/__init__.py", "onnxruntime/capi/libonnxruntime_providers_cuda.so"]
    assert site.version == "1.31.1"
    found = site.pruned["libonnxruntime_providers_cuda.so"]
    assert (found["kept_bytes"], found["zeroed_bytes"], found["num_without_code"]) == (64, 64, 0)
    with pytest.raises(UsageError, match="no code for SM 75"):
        libraries.unpack_onnxruntime(path, "3.12", 75, tmp_path / "work75")
    with pytest.raises(UsageError, match=r"for Python 3\.13"):
        libraries.unpack_onnxruntime(path, "3.13", 90, tmp_path / "work13")


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    for name in sorted(set(libraries.WHEELS) - {"pillow"}):
        wheel(tmp_path / "w", f"{name.replace('-', '_')}-99.0-py3-none-any.whl", {})
    with pytest.raises(UsageError, match=r"no wheels of pillow"):
        libraries.collect_wheels(tmp_path / "w", "3.12", tmp_path / "a")
    wheel(tmp_path / "w", "pillow-99.0-py3-none-any.whl", {})
    found = libraries.collect_wheels(tmp_path / "w", "3.12", tmp_path / "b")
    assert {each["distribution"] for each in found} == set(libraries.WHEELS)


@pytest.mark.parametrize(("text", "expected"), [("60M", 60_000_000), ("1500", 1500), ("2g", 2_000_000_000)])
def test_sizes_of_parts(text: str, expected: int) -> None:
    assert gpu_pack.parsed_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "M", "60 M", "-5M", "999", "1.5G"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--part-bytes"):
        gpu_pack.parsed_bytes(text)


def test_an_output_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="not empty"):
        gpu_pack.gpu_pack(output=tmp_path)


def test_wheels_are_either_given_or_left_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--no-wheels"):
        gpu_pack.gpu_pack(output=tmp_path / "pack", wheels=tmp_path, no_wheels=True)
    assert not (tmp_path / "pack").exists()


def test_a_gpu_without_kernels_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--sm 91: no decode kernels") as raised:
        gpu_pack.gpu_pack(sm=91, output=tmp_path / "pack")
    assert "90" in raised.value.remedy and "--no-decode-plan" in raised.value.remedy
    assert not (tmp_path / "pack").exists()


def test_without_triton_a_pack_says_so_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_pack, "plan_problem", lambda: "triton is not installed")
    with pytest.raises(TargetError, match="triton is not installed") as raised:
        gpu_pack.gpu_pack(output=tmp_path / "pack")
    assert "--no-decode-plan" in raised.value.remedy
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize(
    ("option", "error"), [("models", UsageError), ("targets", TargetError), ("checkpoints", UsageError)]
)
def test_a_name_that_is_none_is_refused_before_anything_is_built(tmp_path: Path, option: str, error: Any) -> None:
    with pytest.raises(error, match="no-such"):
        gpu_pack.gpu_pack(output=tmp_path / "pack", **{option: "no-such"})
    assert not (tmp_path / "pack").exists()


def test_engines_of_every_target_and_graphs_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, Any]] = []

    def export(model: str, target: Any, output: Path, plan: dict[str, Any], **options: Any) -> None:
        output.mkdir(parents=True)
        asked.append((Path(model).name, target.name, options.get("weights", True)))

    monkeypatch.setattr(gpu_pack, "export_engine", export)
    monkeypatch.setattr(gpu_pack, "describe", lambda folder, manifest: {})
    names = gpu_pack.build_shipped(["demo"], tmp_path / "engines", {})
    assert {"demo-ort-cuda-fp16", "demo-ort-cuda-bf16", "demo-ort-cuda-int4"} <= set(names)
    wanted = gpu_pack.wanted_graphs(["tiny"], ["ort-cuda-int4"], ["tiny-ort-cuda-fp8", "tiny-moe-ort-cuda-int4"])
    graphs = gpu_pack.build_graphs(wanted, tmp_path, {})
    assert graphs == ["tiny-ort-cuda-int4", "tiny-ort-cuda-fp8", "tiny-moe-ort-cuda-int4"]
    assert asked[-3:] == [
        ("checkpoint-tiny", "ort-cuda-int4", False),
        ("checkpoint-tiny", "ort-cuda-fp8", False),
        ("checkpoint-tiny-moe", "ort-cuda-int4", False),
    ]
    assert all(is_whole for _, _, is_whole in asked[:-3])


@pytest.mark.parametrize("name", ["tiny", "tiny-trt-fp16", "ort-cuda-int4", "no-such-ort-cuda-int4"])
def test_a_further_graph_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        gpu_pack.wanted_graphs([], [], [name])


def test_a_graph_that_is_asked_for_twice_is_made_once() -> None:
    found = gpu_pack.wanted_graphs(["tiny"], ["ort-cuda-int4"], ["tiny-ort-cuda-int4"])
    assert found == [("tiny", get("ort-cuda-int4"))]


def test_what_travels_imports_without_the_rest_of_the_repository(tmp_path: Path) -> None:
    gpu_pack.copy_project(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.so"))
    modules = sorted(path.stem for path in (tmp_path / "benchmarks" / "gpu").glob("*.py") if path.stem != "__init__")
    assert {"agreement", "fill", "measure", "options", "parity", "plan_step", "speed"} <= set(modules)
    code = f"""import sys
for each in {modules}:
    __import__("benchmarks.gpu." + each)
sys.modules["benchmarks.gpu.questions"].questions()
print(sorted({{"torch", "onnx", "onnx_ir", "typer"}} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PATH": ""})
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr

"""Kernels of quantised numbers are proven on the machine at hand, and an engine computes the same on every CPU."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engines.bundle import Bundle
from engines.quantised_kernels import BITS
from helpers import PICTURES
from helpers.engines import build
from helpers.own_kernels import needs_own_kernels
from helpers.products import opened_bytes
from runtime import native
from runtime.errors import EngineError
from runtime.kernels import KERNEL_TESTS, kernels_of, known_kernels, needs_exact_products
from runtime.manifest import Manifest
from scripts import write_kernel_tests, write_own_kernel_tests

EMULATOR = shutil.which("qemu-x86_64")
# AVX2 without VNNI, and processors before AVX2: whether products of ONNX Runtime saturate, and our instruction set.
EMULATED = {"Haswell": (True, "avx2"), "SandyBridge": (False, "portable"), "Nehalem": (False, "portable")}
IMAGE = PICTURES / "held_out_0.png"
READ = """
import sys
import numpy as np
from qwen3_vl import Qwen3VLModel

engine, image, output = sys.argv[1:]
model = Qwen3VLModel.from_engine(engine, threads=1)
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Read"}]}]
np.savez(output, levels=model.encode_images(model.prepare(messages).images), logits=model.logits(messages))
"""
needs_emulator = pytest.mark.skipif(EMULATOR is None, reason="qemu-x86_64 is not installed (Debian: qemu-user)")


def emulated(cpu: str, source: str, *arguments: str) -> str:
    """Run Python on an emulated processor; return what it prints."""
    command = [str(EMULATOR), "-cpu", cpu, sys.executable, "-c", source, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sabotaged(kernel: str, folder: Path) -> None:
    """Write the tests, one of them with its constants of codes, or of a cache in a float type, changed."""
    shutil.copytree(KERNEL_TESTS, folder)
    (path,) = folder.rglob(f"{kernel}.onnx")
    model = onnx.load(path)
    codes = onnx.TensorProto.INT8, onnx.TensorProto.UINT8
    for old in model.graph.initializer:
        values = numpy_helper.to_array(old)
        if (old.data_type in codes and values.size > 1) or (values.dtype.kind == "f" and values.ndim == 4):
            changed = values // 2 if old.data_type in codes else values[..., ::-1]
            old.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed.astype(values.dtype)), old.name))
    onnx.save(model, path)


@pytest.mark.portable
def test_the_tests_are_what_the_script_writes(tmp_path: Path) -> None:
    write_kernel_tests.main(tmp_path / "tests")
    write_own_kernel_tests.main(tmp_path / "tests" / "own")
    written = {path.name: path.read_bytes() for path in (tmp_path / "tests").rglob("*.onnx")}
    assert written == {path.name: path.read_bytes() for path in KERNEL_TESTS.rglob("*.onnx")}
    assert known_kernels() == sorted(write_kernel_tests.TESTS)
    assert set(write_own_kernel_tests.TESTS) == set(native.OPERATORS)


@pytest.mark.portable
def test_every_kernel_is_right_on_this_machine() -> None:
    needs_exact_products(known_kernels())


@pytest.fixture
def any_isa() -> Iterator[None]:
    """Puts back the instruction set that was in use."""
    before = native.isa()
    yield
    native.use(before)


@needs_own_kernels
@pytest.mark.portable
@pytest.mark.parametrize("isa", native.ISAS)
def test_our_own_kernels_are_right_with_every_instruction_set(isa: str, any_isa: None) -> None:
    if isa not in native.isas():
        pytest.skip(f"this processor does not run {isa}")
    native.use(isa)
    needs_exact_products(write_own_kernel_tests.TESTS)


@needs_own_kernels
@pytest.mark.portable
@pytest.mark.parametrize("kernel", sorted(write_own_kernel_tests.TESTS))
def test_an_own_kernel_that_reads_other_codes_is_noticed(kernel: str, tmp_path: Path) -> None:
    sabotaged(kernel, tmp_path / "tests")
    expected = rf"our own kernel {kernel} \({native.isa()}\) computes wrong products on this processor: relative error"
    with pytest.raises(EngineError, match=expected) as caught:
        needs_exact_products([kernel], tmp_path / "tests")
    assert "or the engine with qwen3vl-export --kernels ort" in str(caught.value.remedy)
    assert ("(QWEN3VL_CPU_ISA: " in str(caught.value.remedy)) is (len(native.isas()) > 1)


@pytest.mark.portable
def test_own_kernels_without_a_library_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise EngineError("the library of own kernels is missing", remedy="build it")

    monkeypatch.setattr(native, "isa", missing)
    with pytest.raises(EngineError, match="the library of own kernels is missing"):
        needs_exact_products(["MatMulNBits.4", "MatMulInt4"])


@pytest.mark.portable
@pytest.mark.parametrize("kernel", sorted(write_kernel_tests.TESTS))
def test_a_kernel_that_reads_other_codes_is_noticed(kernel: str, tmp_path: Path) -> None:
    sabotaged(kernel, tmp_path / "tests")
    with pytest.raises(EngineError, match=r"computes wrong products on this processor: relative error .*; instruction"):
        needs_exact_products([kernel], tmp_path / "tests")


@pytest.mark.portable
def test_a_kernel_that_does_not_run_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "MatMulNBits.4.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"MatMulNBits\.4 .* relative error inf"):
        needs_exact_products(["MatMulNBits.4"], tmp_path)


@pytest.mark.portable
def test_a_kernel_without_a_test_is_refused() -> None:
    with pytest.raises(EngineError, match=r"cannot test: MatMulNBits\.3"):
        needs_exact_products(["MatMulNBits.4", "MatMulNBits.3"])


BYTE_KERNELS = {"MatMulIntegerToFloat", "MatMulNBits.8"}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("ort-cpu-fp32", set()),
        ("ort-cpu-int8", BYTE_KERNELS | {"GatherBlockQuantized.8"}),
        ("ort-cpu-int4", BYTE_KERNELS | {"GatherBlockQuantized.4", "MatMulNBits.4"}),
    ],
)
def test_manifests_name_the_kernels(target: str, expected: set[str], demo_bundle: Bundle, tmp_path: Path) -> None:
    engine = build(demo_bundle, target, tmp_path / "engine")
    assert kernels_of(Manifest.read(engine)) == sorted(expected)


def test_kernels_of_a_cache_in_few_bits_and_of_an_engine_that_names_none(demo_engine: Path) -> None:
    manifest = Manifest.read(demo_engine)
    cached = dataclasses.replace(manifest, capabilities={**manifest.capabilities, "cache_bits": 4})
    assert kernels_of(cached) == ["GroupQueryAttention.4"]
    own = {**cached.capabilities, "custom_ops": native.DOMAIN}
    assert kernels_of(dataclasses.replace(cached, capabilities=own)) == ["DecodeAttentionInt4"]
    silent = {name: value for name, value in manifest.capabilities.items() if name != "kernels"}
    assert kernels_of(dataclasses.replace(manifest, capabilities=silent)) == known_kernels()
    own = {**silent, "custom_ops": native.DOMAIN}
    every = sorted([*known_kernels(), *native.OPERATORS])
    assert kernels_of(dataclasses.replace(manifest, capabilities=own)) == every


@pytest.mark.portable
def test_every_kernel_that_the_exporter_names_has_a_test() -> None:
    assert {name.split(".")[0] for name in known_kernels()} == {*BITS, "GroupQueryAttention"}


@needs_emulator
@pytest.mark.portable
@pytest.mark.parametrize("cpu", EMULATED)
def test_other_processors_are_right_or_made_right(cpu: str) -> None:
    source = """
from runtime import native
from runtime.kernels import known_kernels, needs_exact_products

own = () if native.problem() else native.OPERATORS
print(needs_exact_products([*known_kernels(), *own]), native.isa() if own else "")
"""
    exact, isa = EMULATED[cpu]
    assert emulated(cpu, source).split() == [str(exact), *([isa] if native.problem() == "" else [])]


@needs_emulator
# The first has the kernels of both others.
@pytest.mark.parametrize(
    "target",
    ["ort-cpu-int4p8", *(pytest.param(f"ort-cpu-{each}", marks=pytest.mark.slow) for each in ("int8", "int4"))],
)
def test_an_engine_computes_the_same_without_vnni(target: str, demo_bundle: Bundle, tmp_path: Path) -> None:
    engine = build(demo_bundle, target, tmp_path / "engine")
    arguments = (str(engine), str(IMAGE))
    subprocess.run([sys.executable, "-c", READ, *arguments, str(tmp_path / "here.npz")], check=True)
    emulated("Haswell", READ, *arguments, str(tmp_path / "there.npz"))
    here, there = np.load(tmp_path / "here.npz"), np.load(tmp_path / "there.npz")
    for name in ("levels", "logits"):
        assert np.linalg.norm(there[name] - here[name]) < 0.005 * np.linalg.norm(here[name]), name


def test_weights_are_in_memory_once_whatever_the_processor(tmp_path: Path) -> None:
    plain, exact = (opened_bytes(tmp_path, exact=each) for each in (False, True))
    assert exact["now"] < 1.1 * plain["now"]
    assert exact["peak"] > 1.5 * exact["now"], "copies were made on the way"

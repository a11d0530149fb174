"""The probe of the machine, on recorded answers of the kernel and of the driver, and for real."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from engines.hardware import Gpu, Hardware, probe, probe_gpus
from runtime.machine import processor

X86 = """processor\t: 0
model name\t: AMD EPYC 9B14
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni avx512_bf16

processor\t: 1
model name\t: another
flags\t\t: amx_int8
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


def says(text: str) -> Callable[[Sequence[str]], str]:
    return lambda command: text


def raises(error: Exception) -> Callable[[Sequence[str]], str]:
    def run(command: Sequence[str]) -> str:
        raise error

    return run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (X86, ("AMD EPYC 9B14", ("avx2", "avx512f", "avx512_vnni", "avx512_bf16"))),
        (ARM, ("", ("asimd", "asimddp", "i8mm"))),
        ("", ("", ())),
    ],
)
def test_the_first_processor_and_its_instruction_sets(
    text: str, expected: tuple[str, tuple[str, ...]], tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert processor(tmp_path / "cpuinfo") == expected
    assert processor(tmp_path / "absent") == ("", ())


def test_gpus_are_those_the_driver_lists() -> None:
    text = "NVIDIA H200, 9.0, 143771, 143163, 570.86.10\nNVIDIA RTX A2000, 8.6, 6138, 6000, 570.86.10\n"
    first = Gpu("NVIDIA H200", "9.0", 143771 << 20, 143163 << 20, "570.86.10")
    second = Gpu("NVIDIA RTX A2000", "8.6", 6138 << 20, 6000 << 20, "570.86.10")
    assert probe_gpus(says(text)) == ((first, second), ())
    assert Hardware("", (), 1, 1, (second, first)).gpu == second
    assert Hardware("", (), 1, 1).gpu is None


def test_memory_that_the_driver_does_not_know_is_0() -> None:
    (gpu,), notes = probe_gpus(says("NVIDIA GB10, 12.1, [N/A], [N/A], 580.1\n"))
    assert (gpu.total_bytes, gpu.free_bytes, notes) == (0, 0, ())


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("nvidia-smi"),
        subprocess.CalledProcessError(6, "nvidia-smi", "No devices were found\n", ""),
    ],
)
def test_no_gpu_is_a_normal_result(error: Exception) -> None:
    assert probe_gpus(raises(error)) == ((), ())


@pytest.mark.parametrize(
    ("run", "note"),
    [
        (
            raises(subprocess.CalledProcessError(9, "nvidia-smi", "couldn't communicate with\nthe driver", "")),
            "nvidia-smi ended with exit code 9: couldn't communicate with the driver",
        ),
        (
            raises(subprocess.TimeoutExpired("nvidia-smi", 30)),
            "nvidia-smi did not answer within 30 s: the GPU driver hangs",
        ),
        (raises(PermissionError("denied")), "nvidia-smi cannot be run: denied"),
        (
            says("Failed to initialize NVML\n"),
            "nvidia-smi said 'Failed to initialize NVML', "
            "expected name, compute_cap, memory.total, memory.free, driver_version",
        ),
    ],
)
def test_a_broken_driver_is_a_note(run: Callable[[Sequence[str]], str], note: str) -> None:
    assert probe_gpus(run) == ((), (note,))


def test_this_machine() -> None:
    import os

    from runtime.memory import machine_bytes

    found = probe(raises(FileNotFoundError("nvidia-smi")))
    assert found.num_cores == len(os.sched_getaffinity(0))
    assert found.memory_bytes == machine_bytes()
    assert found.cpu
    assert found.gpus == () and found.notes == ()
    assert found.to_dict()["versions"] == dict(found.versions)
    assert "torch" in found.versions and "pytest" not in found.versions
    assert ("GPU", "none") in found.lines()


def test_the_command_that_is_run_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = "name,compute_cap,memory.total,memory.free,driver_version"
    command = tmp_path / "nvidia-smi"
    command.write_text(
        f'#!/bin/sh\n[ "$*" = "--query-gpu={fields} --format=csv,noheader,nounits" ] || exit 3\n'
        'echo "Test GPU, 8.9, 100, 90, 570.1"\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert not probe().gpus
    monkeypatch.setenv("PATH", str(tmp_path))
    assert probe().gpus == (Gpu("Test GPU", "8.9", 100 << 20, 90 << 20, "570.1"),)

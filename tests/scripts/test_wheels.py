"""A wheel is published only if other Linux systems run it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from helpers.native_library import compiled
from scripts import wheels

MACHINE = wheels.platform.machine()


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        (f"manylinux_2_28_{MACHINE}", ""),
        (f"manylinux2014_{MACHINE}.manylinux_2_17_{MACHINE}.manylinux_2_28_{MACHINE}", ""),
        (f"manylinux_2_34_{MACHINE}", "it needs glibc 2.34, expected at most 2.28"),
        (f"linux_{MACHINE}", "no name of manylinux"),
    ],
)
def test_names_of_systems(tag: str, reason: str) -> None:
    name = f"qwen3vl_export-1-py3-none-{tag}.whl"
    assert wheels.why_not_portable(name) == (f"{name}: {reason}" if reason else "")


def test_a_wheel_for_any_platform_has_no_library() -> None:
    assert "install g++" in wheels.why_not_binary(Path("x-1-py3-none-any.whl"))
    assert wheels.why_not_binary(Path("x-1-py3-none-linux_x86_64.whl")) == ""


def wheel_with(source: str, folder: Path) -> Path:
    """A wheel that holds nothing but a library of a text in C."""
    library = compiled(source, folder / "library.so")
    path = folder / f"x-1-py3-none-linux_{MACHINE}.whl"
    tag = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: py3-none-linux_{MACHINE}\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(library, "x/library.so")
        archive.writestr("x-1.dist-info/WHEEL", tag)
        archive.writestr("x-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: x\nVersion: 1\n")
        archive.writestr("x-1.dist-info/RECORD", "x/library.so,,\n")  # auditwheel looks at what it lists
    return path


def test_auditwheel_names_the_systems(tmp_path: Path) -> None:
    pytest.importorskip("auditwheel")
    wheel = wheel_with("#include <stdlib.h>\nvoid* some(void) { return malloc(8); }", tmp_path)
    repaired, problem = wheels.repair(wheel, tmp_path)
    assert problem == "" and "manylinux_2_28" in repaired.name and repaired.is_file()


def test_what_newer_systems_alone_have_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("auditwheel")
    # The version of a function that glibc got in 2.34.
    source = """
    __asm__(".symver __libc_start_main, __libc_start_main@GLIBC_2.34");
    int __libc_start_main(void);
    int some(void) { return __libc_start_main(); }
    """
    _, problem = wheels.repair(wheel_with(source, tmp_path), tmp_path)
    assert f"auditwheel does not make manylinux_2_28_{MACHINE}" in problem

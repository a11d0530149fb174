#!/usr/bin/env python3
"""Unpack a GPU pack and measure this machine with it; `python -m benchmarks gpu-pack` made it.

    python3 gpu_pack.py run --json gpu.json     # everything, within 4 minutes
    python3 gpu_pack.py run --dry-run           # unpack and list what would run; no GPU is needed
    python3 gpu_pack.py check                   # are all parts here and whole?

The parts and pack.json lie beside this file, or in folders that --parts names. Nothing is fetched. This file needs the
standard library alone; the Python that runs it should be one that has numpy and, for the comparison, PyTorch.

Exit codes: 0 all passed, 1 a section failed, 2 no GPU of the pack's kind (or a wrong command line), 3 a part is missing
or damaged, 4 this Python or system is not the one that the pack was made for, 5 too little room for what is unpacked.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import hashlib
import importlib.metadata
import json
import lzma
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "pack.json"
FORMAT = 1
FAILED, NO_GPU, DAMAGED, WRONG_PYTHON, NO_ROOM = 1, 2, 3, 4, 5
MEMORY = Path("/dev/shm")
WORK = "gpu-pack-work"
_BLOCK = 1 << 20


class PackError(Exception):
    """What is wrong, for the user; `exit_code` is how the program ends."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "check"))
    parser.add_argument("--parts", action="append", default=[], metavar="DIR", help="where parts lie; may be repeated")
    where = "what is unpacked; /dev/shm if it has the room, since weights are read from there faster, else here"
    parser.add_argument("--work", metavar="DIR", help=where)
    parser.add_argument("--json", default="gpu.json", metavar="FILE", help="the result")
    parser.add_argument("--minutes", type=float, default=4.0, help="time for everything, unpacking included")
    parser.add_argument("--only", metavar="NAMES", help="sections whose names begin with one of these, comma-separated")
    parser.add_argument("--dry-run", action="store_true", help="unpack, import, list the sections; no GPU is needed")
    args = parser.parse_args(arguments)
    try:
        return _command(args)
    except PackError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _command(args: argparse.Namespace) -> int:
    start = time.monotonic()
    folders = [Path(each) for each in args.parts] + [Path(__file__).resolve().parent]
    pack = read_pack(folders)
    if args.command == "check":
        find_parts(pack, folders)
        print(f"{len(pack['parts'])} parts are whole: {pack['title']}")
        return 0
    check_python(pack)
    if not args.dry_run:
        check_gpu(pack, gpu_versions())
    work = work_folder(pack, args.work)
    print(f"working in {work}", flush=True)
    unpack(pack, folders, work)
    add_wheels(pack, work)
    left_s = max(10.0, 60 * args.minutes - (time.monotonic() - start))
    command = [sys.executable, "-m", "benchmarks.gpu.measure", str(work)]
    command += ["--json", str(Path(args.json).resolve()), "--seconds", f"{left_s:.0f}"]
    command += ["--only", args.only] if args.only else []
    command += ["--dry-run"] if args.dry_run else []
    return subprocess.call(command, env=environment(work), cwd=str(work))


def read_pack(folders: list[Path]) -> dict[str, Any]:
    """Return the contents of pack.json, from the first folder that has it."""
    path = next((each / MANIFEST for each in folders if (each / MANIFEST).is_file()), None)
    if path is None:
        raise PackError(f"{MANIFEST} is not in {_names(folders)}: copy it beside gpu_pack.py", DAMAGED)
    try:
        pack = json.loads(path.read_text(encoding="utf-8"))
        found = pack["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise PackError(f"{path} is damaged ({error}): copy it again", DAMAGED) from error
    if found != FORMAT:
        raise PackError(
            f"{path} has format {found!r}, this gpu_pack.py reads {FORMAT!r}: take both from one pack", DAMAGED
        )
    return pack


def find_parts(pack: dict[str, Any], folders: list[Path]) -> list[Path]:
    """Return the paths of all parts, in order, after comparing sizes and SHA-256."""
    paths, problems = [], []
    for part in pack["parts"]:
        path = next((each / part["name"] for each in folders if (each / part["name"]).is_file()), None)
        if path is None:
            problems.append("{} is missing".format(part["name"]))
        elif path.stat().st_size != part["num_bytes"]:
            problems.append(f"{path} has {path.stat().st_size} bytes instead of {part['num_bytes']}")
        elif _sha256(path) != part["sha256"]:
            problems.append(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
        paths.append(path)
    if problems:
        listed = "; ".join(problems)
        raise PackError(f"{listed}; looked in {_names(folders)}; copy these parts again", DAMAGED)
    return paths


def check_python(pack: dict[str, Any]) -> None:
    """Compare system and Python with those that the pack's libraries were built for."""
    system = platform.system(), platform.machine()
    if system != ("Linux", "x86_64"):
        raise PackError(f"this pack is for Linux on x86_64, here is {' on '.join(system)}", WRONG_PYTHON)
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if here != pack["python"]:
        raise PackError(
            f"this pack is for Python {pack['python']}, {sys.executable} is Python {here}: run it with "
            f"python{pack['python']}, or make one with: python -m benchmarks gpu-pack --python {here}",
            WRONG_PYTHON,
        )


def gpu_versions() -> list[int]:
    """Return the compute capabilities of all GPUs, such as [90], as the driver has them."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, versions = ctypes.c_int(0), []
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    for device in range(count.value):
        values = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            value = ctypes.c_int(0)
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            values.append(value.value)
        versions.append(10 * values[0] + values[1])
    return versions


def check_gpu(pack: dict[str, Any], versions: list[int]) -> None:
    """Compare the first GPU, which is the one that is measured, with the one that the pack is for."""
    if not versions:
        raise PackError(
            "no NVIDIA GPU: the driver's libcuda.so.1 is missing or lists none; --dry-run needs none", NO_GPU
        )
    wanted = int(pack["sm"])
    if versions[0] != wanted:
        raise PackError(
            f"this pack has machine code of SM {wanted} alone, the GPU is SM {versions[0]}: make one with: "
            f"python -m benchmarks gpu-pack --sm {versions[0]}",
            NO_GPU,
        )


def work_folder(pack: dict[str, Any], given: str | None, memory: Path = MEMORY) -> Path:
    """Return where to unpack and to fill weights: what was given, or memory if that has twice the room, or here."""
    needed = int(pack["work_bytes"])
    if given is None and (memory / WORK / "unpacked").exists():
        return memory / WORK
    folder = Path(given or WORK).resolve()
    if (
        given is None
        and not (folder / "unpacked").exists()
        and _room(memory) >= needed
        and _free_memory() >= 2 * needed
    ):
        folder = memory / WORK
    room = _room(folder)
    if not (folder / "unpacked").exists() and room < needed:
        raise PackError(
            f"{folder}: {room / 1e9:.1f} GB are free, {needed / 1e9:.1f} are needed: give a folder with more by "
            "--work, or make a pack with fewer --models",
            NO_ROOM,
        )
    return folder


def _room(folder: Path) -> int:
    """Return the bytes that are free where a folder is, or would be; 0 if there is no such place."""
    place = next((each for each in (folder, *folder.parents) if each.exists()), None)
    return 0 if place is None or not os.access(place, os.W_OK) else shutil.disk_usage(place).free


def _free_memory() -> int:
    """Return the bytes of memory that programs may still take; 0 if the kernel does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)


class _Parts:
    """The bytes start … start + size - 1 of all parts together, as a file; they are hashed on the way."""

    def __init__(self, paths: list[Path], start: int, size: int) -> None:
        self._paths, self._left = list(paths), size
        self.digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        while self._paths and start >= self._paths[0].stat().st_size:
            start -= self._paths.pop(0).stat().st_size
        self._skip = start

    def read(self, size: int = -1) -> bytes:
        """Return at most so many bytes."""
        size = self._left if size < 0 else min(size, self._left)
        while size:
            if self._file is None:
                self._file = self._paths.pop(0).open("rb")
                self._file.seek(self._skip)
                self._skip = 0
            data = self._file.read(size)
            if data:
                self._left -= len(data)
                self.digest.update(data)
                return data
            self._file.close()
            self._file = None
        return b""


def unpack(pack: dict[str, Any], folders: list[Path], work: Path) -> None:
    """Unpack all archives, unless the same pack has been unpacked there."""
    marker = work / "unpacked"
    mark = hashlib.sha256(json.dumps(pack, sort_keys=True).encode()).hexdigest()
    if marker.is_file() and marker.read_text() == mark:
        return
    paths = find_parts(pack, folders)
    start = time.monotonic()

    def one(archive: dict[str, Any]) -> None:
        target = work / archive["folder"]
        target.mkdir(parents=True, exist_ok=True)
        source = _Parts(paths, archive["offset"], archive["num_bytes"])
        with lzma.open(source) as plain, tarfile.open(fileobj=plain, mode="r|") as files:
            for each in files:
                _extract(files, each, target)
        while source.read(_BLOCK):
            pass
        if source.digest.hexdigest() != archive["sha256"]:
            raise PackError(f"archive {archive['name']} is damaged although its parts are whole", DAMAGED)

    with ThreadPoolExecutor(len(pack["archives"])) as pool:
        list(pool.map(one, pack["archives"]))
    marker.write_text(mark)
    print("unpacked in {:.1f} s: {}".format(time.monotonic() - start, pack["title"]), flush=True)


def _extract(files: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    if hasattr(tarfile, "data_filter"):
        files.extract(member, str(target), filter="data")
        return
    if member.name.startswith("/") or ".." in member.name.split("/") or not (member.isfile() or member.isdir()):
        raise PackError(f"{member.name}: a name or kind that an archive of ours has not", DAMAGED)
    files.extract(member, str(target))


def add_wheels(pack: dict[str, Any], work: Path) -> None:
    """Unpack those wheels whose distribution this Python lacks, or has too old."""
    site = work / "site"
    for wheel in pack["wheels"]:
        found = _version(wheel["distribution"])
        if found is not None and _numbers(found) >= _numbers(wheel["least"]):
            continue
        print(
            "{} {} comes from the pack, here is {}".format(wheel["distribution"], wheel["version"], found or "none"),
            flush=True,
        )
        with zipfile.ZipFile(str(work / "wheels" / wheel["file"])) as archive:
            archive.extractall(str(site))


def environment(work: Path) -> dict[str, str]:
    """Return the environment of the sections: our packages first, and CUDA's libraries where the loader finds them."""
    values = dict(os.environ)
    paths = [str(work / "project"), str(work / "site"), values.get("PYTHONPATH", "")]
    values["PYTHONPATH"] = os.pathsep.join(each for each in paths if each)
    libraries = sorted(
        {path for each in sys.path if each for path in glob.glob(os.path.join(each, "nvidia", "*", "lib"))}
    )
    libraries.append(values.get("LD_LIBRARY_PATH", ""))
    values["LD_LIBRARY_PATH"] = os.pathsep.join(each for each in libraries if each)
    values["PYTHONUNBUFFERED"] = "1"
    return values


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", version)[:3]]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(_BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()


def _names(folders: list[Path]) -> str:
    return ", ".join(str(each) for each in folders)


if __name__ == "__main__":
    sys.exit(main())

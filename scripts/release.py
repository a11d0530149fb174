"""Build what is published, and make sure that it works: make release. Nothing is uploaded.

    python -m scripts.release prepare 0.2.0    # write the version and its section of CHANGELOG.md, to commit and tag
    python -m scripts.release check            # at the tag v0.2.0: build and check into dist/
    python -m scripts.release check --dry-run  # the same at any commit, without the tag: make release DRY_RUN=1

The version stands in pyproject.toml and runtime/__init__.py, and a tag has to agree. setuptools-scm would take it from
the tag, but the sources are built where there is no Git: from a copy of what is tracked, and from the source
distribution. The wheel is built from the source distribution, so that both are known to be whole; the C++ compiler that
`make wheel` needs is needed here, and the package index, for what the extra `cpu` installs.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

from scripts import wheels

ROOT = Path(__file__).resolve().parent.parent
PLACES = {
    "pyproject.toml": re.compile(r'^version = "(.+)"$', re.M),
    "runtime/__init__.py": re.compile(r'^__version__ = "(.+)"$', re.M),
}
"""Where the version stands."""
VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")
UNRELEASED = "## [Unreleased]\n"
PACKAGES = ("configs", "engines", "optimum", "qwen3_vl", "qwen3vl_export", "runtime")
SDIST_FILES = {"LICENSE", "MANIFEST.in", "NOTICE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg", "setup.py"}
LIBRARY = "runtime/native/libqwen3vl_cpu.so"
MAX_BYTES = {".whl": 20_000_000, ".gz": 20_000_000}
"""Of each, 17 MB are the three demo checkpoints, 0.6 the own kernels and their proofs, or their sources."""
ABSENT = ("torch", "torchvision", "transformers", "onnx", "onnxscript", "safetensors")
"""What no engine needs to run."""


class ReleaseError(Exception):
    """What is wrong, and what to do about it."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_parser = commands.add_parser("prepare", help="write the version and its section of CHANGELOG.md")
    prepare_parser.add_argument("version")
    check_parser = commands.add_parser("check", help="build and check what is published")
    check_parser.add_argument("--dry-run", action="store_true", help="at any commit, without a tag")
    check_parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of the files (dist)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "prepare":
            prepare(ROOT, options.version, datetime.date.today())
            print(f"Commit this, then: git tag v{options.version} && make release")
        else:
            check(options.output, options.dry_run)
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(root: Path, version: str, day: datetime.date) -> None:
    """Write a version where it stands, and give it what CHANGELOG.md has under Unreleased.

    Raises:
        ReleaseError: It is no version, has a section already, or there is nothing to release. Nothing was written then.
    """
    if not VERSION.fullmatch(version):
        raise ReleaseError(f"{version!r} is no version: write 0.2.0, or 0.2.0rc1 for a candidate")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    if section(changelog, version):
        raise ReleaseError(f"CHANGELOG.md has a section of {version} already: choose another version")
    if changelog.count(UNRELEASED) != 1:
        raise ReleaseError(f"CHANGELOG.md: expected one line {UNRELEASED.strip()!r}")
    if not section(changelog, "Unreleased"):
        raise ReleaseError("CHANGELOG.md has nothing under Unreleased: there is nothing to release")
    texts = {"CHANGELOG.md": changelog.replace(UNRELEASED, f"{UNRELEASED}\n## [{version}] - {day.isoformat()}\n")}
    before = version_of(root)
    for name in PLACES:
        text = (root / name).read_text(encoding="utf-8")
        texts[name] = PLACES[name].sub(lambda found: found[0].replace(before, version), text, count=1)
    for name, text in texts.items():
        (root / name).write_text(text, encoding="utf-8")


def section(changelog: str, name: str) -> str:
    """Return what a changelog says of a version, empty if it says nothing."""
    found = re.search(rf"^## \[{re.escape(name)}\][^\n]*\n(.*?)(?=^## \[|\Z)", changelog, re.M | re.S)
    return found[1].strip() if found else ""


def version_of(root: Path) -> str:
    """Return the version of a checkout.

    Raises:
        ReleaseError: Its places do not agree.
    """
    found = {name: pattern.search((root / name).read_text(encoding="utf-8")) for name, pattern in PLACES.items()}
    versions = {name: match[1] if match else "none" for name, match in found.items()}
    if len(set(versions.values())) != 1:
        said = ", ".join(f"{name}: {version}" for name, version in versions.items())
        raise ReleaseError(
            f"the version is not the same everywhere ({said}): run `python -m scripts.release prepare VERSION`"
        )
    return versions["pyproject.toml"]


def check_tag(version: str, tags: Iterable[str], changes: str, changelog: str) -> None:
    """Require that a commit is what its tag says.

    Args:
        version: Of the checkout.
        tags: Of the commit.
        changes: What `git status --porcelain` prints.
        changelog: Its text.

    Raises:
        ReleaseError: It is not.
    """
    if changes:
        raise ReleaseError(f"there is what no commit has; commit or remove it:\n{changes.rstrip()}")
    if f"v{version}" not in (found := sorted(tags)):
        has = f"its tags are {', '.join(found)}" if found else "it has no tag"
        raise ReleaseError(f"this commit is no release of {version}: {has}; run `git tag v{version}`, or use --dry-run")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.M):
        raise ReleaseError(
            f"CHANGELOG.md has no section `## [{version}] - DATE`: run `python -m scripts.release prepare {version}`"
        )


def check(output: Path, is_dry_run: bool) -> None:
    """Build the source distribution and the wheel into a folder, and check them.

    Raises:
        ReleaseError: One of them is not as it should be.
    """
    version = version_of(ROOT)
    if not is_dry_run:
        changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        check_tag(version, git("tag", "--points-at", "HEAD").split(), git("status", "--porcelain"), changelog)
    with tempfile.TemporaryDirectory() as work:
        sdist, wheel = build(Path(work))
        run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
        tracked = set(filter(None, git("ls-files", "-z").split("\0")))
        for problem in (problem_of_sdist(sdist, tracked), problem_of_wheel(wheel, tracked)):
            if problem:
                raise ReleaseError(problem)
        answer_without_pytorch(wheel, version, Path(work))
        output.mkdir(parents=True, exist_ok=True)
        for each in (sdist, wheel):
            (output / each.name).write_bytes(each.read_bytes())
            print(f"{hashlib.sha256(each.read_bytes()).hexdigest()}  {output / each.name}  {each.stat().st_size} bytes")
    print(
        "dry run: this is not to be published" if is_dry_run else f"{version}: CONTRIBUTING.md says how to publish it"
    )


def build(work: Path) -> tuple[Path, Path]:
    """Build a source distribution of what git tracks, and of that a wheel which other Linux systems run."""
    wheels.copy_tracked(work / "source")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", work / "files", work / "source")
    (sdist,) = (work / "files").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (unpacked,) = (work / "unpacked").iterdir()
    (work / "built").mkdir()
    built = wheels.build_source(unpacked, work / "built")
    if problem := wheels.why_not_binary(built):
        raise ReleaseError(problem)
    wheel, problem = wheels.repair(built, work / "files")
    if problem:
        raise ReleaseError(problem)
    return sdist, wheel


def problem_of_sdist(sdist: Path, tracked: set[str]) -> str:
    """Return what is wrong with a source distribution's files, empty if nothing is."""
    with tarfile.open(sdist) as archive:
        names = {each.name.partition("/")[2] for each in archive if each.isfile()}
    names = {name for name in names if ".egg-info/" not in name}
    sources = {name for name in tracked if name.split("/")[0] in (*PACKAGES, "native")}
    return too_large(sdist) or difference(sdist.name, names, sources | SDIST_FILES)


def problem_of_wheel(wheel: Path, tracked: set[str]) -> str:
    """Return what is wrong with a wheel's files, empty if nothing is."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    return too_large(wheel) or difference(
        wheel.name, names, {name for name in tracked if name.split("/")[0] in PACKAGES} | {LIBRARY}
    )


def too_large(path: Path) -> str:
    """Return that a file is larger than it may be, or nothing."""
    size, limit = path.stat().st_size, MAX_BYTES[path.suffix]
    return f"{path.name} has {size} bytes, more than {limit}: leave out what users do not need" if size > limit else ""


def difference(name: str, found: set[str], expected: set[str]) -> str:
    """Return which files an archive lacks or has besides those expected, or nothing."""
    lacking, more = sorted(expected - found), sorted(found - expected)
    if not lacking and not more:
        return ""
    said = f"{name} lacks {lacking or 'nothing'}, and has besides {more or 'nothing'}"
    return f"{said}: see packages in setup.py, package-data in pyproject.toml, MANIFEST.in"


ASK = """
import importlib.util, sys

there = [name for name in {absent} if importlib.util.find_spec(name)]
if there:
    sys.exit(f"found where the extra cpu alone was installed: {{there}}")

def refuse(event, arguments):
    if event == "socket.getaddrinfo" or event == "socket.connect" and isinstance(arguments[1], tuple):
        raise RuntimeError(f"an engine asks for the network: {{event}} {{arguments}}")

sys.addaudithook(refuse)
import importlib.resources
import json

from qwen3_vl import Qwen3VLModel, __version__

images = importlib.resources.files("qwen3vl_export") / "demo" / "images"
model = Qwen3VLModel.from_engine(sys.argv[1])
for truth in json.loads((images / "truth.json").read_text(encoding="utf-8")):
    image = {{"type": "image", "image": str(images / truth["file"])}}
    content = [image, {{"type": "text", "text": truth["question"]}}]
    print(model.generate([{{"role": "user", "content": content}}], do_sample=False).text == truth["answer"])
print(__version__)
"""
"""Answer the shipped pictures where nothing but the wheel and the extra `cpu` is."""


def answer_without_pytorch(wheel: Path, version: str, work: Path) -> None:
    """Install a wheel with the extra `cpu` into an empty environment, and let an engine with own kernels answer there.

    Raises:
        ReleaseError: Its command does not start, it answers wrongly or asks for the network, or PyTorch came along.
    """
    exporter = Path(sys.executable).with_name("qwen3vl-export")
    run(exporter, "demo", "--target", "ort-cpu-int8", "--kernels", "own", "--output", work / "engine", "--quiet")
    venv.create(work / "env", with_pip=True)
    python = work / "env" / "bin" / "python"
    options = ("--quiet", "--disable-pip-version-check", "-c", ROOT / "locks" / "demo.txt")
    run(python, "-m", "pip", "install", *options, f"{wheel}[cpu]", cwd=work)
    run(work / "env" / "bin" / "qwen3vl", "targets", cwd=work)
    *answers, installed = run(python, "-c", ASK.format(absent=ABSENT), work / "engine", cwd=work).split()
    if not answers or set(answers) != {"True"} or installed != version:
        raise ReleaseError(f"{wheel.name}: right answers to the shipped pictures: {answers}; version {installed}")
    print(f"{wheel.name}: {len(answers)} right answers without PyTorch and without network")


def git(*arguments: str) -> str:
    """Return what git prints."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command and return its output.

    Raises:
        ReleaseError: It fails; what it printed is in the message.
    """
    words = [str(word) for word in command]
    # Outside of this checkout nothing of it may be found: only the wheel counts.
    environment = {name: value for name, value in os.environ.items() if cwd == ROOT or name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ReleaseError(f"{json.dumps(words[:4])} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())

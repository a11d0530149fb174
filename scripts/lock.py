"""Write the lock files of locks/ with uv: exact versions of all that an environment of this project holds.

    python scripts/lock.py                  # newest releases that the ranges allow, but of PyTorch
    python scripts/lock.py demo.txt dev.txt # some of them

uv alone reads the ranges, and pip alone installs. A lock names no index: pip takes packages from where it is set up to.
CUDA libraries are left out: each build of PyTorch asks for those that it was made with, and a build for CPUs for none.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "locks"
OLDEST_PYTHON = "3.11"

# The pair that parity was measured with; it is raised here, by hand, and then measured again.
# A torchvision of another build than torch's has no kernels that it could call.
TORCH_PAIR = ("torch==2.14.1", "torchvision==0.29.1")

_OF_TORCH = re.compile(r"(nvidia-.*|cuda-.*|triton)$")


@dataclass(frozen=True)
class Lock:
    """One file of locks/.

    Attributes:
        name: File in locks/.
        extras: Extras of pyproject.toml that it covers, beside the dependencies of the runtime.
        pins: Versions that are not chosen by uv.
        source: File of requirements, from the repository's root, in place of pyproject.toml.
        like: Lock whose versions count here, too; it stands earlier in the tuple.
        is_lowest: Take the lowest version that each range allows instead of the newest.
        keeps: Distributions named like CUDA libraries that an extra asks for itself.
    """

    name: str
    extras: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()
    source: str = "pyproject.toml"
    like: str = ""
    is_lowest: bool = False
    keeps: tuple[str, ...] = ()


ALL = (
    Lock(
        "dev.txt",
        (
            "export",
            "cpu",
            "verify",
            "tensorrt-rtx",
            "plot",
            "video",
            "structured",
            "heif",
            "serve",
            "optimum",
            "polygraphy",
            "dev",
        ),
        TORCH_PAIR,
        keeps=("cuda-bindings", "cuda-pathfinder"),  # asked for by the extra tensorrt-rtx
    ),
    Lock("demo.txt", ("export", "cpu"), like="dev.txt"),
    Lock(
        "oldest.txt",
        ("export", "cpu", "video", "structured", "heif", "serve", "test"),
        ("torch==2.13.0",),
        is_lowest=True,
    ),
    Lock(
        "oldest-transformers.txt",
        ("export", "cpu", "verify", "video", "structured", "heif", "serve", "test"),
        # 4.57.0 was withdrawn for its packaging and installs all the same, but only by its exact version.
        ("transformers==4.57.0", *TORCH_PAIR),
        is_lowest=True,
    ),
    # Apart, since Ray and Triton's client ask for other versions of what all the other tests have. Without PyTorch.
    Lock("cluster.txt", ("cpu", "video", "structured", "serve", "ray", "test-cluster")),
    # They share the PyTorch of `make setup`.
    Lock("peers-genai.txt", pins=TORCH_PAIR, source="benchmarks/compare/requirements-genai.txt"),
    Lock("peers-openvino.txt", pins=TORCH_PAIR, source="benchmarks/compare/requirements-openvino.txt"),
)


def is_of_torch(line: str, keeps: tuple[str, ...] = ()) -> bool:
    """Whether a line of a lock names a CUDA library that PyTorch asks for by itself."""
    name = re.split(r"[=\[ ]", line, maxsplit=1)[0]
    return name not in keeps and _OF_TORCH.match(name) is not None


def compile_lock(lock: Lock, uv: Path) -> str:
    """Return the text of a lock.

    Args:
        lock: What it covers.
        uv: The uv to ask.

    Raises:
        subprocess.CalledProcessError: The ranges allow no set of versions; uv has said why on stderr.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    is_ours = lock.source == "pyproject.toml"
    with tempfile.TemporaryDirectory() as name:
        pins, builds = Path(name) / "pins.in", Path(name) / "builds.in"
        pins.write_text("\n".join(lock.pins) + "\n", encoding="utf-8")
        # An environment builds this project with the setuptools that is locked.
        builds.write_text("\n".join(project["build-system"]["requires"]) + "\n", encoding="utf-8")
        command = [
            *(str(uv), "pip", "compile", lock.source, *([str(builds)] if is_ours else [])),
            *(f"--extra={extra}" for extra in lock.extras),
            *("--constraints", str(pins), *(["--constraints", str(LOCKS / lock.like)] if lock.like else [])),
            *("--universal", "--python-version", OLDEST_PYTHON),
            *("--resolution", "lowest-direct" if lock.is_lowest else "highest"),
            *("--no-progress", "--no-annotate", "--custom-compile-command", "make lock"),
        ]
        text = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return "".join(line for line in text.splitlines(keepends=True) if not is_of_torch(line, lock.keeps))


def main(names: list[str]) -> None:
    """Write the locks that are named, or all."""
    unknown = set(names) - {lock.name for lock in ALL}
    if unknown:
        sys.exit(f"error: {', '.join(sorted(unknown))}: unknown; there are {', '.join(lock.name for lock in ALL)}")
    LOCKS.mkdir(exist_ok=True)
    for lock in ALL:
        if not names or lock.name in names:
            try:
                text = compile_lock(lock, Path(sys.executable).with_name("uv"))
            except subprocess.CalledProcessError as error:
                sys.exit(
                    f"error: no set of versions for locks/{lock.name} (uv's exit code {error.returncode}, see above)"
                )
            (LOCKS / lock.name).write_text(text, encoding="utf-8")
            print(f"locks/{lock.name}: {sum('==' in line for line in text.splitlines())} pins")


if __name__ == "__main__":
    main(sys.argv[1:])

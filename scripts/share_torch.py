"""Make a virtual environment that sees the PyTorch of this interpreter's environment, and nothing else of it.

    .venv/bin/python scripts/share_torch.py build/newest

PyTorch with its CUDA libraries takes gigabytes. Links to torch, torchvision and those libraries, with what pip wrote
about them, stand in build/shared-torch/. A `.pth` file puts that folder on the path of the new environment, so its pip
takes them as installed. Install there with `-c build/shared-torch/constraints.txt`: pip then fails where it would fetch
another PyTorch. The folder is outside of the environments, since pip removes no files outside of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT / "build" / "shared-torch"
CONSTRAINTS = SHARED / "constraints.txt"

_SHARED_NAME = re.compile(r"(torch|torchvision|triton|nvidia-.*|cuda-.*)$")


def is_shared(name: str) -> bool:
    """Whether a distribution is PyTorch, or of its CUDA libraries."""
    return _SHARED_NAME.match(re.sub(r"[-_.]+", "-", name).lower()) is not None


def link(found: Iterable[Distribution], folder: Path) -> list[str]:
    """Link the files of those distributions that are shared into a folder, and leave no other link there.

    Args:
        found: Installed distributions.
        folder: Where the links go; those that are right stay, since a program may run with them.

    Returns:
        A pin for each, sorted.
    """
    pins, targets = [], {}
    for each in found:
        if is_shared(each.metadata["Name"]):
            pins.append(f"{each.metadata['Name']}=={each.version.partition('+')[0]}")
            # Commands lie beside site-packages, at `../../bin`; nothing here calls them.
            for name in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
                targets[name] = Path(str(each.locate_file(name))).absolute()  # `nvidia` is of many distributions
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_symlink() and path.readlink() != targets.get(path.name):
            path.unlink()
    for name, target in targets.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)
    return sorted(pins)


def make_environment(folder: Path) -> list[str]:
    """Make an empty environment that sees this interpreter's PyTorch; one that is there is replaced.

    Args:
        folder: Its folder.

    Returns:
        Command of its pip, to which what to install is added.
    """
    pins = link(distributions(), SHARED)
    if not any(pin.startswith("torch==") for pin in pins):
        sys.exit(f"error: {sys.executable} has no PyTorch to share; make setup installs one")
    CONSTRAINTS.write_text("\n".join(pins) + "\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", ask], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    (Path(packages) / "shared-torch.pth").write_text(f"{SHARED}\n", encoding="utf-8")
    return [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", str(CONSTRAINTS)]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/share_torch.py FOLDER")
    make_environment(Path(sys.argv[1]))

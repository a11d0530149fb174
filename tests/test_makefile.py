"""`make` in one checkout leaves the environment of another alone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("owner", "is_refused"), [("/another/checkout", True), (str(ROOT), False), ("", False)])
def test_an_environment_of_another_checkout_is_refused(tmp_path: Path, owner: str, is_refused: bool) -> None:
    (tmp_path / ".installed").write_text(owner + "\n")
    command = ["make", "--dry-run", "demo", f"VENV={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode != 0) is is_refused
    assert ("runs the code of /another/checkout" in done.stderr) is is_refused
    assert ("scripts/demo.py" in done.stdout) is not is_refused

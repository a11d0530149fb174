"""The notebooks equal the scripts that they are made of, and these run offline."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import PICTURES, ROOT

pytest.importorskip("nbformat", reason="needs the extra dev")
sys.path.insert(0, str(ROOT / "scripts"))

import notebooks

SCRIPTS = sorted((ROOT / "examples" / "notebooks").glob("*.py"))
TRUTHS = json.loads((PICTURES / "truth.json").read_text(encoding="utf-8"))


def ran(name: str, folder: Path) -> list[str]:
    """Run a script in a folder of its own, as its notebook would run it, and return what it prints."""
    script = ROOT / "examples" / "notebooks" / f"{name}.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9"}
    environment["no_proxy"] = "127.0.0.1"
    done = subprocess.run([sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_that_of_its_script(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert script.with_suffix(".ipynb").read_text(encoding="utf-8") == notebooks.notebook_of(text), (
        "run: python scripts/notebooks.py"
    )


def test_no_notebook_is_without_a_script() -> None:
    assert [path.stem for path in SCRIPTS] == sorted(path.stem for path in notebooks.FOLDER.glob("*.ipynb"))
    assert [path.stem for path in SCRIPTS] == ["export_and_ask", "quantise", "serve_and_batch"]


def test_cells_of_a_script() -> None:
    made = json.loads(notebooks.notebook_of("# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1\n\n\n# %%\nx\n"))
    assert [(each["cell_type"], "".join(each["source"])) for each in made["cells"]] == [
        *(("markdown", "# Title\n\ntext"), ("code", "x = 1"), ("code", "x"))
    ]
    assert all(each["outputs"] == [] for each in made["cells"][1:])
    with pytest.raises(ValueError, match="before the first cell"):
        notebooks.notebook_of("import os\n# %%\n")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_cell_is_whole(script: Path) -> None:
    for cell in json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))


def test_export_and_ask(tmp_path: Path) -> None:
    size, answer, second, pieces = ran("export_and_ask", tmp_path)
    assert re.fullmatch(r"1\d\.\d MB of weights in out/fp32", size)
    assert answer == TRUTHS[0]["answer"] == pieces.replace("|", "")
    assert re.fullmatch(rf"{len(answer)}: [1-9]\d* of \d+ tokens were in the cache", second)


def test_quantise(tmp_path: Path) -> None:
    *sizes, exact, rounded, divergence = ran("quantise", tmp_path)
    large, small = (float(re.search(r": ([\d.]+) MB", line)[1]) for line in sizes)  # type: ignore[index]
    assert 0 < 3 * small < large
    assert exact == f"ort-cpu-fp32: {len(TRUTHS)} of {len(TRUTHS)} answers are right"
    assert re.fullmatch(rf"ort-cpu-int4: \d+ of {len(TRUTHS)} answers are right", rounded)
    mean, high = map(float, re.findall(r"([\d.e-]+)(?=,| nats)", divergence))
    assert 0 < mean < high < 1


def test_serve_and_batch(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="needs the extra serve")
    several, one, batch = ran("serve_and_batch", tmp_path)
    assert ast.literal_eval(several) == [each["answer"] for each in TRUTHS[:3]]
    assert one == TRUTHS[0]["answer"]
    assert batch == f"{len(TRUTHS)} of {len(TRUTHS)} are right"

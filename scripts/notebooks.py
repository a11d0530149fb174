"""Write the notebooks of examples/notebooks from the scripts beside them: `python scripts/notebooks.py`.

The scripts are the source, in the percent format: a line `# %%` begins a cell of code, `# %% [markdown]` one of text.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "notebooks"
_CELL = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebook_of(script: str) -> str:
    """Return the notebook that a script is, without outputs."""
    before, *parts = _CELL.split(script)
    if before.strip():
        raise ValueError(f"text before the first cell: {before.strip()[:80]!r}; begin the script with a line '# %%'")
    cells = []
    for index, (kind, text) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        source = text.strip("\n")
        if kind:
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        # A number as the name: random names would make each notebook another file.
        cells.append((new_markdown_cell if kind else new_code_cell)(source, id=f"cell-{index}"))
    notebook = new_notebook(cells=cells, metadata=_METADATA)
    nbformat.validate(notebook)
    return f"{nbformat.writes(notebook, version=4)}\n"


def main() -> None:
    """Write all notebooks."""
    for script in sorted(FOLDER.glob("*.py")):
        script.with_suffix(".ipynb").write_text(notebook_of(script.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Names and links of an engine's files that ONNX Runtime does not open, found before it says so in its own words."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import EngineError
from runtime.manifest import Manifest
from runtime.shown import one_line

_WEIGHTS_SUFFIX = ".data"
_LONGEST = 160


def check_paths(folder: Path, manifest: Manifest) -> None:
    """Raise if ONNX Runtime cannot open the graphs of an engine folder where it lies.

    Its Python binding takes names in UTF-8 alone. From 1.24 on it reads weights only from the folder of the graph,
    links followed: both may be links into one folder, as in the Hub's cache, and the whole folder may be one, but not
    the weights alone.

    Raises:
        EngineError: The folder's name is no UTF-8, or a file of weights is a link to another place than its graph.
    """
    name = one_line(str(folder), _LONGEST)
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise EngineError(
            f"{name}: the folder's name is not UTF-8, and ONNX Runtime opens no other",
            remedy="rename the folder, or reach it by a link with another name: ln -s FOLDER engine",
        ) from error
    for file in manifest.files:
        graph = folder / file.removesuffix(_WEIGHTS_SUFFIX)
        weights = folder / file
        if not file.endswith(_WEIGHTS_SUFFIX) or not graph.is_file() or not weights.is_symlink():
            continue
        if not weights.resolve().is_relative_to(graph.resolve().parent):
            raise EngineError(
                f"{name}: {file} is a symlink to {one_line(str(weights.resolve()), _LONGEST)}, away from {graph.name}; "
                "ONNX Runtime reads weights from the folder of their graph alone",
                remedy="move the whole folder to that disk and link the folder, or copy it with the files behind the "
                f"links: cp -rL {name} NEW",
            )

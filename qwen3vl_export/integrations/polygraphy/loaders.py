"""Loaders of Polygraphy for what an export makes: the graphs of a bundle, lowered graphs, and an opened engine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from polygraphy.backend.base import BaseLoader

from engines.bundle import BUNDLE_MANIFEST_NAME, DECODER, PREFILL, VISION
from runtime.errors import UsageError
from runtime.shown import shown

if TYPE_CHECKING:
    import onnx

    from runtime.model import Qwen3VLModel

GRAPHS = (VISION, DECODER)


class BundleGraph(BaseLoader):
    """Load a graph of a bundle, which any ONNX runtime runs: custom operators have bodies of standard ones."""

    def __init__(self, source: str | Path, graph: str = DECODER) -> None:
        """Take what to load.

        Args:
            source: The folder of a bundle, or a checkpoint that is traced: a folder, a Hub id, or `demo`.
            graph: `vision` or `decoder`.

        Raises:
            UsageError: There is no such graph.
        """
        self._source = str(source)
        self._graph = checked_graph(graph)

    def call_impl(self) -> onnx.ModelProto:
        """Return the model with its weights.

        Raises:
            CheckpointError: The checkpoint does not open.
        """
        if (Path(self._source) / BUNDLE_MANIFEST_NAME).is_file():
            return _loaded(Path(self._source), self._graph)
        from qwen3vl_export.checkpoint import Checkpoint
        from qwen3vl_export.export import make_bundle

        with tempfile.TemporaryDirectory() as folder:
            make_bundle(Checkpoint.open(self._source)).write(Path(folder))
            return _loaded(Path(folder), self._graph)


class LoweredGraph(BaseLoader):
    """Load a graph as a target runs it, or its compiler gets it."""

    def __init__(self, source: str | Path, graph: str = DECODER, *, target: str | None = None) -> None:
        """Take what to load.

        Args:
            source: An engine of ONNX graphs or a folder of lowered ones (`qwen3vl-export --no-compile`); with a target,
                a checkpoint that is lowered for it.
            graph: `vision`, `decoder`, or `prefill` of an engine that has one.
            target: Name of the target.

        Raises:
            UsageError: There is no such graph.
        """
        self._source = str(source)
        self._graph = checked_graph(graph, (*GRAPHS, PREFILL))
        self._target = target

    def call_impl(self) -> onnx.ModelProto:
        """Return the model with its weights.

        Raises:
            CheckpointError: The checkpoint does not open.
            TargetError: There is no such target, or it does not take the model.
            UsageError: The folder holds no such graph.
        """
        if self._target is None:
            return _loaded(Path(self._source), self._graph)
        from engines import registry
        from engines.build import build_engine
        from qwen3vl_export.checkpoint import Checkpoint
        from qwen3vl_export.export import make_bundle

        target = registry.get(self._target)
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "lowered"
            build_engine(make_bundle(Checkpoint.open(self._source)), target, folder, runnable=False)
            return _loaded(folder, self._graph)


class EngineSession(BaseLoader):
    """Open an engine, or lowered graphs, which ONNX Runtime's CPU provider then runs node by node."""

    def __init__(self, engine: str | Path) -> None:
        """Take the folder."""
        self._engine = Path(engine)

    def call_impl(self) -> Qwen3VLModel:
        """Return the opened model; its `session` runs the graphs, and whoever asked for it closes it.

        Raises:
            EngineError: A file is missing or altered, or the engine does not open.
        """
        from qwen3vl_export.parity.lowered import open_model

        return open_model(self._engine)


def checked_graph(graph: str, known: tuple[str, ...] = GRAPHS) -> str:
    """Return the name of a graph.

    Raises:
        UsageError: It is none.
    """
    if graph not in known:
        raise UsageError(f"unknown graph {shown(graph)}", remedy=f"give one of {', '.join(known)}")
    return graph


def _loaded(folder: Path, graph: str) -> onnx.ModelProto:
    import onnx

    path = folder / f"{graph}.onnx"
    if not path.is_file():
        raise UsageError(
            f"{folder} holds no {path.name}",
            remedy="give a folder of ONNX graphs: an engine ort-*, a bundle, or what --no-compile writes",
        )
    return onnx.load(path)

"""CUDA graphs of ONNX Runtime's CUDA provider, on the CPU: a run with a graph's id replays its first run.

What is replayed reads and writes the memory that the first run was bound to, whatever the later one is bound to.
"""

from __future__ import annotations

from typing import Any

import onnxruntime as ort
import pytest

_UNCAPTURED = "-1"


class HostGraphs:
    """Replaces `InferenceSession.run_with_iobinding` and `release_captured_graph`.

    Attributes:
        runs: Batch of each run of a graph in order, and None for each run without.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.runs: list[int | None] = []
        self._graphs: dict[tuple[int, str], tuple[Any, int]] = {}
        self._run = ort.InferenceSession.run_with_iobinding

        def run(session: ort.InferenceSession, binding: Any, options: ort.RunOptions | None = None) -> None:
            if options is None:  # the vision tower, of which nothing is recorded
                self._run(session, binding)
            else:
                self._run_or_replay(session, binding, options)

        def release(session: ort.InferenceSession, graph_id: int) -> None:
            assert self._graphs.pop((id(session), str(graph_id)), None), "a graph that is not there is released"

        patch.setattr(ort.InferenceSession, "run_with_iobinding", run)
        patch.setattr(ort.InferenceSession, "release_captured_graph", release)

    @property
    def recorded(self) -> list[int]:
        """Batches of the graphs that there are."""
        return sorted(batch for _, batch in self._graphs.values())

    def take_runs(self) -> list[int | None]:
        runs, self.runs = self.runs, []
        return runs

    def _run_or_replay(self, session: ort.InferenceSession, binding: Any, options: ort.RunOptions) -> None:
        graph_id = options.get_run_config_entry("gpu_graph_id")
        if graph_id == _UNCAPTURED:
            self.runs.append(None)
            self._run(session, binding, options)
            return
        (batch,) = {value.shape()[0] for value in binding.get_outputs()}
        recorded, batch = self._graphs.setdefault((id(session), graph_id), (binding, batch))
        self.runs.append(batch)
        self._run(session, recorded, options)

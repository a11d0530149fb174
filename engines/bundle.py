"""A bundle: the two target-neutral graphs of one model, its shape, and the small files a runtime needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from engines.external_data import weight_bytes, write_model
from engines.progress import SILENT, Progress
from runtime.contract import (
    DECODER_INPUTS,
    DECODER_OUTPUTS,
    TOKEN_SCORES,
    VISION_INPUTS,
    VISION_OUTPUTS,
    past_names,
    present_names,
)
from runtime.errors import BundleError
from runtime.manifest import FileRecord
from runtime.model_config import ModelConfig

VISION = "vision"
DECODER = "decoder"
PREFILL = "prefill"  # in an engine: the decoder once more, lowered for many tokens at once
BUNDLE_MANIFEST_NAME = "bundle.json"


@dataclass(frozen=True)
class Bundle:
    """The graph contract of docs/architecture.md, in memory; weights are references until they are written.

    Attributes:
        config: Shape of the model.
        graphs: `vision` and `decoder`.
        assets: Contents of the tokenizer, template and processor files, by name.
        source: Where the weights came from.
        versions: Libraries that made the graphs.
    """

    config: ModelConfig
    graphs: Mapping[str, ir.Model]
    assets: Mapping[str, bytes]
    source: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_token_scores(self) -> bool:
        """Whether the vision graph says how much attention each visual token gets."""
        return any(value.name == TOKEN_SCORES for value in self.graphs[VISION].graph.outputs)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all streamed weights."""
        return sum(weight_bytes(model) for model in self.graphs.values())

    def write_assets(self, folder: Path) -> dict[str, FileRecord]:
        """Write the small files and return a record for each."""
        for name, contents in self.assets.items():
            (folder / name).write_bytes(contents)
        return {name: FileRecord.of(folder / name) for name in self.assets}

    def copies(self) -> dict[str, ir.Model]:
        """Return copies of the graphs, to be changed; weights are references, so they are not copied."""
        return {name: model.clone() for name, model in self.graphs.items()}

    def check(self) -> None:
        """Raise unless both graphs have the inputs and outputs of the contract.

        Raises:
            BundleError: A graph, an input or an output is missing or out of order.
        """
        num_layers = self.config.text.num_layers
        expected = {
            VISION: ([*VISION_INPUTS], [*VISION_OUTPUTS]),
            DECODER: (
                [*DECODER_INPUTS, *past_names(num_layers)],
                [*DECODER_OUTPUTS, *present_names(num_layers)],
            ),
        }
        for name, (inputs, outputs) in expected.items():
            graph = self.graphs[name].graph
            found = [value.name for value in graph.inputs], [value.name for value in graph.outputs]
            if name == VISION and self.has_token_scores:
                outputs = [*outputs, TOKEN_SCORES]
            if found != (inputs, outputs):
                raise BundleError(
                    f"{name}.onnx: inputs and outputs are {found}, the contract says {(inputs, outputs)}",
                    remedy="keep names and order of what runtime/contract.py lists, in a graph or pass of your own",
                )

    def write(self, folder: Path, *, with_weights: bool = True, progress: Progress = SILENT) -> None:
        """Write graphs, weights, small files and `bundle.json` into an empty folder, for any ONNX runtime."""
        self.check()
        advance = partial(progress.advance, total_bytes=self.weight_bytes)
        files: dict[str, FileRecord] = {}
        for name, model in self.copies().items():
            files |= write_model(model, folder / f"{name}.onnx", with_weights=with_weights, advance=advance)
        self.write_assets(folder)
        manifest = {
            "model": self.config.to_dict(),
            "source": dict(self.source),
            "versions": dict(self.versions),
            "files": {name: asdict(record) for name, record in files.items()},
        }
        (folder / BUNDLE_MANIFEST_NAME).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

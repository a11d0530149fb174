"""Find the weights of a layer's experts in a checkpoint, in any layout in use, and read them one expert at a time.

Shapes: E experts, D hidden, I width of an expert. The graph takes `gate_up` [E, 2·I, D] and `down` [E, D, I]:
[out, in], as every other weight. Layouts:

- transposed: `experts.gate_up_proj` [E, D, 2·I] and `experts.down_proj` [E, I, D]; the Hub's checkpoints.
- as in the graph, under the same keys; what `save_pretrained` of transformers 5 writes.
- one by one: `experts.<e>.gate_proj.weight` and `.up_proj.weight` [I, D], `.down_proj.weight` [D, I]; quantisers.

transformers 5.23 transposes a stacked tensor if its shape is not the model's (`conversion_mapping.py`: `Transpose` with
`check_dims`). So where D = 2·I it takes a transposed gate_up for its own, without a word. Here both tensors of a layer
are in one layout: where one is square the other is not, since D = 2·I and D = I exclude each other, and decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from engines.weights import ConcatenatedTensor, StackedTensor, StreamedTensor
from qwen3vl_export.quantized.parts import QuantizedEntry
from qwen3vl_export.safetensors_reader import TensorEntry, read_transposed
from runtime.errors import CheckpointError
from runtime.model_config import ExpertsConfig

Entries: TypeAlias = Mapping[str, TensorEntry | QuantizedEntry]

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
_SAME_CONFIG = "the weights do not belong to this config.json: take both from one checkpoint"
_COMPLETE = "download the checkpoint again: a shard is lost, or was cut"


def find_experts(
    entries: Entries, scope: str, config: ExpertsConfig, hidden_size: int
) -> tuple[dict[str, StackedTensor], set[str]]:
    """Refer to the experts of one layer.

    Args:
        entries: Every tensor of the checkpoint by key.
        scope: Key of the layer's feed-forward network, such as `model.language_model.layers.3.mlp`.
        config: The experts that config.json implies.
        hidden_size: D.

    Returns:
        `experts.gate_up_proj` and `experts.down_proj` as the graph takes them, and the checkpoint keys of both.

    Raises:
        CheckpointError: An expert is missing, or the weights are of another shape, mixed layouts or mixed dtypes.
    """
    if f"{scope}.{GATE_UP}" in entries or f"{scope}.{DOWN}" in entries:
        return _stacked(entries, scope, config, hidden_size)
    return _one_by_one(entries, scope, config, hidden_size)


def _stacked(
    entries: Entries, scope: str, config: ExpertsConfig, hidden_size: int
) -> tuple[dict[str, StackedTensor], set[str]]:
    count, width = config.num_experts, config.intermediate_size
    shapes = {GATE_UP: (2 * width, hidden_size), DOWN: (hidden_size, width)}
    found: dict[str, TensorEntry] = {}
    fitting: dict[str, set[bool]] = {}
    for name, shape in shapes.items():
        entry = entries.get(f"{scope}.{name}")
        if entry is None:
            folder = next(iter(entries.values())).path.parent
            raise CheckpointError(f"{folder}: {scope}.{name} is missing", remedy=_COMPLETE)
        if not isinstance(entry, TensorEntry):
            raise CheckpointError(
                f"{entry.path}: {scope}.{name} is quantised and stacked", remedy="give the unquantised checkpoint"
            )
        if entry.shape and entry.shape[0] != count and entry.shape[1:] in (shape, shape[::-1]):
            raise CheckpointError(
                f"{entry.path}: {scope}.{name} holds {entry.shape[0]} experts, config.json implies {count}",
                remedy=_SAME_CONFIG,
            )
        fitting[name] = {
            turned for turned in (False, True) if entry.shape == (count, *(shape[::-1] if turned else shape))
        }
        if not fitting[name]:
            raise CheckpointError(
                f"{entry.path}: {scope}.{name} has shape {list(entry.shape)}, config.json implies "
                f"{[count, *shape]} or, transposed, {[count, *shape[::-1]]}",
                remedy=_SAME_CONFIG,
            )
        found[name] = entry
    agreed = fitting[GATE_UP] & fitting[DOWN]
    if not agreed:
        raise CheckpointError(
            f"{found[GATE_UP].path}: {scope}: gate_up_proj has shape {list(found[GATE_UP].shape)} and down_proj "
            f"{list(found[DOWN].shape)}: one is transposed, the other is not",
            remedy="two checkpoints were mixed: take all shards from one",
        )
    (is_turned,) = agreed  # never both: see the head of this file
    tensors = {}
    for name, entry in found.items():
        part = name.removeprefix("experts.")
        size = entry.num_bytes // count
        parts = [
            ExpertTensor(
                f"{scope}.experts.{e}.{part}",
                TensorEntry(entry.path, entry.offset + e * size, size, entry.shape[1:], entry.dtype),
                is_turned,
            )
            for e in range(count)
        ]
        tensors[name] = StackedTensor(f"{scope}.{name}", parts)
    return tensors, {f"{scope}.{name}" for name in found}


def _one_by_one(
    entries: Entries, scope: str, config: ExpertsConfig, hidden_size: int
) -> tuple[dict[str, StackedTensor], set[str]]:
    inner, outer = (config.intermediate_size, hidden_size), (hidden_size, config.intermediate_size)
    shapes = {"gate_proj": inner, "up_proj": inner, "down_proj": outer}
    used: dict[str, StreamedTensor] = {}
    dtypes: dict[str, str] = {}
    for e in range(config.num_experts):
        for part, shape in shapes.items():
            key = f"{scope}.experts.{e}.{part}.weight"
            entry = entries.get(key)
            if entry is None:
                folder = next(iter(entries.values())).path.parent
                if f"{scope}.gate_proj.weight" in entries:
                    raise CheckpointError(
                        f"{folder}: {scope} is a dense network, config.json implies {config.num_experts} experts",
                        remedy="give mlp_only_layers and decoder_sparse_step of config.json as the model was trained",
                    )
                raise CheckpointError(
                    f"{folder}: {key} is missing: config.json implies {config.num_experts} experts, or all of a layer "
                    f"stacked in {scope}.{GATE_UP}",
                    remedy=_COMPLETE,
                )
            if entry.shape != shape:
                raise CheckpointError(
                    f"{entry.path}: {key} has shape {list(entry.shape)}, config.json implies {list(shape)}",
                    remedy=_SAME_CONFIG,
                )
            dtype = entry.dtype if isinstance(entry, TensorEntry) else "quantised"
            matrix = DOWN if part == "down_proj" else GATE_UP
            if dtypes.setdefault(matrix, dtype) != dtype:
                raise CheckpointError(
                    f"{entry.path}: {key} is {dtype}, {'gate' if matrix == GATE_UP else 'that'} of expert 0 is "
                    f"{dtypes[matrix]}",
                    remedy="the experts are of different checkpoints: take all from one",
                )
            used[key] = ExpertTensor(key, entry, False) if isinstance(entry, TensorEntry) else entry.tensor(key)

    def of(e: int, part: str) -> StreamedTensor:
        return used[f"{scope}.experts.{e}.{part}.weight"]

    experts = range(config.num_experts)
    gate_up = [
        ConcatenatedTensor(f"{scope}.experts.{e}.gate_up_proj", [of(e, "gate_proj"), of(e, "up_proj")]) for e in experts
    ]
    tensors = {GATE_UP: gate_up, DOWN: [of(e, "down_proj") for e in experts]}
    return {name: StackedTensor(f"{scope}.{name}", parts) for name, parts in tensors.items()}, set(used)


class ExpertTensor(StreamedTensor):
    """One matrix of one expert, cast to float32, and transposed if it is stored [in, out]; read as a whole.

    Args:
        name: Names layer and expert.
        entry: Where it lies.
        is_turned: It is stored transposed.
    """

    def __init__(self, name: str, entry: TensorEntry, is_turned: bool) -> None:
        entry.tensor(name)  # refuses what is no float
        super().__init__(name, entry.shape[::-1] if is_turned else entry.shape, ir.DataType.FLOAT)
        self._entry, self._is_turned = entry, is_turned

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield the matrix.

        Raises:
            CheckpointError: A weight is NaN or infinite, or the file became shorter since its header was read.
        """
        if self._is_turned:
            yield self._checked(read_transposed(self._entry).reshape(-1), 0)
            return
        done = 0
        for block in self._entry.tensor(str(self.name)).blocks():
            yield self._checked(block, done)
            done += block.size

    def _checked(self, values: NDArray[np.float32], first: int) -> NDArray[np.float32]:
        # The sum of squares is finite unless a weight is not, or is beyond 1e19.
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.dot(values, values)):
                return values
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            row, column = divmod(first + int(bad[0]), int(self.shape.numpy()[1]))
            if self._is_turned:
                row, column = column, row
            raise CheckpointError(
                f"{self._entry.path}: {self.name}: {values[bad[0]]} at row {row}, column {column} of what is stored",
                remedy="the checkpoint is damaged, or was saved after a training that diverged: get it again",
            )
        return values

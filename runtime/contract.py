"""The names of the inputs and outputs of an engine's two graphs; what they mean stands in docs/architecture.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from runtime.errors import EngineError

VISION_INPUTS = ("pixel_values", "pos_indices", "pos_weights", "rope_cos", "rope_sin")
VISION_OUTPUTS = ("visual_embeds",)
DECODER_INPUTS = (
    "input_ids",
    "position_ids",
    "visual_rows",
    "visual_embeds",
    "past_lengths",
    "logits_positions",
)
DECODER_OUTPUTS = ("logits",)
_MOST_LISTED = 3


def past_names(num_layers: int) -> list[str]:
    """Return the decoder's inputs that hold the KV cache."""
    return [f"past_key_values.{i}.{kind}" for i in range(num_layers) for kind in ("key", "value")]


def present_names(num_layers: int) -> list[str]:
    """Return the decoder's outputs that hold the KV cache."""
    return [f"present_key_values.{i}.{kind}" for i in range(num_layers) for kind in ("key", "value")]


def check_names(
    path: Path,
    inputs: Iterable[str],
    outputs: Iterable[str],
    *,
    expected_inputs: Iterable[str],
    expected_outputs: Iterable[str],
) -> None:
    """Compare the inputs and outputs of an opened graph with those that a session gives and asks for.

    Raises:
        EngineError: An input is missing or unknown, or an output is missing.
    """
    found, wanted = set(inputs), set(expected_inputs)
    for problem, names in (
        ("lacks the inputs", wanted - found),
        ("has the unknown inputs", found - wanted),
        ("lacks the outputs", set(expected_outputs) - set(outputs)),
    ):
        if names:
            listed = ", ".join(sorted(names)[:_MOST_LISTED]) + (", …" if len(names) > _MOST_LISTED else "")
            raise EngineError(
                f"{path}: the graph {problem} {listed}, so it is not of the model that engine.json describes",
                remedy="build the engine again",
            )

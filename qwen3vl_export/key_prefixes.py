"""Name the tensors of a checkpoint as the whole model does, whichever part of it was saved.

transformers adds or strips the prefix of the base model, `model.`, key by key while it loads (5.24,
`core_model_loading.rename_source_key` with `base_model_prefix`), so weights saved from `Qwen3VLModel` (AutoModel) load;
they have no head, which is complete where the embedding is tied to it. It maps no other prefix of this family.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qwen3vl_export.names import shown_name
from qwen3vl_export.safetensors_reader import TensorEntry
from runtime.errors import CheckpointError

_BASE = "model."
_PARTS = ("visual.", "language_model.")

# Prefixes that tools put before the model's own, and that no release of transformers takes off.
_WRAPPERS: Mapping[str, str] = {
    "module.": "torch's DistributedDataParallel: save model.module",
    "_orig_mod.": "torch.compile: save the model that was compiled",
    "_fsdp_wrapped_module.": "torch's FSDP: save with a full state dict",
    "base_model.model.": "PEFT: save what merge_and_unload() returns",
    "model.model.": "a wrapper of a training framework: save the model inside of it",
}
_SAVE = "transformers would start these weights at random: take the prefix off, or write the folder again; it is of "


def as_in_graph(entries: Mapping[str, TensorEntry], folder: Path) -> dict[str, TensorEntry]:
    """Return the entries by the keys of the whole model.

    Raises:
        CheckpointError: A tensor is there with and without the prefix, or keys have a prefix of another origin.
    """
    renamed: dict[str, TensorEntry] = {}
    for key, entry in entries.items():
        whole = _BASE + key if key.startswith(_PARTS) else key
        if whole in renamed:
            raise CheckpointError(
                f"{entry.path}: {shown_name(whole)} is there with and without the prefix {_BASE!r}",
                remedy="two checkpoints were mixed: get one of them again",
            )
        renamed[whole] = entry
    if not any(key.startswith(tuple(_BASE + part for part in _PARTS)) for key in renamed):
        _refuse_foreign(renamed, folder)
    return renamed


def _refuse_foreign(entries: Mapping[str, TensorEntry], folder: Path) -> None:
    """Raise if no key is one of this model, and it can be told where the keys come from."""
    for prefix, origin in _WRAPPERS.items():
        found = next((key for key in entries if key.startswith(prefix)), None)
        if found is not None:
            raise CheckpointError(f"{folder}: {shown_name(found)} begins with {prefix!r}", remedy=_SAVE + origin)
    found = next((key for key in entries if key.startswith("model.layers.")), None)
    if found is not None:
        raise CheckpointError(
            f"{folder}: {shown_name(found)} is of a text model, or of Qwen2-VL's older layout; expected "
            "model.language_model. and model.visual.",
            remedy="give a Qwen3-VL checkpoint that transformers saved: it does not map these keys either",
        )

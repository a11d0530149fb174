"""onnxruntime-genai knows Qwen3-VL by name, and leaves DeepStack out without a word, so there is no package for it.

Its builder and ONNX Runtime run in the environment that `make compare-setup` installs; `make test-peers` does both.
When a release takes the levels, this fails: then write the package, and change docs/benchmarks.md.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.compare.sides import PEERS
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.eager import EagerSession, open_eager
from qwen3vl_export.parity.metrics import difference
from qwen3vl_export.parity.sections import recorded

PYTHON = PEERS / "genai" / "bin" / "python"
pytestmark = pytest.mark.skipif(
    not PYTHON.is_file(), reason="onnxruntime-genai is not installed: make compare-setup installs it into build/peers"
)
IMAGE = Path(__file__).resolve().parents[2] / "qwen3vl_export" / "demo" / "images" / "held_out_0.png"
# Runs a decoder of the builder on a whole prompt, given as embeddings; prints what it takes besides the cache.
RUN = """
import sys, numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
given = dict(np.load(sys.argv[2]))
names = {value.name: value.shape for value in session.get_inputs()}
cache = {name: np.zeros([1, shape[1], 0, int(given["head_dim"])], np.float32)
         for name, shape in names.items() if name.startswith("past_key_values")}
print(*sorted(names.keys() - cache.keys()))
feed = {name: given[name] for name in names if name in given} | cache
np.save(sys.argv[3], session.run(["logits"], feed)[0])
"""


def run(*arguments: str | Path) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run([*map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's decoder, exported by the builder to take embeddings of text and images, and what the builder said."""
    folder, checkpoint = tmp_path_factory.mktemp("genai"), Checkpoint.open("demo").folder
    builder = (PYTHON, "-m", "onnxruntime_genai.models.builder", "-m", checkpoint, "-i", checkpoint)
    options = ("-p", "fp32", "-e", "cpu", "-c", folder / "cache", "--extra_options", "exclude_embeds=true")
    printed = run(*builder, "-o", folder / "model", *options)
    return folder / "model" / "model.onnx", printed


def prompt(model: Any) -> tuple[Any, np.ndarray]:
    """A prompt with an image, and its visual embeddings."""
    question = [{"type": "image", "image": str(IMAGE)}, {"type": "text", "text": "Read the digits."}]
    prepared = model.prepare([{"role": "user", "content": question}])
    return prepared, model.encode_images(prepared.images)


def test_builder_leaves_deepstack_out_in_silence(decoder: tuple[Path, str], tmp_path: Path) -> None:
    path, printed = decoder
    assert "deepstack" not in printed.lower()
    model = open_eager("demo")
    prepared, embeds = prompt(model)
    session, num_tokens = model.session, len(prepared.prompt.input_ids)
    assert isinstance(session, EagerSession)
    logits = {}
    for name, levels in (("all levels", embeds), ("none", np.concatenate([embeds[:1], np.zeros_like(embeds[1:])]))):
        inputs = prepared.decoder_inputs(levels, all_logits=True)
        with recorded(session.model) as seen:
            logits[name] = session.decode(inputs, session.new_cache(num_tokens))
    np.savez(
        tmp_path / "inputs.npz",
        inputs_embeds=seen.values["model.language_model.embed_tokens/hidden_states"],  # the same with and without
        position_ids=prepared.positions.position_ids,
        attention_mask=np.ones((1, num_tokens), np.int64),
        head_dim=model.config.text.head_dim,
    )
    taken = run(PYTHON, "-c", RUN, path, tmp_path / "inputs.npz", tmp_path / "logits.npy")
    assert taken.splitlines()[-1].split() == ["attention_mask", "inputs_embeds", "position_ids"]
    found = np.load(tmp_path / "logits.npy")
    assert difference(found, logits["none"]).scaled < 1e-3
    assert difference(found, logits["all levels"]).scaled > 0.1


def test_runtime_knows_the_model_and_not_its_levels() -> None:
    folder = run(PYTHON, "-c", "import onnxruntime_genai as og; print(og.__path__[0])").splitlines()[-1]
    library = (Path(folder) / "libonnxruntime-genai.so").read_bytes().lower()
    assert b"qwen3_vl" in library and b"deepstack" not in library

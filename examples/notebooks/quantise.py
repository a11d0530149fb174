# %% [markdown]
# # Quantise, and see what it costs
#
# The same checkpoint for two targets: float32, and weights of 4 and 8 bits. What is smaller, and which answers change?

# %%
import json
from importlib import resources
from pathlib import Path

import numpy as np

from qwen3_vl import Qwen3VLModel
from qwen3_vl.core import ExportRequest, export
from qwen3_vl.utils import user_message

engines = {
    target: export(ExportRequest("demo", target=target, output=Path("out") / target))
    for target in ("ort-cpu-fp32", "ort-cpu-int4")
}
for target, exported in engines.items():
    print(f"{target}: {exported.weight_bytes / 1e6:.1f} MB")

# %% [markdown]
# Questions about pictures that the model was not trained on, with the right answers.

# %%
images = resources.files("qwen3vl_export.demo") / "images"
questions = json.loads((images / "truth.json").read_text(encoding="utf-8"))
prompts = [user_message(each["question"], [str(images / each["file"])]) for each in questions]
models = {target: Qwen3VLModel.from_engine(exported.output) for target, exported in engines.items()}
right = {
    target: [
        answer.text.strip() == each["answer"]
        for answer, each in zip(model.generate_batch(prompts), questions, strict=True)
    ]
    for target, model in models.items()
}
for target, found in right.items():
    print(f"{target}: {sum(found)} of {len(found)} answers are right")

# %% [markdown]
# Answers are few, logits are many: how far apart the distributions of the next token are says more. This is the
# Kullback-Leibler divergence of each token of the prompts, in nats.


# %%
def log_softmax(logits):
    """Return the logarithms of the probabilities."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


divergences = []
for prompt in prompts:
    exact, rounded = (log_softmax(model.logits(prompt)) for model in models.values())
    divergences += (np.exp(exact) * (exact - rounded)).sum(-1).tolist()
print(f"mean {np.mean(divergences):.2g}, 99th percentile {np.percentile(divergences, 99):.2g} nats")

# %% [markdown]
# What speed that gives depends on the machine: `qwen3vl bench fp32=out/ort-cpu-fp32 int4=out/ort-cpu-int4 --against
# fp32` measures it in turns. `qwen3vl verify out/ort-cpu-int4 --checkpoint demo --html report.html` shows in which
# layers the error is, and `qwen3vl inspect out/ort-cpu-int4 --graph graph.svg` which weights have which format.

# %%
for model in models.values():
    model.close()

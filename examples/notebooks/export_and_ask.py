# %% [markdown]
# # Export a checkpoint, and ask about a picture
#
# The demo is a small model that reads digits. It comes with the package, so nothing is fetched. For one of the released
# checkpoints, write its folder or Hub id in place of `demo`.

# %%
from importlib import resources
from pathlib import Path

from qwen3_vl import Qwen3VLModel
from qwen3_vl.core import ExportRequest, export
from qwen3_vl.utils import user_message

exported = export(ExportRequest("demo", target="ort-cpu-fp32", output=Path("out/fp32")))
print(f"{exported.weight_bytes / 1e6:.1f} MB of weights in {exported.output}")

# %% [markdown]
# An engine is opened once, and then answers from any thread. In a notebook, the model shows what it is.

# %%
model = Qwen3VLModel.from_engine(exported.output)
model

# %% [markdown]
# An answer shows its text and its figures, and boxes and points on the picture where it names some.

# %%
picture = resources.files("qwen3vl_export.demo") / "images" / "held_out_0.png"
answer = model.generate(user_message("Read the digits.", [str(picture)]))
print(answer.text)
answer

# %% [markdown]
# A conversation keeps what was said; its next turn runs only what is new.

# %%
chat = model.chat()
chat.ask("Read the digits.", images=[str(picture)])
second = chat.ask("How many digits are there?")
print(f"{second.text}: {second.stats.cached_tokens} of {second.stats.prompt_tokens} tokens were in the cache")

# %%
for piece in model.stream(user_message("Read the digits.", [str(picture)])):
    print(piece, end="|")
print()

# %%
model.close()

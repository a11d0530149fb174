# %% [markdown]
# # Serve, and answer a batch
#
# Many requests at once: in Python, from a server with OpenAI's API, and from a file. The server and the batch need the
# extra `serve`.

# %%
import base64
import json
import re
import subprocess
import sys
import urllib.request
from importlib import resources
from pathlib import Path

from qwen3_vl import Qwen3VLModel
from qwen3_vl.core import ExportRequest, export
from qwen3_vl.utils import user_message

engine = export(ExportRequest("demo", target="ort-cpu-fp32", output=Path("out/fp32"))).output
images = resources.files("qwen3vl_export.demo") / "images"
questions = json.loads((images / "truth.json").read_text(encoding="utf-8"))

# %% [markdown]
# In Python, a batch runs side by side in one engine.

# %%
with Qwen3VLModel.from_engine(engine) as model:
    prompts = [user_message(each["question"], [str(images / each["file"])]) for each in questions]
    print([answer.text for answer in model.generate_batch(prompts)][:3])

# %% [markdown]
# A server is a process of its own. Port 0 takes a free one; it says which on stderr.

# %%
command = [sys.executable, "-m", "qwen3vl_export.cli.run"]
server = subprocess.Popen([*command, "serve", f"demo={engine}", "--port", "0"], stderr=subprocess.PIPE, text=True)
address = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))


# %%
def body(question):
    """Return a request in OpenAI's form, with the picture in it."""
    data = base64.b64encode((images / question["file"]).read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    content = [picture, {"type": "text", "text": question["question"]}]
    return {"model": "demo", "messages": [{"role": "user", "content": content}]}


request = urllib.request.Request(
    f"{address}/v1/chat/completions",
    data=json.dumps(body(questions[0])).encode(),
    headers={"Content-Type": "application/json"},
)
try:
    with urllib.request.urlopen(request) as response:
        print(json.load(response)["choices"][0]["message"]["content"])
finally:
    server.terminate()
    server.wait()

# %% [markdown]
# A file of requests is answered once each, and goes on where it was interrupted.

# %%
lines = (
    {"custom_id": each["file"], "method": "POST", "url": "/v1/chat/completions", "body": body(each)}
    for each in questions
)
Path("requests.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
subprocess.run([*command, "batch", "requests.jsonl", "results.jsonl", "--engine", f"demo={engine}"], check=True)
results = [json.loads(line) for line in Path("results.jsonl").read_text(encoding="utf-8").splitlines()]
answers = {each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"] for each in results}
print(sum(answers[each["file"]].strip() == each["answer"] for each in questions), "of", len(questions), "are right")

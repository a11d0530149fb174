"""The shipped checkpoint: a complete Hugging Face folder with Qwen3-VL's parts, and it reads held-out canvases."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from demo_training.evaluate import as_markdown, evaluate, summarise, torch_predictor
from demo_training.model import save_checkpoint
from demo_training.tokenizer import SPECIAL_TOKENS, build_tokenizer
from qwen3vl_export.checkpoint import Checkpoint
from qwen3vl_export.demo import CHECKPOINT, IMAGES
from qwen3vl_export.demo.data import held_out
from qwen3vl_export.demo.tasks import TASKS
from qwen3vl_export.eager import EagerSession, load, open_eager
from qwen3vl_export.sources import DEMO, DEMO_LONG, DEMO_MOE
from runtime.messages import user_message

NUM_CANVASES = 40
SHIPPED = (DEMO, DEMO_MOE, DEMO_LONG)


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((CHECKPOINT / "config.json").read_text())


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(CHECKPOINT / "model.safetensors")


@pytest.mark.portable
def test_folder_is_complete_and_small() -> None:
    names = {p.name for p in CHECKPOINT.iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
    }
    assert sum(p.stat().st_size for p in CHECKPOINT.iterdir()) <= 8_000_000


@pytest.mark.parametrize("shipped", SHIPPED, ids=str)
def test_saving_the_shipped_weights_writes_the_shipped_folder(shipped: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(shipped)
    save_checkpoint(load(checkpoint), tmp_path / "saved", (checkpoint.folder / "README.md").read_text())
    for file in checkpoint.folder.iterdir():
        saved = tmp_path / "saved" / file.name
        if file.suffix == ".json":
            assert json.loads(saved.read_text()) == json.loads(file.read_text()), file.name
        else:
            assert saved.read_bytes() == file.read_bytes(), file.name
    assert len(list((tmp_path / "saved").iterdir())) == len(list(checkpoint.folder.iterdir()))


@pytest.mark.portable
def test_weights_are_finite_bfloat16(weights: dict[str, torch.Tensor]) -> None:
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert all(torch.isfinite(w).all() for w in weights.values())


@pytest.mark.judge
@pytest.mark.parametrize("shipped", SHIPPED, ids=str)
def test_transformers_loads_every_key_and_gives_our_logits(shipped: str) -> None:
    from PIL import Image
    from transformers import AutoProcessor

    from helpers import judge

    folder = Checkpoint.open(shipped).folder
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = judge.load(folder)  # every weight comes from the folder
    assert [type(model).__name__] == json.loads((folder / "config.json").read_text())["architectures"]
    entry = json.loads((IMAGES / "truth.json").read_text())[0]
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": entry["question"]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with Image.open(IMAGES / entry["file"]) as image, torch.inference_mode():
        inputs = processor(text=[prompt], images=[image], return_tensors="pt")
        expected = model(**inputs).logits[0].numpy()
        found = open_eager(shipped).logits(user_message(entry["question"], [image]))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.portable
def test_architecture_is_qwen3_vl(config: dict, weights: dict[str, torch.Tensor]) -> None:
    text, vision = config["text_config"], config["vision_config"]
    assert config["model_type"] == "qwen3_vl"
    assert text["num_attention_heads"] > text["num_key_value_heads"] > 1
    assert text["head_dim"] != text["hidden_size"] // text["num_attention_heads"]
    for form in ("rope_parameters", "rope_scaling"):  # transformers 5 reads the first, 4.57 the second
        assert text[form]["mrope_section"] == [12, 10, 10]
        assert text[form]["mrope_interleaved"] is True
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 5e6
    assert vision["deepstack_visual_indexes"] == [1, 2]
    names = set(weights)
    assert {f"model.visual.deepstack_merger_list.{i}.linear_fc2.weight" for i in (0, 1)} <= names
    assert {f"model.language_model.layers.{i}.self_attn.q_norm.weight" for i in range(4)} <= names
    assert config["tie_word_embeddings"] is True and "lm_head.weight" not in names
    # A part that training never reached would still have its initial value.
    for i in range(4):
        assert not torch.equal(weights[f"model.language_model.layers.{i}.self_attn.k_norm.weight"], torch.ones(64))


@pytest.mark.portable
@pytest.mark.parametrize("level", [0, 1])
def test_deepstack_matters(level: int) -> None:
    model = open_eager("demo")
    assert isinstance(model.session, EagerSession)
    messages = user_message("Read the digits.", [IMAGES / "held_out_0.png"])
    before = model.logits(messages)[-1]
    merger = model.session.model.visual.deepstack_merger_list[level].linear_fc2
    with torch.no_grad():
        merger.weight.zero_()
        merger.bias.zero_()
    after = model.logits(messages)[-1]
    assert np.abs(before - after).max() > 0.01


@pytest.mark.judge
def test_tokenizer_round_trips_any_text_and_is_reproducible() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    for text in ("Where is the 7?", '{"digits":[3,1,7],"count":3}', "héllo\n\n日本 😀\x00", " two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for token in SPECIAL_TOKENS:
        assert tokenizer.encode(token) == [tokenizer.convert_tokens_to_ids(token)]
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


@pytest.mark.judge
def test_processor_renders_qwens_prompt_and_counts_tokens(config: dict) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    assert type(processor).__name__ == "Qwen3VLProcessor"
    assert processor.chat_template == (CHECKPOINT / "chat_template.jinja").read_text()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
        {"role": "user", "content": "Go on"},
    ]
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{pad}{pad}Hi<|im_end|>\n"
        "<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>user\nGo on<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    numbered = processor.apply_chat_template(messages[1:2], add_vision_id=True)
    assert numbered == f"<|im_start|>user\nPicture 1: {pad}Picture 2: {pad}Hi<|im_end|>\n"
    image = held_out(3).image
    inputs = processor(text=[f"{pad}"], images=[image], return_tensors="pt")
    rows, cols = round(image.height / 32), round(image.width / 32)
    assert inputs["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * cols]]
    assert int((inputs["input_ids"] == config["image_token_id"]).sum()) == rows * cols


def test_answers_held_out_canvases() -> None:
    outcomes = evaluate(torch_predictor(CHECKPOINT), map(held_out, range(NUM_CANVASES)))
    shares = summarise(outcomes)["all"]
    assert {task: shares[task] >= 0.8 for task in TASKS} == dict.fromkeys(TASKS, True), shares


def test_answers_a_shipped_picture_of_every_task() -> None:
    from PIL import Image

    predict = torch_predictor(CHECKPOINT)
    truth = json.loads((IMAGES / "truth.json").read_text())
    right = {task: [] for task in TASKS}
    for entry in truth:
        with Image.open(IMAGES / entry["file"]) as image:
            right[entry["task"]].append(predict(image, [entry["question"]]) == [entry["answer"]])
    assert all(any(answers) for answers in right.values()), right
    assert np.mean([a for answers in right.values() for a in answers]) >= 0.75
    assert right[truth[0]["task"]][0], "the picture that `make demo` shows"


@pytest.mark.portable
def test_card_credits_the_data_and_states_the_measured_table() -> None:
    root = CHECKPOINT.parents[2]
    card = (CHECKPOINT / "README.md").read_text()
    assert card == (root / "docs" / "demo.md").read_text()
    assert "Alpaydin" in card and "CC BY 4.0" in card and "10.24432/C50P49" in card
    table = as_markdown(json.loads((root / "docs" / "demo_accuracy.json").read_text()))
    assert table in card

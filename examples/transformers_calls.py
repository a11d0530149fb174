"""Ask about pictures with transformers' calls: `python examples/transformers_calls.py MODEL "Read the digits." 1.png`.

MODEL is an engine or a checkpoint, of which an engine is built and kept for the next time. The answer about the first
picture is printed as it comes; those about the others are one padded batch, whose rows run side by side.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from transformers import AutoProcessor, TextStreamer

from qwen3_vl import Qwen3VLError
from qwen3_vl.integrations.optimum import QwenVLForImageTextToText


def main(model_id: str, question: str, *paths: str) -> int:
    """Print an answer for each picture."""
    with QwenVLForImageTextToText.from_pretrained(model_id) as model:
        processor = AutoProcessor.from_pretrained(model.folder)
        processor.tokenizer.padding_side = "left"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [Image.open(Path(path)).convert("RGB") for path in paths]

        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        first = processor(text=[text], images=images[:1], return_tensors="pt")
        model.generate(**first, streamer=streamer)

        if images[1:]:
            inputs = processor(text=[text] * len(images[1:]), images=images[1:], padding=True, return_tensors="pt")
            answers = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            print("\n".join(processor.batch_decode(answers, skip_special_tokens=True)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except Qwen3VLError as error:
        sys.exit(f"error: {error}")

"""Export the demo checkpoint to an ONNX Runtime CPU engine and let it read a picture that training never saw."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "qwen3vl_export" / "demo" / "images"
TARGET = "ort-cpu-fp32"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "out" / f"demo-{TARGET}", help="engine folder to write")
    parser.add_argument("--image", type=Path, help="a picture of your own instead of the held-out one")
    arguments = parser.parse_args()
    command = [str(Path(sys.executable).with_name("qwen3vl-export")), "demo"]
    exported = subprocess.run([*command, "--target", TARGET, "--output", str(arguments.output)], check=False)
    if exported.returncode != 0:
        return exported.returncode

    from qwen3_vl import Qwen3VLError, Qwen3VLModel

    if arguments.image is None:
        entry = json.loads((IMAGES / "truth.json").read_text(encoding="utf-8"))[0]
        image, question, truth = (IMAGES / entry["file"]).relative_to(ROOT), entry["question"], entry["answer"]
        path = ROOT / image
    else:
        image = path = arguments.image
        question, truth = "Read the digits.", None
    content = [{"type": "image", "image": str(path)}, {"type": "text", "text": question}]
    try:
        model = Qwen3VLModel.from_engine(arguments.output)
        answer = model.generate([{"role": "user", "content": content}], do_sample=False).text
    except Qwen3VLError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"picture:  {image}")
    print(f"question: {question}")
    print(f"answer:   {answer}")
    if truth is None:
        return 0
    print(f"truth:    {truth}")
    if answer != truth:
        print("The answer differs from the truth.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Export the demo checkpoint to an ONNX Runtime CPU engine and let it read a picture that training never saw.

With a picture of your own, an engine of the demo that is there already reads it as it is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qwen3_vl import Qwen3VLModel

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "qwen3vl_export" / "demo" / "images"
CHECKPOINT, TARGET = "demo", "ort-cpu-fp32"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "out" / f"demo-{TARGET}", help="engine folder to write")
    parser.add_argument("--image", help="a picture of your own instead of the held-out one")
    arguments = parser.parse_args()

    from qwen3_vl import Qwen3VLError

    try:
        return show(arguments.output, arguments.image)
    except Qwen3VLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def show(output: Path, image: str | None) -> int:
    """Export, answer and print; return the exit code.

    Raises:
        Qwen3VLError: The picture cannot be read, or the engine does not run.
    """
    from qwen3_vl import Qwen3VLModel
    from runtime.images import load_image

    if image is None:
        entry = json.loads((IMAGES / "truth.json").read_text(encoding="utf-8"))[0]
        path, question, truth = IMAGES / entry["file"], entry["question"], entry["answer"]
        image = str(path.relative_to(ROOT))
        pixels_HWC = load_image(str(path))
    else:
        question, truth = "Read the digits.", None
        pixels_HWC = load_image(image)  # before the export, which takes longer than to find that the path is wrong
    model = opened(output) if truth is None else None
    if model is not None:
        print(f"engine:   {output}, which was there; `make demo` without IMAGE builds it anew", file=sys.stderr)
        return answer(model, image, pixels_HWC, question, truth)
    export = [str(Path(sys.executable).with_name("qwen3vl-export")), CHECKPOINT, "--target", TARGET]
    exported = subprocess.run([*export, "--output", str(output)], check=False)
    if exported.returncode != 0:
        return exported.returncode
    return answer(Qwen3VLModel.from_engine(output), image, pixels_HWC, question, truth)


def opened(folder: Path) -> Qwen3VLModel | None:
    """Open an engine of the demo, or return None where there is none, or a damaged or older one: it is built then."""
    from qwen3_vl import EngineError, Qwen3VLModel

    try:
        model = Qwen3VLModel.from_engine(folder)
    except EngineError:
        return None
    return model if model.manifest.source.get("name") == CHECKPOINT else None


def answer(model: Qwen3VLModel, image: str, pixels_HWC: npt.NDArray[np.uint8], question: str, truth: str | None) -> int:
    """Ask, print, and compare with the truth, if there is one; return the exit code."""
    content = [{"type": "image", "image": pixels_HWC}, {"type": "text", "text": question}]
    found = model.generate([{"role": "user", "content": content}], do_sample=False).text
    print(f"picture:  {image}")
    print(f"question: {question}")
    print(f"answer:   {found}")
    if truth is None:
        return 0
    print(f"truth:    {truth}")
    if found != truth:
        print("The answer differs from the truth.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

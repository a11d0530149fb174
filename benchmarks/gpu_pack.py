"""`python -m benchmarks gpu-pack`: everything that measures a bare GPU machine, in archives of a size that travels.

Written into a folder: `gpu_pack.py`, which needs the standard library alone, `pack.json`, and the parts. They hold
onnxruntime-gpu without the machine code of other GPUs, wheels that the machine's Python may lack, this package,
engines of the shipped checkpoints for every target of ONNX Runtime on CUDA, the CPU's answers of these, and graphs
of large shapes without weights, which are filled there (`benchmarks/gpu/fill.py`). Nothing of a GPU is needed here.
"""

from __future__ import annotations

import datetime
import json
import shutil
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import gpu_pack_libraries as libraries
from benchmarks import synthetic
from benchmarks.build import SHIPPED
from benchmarks.gpu import standalone
from benchmarks.gpu.measure import LAYOUT
from benchmarks.gpu_pack_graphs import describe
from benchmarks.gpu_pack_parts import MANIFEST, Piece, write_pack
from engines.decode_plan.options import plan_problem
from engines.kernels.launch import GPUS
from engines.quantize.calibration import needs_prompts
from engines.registry import all_targets, get
from engines.target import Target
from runtime.errors import TargetError, UsageError

# A shape of configs/models, and the target of its graphs.
Graph = tuple[str, Target]
ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "gpu_pack.py"
_SESSION = "ort_cuda"
_REFERENCE = "ort-cpu-fp32"
# Of the repository: what sections import, and the pictures that they ask about; not the checkpoints.
_PACKAGES = ("runtime", "engines", "qwen3_vl", "configs", "qwen3vl_export", "benchmarks/gpu")
_FILES = ("benchmarks/__init__.py", "benchmarks/measure.py")
_LEFT_OUT = ("__pycache__", "checkpoint", "checkpoint_moe", "native")
_ALSO_SUCH_AS = "give one such as qwen3-vl-30b-a3b-ort-cuda-int4"
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}


def gpu_pack(
    sm: Annotated[int, typer.Option(help="The GPU's compute capability without its point: 90 for H100 and H200.")] = 90,
    output: Annotated[Path, typer.Option(help="Folder for the pack; it must be empty.")] = Path("out/gpu-pack"),
    python: Annotated[str, typer.Option(help="The machine's Python.")] = "3.12",
    part_bytes: Annotated[str, typer.Option(help="The most bytes of one part, such as 60M.")] = "60M",
    models: Annotated[str, typer.Option(help="Shapes of configs/models, comma-separated.")] = "qwen3-vl-2b,qwen3-vl-8b",
    targets: Annotated[str, typer.Option(help="Targets of these shapes.")] = "ort-cuda-fp16,ort-cuda-int4",
    also: Annotated[str, typer.Option(help="Further graphs, MODEL-TARGET, such as qwen3-vl-2b-ort-cuda-fp8.")] = "",
    checkpoints: Annotated[str, typer.Option(help="Shipped checkpoints, whole.")] = ",".join(SHIPPED),
    onnxruntime: Annotated[Path | None, typer.Option(help="A wheel of onnxruntime-gpu; fetched by default.")] = None,
    wheels: Annotated[Path | None, typer.Option(help="Folder of the other wheels; fetched by default.")] = None,
    no_wheels: Annotated[bool, typer.Option("--no-wheels", help="The machine has these libraries already.")] = False,
    decode_plan: Annotated[bool | None, typer.Option(help="As for qwen3vl-export.")] = None,
) -> None:
    """Write a pack that measures a GPU machine without a package index: `python gpu_pack.py run` there."""
    limit = parsed_bytes(part_bytes)
    check_checkpoints(_listed(checkpoints))
    plan: dict[str, Any] = {"decode_plan": decode_plan}
    if decode_plan is not False:
        plan["compute_capability"] = [f"{sm // 10}.{sm % 10}"]
    graphs = wanted_graphs(_listed(models), _listed(targets), _listed(also))
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty", remedy="give another --output, or empty it")
    if no_wheels and wheels is not None:
        raise UsageError("--no-wheels leaves out what --wheels gives", remedy="give one of them")
    if decode_plan is not False:
        check_plan(sm)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-pack-", dir=output.parent) as name:
        work = Path(name)
        site = libraries.unpack_onnxruntime(onnxruntime, python, sm, work)
        (work / "wheels").mkdir()
        chosen = [] if no_wheels else libraries.collect_wheels(wheels, python, work / "wheels")
        content = write_content(work, _listed(checkpoints), graphs, plan)
        title = f"SM {sm}, Python {python}, {', '.join((*content['engines'], *content['graphs']))}"
        machine = {"title": title, "sm": sm, "python": python, "wheels": chosen}
        pack = _compress(work, site, output, limit, machine | content)
    (output / MANIFEST).write_text(json.dumps(pack, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(standalone.__file__, output / PROGRAM)
    for part in pack["parts"]:
        typer.echo(f"{part['num_bytes'] / 1e6:6.1f} MB  {output / part['name']}")
    typer.echo(f"copy {output} to the machine, then there: python{python} {PROGRAM} run --json gpu.json")


def check_checkpoints(names: Sequence[str]) -> None:
    """Raise for a checkpoint that is not shipped: its answers on the CPU, and its questions, are not known.

    Raises:
        UsageError: There is one.
    """
    unknown = [name for name in names if name not in SHIPPED]
    if unknown:
        raise UsageError(
            f"--checkpoints {','.join(unknown)}: not shipped", remedy=f"choose of {', '.join(SHIPPED)}, or give none"
        )


def check_plan(sm: int) -> None:
    """Raise if no decode plan can be made for a GPU, before minutes go into the rest of the pack.

    Raises:
        UsageError: No kernels are made for it.
        TargetError: What compiles them is missing.
    """
    if sm not in GPUS:
        raise UsageError(
            f"--sm {sm}: no decode kernels are made for it",
            remedy=f"choose of {', '.join(map(str, GPUS))}, or leave decode plans out with --no-decode-plan",
        )
    if problem := plan_problem():
        raise TargetError(
            f"no decode plan can be made: {problem}",
            remedy="install it, or leave decode plans out with --no-decode-plan",
        )


def wanted_graphs(models: Sequence[str], targets: Sequence[str], also: Sequence[str]) -> list[Graph]:
    """Return shape and target of each graph, each once: all shapes for all targets, then the further ones.

    Raises:
        UsageError: There is no such shape, or a further one is not named MODEL-TARGET.
        TargetError: There is no such target.
    """
    graphs = [(model, get(name)) for model in models for name in targets]
    for name in also:
        target = next((each for each in shipped_targets() if name.endswith(f"-{each.name}")), None)
        if target is None:
            listed = ", ".join(each.name for each in shipped_targets())
            raise UsageError(f"--also {name}: expected a shape, a dash and one of {listed}", remedy=_ALSO_SUCH_AS)
        graphs.append((name.removesuffix(f"-{target.name}"), target))
    for model, _ in graphs:
        synthetic.hf_config(model)  # raises for a shape that is not there
    return list({(model, target.name): (model, target) for model, target in graphs}.values())


def write_content(
    work: Path, checkpoints: Sequence[str], graphs: Sequence[Graph], plan: dict[str, Any]
) -> dict[str, list[str]]:
    """Write package, engines, answers of the CPU and graphs; return the names of `engines` and `graphs`."""
    copy_project(work / "project")
    engines = build_shipped(checkpoints, work / "content" / "engines", plan)
    write_references(checkpoints, work)
    return {"engines": engines, "graphs": build_graphs(graphs, work, plan)}


def _compress(
    work: Path, site: libraries.Site, output: Path, part_bytes: int, description: dict[str, Any]
) -> dict[str, Any]:
    """Write the parts, and what they are into one of them; return what `pack.json` is to hold."""
    described = {
        **description,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"qwen3vl-export": metadata.version("qwen3vl-export"), "onnxruntime-gpu": site.version},
        "pruned": site.pruned,
        "work_bytes": work_bytes(work),
    }
    (work / "content" / "description.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    pieces = [
        Piece("onnxruntime", site.folder, "site"),
        Piece("wheels", work / "wheels", "wheels"),
        Piece("project", work / "project", "project"),
        Piece("content", work / "content", "."),
    ]
    typer.echo("compressing")
    return write_pack(pieces, output, part_bytes, described)


def parsed_bytes(text: str) -> int:
    """Return the number of bytes of a text such as 60M.

    Raises:
        UsageError: It is none, or below what any part needs.
    """
    unit = _UNITS.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isdecimal() or int(digits) * unit < _UNITS["K"]:
        raise UsageError(f"--part-bytes {text}: not a number of bytes from 1K on", remedy="give one such as 60M")
    return int(digits) * unit


def copy_project(folder: Path) -> None:
    """Copy what the sections import, and the pictures that they ask about."""
    for package in _PACKAGES:
        ignored = shutil.ignore_patterns(*_LEFT_OUT, "*.so", "*.pyc")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    for name in _FILES:
        shutil.copyfile(ROOT / name, folder / name)


def shipped_targets() -> list[Target]:
    """Return the targets of ONNX Runtime on CUDA."""
    return [target for target in all_targets() if target.session == _SESSION]


def build_shipped(checkpoints: Sequence[str], folder: Path, plan: dict[str, Any]) -> list[str]:
    """Build engines of shipped checkpoints for every target; return their names."""
    names = []
    for checkpoint in checkpoints:
        for target in shipped_targets():
            name = f"{checkpoint}-{target.name}"
            typer.echo(f"building {name}")
            with tempfile.TemporaryDirectory() as prompts:
                calibration = synthetic.write_calibration(Path(prompts)) if needs_prompts(target) else None
                export_engine(checkpoint, target, folder / name, plan, calibration=calibration)
            names.append(name)
    return names


def write_references(checkpoints: Sequence[str], work: Path) -> None:
    """Write the CPU's answers to all questions by checkpoint, and the logits of prompts and steps."""
    from benchmarks.gpu.answers import References
    from qwen3_vl import Qwen3VLModel

    for checkpoint in checkpoints:
        typer.echo(f"asking {checkpoint} on the CPU")
        engine = work / f"reference-{checkpoint}"
        export_engine(checkpoint, get(_REFERENCE), engine, {})
        References.of(Qwen3VLModel.from_engine(engine, tuned=False)).write(work / "content" / "references", checkpoint)


def build_graphs(graphs: Sequence[Graph], work: Path, plan: dict[str, Any]) -> list[str]:
    """Export graphs without weights of large shapes; return their names in the order in which they are measured."""
    names = []
    for model, target in graphs:
        checkpoint = work / f"checkpoint-{model}"
        if not checkpoint.exists():
            synthetic.write_checkpoint(checkpoint, model, sparse=True)
        name = f"{model}-{target.name}"
        typer.echo(f"graphs of {name}")
        folder = work / "content" / "graphs" / name
        manifest = export_engine(str(checkpoint), target, folder, plan, weights=False)
        describe(folder, manifest)
        names.append(name)
    return names


def work_bytes(work: Path) -> int:
    """Return the bytes that the pack takes where it is unpacked and its weights are written."""
    folders = [work / name for name in ("site", "wheels", "project", "content")]
    files = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    layouts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob(f"content/graphs/*/{LAYOUT}"))]
    return files + sum(int(weights["num_bytes"]) for layout in layouts for weights in layout.values())


def export_engine(model: str, target: Target, output: Path, plan: dict[str, Any], **options: Any) -> Any:
    """Export in this process and return the manifest."""
    from qwen3vl_export.export import export
    from qwen3vl_export.request import ExportRequest

    output.parent.mkdir(parents=True, exist_ok=True)
    mine = plan if target.decode_plan else {}
    return export(ExportRequest(model=model, target=target.name, output=output, **mine, **options)).manifest


def _listed(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]

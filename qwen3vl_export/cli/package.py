"""`qwen3vl package`: an engine as a server of others wants it."""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3vl_export.cli.engines import name_of
from qwen3vl_export.cli.options import AsJson, CheckAll, Engine, Opening, Quiet, Serving, given, grouped
from qwen3vl_export.cli.output import note, print_json


class Server(StrEnum):
    """Servers that an engine can be packaged for."""

    TRITON = "triton"


@dataclass(frozen=True)
class Limits:
    """What requests may ask for.

    Attributes:
        allow_url_host: Host from which images and videos may be fetched by URL; may be repeated. [default: none]
        max_answer_tokens: Most tokens of an answer. [default: what the context leaves]
        max_choices: Most answers to one request. [default: 16]
        max_frames: Most frames of a video that a request may ask for. [default: 768]
        request_timeout: Seconds in which an answer has to be complete. [default: 600]
        drain_timeout: Seconds that requests in progress get when the model is unloaded. [default: 600]
    """

    allow_url_host: Annotated[list[str] | None, typer.Option(metavar="HOST")] = None
    max_answer_tokens: int | None = None
    max_choices: int | None = None
    max_frames: int | None = None
    request_timeout: Annotated[float | None, typer.Option(metavar="S")] = None
    drain_timeout: Annotated[float | None, typer.Option(metavar="S")] = None

    def arguments(self) -> dict[str, Any]:
        """Return what was given as fields of `ServerSettings`.

        Raises:
            UsageError: One is out of range.
        """
        from runtime.server.settings import ServerSettings

        values = given(self)
        for name, field in _FIELDS.items():
            if name in values:
                values[field] = values.pop(name)
        ServerSettings(**values)
        return values


_FIELDS = {
    "allow_url_host": "allowed_url_hosts",
    "request_timeout": "request_timeout_s",
    "drain_timeout": "drain_timeout_s",
}


@grouped
def package(
    engine: Engine,
    *,
    server: Annotated[Server, typer.Option("--for", help="Server that is to run it.")],
    output: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Model repository; made if it is not there, and other models in it stay."),
    ],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model. [default: the checkpoint's]")
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="Give the engine's files a second name (hard link); copy none.")
    ] = False,
    limits: Limits,
    opening: Opening,
    serving: Serving,
    as_json: AsJson = False,
    quiet: Quiet = False,
    check: CheckAll = False,
) -> None:
    """Package an engine for NVIDIA Triton Inference Server, as a model of its Python backend.

    Written are DIR/NAME/config.pbtxt, DIR/NAME/1/model.py and, in DIR/NAME/1/engine, the engine. A model of that name
    is replaced if this command wrote it. Options of the engine become parameters in config.pbtxt; they are checked when
    the server loads the model, since its machine may be another one. docs/triton.md says what requests look like.

    --json prints one object: model, path, server, parameters, weight_bytes, linked.

    \b
    Examples:
      qwen3vl package demo-engine --for triton --output models
      qwen3vl package ENGINE --for triton --output models --name captions --max-sequences 16 --link
    """
    from qwen3vl_export.triton_repository import model_name, write_model
    from runtime.errors import UsageError
    from runtime.manifest import Manifest
    from runtime.urls import check_local

    check_local(engine, "engine")
    manifest = Manifest.read(engine)
    parameters = {**opening.arguments(serving), **limits.arguments()}
    for part in ("vision_engine", "prefill_engine"):
        if part in parameters:
            raise UsageError(
                f"--{part.replace('_', '-')}: a model holds the files of one engine, and not those of another",
                remedy="leave it out, and write a parameter of that name, its place on the server, into config.pbtxt",
            )
    name = model_name(name_of(manifest, engine)) if name is None else name
    path = write_model(output, name, engine, parameters=parameters, link=link, check=check)
    if as_json:
        values = {"model": name, "path": str(path), "server": server.value, "parameters": parameters}
        print_json({**values, "weight_bytes": manifest.weight_bytes, "linked": link})
    elif not quiet:
        note(f"{path}: the model {name}, {manifest.weight_bytes / 1e6:.1f} MB of weights")
        note(f"start it with: tritonserver --model-repository {path.parent}")
